"""Collections, judgments, BM25 and measures."""
