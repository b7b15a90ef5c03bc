"""What several mining commands share: resumable jobs, the corpus by row number, texts that count as the same."""
