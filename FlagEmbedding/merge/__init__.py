"""Averaging the weights of checkpoints: a base and what was trained from it, or several trainings."""
