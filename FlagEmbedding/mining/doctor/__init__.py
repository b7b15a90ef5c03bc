"""A report on training files: repeats, false negatives, margins, lengths."""
