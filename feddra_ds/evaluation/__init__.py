"""Trained models at work: retrieval, zero-shot, probes, export. No engine, no ranks."""
