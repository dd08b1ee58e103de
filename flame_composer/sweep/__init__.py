"""Sweeps: runs of several configurations, started, watched, pruned, shared and compared."""
