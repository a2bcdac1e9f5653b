"""Puts the pieces of a run together, loops over its rounds, leaves a folder."""
