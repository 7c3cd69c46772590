"""Losses as pure functions of embeddings, grouped by idea. They know nothing of devices or ranks."""
