"""Benchmarks: where their files are and how to read them."""
