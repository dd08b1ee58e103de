"""What the configurations of all scripts share: how a rule is stated, what a mistake is, durations.

A configuration is a dataclass; the string under a field is what `--help` says of it. Neither this
module nor those of the configurations import torch or composer, so that a mistake is answered in
well under a second.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, quote_plus

GOES_ON = "the same command goes on from what was saved last"


class ConfigError(ValueError):
    """A mistake in what the user asked for: one line with the place, the rule and the remedy.
    Exit status 2.
    """


class DataError(ValueError):
    """Damaged or unusable data met while running: one line naming the file and the remedy. Exit
    status 1.
    """


class TrainingError(RuntimeError):
    """A run that cannot go on as it is: one line with the step, the cause and the remedy. Exit
    status 1.
    """


class StoreError(DataError):
    """An object store that failed, after it was asked as often as is sensible."""


class InvalidField(ConfigError):
    """A field that breaks a rule: its full key (in `validate()` the name within the dataclass) and
    the rule.

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
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # of a file, on Linux
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


def is_text(value: str) -> bool:
    """Not so what Python makes of bytes that are no UTF-8, nor half a pair of surrogates out of
    JSON.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(error: BaseException) -> str:
    """What others' exceptions say, as part of a line of ours."""
    # Masked before it is cut, for half a secret would not be known again.
    return masked(" ".join(str(error).split())).rstrip(".")[:300] or type(error).__name__


# What nobody is to see

_SECRETS = tuple(
    (re.compile(pattern, re.IGNORECASE), shown)
    for pattern, shown in (
        # In an address: user:password before a host or a bucket. A secret key of AWS may hold
        # slashes. What looks like a port is one, but for stores whose addresses have none.
        (r"(\b(?:s3|gs|gcs|az|abfss?|oci)://[^/\s:@]*):(?:(?!://)\S)*@", r"\1:***@"),
        (r"(://(?![^/\s:@]*:\d+(?:[/\s?#]|$))[^/\s:@]*):(?:(?!://)\S)*@", r"\1:***@"),
        (r"://[^/\s:@]+@", "://***@"),
        # In the query of one: what signs it, or stands for a user.
        (
            r"((?:[?&;#]|\\u0026)[\w.~-]*?(?:signature|credential|token|secret|passwo?r?d|pwd|auth"
            r"|(?<![a-z])sig|(?:api|access|secret|account|private)[_-]?key)[\w.~-]{0,40}=)"
            r"[^\s&\"'<>\\;]+?(?=:?(?:[\s&\"'<>\\;]|$))",
            r"\1***",
        ),
        # Where it has a name.
        (
            r"((?:secret|passwo?r?d|api_?key|access_?key|(?:auth|session|access)_?token)\w{0,40}"
            r"(?:=|[\"']:\s?)[\"']?)"
            r"[^\s\"',;&}]+?(?=:?(?:[\s\"',;&}]|$))",
            r"\1***",
        ),
        (r"(\bbearer\s+|\bauthorization[\"']?\s?[:=]\s?[\"']?(?:\w+\s+)?)[\w.~+/=-]{8,}", r"\1***"),
        # By its looks: of Hugging Face, AWS, GitHub, OpenAI, Slack and Google, and JSON web tokens.
        (
            r"\b(?:hf_[a-z0-9]{30,}|(?-i:AKIA|ASIA)[A-Z0-9]{16}\b|gh[oprsu]_[a-z0-9]{30,}"
            r"|github_pat_\w{30,}|sk-[\w-]{32,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)",
            "***",
        ),
    )
)
_hidden: dict[str, str] = {}  # values, and what is shown in their place


def hide(value: str, name: str) -> None:
    """Have `masked` show `${name}` in place of a value out of the environment, however it is
    quoted.

    What has fewer than four letters, or is a short number, is no secret, and would be found in
    other words.
    """
    lines = [
        value,
        " ".join(value.split()),
        *(line for line in value.splitlines() if len(line) >= _SURE),
    ]
    for each in (line for line in lines if len(line) >= (_SURE if _is_number(line) else 4)):
        quoted = (
            json.dumps(each)[1:-1],
            repr(each)[1:-1],
            quote(each),
            quote(each, ""),
            quote_plus(each),
        )
        for form in (each, *quoted):
            _hidden.setdefault(form, f"${{{name}}}")


_SURE = 8  # letters: what is shorter is taken for a secret only where it is a word of its own


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9._]+(e[+-]?[0-9]+)?", text) is not None


@functools.lru_cache(maxsize=4)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    def alone(value: str) -> str:
        word = len(value) < _SURE or _is_number(value)
        return rf"(?<!\w){re.escape(value)}(?!\w)" if word else re.escape(value)

    return re.compile("|".join(map(alone, sorted(values, key=len, reverse=True))))


def masked(text: str) -> str:
    """Return `text` without what signs a person in: what was hidden, passwords in addresses, and
    tokens.
    """
    if _hidden:
        text = _pattern(tuple(_hidden)).sub(lambda found: _hidden[found[0]], text)
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def without_secrets(value: Any) -> Any:
    """Return a value out of a configuration with every text in it `masked`."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: without_secrets(each) for key, each in value.items()}
    return type(value)(map(without_secrets, value)) if type(value) in (list, tuple) else value


class ScriptConfig:
    """Base of the dataclasses a script is run with, and what `loading.load` knows about one
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
