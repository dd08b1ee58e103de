"""Rules that the configurations of several scripts share, and the base of a configuration.

A configuration is a dataclass, and `--help` shows the string under each field. Neither this module
nor the configurations import torch or composer, so that a mistake is reported in well under a
second.
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
    """Raise InvalidField unless `value` is a whole number of ba, tok, sp or ep.

    These are batches, tokens, rows and epochs. With `fraction`, a fraction of the run like 0.05dur
    is allowed, too; with `time`, a number of s, min or h; with `zero`, a duration of 0.
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
    """Raise InvalidField for a text, or one in a list, that no file could have as its name.

    Such a text is too long, contains a NUL, or is empty. An empty one usually comes from a shell
    variable that is not set; to leave out an optional key, users write null.
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
    """Return a path with a `~` at its beginning replaced by the home folder.

    Raises InvalidField if the home is not known, and for a variable like $HOME, which only a shell
    fills in, unless there is a file or folder of that very name.
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
    """Raise InvalidField for braces, as in {rank}, which only some parts of Composer fill in."""
    for name in names:
        value = getattr(config, name)
        # The ${...} of a default is filled in when a configuration is loaded.
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
    """Return whether a text can be encoded as UTF-8.

    Two kinds cannot: what Python makes of arguments that are not UTF-8, and half a surrogate pair
    from JSON.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class ScriptConfig:
    """The base of all scripts' configurations, with what is known of one besides its values."""

    # The key of the list that takes leading arguments without `key=`; if set, no YAML file is read.
    positional = ""
    # Whether a script that was stopped continues from there when the same command is run again.
    goes_on = False
    # The keys that hold paths (or URLs, or ids), in which `~` is expanded. Sections have this, too.
    paths: tuple[str, ...] = ()
    # Remedies for unknown keys that are other trainers' names, by that name (other_names.py).
    elsewhere: Mapping[str, str] = MappingProxyType({})
    # The configuration as YAML, without the values of environment variables: safe to log and save.
    resolved_yaml: str = ""
    # Where each key was given, and its value there. All other keys are attributed to `place`.
    origins: Mapping[str, tuple[str, Any]] = MappingProxyType({})
    place: str = "command line"
