"""Imported once by the process that the tests' scripts are forked from: fla takes seconds."""

from flame_composer import cpu

cpu.enable()
