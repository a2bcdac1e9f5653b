"""Fragments and folders: writing, choosing, loading checkpoints. Knows no server."""
