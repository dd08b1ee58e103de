"""A training run: how it is assembled, watched, logged, stopped and resumed."""
