"""Online: shards into batches of augmented views; a batch is a pure function of (shards, config, seed, step)."""
