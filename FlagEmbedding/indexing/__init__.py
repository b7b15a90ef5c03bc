"""From a corpus and an encoder to an index folder: for step 0, for mining, and for negatives refreshed in training."""
