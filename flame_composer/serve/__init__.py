"""A server: many requests share one model, over HTTP."""
