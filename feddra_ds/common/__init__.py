"""Words, files, errors and consoles that every other package may use. Imports nothing of ours, and no torch."""
