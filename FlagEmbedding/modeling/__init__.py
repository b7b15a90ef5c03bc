"""The encoder: tokens without padding, experts, loading and saving checkpoints, heads, pooling, the two engines."""
