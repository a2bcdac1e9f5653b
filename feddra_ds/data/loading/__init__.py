"""From disk to a batch: order, decoding, workers, a client's data."""
