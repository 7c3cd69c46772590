"""Bytes of samples, from local shards or through a cache."""
