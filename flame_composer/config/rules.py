"""What the configurations of all scripts share: how a rule is stated, what a mistake is, durations.

A configuration is a dataclass; the string under a field is what `--help` says of it. Neither this
module nor those of the configurations import torch or composer, so that a mistake is answered in
well under a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flame_composer.errors import InvalidField
from flame_composer.storage.files import MAX_NAME_BYTES, MAX_PATH_BYTES


def require(condition: bool, name: str, rule: str) -> None:
    if not condition:
        raise InvalidField(name, rule)


DURATION = re.compile(r"([0-9](?:_?[0-9]){0,17})(ba|tok|sp|ep)")
FRACTION = re.compile(r"(0?\.[0-9]+|0|1|1\.0)dur")
SECONDS = {"s": 1, "min": 60, "h": 3600}
TIME = re.compile(r"([0-9]{1,9})(s|min|h)")
BYTES = re.compile(r"[0-9]+b?|[0-9]+(\.[0-9]+)?[kmgtp]b", re.IGNORECASE)


def require_duration(
    value: str, name: str, *, fraction: bool = False, time: bool = False, zero: bool = False
) -> None:
    """A whole number of ba (batches), tok (tokens), sp (rows) or ep (epochs); with `fraction`,
    also 0.05dur; with `time`, also of s (seconds), min or h.
    """
    units = "ba, tok, sp or ep" + (", or by s, min or h" if time else "")
    allowed = f"a whole number followed by {units}" + (
        ", or a fraction of the run like 0.05dur" if fraction else ""
    )
    match = (
        DURATION.fullmatch(value)
        or (FRACTION.fullmatch(value) if fraction else None)
        or (TIME.fullmatch(value) if time else None)
    )
    require(bool(match), name, f"must be {allowed}, e.g. 1000ba")
    assert match is not None
    require(zero or float(match[1]) > 0, name, "must be more than 0")


def require_text(config: object, *names: str) -> None:
    """Require paths and names, or lists of them, to be such as a file can have: neither empty (a
    variable of the shell that was not set; what may be left out is null), nor too long, nor with
    a NUL in them.
    """
    for name in names:
        value = getattr(config, name)
        for text in value if isinstance(value, list) else [value] if value is not None else []:
            require(text != "", name, "must not be empty")
            require("\0" not in text, name, "must not hold a NUL character; write it without")
            longest = max(len(part.encode()) for part in text.split("/"))
            fits = "://" in text or (
                longest <= MAX_NAME_BYTES and len(text.encode()) <= MAX_PATH_BYTES
            )
            require(
                fits,
                name,
                f"must be shorter: {MAX_NAME_BYTES} bytes between slashes, and "
                f"{MAX_PATH_BYTES:,} in all",
            )


def expand_path(path: str, name: str) -> str:
    """Return a path with a `~` at its beginning replaced by the home folder it stands for.

    Raises InvalidField for a home that is not known, and for a variable like $HOME, which only a
    shell would fill in; unless something has that very name, so that it can be used.
    """
    expanded = path if "://" in path else os.path.expanduser(path)
    require(
        not expanded.startswith("~"),
        name,
        f"nobody's home is known here as {path.partition('/')[0]}; write the folder "
        "out, or ./~... for a name that begins so",
    )
    variable = re.search(r"\$([A-Za-z_]\w*)", expanded)
    if variable is not None and not os.path.exists(expanded):
        raise InvalidField(
            name,
            f"{variable[0]} is not filled in here; write ${{oc.env:{variable[1]}}} for what it is"
            " set to",
        )
    return expanded


def require_no_braces(config: object, *names: str) -> None:
    """Composer fills in what is in braces, {rank} and {run_name}: in some places of a run, and
    not in others.
    """
    for name in names:
        value = getattr(config, name)
        # Whose ${...} is filled in where a configuration is loaded
        is_default = value == getattr(type(config), name)
        require(
            is_default or not set(value or "") & set("{}"),
            name,
            "must hold no braces, which Composer would fill in; write ${run_name} for the name of"
            " the run",
        )


def require_seed(value: int | None, name: str) -> None:
    require(value is None or 0 <= value < 2**32, name, "must be in [0, 2**32)")


def require_png(file: str | None, name: str) -> None:
    is_png = file is None or file.lower().endswith(".png")
    require(is_png, name, "must be a file name ending in .png")


def is_text(value: str) -> bool:
    """Not so what Python makes of bytes that are no UTF-8, nor half a pair of surrogates out of
    JSON.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# What nobody is to see


class ScriptConfig:
    """Base of the dataclasses a script is run with, and what `load.load` knows about one
    beyond its values.
    """

    # The list that leading arguments without a key fill, in place of a YAML file.
    positional = ""
    # Whether a script that was stopped goes on where it was when the same command is given again.
    goes_on = False
    # The keys that hold paths (or URLs, or ids), also of sections: `~` is expanded in these.
    paths: tuple[str, ...] = ()
    # By the names that others give its keys, what is said to those who use them (other_names.py).
    elsewhere: Mapping[str, str] = MappingProxyType({})
    # As YAML, with interpolations resolved but those of the environment: safe to log and save.
    resolved_yaml: str = ""
    # Where each key that was given was given, and its value there; where to look for one that was
    # not.
    origins: Mapping[str, tuple[str, Any]] = MappingProxyType({})
    place: str = "command line"
