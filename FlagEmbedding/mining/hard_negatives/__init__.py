"""Hard negatives (ANCE): embed, search, filter, choose; also between the epochs of a training run."""
