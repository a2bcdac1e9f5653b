"""From elsewhere to shards on disk, and from there to batches. Knows no model and prints nothing."""
