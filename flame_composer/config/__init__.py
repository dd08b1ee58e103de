"""Configurations of all scripts, and the way from a command line to one that is checked."""
