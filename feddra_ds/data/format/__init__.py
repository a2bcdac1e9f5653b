"""What lies on disk: shards, their index, reading and writing them."""
