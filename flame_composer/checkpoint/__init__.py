"""Checkpoints: saved whole, found, read, and turned into models."""
