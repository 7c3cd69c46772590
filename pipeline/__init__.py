"""Online: from shards to batches of augmented views."""
