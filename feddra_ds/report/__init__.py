"""A run as one HTML page, and where it stands. Reads, never trains."""
