"""Offline: Hugging Face images into verified, per-rank WebDataset shards."""
