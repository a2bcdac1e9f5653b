"""A run as one HTML page. Reads, never trains."""
