"""Errors that users meet, told in one line without secrets."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, quote_plus

GOES_ON = "the same command goes on from what was saved last"


class ConfigError(ValueError):
    """A mistake in what the user asked for. Exit status 2.

    The message is one line with the place, the rule and the remedy.
    """


class DataError(ValueError):
    """Damaged or unusable data met while running. Exit status 1.

    The message is one line that names the file and the remedy.
    """


class TrainingError(RuntimeError):
    """A run that cannot go on as it is. Exit status 1.

    The message is one line with the step, the cause and the remedy.
    """


class StoreError(DataError):
    """An object store that failed, after it was asked as often as is sensible."""


class InvalidField(ConfigError):
    """A field that breaks a rule.

    `name` is its full key, or within `validate()` its name in the dataclass. Whoever loaded the
    configuration adds the value, and where it came from.
    """

    def __init__(self, name: str, rule: str):
        super().__init__(f"{name}: {rule}")
        self.name = name
        self.rule = rule


def one_line(error: BaseException) -> str:
    """Return what an exception of another library says, as part of a line of ours."""
    # Masked before it is cut, for half a secret would not be recognized
    return masked(" ".join(str(error).split())).rstrip(".")[:300] or type(error).__name__


_SECRETS = tuple(
    (re.compile(pattern, re.IGNORECASE), shown)
    for pattern, shown in (
        # In an address: user:password before a host or a bucket. A secret key of AWS may hold
        # slashes. What looks like a port is one, except in stores' addresses, which have none.
        (r"(\b(?:s3|gs|gcs|az|abfss?|oci)://[^/\s:@]*):(?:(?!://)\S)*@", r"\1:***@"),
        (r"(://(?![^/\s:@]*:\d+(?:[/\s?#]|$))[^/\s:@]*):(?:(?!://)\S)*@", r"\1:***@"),
        (r"://[^/\s:@]+@", "://***@"),
        # In the query of an address: what signs it, or identifies a user.
        (
            r"((?:[?&;#]|\\u0026)[\w.~-]*?(?:signature|credential|token|secret|passwo?r?d|pwd|auth"
            r"|(?<![a-z])sig|(?:api|access|secret|account|private)[_-]?key)[\w.~-]{0,40}=)"
            r"[^\s&\"'<>\\;]+?(?=:?(?:[\s&\"'<>\\;]|$))",
            r"\1***",
        ),
        # By its name, before it.
        (
            r"((?:secret|passwo?r?d|api_?key|access_?key|(?:auth|session|access)_?token)\w{0,40}"
            r"(?:=|[\"']:\s?)[\"']?)"
            r"[^\s\"',;&}]+?(?=:?(?:[\s\"',;&}]|$))",
            r"\1***",
        ),
        (r"(\bbearer\s+|\bauthorization[\"']?\s?[:=]\s?[\"']?(?:\w+\s+)?)[\w.~+/=-]{8,}", r"\1***"),
        # By its form: of Hugging Face, AWS, GitHub, OpenAI, Slack and Google, and JSON web tokens.
        (
            r"\b(?:hf_[a-z0-9]{30,}|(?-i:AKIA|ASIA)[A-Z0-9]{16}\b|gh[oprsu]_[a-z0-9]{30,}"
            r"|github_pat_\w{30,}|sk-[\w-]{32,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}"
            r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)",
            "***",
        ),
    )
)

_hidden: dict[str, str] = {}  # from values to what is shown instead


def hide(value: str, name: str) -> None:
    """Have `masked` show `${name}` instead of a value from the environment, however quoted.

    A value of fewer than four letters, or a short number, is not a secret, and would be found in
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


_SURE = 8  # letters; a shorter value is hidden only where it is a word of its own


def _is_number(text: str) -> bool:
    """Return whether a text is a number."""
    return re.fullmatch(r"[+-]?[0-9._]+(e[+-]?[0-9]+)?", text) is not None


@functools.lru_cache(maxsize=4)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that finds any of these values in a text, the longest first."""

    def alone(value: str) -> str:
        word = len(value) < _SURE or _is_number(value)
        return rf"(?<!\w){re.escape(value)}(?!\w)" if word else re.escape(value)

    return re.compile("|".join(map(alone, sorted(values, key=len, reverse=True))))


def masked(text: str) -> str:
    """Return `text` without secrets: hidden values, passwords in addresses, and tokens."""
    if _hidden:
        text = _pattern(tuple(_hidden)).sub(lambda found: _hidden[found[0]], text)
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def without_secrets(value: Any) -> Any:
    """Return a value from a configuration with every text in it `masked`."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: without_secrets(each) for key, each in value.items()}
    return type(value)(map(without_secrets, value)) if type(value) in (list, tuple) else value
