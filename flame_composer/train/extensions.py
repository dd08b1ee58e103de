"""Algorithms, callbacks and loggers built from the names and arguments in the configuration."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import composer.algorithms
import composer.callbacks
import composer.loggers
import torch
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination

from flame_composer.config.extensions import in_use, spelled_alike
from flame_composer.config.fields import nearest
from flame_composer.config.train import TrainConfig
from flame_composer.config.written import quote_it
from flame_composer.errors import InvalidField, one_line
from flame_composer.train import algorithms, callbacks
from flame_composer.train.loggers import build_loggers

# The modules that are searched for a class of each kind, in this order: ours come first.
_MODULES: Mapping[str, tuple[types.ModuleType, ...]] = types.MappingProxyType(
    {
        "algorithms": (algorithms, composer.algorithms),
        "callbacks": (callbacks, composer.callbacks),
        "loggers": (callbacks, composer.loggers),
    }
)
# Composer divides by these without checking them.
COUNTS = ("window_size", "batch_log_interval", "dist_aggregate_batch_interval")
FROM_THE_RUN = ("log_folder", "context_length")  # arguments that the run fills in itself


class Extensions(NamedTuple):
    """The algorithms, callbacks and loggers that a configuration asks for."""

    algorithms: list[Algorithm]
    callbacks: list[Callback]
    loggers: list[LoggerDestination]


def build_extensions(config: TrainConfig) -> Extensions:
    """Return all that the configuration names, including W&B and TensorBoard.

    Raise InvalidField if the arguments do not fit the class they are for.
    """
    run = dict(zip(FROM_THE_RUN, (Path(config.log_folder), config.context_length), strict=True))
    built = {
        section: [build(section, name, arguments, run) for name, arguments in in_use(given).items()]
        for section, given in (
            ("algorithms", config.algorithms),
            ("callbacks", config.callbacks),
            ("loggers", config.loggers),
        )
    }
    if "memory_monitor" in in_use(config.callbacks) and not torch.cuda.is_available():
        raise InvalidField(
            "callbacks.memory_monitor",
            "it logs the memory of a GPU, and there is none here; leave it out",
        )
    return Extensions(
        built["algorithms"], built["callbacks"], [*build_loggers(config), *built["loggers"]]
    )


def find_class(section: str, name: str) -> type:
    """Return the class that `section` offers under `name`, however that is spelled."""
    return next(
        value
        for module in _MODULES[section]
        for attribute, value in vars(module).items()
        if isinstance(value, type) and spelled_alike(attribute) == spelled_alike(name)
    )


def arguments_of(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments that a user may give to `cls`, by name, with their types resolved."""
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(cls).parameters.items()
        if name not in FROM_THE_RUN and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }


def build(section: str, name: str, arguments: Mapping[str, Any], run: Mapping[str, Any]) -> Any:
    """Return an object of the class that `name` stands for, built with `arguments`.

    `run` supplies the arguments in FROM_THE_RUN. Raise InvalidField for an argument that the class
    does not have, that is missing, or whose value it does not accept.
    """
    key, cls = f"{section}.{name}", find_class(section, name)
    known = arguments_of(cls)
    for argument, value in arguments.items():
        if argument not in known:
            close = nearest(argument, list(known)).replace("mean ", f"mean {key}.")
            listed = f"; its arguments are {', '.join(known)}" if known else "; it takes none"
            raise InvalidField(
                f"{key}.{argument}", f"unknown argument of {cls.__name__}{close or listed}"
            )
        if not fits(value, known[argument].annotation):
            raise InvalidField(
                f"{key}.{argument}",
                f"must be {in_words(known[argument].annotation)}"
                + quote_it(value, fits("text", known[argument].annotation)),
            )
        if (
            isinstance(value, (int, float))
            and not (1 if argument in COUNTS else 0) <= value < math.inf
        ):
            raise InvalidField(
                f"{key}.{argument}", f"must be {1 if argument in COUNTS else 0} or more, and finite"
            )
    for argument, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and argument not in arguments:
            raise InvalidField(
                f"{key}.{argument}", f"must be set: {in_words(parameter.annotation)}"
            )
    filled = {
        argument: run[argument]
        for argument in FROM_THE_RUN
        if argument in inspect.signature(cls).parameters
    }
    try:
        return cls(**filled, **arguments)
    # The class's own checks of the values may raise any of these.
    except (ValueError, TypeError, ImportError, ArithmeticError) as error:
        raise InvalidField(key, f"{cls.__name__} refuses it: {one_line(error)}") from None


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value from a configuration has the type that `hint` annotates.

    Types that no configuration can hold, such as Composer's classes, never fit.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin in (list, Sequence):
        return isinstance(value, list) and all(fits(each, options[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(k, options[0]) and fits(v, options[1]) for k, v in value.items()
        )
    if hint is types.NoneType or value is None:
        return hint is types.NoneType and value is None
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return hint in (int, float, str) and isinstance(value, (int, float) if hint is float else hint)


def in_words(hint: Any) -> str:
    """Return a type annotation as text for users, without types that no configuration can hold."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        names = [in_words(option) for option in options if not _is_object(option)]
        # Sort them, because typing caches a union in the order in which it was first written.
        return " | ".join(sorted(names, key=lambda name: (name == "null", name)))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, options))}"
    if options:
        return f"{origin.__name__}[{', '.join(map(in_words, options))}]"
    return "null" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def _is_object(hint: Any) -> bool:
    return (
        isinstance(hint, type)
        and typing.get_origin(hint) is None
        and hint not in (int, float, str, bool, types.NoneType)
    )
