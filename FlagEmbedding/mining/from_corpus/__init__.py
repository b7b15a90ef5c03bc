"""From bare documents to a training folder and an eval folder: queries by a model, checked, with hard negatives."""
