"""Makes the product forget a key, so that a test can be seen to fail (tests/prove_keys.py).

A key, like `recipes/train.py optimizer.lr`, is forgotten once it was read and checked: what asks
for it then gets its default (or, where there is none, something else that is allowed), in the
tests' own process and in all that they start. Tests themselves still see the value.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import pickle
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flame_composer.config import cli, fields
from flame_composer.config import load as loading
from flame_composer.config.extensions import OFFERED

ROOT = Path(__file__).parent.parent
VARIABLE, PLACE = "FORGET", "FORGET_PLACE"
# What stands in for a key that must be set, or whose default cannot be told from not being read;
# and for arguments.
STAND_INS: dict[str, Any] = {
    "max_duration": "1ba",
    "global_batch_size": 24,
    "microbatch_size": 1,
    "devices": 3,
    "device": "l4",
    "stall_timeout": 1.5,  # not half an hour
}
FOLDERS = ("save_folder", "log_folder")
ARGUMENTS: dict[str, Any] = {
    "patience": "1ba",
    "prompts": ["forgotten"],
    # Without one, MLflow goes on with the last that it was given
    "tracking_uri": "file://{folder}",
}
# What these read is compared with that of the run before, and is no effect
ONLY_COMPARED = ("describe_order",)
_loading = 0


class Forgotten:
    """In the place of a dataclass's field: the product reads its stand-in where the key is, and
    the value anywhere else.
    """

    def __init__(self, key: Key):
        self.key, self.field = (
            key,
            next(field for field in dataclasses.fields(key.of) if field.name == key.name),
        )

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            if self.field.default is dataclasses.MISSING:
                raise AttributeError(self.field.name)
            return self.field.default
        value, place = vars(instance)[self.field.name], vars(instance).get("place")
        reader = sys._getframe(1).f_code
        no_effect = (
            reader.co_filename.startswith(str(ROOT / "tests")) or reader.co_name in ONLY_COMPARED
        )
        here = (
            place == self.key[:2]
            if place
            else self.key.anywhere and isinstance(instance, self.key.of)
        )
        return self.stand_in(value) if here and not _loading and not no_effect else value

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self.field.name] = value

    def stand_in(self, value: Any) -> Any:
        if self.field.name in STAND_INS:
            return STAND_INS[self.field.name]
        if self.field.default_factory is not dataclasses.MISSING:
            return self.field.default_factory()
        if self.field.default != "???" and self.field.name not in FOLDERS:
            return self.field.default
        # A folder that is removed after the attempt
        nowhere = f"{os.environ[PLACE]}/{self.field.name}"
        return [nowhere] if isinstance(value, list) else nowhere


class Key(NamedTuple):
    """The field `name` of `of`, which is at `path` in the configuration `script`; if `anywhere`,
    also where tests made it.
    """

    script: type
    path: str
    of: type
    name: str
    anywhere: bool


@functools.cache
def config_keys() -> dict[str, Key]:
    """`script.py key` of all scripts; of those with the same configuration, the first. Without
    what extensions take.
    """
    from flame_composer.config.train import TrainConfig
    from flame_composer.reference import scripts

    by_class = {cls: script for script, cls in reversed([*scripts()])}
    return {
        # A section of a plan is one of the run's.
        f"{by_class[cls]} {path}{name}": Key(
            cls, path, of, name, of is cls or TrainConfig not in cls.__mro__[1:]
        )
        for cls in sorted(by_class, key=lambda cls: cls is not TrainConfig)
        for path, of, name in _fields(cls, "")
    }


def _fields(cls: type, path: str) -> Iterator[tuple[str, type, str]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield path, cls, field.name
        section, each = (
            fields.dataclass_of(hints[field.name]),
            fields.named_sections(hints[field.name]),
        )
        yield from _fields(section, f"{path}{field.name}.") if section else ()
        yield from _fields(each, f"{path}{field.name}.{fields.ANY_NAME}.") if each else ()


def extension_keys() -> list[str]:
    from flame_composer.train.extensions import arguments_of, find_class

    return [
        f"recipes/train.py {section}.{name}{argument}"
        for section, names in OFFERED.items()
        for name in names
        for argument in (
            "",
            *(f".{argument}" for argument in arguments_of(find_class(section, name))),
        )
    ]


@contextmanager
def forgotten(key: str, folder: Path) -> Iterator[None]:
    """`key` is forgotten in this process and in those that it starts; `folder` is a temporary
    one.
    """
    from tests import runs

    (folder / "sitecustomize.py").write_text("from tests import forget\n\nforget.begin()\n")
    content = pickle.dumps(config_keys().get(key, key)).hex()
    environment = {VARIABLE: content, PLACE: str(folder), "PYTHONPATH": f"{folder}:{ROOT}"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(runs, "_run", functools.partial(run, environment))
        install(patch)
        yield


def run(environment: dict[str, str], *arguments: Any) -> None:
    """In place of tests.runs._run, in the forked process of a script."""
    os.environ.update(environment)
    begin()
    from tests.runs import _run

    _run(*arguments)


def begin() -> None:
    """In a process of its own, before anything else is imported."""
    note_places()
    install(pytest.MonkeyPatch())


def note_places() -> None:
    """Have all that is loaded from now on, by whoever imports loading.load from now on, know
    where it is.
    """
    cli.load = loading.load = functools.partial(_load, loading.load)  # type: ignore[assignment]


def install(patch: pytest.MonkeyPatch) -> None:
    """Forget the key, or the argument of an extension, that the environment names."""
    key: Key | str = pickle.loads(bytes.fromhex(os.environ[VARIABLE]))  # noqa: S301
    if isinstance(key, Key):
        owner = next(
            base for base in key.of.__mro__ if key.name in vars(base).get("__annotations__", {})
        )
        patch.setattr(owner, key.name, Forgotten(key), raising=False)
    else:
        _forget_extension(patch, *key.partition(" ")[2].split("."))


def _load(real: Callable[..., Any], cls: type, argv: list[str]) -> Any:
    """As loading.load; every section then knows where it is."""
    global _loading
    _loading += 1
    try:
        config = real(cls, argv)
        for path, section in fields.sections_of(config):
            vars(section)["place"] = (
                cls,
                re.sub(r"\b(streams|datasets)\.[^.]+\.", rf"\1.{fields.ANY_NAME}.", path),
            )
    finally:
        _loading -= 1
    return config


def _forget_extension(
    patch: pytest.MonkeyPatch, section: str, name: str, argument: str = ""
) -> None:
    from flame_composer.train import extensions

    cls, in_use = extensions.find_class(section, name), extensions.in_use
    init = cls.__init__  # type: ignore[misc]

    def in_use_without(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {each: arguments for each, arguments in in_use(given).items() if each != name}

    @functools.wraps(init)
    def init_without(*args: Any, **kwargs: Any) -> None:
        init(*args, **kwargs)  # so that the argument has been checked
        bound = inspect.signature(init).bind(*args, **kwargs)
        if bound.arguments.pop(argument, None) is not None and argument in ARGUMENTS:
            value = ARGUMENTS[argument]
            bound.arguments[argument] = (
                value.format(folder=os.environ[PLACE]) if isinstance(value, str) else value
            )
        init(*bound.args, **bound.kwargs)

    if argument:
        patch.setattr(cls, "__init__", init_without)
    else:
        patch.setattr(extensions, "in_use", in_use_without)
