"""Synthetic hospitals: scenes, their images, their reports."""
