"""Using a checkpoint: one encoder for queries and passages, under upstream's public classes."""
