"""What makes training data out of any corpus: hard negatives, the queries they answer, checks, conversions."""
