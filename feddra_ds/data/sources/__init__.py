"""From elsewhere to disk: tables, splits, partitions."""
