"""The steps from a checkpoint to a table: encode, search, measure, compare, report."""
