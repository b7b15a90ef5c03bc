"""Grids of experiments over the public commands: rows × seeds × collections, resumable, with tests over both."""
