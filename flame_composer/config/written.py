"""What was written: YAML whose texts stay as they are in the file, and which keys take a text
and which a number.
"""

from __future__ import annotations

import contextlib
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flame_composer.config.fields import dataclass_of, hints_of, named_sections
from flame_composer.errors import ConfigError
from flame_composer.upstream.omegaconf import PYTHONS_NONE, load_yaml

# OmegaConf's own limit is 10,000, which some thousand streams reach. Aliases that multiply are
# refused all the same.
MAX_YAML_NODES = 1_000_000
MOST_LEVELS = 100  # of a YAML document
MOST_LETTERS = 1 << 26


@dataclass(frozen=True, slots=True)
class Written:
    """A scalar without quotes: its text, and what YAML takes it for."""

    text: str
    value: Any


def parse_yaml(stream: Any) -> Any:
    """Return the content of a YAML document, with a `Written` for each scalar that YAML takes
    for something but text.
    """
    require_shallow(stream)
    return load_yaml(stream, Written, MAX_YAML_NODES)


def require_shallow(stream: Any) -> None:
    """Raise ValueError for a YAML document of endless depth or size; of a file, as much as this
    reads is left to be read.

    libyaml's loader builds nested lists and mappings one within the other: 100,000 of them end the
    process.
    """
    text = stream if isinstance(stream, str) else stream.read(MOST_LETTERS + 1)
    if len(text) > MOST_LETTERS:
        raise ValueError(f"has more than {MOST_LETTERS:,} characters")
    depth = 0
    with contextlib.suppress(yaml.YAMLError):  # which is told when it is loaded
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            if depth > MOST_LEVELS:
                raise ValueError(f"lists and mappings in one another, more than {MOST_LEVELS} deep")
    if not isinstance(stream, str):
        stream.seek(0)


def as_it_stands(text: str) -> Written:
    """Return a text of the command line, which is null only as the word."""
    return Written(text, None if text == "null" else text)


def plain(value: Any) -> Any:
    """Return a value of `parse_yaml` as YAML takes it."""
    if isinstance(value, Written):
        return value.value
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(each) for each in value)
    return value


def as_meant(hint: Any, value: Any, place: str, key: str = "") -> Any:
    """Return a value of `parse_yaml` for a key of type `hint`: a text as it was written, a number
    as YAML takes it.

    Raises ConfigError, which names `place` and `key`, for what a person has not meant: Python's
    None, and numbers in forms that only YAML 1.1 knows (0123 is 83 to it, 1:30 is 90).
    """
    above = f"{key}." if key else ""
    section, each = dataclass_of(hint), named_sections(hint)
    if isinstance(value, Written):
        return _scalar(hint, value, f"{place}: {key}={value.text}")
    if isinstance(value, str):
        return (
            _with_checked_default(value, f"{place}: {key}={value}") if takes_text(hint) else value
        )
    if isinstance(value, dict) and section is not None:
        hints, content = hints_of(section), {plain(name): inner for name, inner in value.items()}
        return {
            name: (
                as_meant(hints[name], inner, place, f"{above}{name}")
                if name in hints
                else plain(inner)
            )
            for name, inner in content.items()
        }
    if isinstance(value, dict) and each is not None:
        names = {
            name.text if isinstance(name, Written) else name: inner for name, inner in value.items()
        }
        return {
            name: as_meant(each, inner, place, f"{above}{name}") for name, inner in names.items()
        }
    if isinstance(value, dict):
        inner_hint = get_args(hint)[1] if get_origin(hint) is dict else Any
        content = {plain(name): inner for name, inner in value.items()}
        return {
            name: as_meant(inner_hint, inner, place, f"{above}{name}")
            for name, inner in content.items()
        }
    if isinstance(value, list):
        inner_hint = get_args(hint)[0] if get_origin(hint) in (list, tuple) else Any
        return [as_meant(inner_hint, inner, place, key) for inner in value]
    return plain(value)


def quote_it(value: Any, for_text: bool) -> str:
    """Return the remedy where a third party's key takes a text and YAML made something else of
    it; '' for other mistakes.
    """
    return "; quote what is text" if for_text and isinstance(value, bool | int | float) else ""


def takes_text(hint: Any) -> bool:
    """Whether a key of this type takes a text and no number, or a list of such: str, str | None,
    list[str], Literal.
    """
    options = [option for option in get_args(hint) if option is not types.NoneType]
    if get_origin(hint) in (typing.Union, types.UnionType):
        return all(map(takes_text, options))
    if get_origin(hint) is Literal:
        return all(isinstance(option, str) for option in options)
    if get_origin(hint) is list:
        return takes_text(options[0])
    return hint is str


def _scalar(hint: Any, scalar: Written, shown: str) -> Any:
    can_be_null = types.NoneType in get_args(hint) or hint is Any
    for_text = takes_text(hint)
    if scalar.text == PYTHONS_NONE and (for_text or can_be_null):
        instead = "write null for no value" if can_be_null else "must be set"
        raise ConfigError(
            f"{shown}: {instead}; where that word is meant, quote it in a file: 'None'"
        )
    if for_text:
        return _with_checked_default(scalar.text, shown) if scalar.value is not None else None
    if isinstance(scalar.value, int | float) and _misread(scalar):
        raise ConfigError(
            f"{shown}: YAML takes this for {scalar.value}; write the number in plain digits, or"
            f" quote what is text: '{scalar.text}'"
        )
    return scalar.value


def _misread(scalar: Written) -> bool:
    """Whether YAML 1.1 takes a number for another one than a person does: octal by a zero before
    it, or by base sixty.
    """
    digits = scalar.text.replace("_", "")
    return ":" in digits or (
        re.fullmatch("[-+]?[0-9]+", digits) is not None and int(digits) != scalar.value
    )


def _with_checked_default(text: str, shown: str) -> str:
    """Return `text`. Raises ConfigError for `${oc.env:NAME,1.10}`, whose default OmegaConf would
    take for the number 1.1.
    """
    for default in re.findall(r"\$\{oc\.env:[^,{}]*,\s*([^'\"{}\[\],]*?)\s*\}", text):
        try:
            read = OmegaConf.create({"default": f"${{oc.decode:'{default}'}}"})["default"]
        except OmegaConfBaseException:
            continue  # it is read where it is used, and refused there
        if read is not None and str(read) != default:
            raise ConfigError(
                f"{shown}: the default {default} would become {read}; quote it: '{default}'"
            )
    return text
