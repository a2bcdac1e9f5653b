"""Whether a machine and a config can run a training. Reads, never trains."""
