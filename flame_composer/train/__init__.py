"""A training run: what is put together, what watches it, what it logs, how it ends and goes on."""
