"""One file per command: parse, call, print. Imported by cli alone."""
