"""Training rows to batches of tokens."""
