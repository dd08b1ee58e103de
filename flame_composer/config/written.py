"""Values of a YAML file or command line, kept as written where a key takes text.

YAML would turn an unquoted 1.10 into the number 1.1, and no into false.
"""

from __future__ import annotations

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

# OmegaConf's own limit is 10,000, which about a thousand streams would reach. This one still
# refuses aliases that multiply endlessly.
MAX_YAML_NODES = 1_000_000
MOST_LEVELS = 100  # of a YAML document
MOST_LETTERS = 1 << 26
# What PyYAML raises for `!!bool maybe`, `!!timestamp x` and `!!int ""`.
BAD_TAGS = (KeyError, AttributeError, IndexError, TypeError)


@dataclass(frozen=True, slots=True)
class Written:
    """An unquoted scalar: its text, and the value that YAML reads it as."""

    text: str
    value: Any


def parse_yaml(stream: Any) -> Any:
    """Return the content of a YAML document, with a `Written` for each scalar that is not text.

    Raise yaml.YAMLError for what is not YAML, and ValueError for a tag that does not fit its value.
    """
    require_shallow(stream)
    try:
        return load_yaml(stream, Written, MAX_YAML_NODES)
    except BAD_TAGS as error:
        told = " ".join(str(error).split())
        raise ValueError(f"a tag does not fit its value ({told})") from None


def require_shallow(stream: Any) -> None:
    """Raise ValueError for a YAML document that is nested too deeply or too large.

    Afterwards a file is again at its beginning. libyaml's loader is recursive: 100,000 nested lists
    or mappings would crash the process.
    """
    text = stream if isinstance(stream, str) else stream.read(MOST_LETTERS + 1)
    if len(text) > MOST_LETTERS:
        raise ValueError(f"has more than {MOST_LETTERS:,} characters")
    depth = most = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            most = max(most, depth)
            if most > MOST_LEVELS:
                break
    except yaml.YAMLError as error:  # other errors are reported when the document is loaded
        # Newer builds of libyaml have a limit of their own, and meet it ahead of these events.
        most = MOST_LEVELS + 1 if "maximum nesting depth" in str(error) else most
    if most > MOST_LEVELS:
        raise ValueError(f"lists and mappings in one another, more than {MOST_LEVELS} deep")
    if not isinstance(stream, str):
        stream.seek(0)


def as_it_stands(text: str) -> Written:
    """Return a text of the command line as written, except for the word null."""
    return Written(text, None if text == "null" else text)


def plain(value: Any) -> Any:
    """Return a value of `parse_yaml` with each `Written` in it replaced by YAML's value."""
    if isinstance(value, Written):
        return value.value
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(each) for each in value)
    return value


def as_meant(hint: Any, value: Any, place: str, key: str = "") -> Any:
    """Return a value of `parse_yaml` for a key of type `hint`: a text as written, or YAML's value.

    Raises ConfigError, which names `place` and `key`, for values that are not what was meant:
    Python's None, and numbers that YAML 1.1 reads in its own way (0123 as 83, 1:30 as 90).
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
    """Return the remedy for a text key that YAML read as a number or a bool, or '' otherwise.

    The key is one of a third party's, whose type `as_meant` does not know.
    """
    return "; quote what is text" if for_text and isinstance(value, bool | int | float) else ""


def takes_text(hint: Any) -> bool:
    """Return whether a key of this type takes only a text or a list of texts.

    Such types are str, str | None, list[str] and Literal of texts.
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
    """Return whether YAML 1.1 reads a number in octal (0123) or in base sixty (1:30)."""
    digits = scalar.text.replace("_", "")
    return ":" in digits or (
        re.fullmatch("[-+]?[0-9]+", digits) is not None and int(digits) != scalar.value
    )


def _with_checked_default(text: str, shown: str) -> str:
    """Return `text`, or raise ConfigError if OmegaConf would change a default in it.

    OmegaConf would read the default in `${oc.env:NAME,1.10}` as the number 1.1.
    """
    for default in re.findall(r"\$\{oc\.env:[^,{}]*,\s*([^'\"{}\[\],]*?)\s*\}", text):
        try:
            read = OmegaConf.create({"default": f"${{oc.decode:'{default}'}}"})["default"]
        except OmegaConfBaseException:
            continue  # refused where it is used
        if read is not None and str(read) != default:
            raise ConfigError(
                f"{shown}: the default {default} would become {read}; quote it: '{default}'"
            )
    return text
