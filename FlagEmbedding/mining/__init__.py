"""From any corpus to a training file: mine negatives, ask for their queries, check, convert (``python -m FlagEmbedding.mining``)."""
