"""Bi-encoder fine-tuning: arguments, data, model, trainer and the runner behind ``run.py``."""
