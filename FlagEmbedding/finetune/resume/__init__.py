"""Checkpoints, and going on from one as the same run."""
