"""Losses as pure functions of embeddings, scores and router logits; each with its formula, shapes and source."""
