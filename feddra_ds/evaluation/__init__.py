"""Trained models at work: retrieval, zero-shot, probes. No engine, no ranks."""
