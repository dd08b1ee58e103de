"""Errors that users meet, told in one line without secrets."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, quote_plus

GOES_ON = "the same command goes on from what was saved last"
IN_USE = "another process is training this run"


class ConfigError(ValueError):
    """The error for a mistake in what the user asked for; exit status 2.

    The message is one line with the place, the rule and the remedy.
    """


class DataError(ValueError):
    """The error for damaged or unusable data met while running; exit status 1.

    The message is one line that names the file and the remedy.
    """


class TrainingError(RuntimeError):
    """The error for a run that cannot continue as it is; exit status 1.

    The message is one line with the step, the cause and the remedy.
    """


class StoreError(DataError):
    """The error for an object store that still failed after several attempts."""


class InvalidField(ConfigError):
    """The error for a field of a configuration that breaks a rule.

    `name` is the field's full key, or within `validate()` its name in the dataclass. `config.load`
    adds the value to the message, and where the value was given.
    """

    def __init__(self, name: str, rule: str):
        super().__init__(f"{name}: {rule}")
        self.name = name
        self.rule = rule


def one_line(error: BaseException) -> str:
    """Return the message of another library's exception, fit to be part of one of our lines.

    It is on one line, without secrets, and has at most 300 characters.
    """
    # Mask before cutting: half of a secret would not be recognized.
    return masked(" ".join(str(error).split())).rstrip(".")[:300] or type(error).__name__


_SECRETS = tuple(
    (re.compile(pattern, re.IGNORECASE), shown)
    for pattern, shown in (
        # user:password before a host or a bucket in an address. A secret key of AWS may contain
        # slashes. HOST:123 is taken for a host and port, except in stores' addresses, where there
        # are no ports.
        (r"(\b(?:s3|gs|gcs|az|abfss?|oci)://[^/\s:@]*):(?:(?!://)\S)*@", r"\1:***@"),
        (r"(://(?![^/\s:@]*:\d+(?:[/\s?#]|$))[^/\s:@]*):(?:(?!://)\S)*@", r"\1:***@"),
        (r"://[^/\s:@]+@", "://***@"),
        # Signatures and credentials in the query of an address.
        (
            r"((?:[?&;#]|\\u0026)[\w.~-]*?(?:signature|credential|token|secret|passwo?r?d|pwd|auth"
            r"|(?<![a-z])sig|(?:api|access|secret|account|private)[_-]?key)[\w.~-]{0,40}=)"
            r"[^\s&\"'<>\\;]+?(?=:?(?:[\s&\"'<>\\;]|$))",
            r"\1***",
        ),
        # Values after a telling name, such as password=...
        (
            r"((?:secret|passwo?r?d|api_?key|access_?key|(?:auth|session|access)_?token)\w{0,40}"
            r"(?:=|[\"']:\s?)[\"']?)"
            r"[^\s\"',;&}]+?(?=:?(?:[\s\"',;&}]|$))",
            r"\1***",
        ),
        (r"(\bbearer\s+|\bauthorization[\"']?\s?[:=]\s?[\"']?(?:\w+\s+)?)[\w.~+/=-]{8,}", r"\1***"),
        # Tokens known by their form: of Hugging Face, AWS, GitHub, OpenAI, Slack and Google, and
        # JSON web tokens.
        (
            r"\b(?:hf_[a-z0-9]{30,}|(?-i:AKIA|ASIA)[A-Z0-9]{16}\b|gh[oprsu]_[a-z0-9]{30,}"
            r"|github_pat_\w{30,}|sk-[\w-]{32,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}"
            r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)",
            "***",
        ),
    )
)

_hidden: dict[str, str] = {}  # from a secret value to what is shown in its place


def hide(value: str, name: str) -> None:
    """Make `masked` show `${name}` in place of an environment variable's value, however quoted.

    Values of fewer than four characters, and short numbers, are not hidden: they are no secrets,
    and would be found in other words.
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


_SURE = 8  # characters; a shorter value is hidden only where it is a whole word


def _is_number(text: str) -> bool:
    """Return whether a text is a number."""
    return re.fullmatch(r"[+-]?[0-9._]+(e[+-]?[0-9]+)?", text) is not None


@functools.lru_cache(maxsize=4)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that finds any of these values in a text, preferring longer ones."""

    def alone(value: str) -> str:
        word = len(value) < _SURE or _is_number(value)
        return rf"(?<!\w){re.escape(value)}(?!\w)" if word else re.escape(value)

    return re.compile("|".join(map(alone, sorted(values, key=len, reverse=True))))


def masked(text: str) -> str:
    """Return `text` with secrets replaced: values passed to `hide`, passwords and tokens."""
    if _hidden:
        text = _pattern(tuple(_hidden)).sub(lambda found: _hidden[found[0]], text)
    return without_credentials(text)


def without_credentials(text: str) -> str:
    """Return `text` with passwords and tokens replaced, which are known by their form or place."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def without_secrets(value: Any) -> Any:
    """Return a value from a configuration with `masked` applied to every text in it."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: without_secrets(each) for key, each in value.items()}
    return type(value)(map(without_secrets, value)) if type(value) in (list, tuple) else value
