"""Error messages about refused values: one line each, with the place, and without secrets."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from flame_composer.config.fields import (
    ANY_NAME,
    SECTIONS,
    annotation_of,
    choices_of,
    fields_of,
    nearest,
    show,
)
from flame_composer.config.rules import ScriptConfig
from flame_composer.errors import InvalidField

MOST_SHOWN = 200  # characters of a value in an error


def told_of(error: Exception) -> str:
    return " ".join(str(error).split())


def reason_of(cls: type, key: str, error: Exception | None, value: Any = None) -> str:
    """Return the rule that a value of the wrong type breaks; a choice most like `value` is named.

    `value` is left out where it must not be told.
    """
    annotation = annotation_of(cls, key)
    if annotation == SECTIONS:
        below = [name for name, _, _, _ in fields_of(cls) if name.startswith(f"{key}.{ANY_NAME}.")]
        return f"must hold {SECTIONS}; their keys are {', '.join(below)}"
    if annotation == "section":
        return f"must hold keys and values; its keys are {', '.join(_section_keys(cls, key))}"
    if annotation:
        close = nearest(value, choices_of(cls, key)) if isinstance(value, str) else ""
        return f"must be {annotation.replace(' | None', ', or null')}{close}"
    return "is of the wrong type" if error is None else first_line(error)


def _section_keys(cls: type, key: str) -> list[str]:
    prefix = f"{key}."
    return [
        name
        for name, _, _, _ in fields_of(cls)
        if name.startswith(prefix) and "." not in name[len(prefix) :]
    ]


def explain(config: ScriptConfig, problem: InvalidField) -> str:
    """Return a line with the place of a value, its key, the value, and the rule that it breaks."""
    parts = problem.name.split(".")
    # A key that was not given has the place of its section.
    above = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    origin, value = next(
        (config.origins[key] for key in above if key in config.origins), (config.place, None)
    )
    if problem.name not in config.origins:
        value = config
        for part in problem.name.split("."):
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    value = None if dataclasses.is_dataclass(value) else value
    shown = "" if value is None else f"={_short(masked(show(value), config.origins))}"
    return masked(f"{origin}: {problem.name}{shown}: {problem.rule}", config.origins)


def masked(text: str, origins: Mapping[str, tuple[str, Any]]) -> str:
    """Return `text` with the names of environment variables in place of their values."""
    for name in re.findall(r"oc\.env:([^,}$]+)", str(origins)):
        value = os.environ.get(name, "")
        # Values of up to three characters are not secrets, and would be found within other words.
        text = text.replace(value, f"${{{name}}}") if len(value) > 3 else text
    return text


def _short(shown: str) -> str:
    return shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
