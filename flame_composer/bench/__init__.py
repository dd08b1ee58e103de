"""What recipes/benchmark.py measures, each against another way of doing it."""
