"""What makes training data: hard negatives, the queries they answer, rows split by length; a loop through files."""
