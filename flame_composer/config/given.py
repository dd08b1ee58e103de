"""The content of a command line, a YAML file and arguments, as values by key and place."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flame_composer.config.fields import dataclass_of, hint_of, hints_of, named_sections
from flame_composer.config.messages import first_line, told_of
from flame_composer.config.rules import is_text
from flame_composer.config.written import (
    as_it_stands,
    parse_yaml,
    plain,
    require_shallow,
    takes_text,
)
from flame_composer.errors import ConfigError


class Given(NamedTuple):
    """A value that was given, with its full key and the place where it was given."""

    origin: str
    key: str
    value: Any


def layers_of(given: Sequence[Given]) -> list[dict[Any, Any]]:
    """Return all given values as a list of nested dicts, to be merged one after another.

    A value that replaces an earlier one, or lies within it, is in a later dict than that one.
    """
    layers: list[dict[Any, Any]] = []
    within: dict[tuple[Any, ...], int] = {}  # the last layer with a value at or within a place
    at: dict[tuple[Any, ...], int] = {}  # the last layer with a value at exactly that place
    for _, key, value in given:
        for place, each in _places((*key.split("."),), value):
            above = [place[:length] for length in range(1, len(place) + 1)]
            number = max(within.get(place, -1), *(at.get(part, -1) for part in above)) + 1
            if number == len(layers):
                layers.append({})
            section = layers[number]
            for part in place[:-1]:
                section = section.setdefault(part, {})
            section[place[-1]] = each
            at[place] = number
            within.update({part: max(number, within.get(part, -1)) for part in above})
    return layers


def _places(place: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the place and the value of each leaf of the nested dicts at `place`.

    Anything but a dict, and an empty dict, is a leaf.
    """
    if not isinstance(value, dict) or not value:
        yield place, value
        return
    for name, each in value.items():
        yield from _places((*place, name), each)


def split_arguments(argv: list[str]) -> tuple[str | None, list[str]]:
    for argument in argv:
        if not is_text(argument):
            raise ConfigError(f"command line: {argument!a}: must be UTF-8")
    if argv and argv[0].startswith("-"):
        raise ConfigError(
            f"command line: {argv[0]}: unknown option; arguments are [file.yaml] [key=value ...],"
            " see --help"
        )
    file = argv[0] if argv and "=" not in argv[0] else None
    overrides = argv[1:] if file else argv
    for argument in overrides:
        if "=" not in argument:
            shown = argument or repr(argument)
            raise ConfigError(
                f"command line: {shown}: must be key=value (only the first argument can be a file)"
            )
    return file, overrides


def read_yaml(file: str) -> dict[Any, Any]:
    if os.path.isdir(file):
        raise ConfigError(f"{file}: is a folder; name a YAML file")
    if not os.path.isfile(file):
        folder = Path(file).parent
        beside = sorted(str(path) for path in folder.glob("*.yaml")) if folder.is_dir() else []
        close = difflib.get_close_matches(file, beside, n=1)
        raise ConfigError(f"{file}: no such file{f'; did you mean {close[0]}?' if close else ''}")
    try:
        with Path(os.path.abspath(file)).open(encoding="utf-8") as stream:
            written = parse_yaml(stream)
        content = {written: None} if isinstance(written, str) else written
        content = {} if plain(content) is None else content
        if isinstance(content, dict):
            OmegaConf.create(plain(content))  # refuses malformed interpolations
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        reason = told_of(error).replace(f'in "{os.path.abspath(file)}", ', "at ")
        raise ConfigError(f"{file}: not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold keys and values (a YAML mapping)")
    return content


def read_override(cls: type, argument: str) -> dict[Any, Any]:
    key, _, text = argument.partition("=")
    hint = hint_of(cls, key)
    is_list = get_origin(hint) is list and text.startswith("[") and text.endswith("]")
    is_quoted_list = is_list and bool(set(text) & set("\"'"))
    is_any_text = takes_text(hint) and (hint is str or str in get_args(hint))
    # Such text is not parsed: to YAML "def f(x):" is a mapping, and *.jsonl an alias.
    stands = is_any_text and not is_quoted_list
    try:
        if stands:
            parts = _split_list(text[1:-1]) if is_list else [text]
            OmegaConf.create(_nested(key, parts))
            return _nested(key, list(map(as_it_stands, parts)) if is_list else as_it_stands(text))
        require_shallow(text)
        if "\\" in key:  # an escape to OmegaConf, which none of our keys needs
            unknown = OmegaConf.to_container(OmegaConf.from_dotlist([argument]), resolve=False)
            assert isinstance(unknown, dict)
            return unknown
        value = parse_yaml(text)
        nested = OmegaConf.from_dotlist([f"{key}=0"])  # understands '[0]' in a key
        content = _with_leaf(OmegaConf.to_container(nested), value)
        OmegaConf.create(plain(content))
        return content
    # An argument such as '[=1' raises IndexError.
    except (
        yaml.YAMLError,
        OmegaConfBaseException,
        ValueError,
        RecursionError,
        IndexError,
    ) as error:
        reason = first_line(error) if isinstance(error, OmegaConfBaseException) else told_of(error)
        raise ConfigError(f"command line: {argument}: cannot be read: {reason}") from None


def _with_leaf(nested: Any, leaf: Any) -> Any:
    """Return nested dicts of one key each, with the innermost value replaced by `leaf`."""
    return (
        {key: _with_leaf(inner, leaf) for key, inner in nested.items()}
        if isinstance(nested, dict)
        else leaf
    )


def leaves(cls: type, content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full key and the value of each leaf of `content`.

    A single value for a key that takes a list is yielded as a list of one.
    """
    hints = hints_of(cls)
    for key, value in content.items():
        hint, full = hints[key], f"{prefix}{key}"
        section, each = dataclass_of(hint), named_sections(hint)
        has_keys = isinstance(value, dict) and len(value) > 0
        if section is not None and has_keys:
            yield from leaves(section, value, f"{full}.")
        elif each is not None and has_keys:
            for name, content_of_name in value.items():
                yield from leaves(each, content_of_name, f"{full}.{name}.")
        else:
            yield full, _as_list(hint, value)


def _as_list(hint: Any, value: Any) -> Any:
    if isinstance(value, str) and "${" not in value and get_origin(hint) in (list, tuple):
        return _split_list(value)
    return [value] if type(value) is int and get_origin(hint) is list else value


def inner_values(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all values within `value`, a dict with a third party's keys, by full key."""
    for name, each in value.items() if isinstance(value, dict) else ():
        yield f"{key}.{name}", each
        yield from inner_values(f"{key}.{name}", each)


def _split_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _nested(key: str, value: Any) -> dict[Any, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
