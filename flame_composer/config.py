"""What the configurations of all scripts share: how a rule is stated, what a mistake is, durations.

A configuration is a dataclass; the string under a field is what `--help` says of it. Neither this module nor those of the
configurations import torch or composer, so that a mistake is answered in well under a second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

GOES_ON = "the same command goes on from what was saved last"


class ConfigError(ValueError):
    """A mistake in what the user asked for: one line with the place, the rule and the remedy. Exit status 2."""


class DataError(ValueError):
    """Damaged or unusable data met while running: one line naming the file and the remedy. Exit status 1."""


class TrainingError(RuntimeError):
    """A run that cannot go on as it is: one line with the step, the cause and the remedy. Exit status 1."""


class StoreError(DataError):
    """An object store that failed, after it was asked as often as is sensible."""


class InvalidField(ConfigError):
    """A field that breaks a rule: its full key (in `validate()` the name within the dataclass) and the rule.

    Whoever loaded the configuration adds where the value came from, and the value.
    """

    def __init__(self, name: str, rule: str):
        super().__init__(f"{name}: {rule}")
        self.name = name
        self.rule = rule


def require(condition: bool, name: str, rule: str) -> None:
    if not condition:
        raise InvalidField(name, rule)


DURATION = re.compile(r"([0-9](?:_?[0-9]){0,17})(ba|tok|sp|ep)")
FRACTION = re.compile(r"(0?\.[0-9]+|0|1|1\.0)dur")
SECONDS = {"s": 1, "min": 60, "h": 3600}
TIME = re.compile(r"([0-9]{1,9})(s|min|h)")
BYTES = re.compile(r"[0-9]+b?|[0-9]+(\.[0-9]+)?[kmgtp]b", re.IGNORECASE)


def require_duration(value: str, name: str, *, fraction: bool = False, time: bool = False, zero: bool = False) -> None:
    """A whole number of ba (batches), tok (tokens), sp (rows) or ep (epochs); with `fraction`, also 0.05dur; with `time`,
    also of s (seconds), min or h."""
    units = "ba, tok, sp or ep" + (", or by s, min or h" if time else "")
    allowed = f"a whole number followed by {units}" + (", or a fraction of the run like 0.05dur" if fraction else "")
    match = (DURATION.fullmatch(value) or (FRACTION.fullmatch(value) if fraction else None)
             or (TIME.fullmatch(value) if time else None))
    require(bool(match), name, f"must be {allowed}, e.g. 1000ba")
    assert match is not None
    require(zero or float(match[1]) > 0, name, "must be more than 0")


def require_text(config: object, *names: str) -> None:
    """An empty path or name is a variable of the shell that was not set; what may be left out is null."""
    for name in names:
        require(getattr(config, name) != "", name, "must not be empty")


def require_seed(value: int | None, name: str) -> None:
    require(value is None or 0 <= value < 2**32, name, "must be in [0, 2**32)")


def is_text(value: str) -> bool:
    """Not so what Python makes of bytes that are no UTF-8, nor half a pair of surrogates out of JSON."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(error: Exception) -> str:
    """What others' exceptions say, as part of a line of ours."""
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__


class ScriptConfig:
    """Base of the dataclasses a script is run with, and what `loading.load` knows about one beyond its values."""

    # The list that leading arguments without a key fill, in place of a YAML file.
    positional = ""
    # Whether a script that was stopped goes on where it was when the same command is given again.
    goes_on = False
    # By the names that others give its keys, what is said to those who use them (other_names.py).
    elsewhere: Mapping[str, str] = MappingProxyType({})
    # As YAML, with interpolations resolved but those of the environment: safe to log and save.
    resolved_yaml: str = ""
    # Where each key that was given was given, and its value there; where to look for one that was not.
    origins: Mapping[str, tuple[str, Any]] = MappingProxyType({})
    place: str = "command line"
