"""Data: the shard contract, its readers and writers, and the commands that make datasets."""
