"""What a run says of itself: at its start, at its end, and in its report."""
