"""Queries for negatives (``neg_q``): reuse real ones, ask a language model, check, report."""
