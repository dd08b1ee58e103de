"""What a run comes to before anyone pays for it."""
