"""The axes of a sweep: keys of a run with the values that are tried for each."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import yaml

from flame_composer.config.fields import hint_of
from flame_composer.config.train import TrainConfig
from flame_composer.config.written import Written, parse_yaml, plain, require_shallow, takes_text
from flame_composer.errors import ConfigError, without_credentials

KINDS = ("loguniform", "uniform", "int")
RANGE = re.compile(r"([A-Za-z_]\w*)\s*\(([^()]*)\)")
RANGES = "loguniform(1e-4,1e-2), uniform(0,0.2) or int(1,8)"
SIGNED = re.compile(r"-?[0-9.]+(e-?[0-9]+)?")  # a number, whose '-' cannot be taken for a joint
DIGITS = 4  # significant digits of a number taken from a range, so that its name is the number
LONGEST_NAME = 100  # characters; the name of the sweep comes before it in the run's name
MOST_CHECKED = 256  # configurations of a search among ranges; of more, each axis is checked alone
# A trial gets these from the sweep.
ITS_OWN = ("run_name", "log_folder", "save_folder", "autoresume", "progress_bar")


@dataclass(frozen=True)
class Axis:
    """A key with its values, as texts of a command line, or with a range to take numbers from.

    `kind` is one of KINDS for a range from `low` to `high`, both included, and "" otherwise.
    `covers` holds the keys that the values set: the key itself, or those in values that are
    mappings.
    """

    key: str
    values: tuple[str, ...] = ()
    kind: str = ""
    low: float = 0
    high: float = 0
    covers: tuple[str, ...] = ()

    def extremes(self) -> tuple[str, ...]:
        """Return the values, or the ends of the range."""
        return self.values or (self.text(self.low), self.text(self.high))

    def text(self, number: float) -> str:
        """Return a number from the range as it is written, rounded to DIGITS digits."""
        if self.kind == "int":
            return str(int(number))
        rounded = number if number in (self.low, self.high) else float(f"{number:.{DIGITS}g}")
        return _number(min(max(rounded, self.low), self.high))

    def shown(self) -> str:
        """Return the axis as the command line gives it."""
        if self.kind:
            low, high = self.extremes()
            return f"{self.kind}({low},{high})"
        return f"[{', '.join(self.values)}]"

    def has_numbers(self) -> bool:
        return bool(self.kind) or all(_is_number(value) for value in self.values)


def read_axis(argument: str) -> Axis | None:
    """Return the axis that `key=value` gives, or None if it gives one value.

    A list is an axis where the key takes no list, and a list of lists where it does. Raise
    ConfigError for an axis that cannot be read, has no value or has one twice.
    """
    key, _, text = argument.partition("=")
    hint, text = hint_of(TrainConfig, key), text.strip()
    if (found := RANGE.fullmatch(text)) and not (hint is not None and takes_text(hint)):
        return _range(key, found[1], found[2], argument)
    if not (text.startswith("[") and text.endswith("]")):
        return None
    takes_list = any(get_origin(each) in (list, tuple) for each in (hint, *get_args(hint)))
    if takes_list and not text[1:].lstrip().startswith("["):
        return None
    try:
        require_shallow(text)
        elements = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"command line: {argument}: cannot be read: {reason}") from None
    if takes_list and not all(isinstance(each, list) for each in elements):
        raise ConfigError(
            f"command line: {argument}: the values to try of a key that takes a list must all be"
            " lists, e.g. [[0.9,0.95],[0.9,0.99]]"
        )
    values = tuple(_written(each, hint) for each in elements)
    if not values:
        raise ConfigError(f"command line: {argument}: must hold at least one value to try")
    seen = set[str]()
    for value in values:
        if value in seen:
            raise ConfigError(f"command line: {argument}: {value} must be given once, not twice")
        seen.add(value)
    covers = dict.fromkeys(leaf for each in elements for leaf in _leaves(key, plain(each)))
    return Axis(key, values, covers=tuple(covers))


def _range(key: str, kind: str, ends: str, argument: str) -> Axis:
    if kind not in KINDS:
        raise ConfigError(f"command line: {argument}: a range must be {RANGES}")
    try:
        low, high = (float(end) for end in ends.split(","))
    except ValueError:
        low = high = math.nan
    in_order = -math.inf < low < high < math.inf
    if not in_order:
        raise ConfigError(
            f"command line: {argument}: a range must have two numbers, the lower one first:"
            f" {RANGES}"
        )
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"command line: {argument}: loguniform must begin above 0")
    if kind == "int" and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"command line: {argument}: the ends of int must be whole numbers")
    return Axis(key, kind=kind, low=low, high=high, covers=(key,))


def _written(value: Any, hint: Any) -> str:
    """Return a value as a command line gives it; a number in the shortest way."""
    if isinstance(value, Written):
        is_text = hint is not None and takes_text(hint)
        return value.text if is_text and value.value is not None else _plain_text(value.value)
    if isinstance(value, list):
        return f"[{', '.join(_written(each, hint) for each in value)}]"
    if isinstance(value, dict):
        inner = (f"{_written(name, str)}: {_written(each, None)}" for name, each in value.items())
        return f"{{{', '.join(inner)}}}"
    if hint is not None and takes_text(hint):
        return str(value)
    try:
        is_itself = parse_yaml(f"[{value}]") == [value]
    except (yaml.YAMLError, ValueError):
        is_itself = False
    return value if is_itself else json.dumps(value)


def _plain_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    """Return the shortest text that is read as this number again."""
    return repr(value).replace("e+", "e")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _leaves(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, dict) or not value:
        yield key
        return
    for name, each in value.items():
        yield from _leaves(f"{key}.{name}", each)


def name_of(axes: Sequence[Axis], values: Sequence[str]) -> str:
    """Return a name for the folder of a trial, which says its values.

    Names of trials with other values are others: where a value had to be cut, or held characters
    that a run's name cannot have, or the '-' that joins values, a hash follows.
    """
    lasts = [axis.key.rpartition(".")[2] for axis in axes]
    said, exact = [], True
    for axis, last, value in zip(axes, lasts, values, strict=True):
        label = axis.key if lasts.count(last) > 1 else last
        text = re.sub(r"[^A-Za-z0-9.-]+", "_", without_credentials(value)).strip("_")
        exact = (
            exact and text == value and ("-" not in value or SIGNED.fullmatch(value) is not None)
        )
        said.append(re.sub(r"[^A-Za-z0-9.]+", "_", label).strip("_") + f"_{text}")
    name = "-".join(said)
    if exact and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"


def arguments_of(axes: Sequence[Axis], values: Sequence[str]) -> list[str]:
    """Return the arguments that give a trial its values."""
    return [f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True)]


def value_of(key: str, text: str) -> Any:
    """Return the value that a text stands for where `key` is given."""
    hint = hint_of(TrainConfig, key)
    return text if hint is not None and takes_text(hint) else plain(parse_yaml(text))


def grid(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    """Return all combinations of the axes' values; the last axis changes fastest."""
    return list(itertools.product(*(axis.values for axis in axes)))


def to_check(axes: Sequence[Axis], is_grid: bool) -> list[tuple[str, ...]]:
    """Return the combinations to check before a sweep starts: all of a grid.

    Of a search, these are all combinations of values and ends of ranges; if they are very many,
    each axis's with the first ones of the others.
    """
    if is_grid:
        return grid(axes)
    candidates = [axis.extremes() for axis in axes]
    if math.prod(map(len, candidates)) <= MOST_CHECKED:
        return list(itertools.product(*candidates))
    first = tuple(values[0] for values in candidates)
    return [
        (*first[:number], value, *first[number + 1 :])
        for number, values in enumerate(candidates)
        for value in values
    ]
