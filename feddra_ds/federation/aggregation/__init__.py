"""The server's average as sharded sums over peers."""
