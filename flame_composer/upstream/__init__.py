"""Patches of third parties' private parts, each with its version and what it mends."""
