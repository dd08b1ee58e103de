"""The size, time and cost of a run, worked out before anyone pays for it."""
