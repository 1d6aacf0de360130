"""What a student gains and what it costs: nDCG@10 beside tokens per second. Light to import."""
