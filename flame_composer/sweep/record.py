"""What a sweep was begun with, in sweep.json: other trials are not mixed into it unnoticed."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import importlib.metadata
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flame_composer.config.axes import ITS_OWN, to_check
from flame_composer.config.sweep import SweepConfig, sweep_keys
from flame_composer.errors import ConfigError, DataError, without_credentials
from flame_composer.sweep.trials import read_own, write_whole

RECORD = "sweep.json"
VERSION = 1
# Keys of the sweep that change how trials are run, not what comes of them.
FREE_SWEEP = ("sweep_folder", "on_failure", "retry_failed")
# Keys of the run that change nothing in its losses.
FREE_RUN = (
    *ITS_OWN,
    "loggers",
    "save_async",
    "save_interval",
    "save_num_checkpoints_to_keep",
    "stall_timeout",
    "tensorboard",
    "train_data.num_workers",
    "train_data.prefetch_factor",
    "wandb",
)


def describe(config: SweepConfig, salt: str | None = None) -> dict[str, Any]:
    """Return what sweep.json holds: the search, the axes, and what all trials have in common.

    Values from the environment may be secret, so they stand there as fingerprints only, which
    depend on `salt`; a new one is drawn for a new sweep.
    """
    content = yaml.safe_load(config.resolved_yaml)
    own = sweep_keys()
    covered = [key for axis in config.axes for key in axis.covers]
    left_out = (*covered, *FREE_RUN, *own)
    base = {
        key: value
        for key, value in _flat("", {**content})
        if not any(key == each or key.startswith(f"{each}.") for each in left_out)
    }
    values = dataclasses.asdict(config)
    search = {key: values[key] for key in own if key not in FREE_SWEEP}
    if not config.is_ordered():
        del search["parallel"]
    if config.search == "tpe":
        search["optuna"] = importlib.metadata.version("optuna")
    axes = {
        axis.key: list(map(without_credentials, axis.values)) or axis.shown()
        for axis in config.axes
    }
    salt = salt or secrets.token_hex(16)
    prints = {key: _print(salt, value) for key, value in _from_environment(config, base)}
    environment = {"salt": salt, "prints": prints}
    content = {"search": search, "axes": axes, "base": base, "environment": environment}
    return {"version": VERSION, **content}


def _from_environment(config: SweepConfig, base: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values that hold environment variables, by key, or by key=value on an axis."""
    values = dataclasses.asdict(config)
    for key, shown in base.items():
        if "<environment variable" in str(shown):
            yield key, _at(values, key)
    combinations = to_check(config.axes, config.search == "grid")
    found: dict[str, Any] = {}
    for texts, trial in zip(combinations, config.to_check.values(), strict=True):
        for axis, text in zip(config.axes, texts, strict=True):
            name = f"{axis.key}={without_credentials(text)}"
            if "oc.env:" in text and name not in found:
                found[name] = _at(dataclasses.asdict(trial), axis.key)
    yield from found.items()


def _at(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return what a dotted key has as its value, or below it."""
    return {name: each for name, each in _flat("", values) if f"{name}.".startswith(f"{key}.")}


def _print(salt: str, value: Any) -> str:
    """Return a fingerprint of a value, in which passwords do not count: they change by the day."""
    text = without_credentials(json.dumps(value, default=str))
    return hmac.new(salt.encode(), text.encode(), hashlib.sha256).hexdigest()


def _flat(prefix: str, content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def read(folder: str) -> dict[str, Any] | None:
    """Return the content of a sweep's record, or None if the sweep is new."""
    path = Path(folder, RECORD)
    written = read_own(path)
    if written is None:
        return None
    try:
        content = json.loads(written)
    except (ValueError, RecursionError):
        content = None
    if not _is_whole(content):
        raise DataError(
            f"{path}: damaged, or of another version; give another sweep_folder, or restore it"
        )
    return content


def _is_whole(content: Any) -> bool:
    """Return whether the content of a record has the parts that are compared."""
    parts = ("search", "axes", "base", "environment")
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return False
    if not all(isinstance(content.get(part), dict) for part in parts):
        return False
    search, environment = content["search"], content["environment"]
    return (
        isinstance(search.get("search"), str)
        and isinstance(search.get("trials"), int | None)
        and isinstance(environment.get("salt"), str)
        and isinstance(environment.get("prints"), dict)
        and all(
            isinstance(each, str)
            or (isinstance(each, list) and all(isinstance(text, str) for text in each))
            for each in content["axes"].values()
        )
    )


def is_of(config: SweepConfig) -> bool:
    """Return whether the record is this sweep's, and no trials have been added since."""
    before = read(config.sweep_folder)
    return before is not None and before == describe(config, before["environment"]["salt"])


def write(folder: str, content: dict[str, Any]) -> None:
    write_whole(Path(folder, RECORD), content)


def require_same(folder: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError, which names what changed, unless trials are only added.

    Values can be added to the lists of a grid, and trials to a search.
    """
    search, space = now["search"], now["search"]["search"]
    for key in dict.fromkeys([*before["search"], *search]):
        old, new = before["search"].get(key), search.get(key)
        grows = key == "trials" and space == before["search"]["search"] and old and new >= old
        if old != new and not grows:
            _refuse(folder, key, old, new)
    can_grow = space == "grid" and search["prune"] is None
    for key in dict.fromkeys([*before["axes"], *now["axes"]]):
        old, new = before["axes"].get(key), now["axes"].get(key)
        if old is None or new is None:
            shown = "an axis" if old is None else "not an axis"
            raise ConfigError(
                f"{folder}: {key}: is {shown} now, but was {'not one' if old is None else 'one'}"
                f" when this sweep began; {REMEDY}"
            )
        are_lists = isinstance(old, list) and isinstance(new, list)
        grows = can_grow and are_lists and set(old) <= set(new)
        if old != new and not grows:
            _refuse(folder, key, old, new)
    for key in dict.fromkeys([*before["base"], *now["base"]]):
        old, new = before["base"].get(key), now["base"].get(key)
        if old != new:
            _refuse(folder, key, old, new)
    old_prints, new_prints = (each["environment"]["prints"] for each in (before, now))
    for key in old_prints.keys() & new_prints.keys():
        if old_prints[key] != new_prints[key]:
            raise ConfigError(
                f"{folder}: {key}: an environment variable in it is set to another value than when"
                f" this sweep began; {REMEDY}"
            )


REMEDY = "give another sweep_folder, or the values that it began with"


def _refuse(folder: str, key: str, old: Any, new: Any) -> None:
    raise ConfigError(
        f"{folder}: {key}: is {_shown(new)} now, but was {_shown(old)} when this sweep began;"
        f" {REMEDY}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
