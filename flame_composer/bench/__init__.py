"""The measurements of recipes/benchmark.py, each against another way of doing the same."""
