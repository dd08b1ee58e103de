"""From the names under algorithms, callbacks and loggers to objects: whose class is meant, and
whether the arguments fit it.
"""

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
from flame_composer.train import algorithms
from flame_composer.train import callbacks as optional_callbacks
from flame_composer.train.loggers import build_loggers

# Where a class of each kind is looked for, in this order.
_MODULES: Mapping[str, tuple[types.ModuleType, ...]] = types.MappingProxyType(
    {
        "algorithms": (algorithms, composer.algorithms),
        "callbacks": (optional_callbacks, composer.callbacks),
        "loggers": (optional_callbacks, composer.loggers),
    }
)
# Composer divides by them, unasked
COUNTS = ("window_size", "batch_log_interval", "dist_aggregate_batch_interval")
FROM_THE_RUN = ("log_folder", "context_length")  # arguments that are filled in


class Extensions(NamedTuple):
    algorithms: list[Algorithm]
    callbacks: list[Callback]
    loggers: list[LoggerDestination]


def build_extensions(config: TrainConfig) -> Extensions:
    """What the configuration names, W&B and TensorBoard included. Raises InvalidField where
    arguments do not fit.
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
            "there is no GPU here, whose memory it would log; leave it out",
        )
    return Extensions(
        built["algorithms"], built["callbacks"], [*build_loggers(config), *built["loggers"]]
    )


def find_class(section: str, name: str) -> type:
    """The class that is offered under `name`."""
    return next(
        value
        for module in _MODULES[section]
        for attribute, value in vars(module).items()
        if isinstance(value, type) and spelled_alike(attribute) == spelled_alike(name)
    )


def arguments_of(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments that a user may give, with their types resolved."""
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(cls).parameters.items()
        if name not in FROM_THE_RUN and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }


def build(section: str, name: str, arguments: Mapping[str, Any], run: Mapping[str, Any]) -> Any:
    """An object of the class that `name` means. Raises InvalidField for arguments that it does
    not take.
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
    # Whatever its own code makes of the values
    except (ValueError, TypeError, ImportError, ArithmeticError) as error:
        raise InvalidField(key, f"{cls.__name__} refuses it: {one_line(error)}") from None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value out of a configuration is of an annotated type; no such value is an object
    of Composer's.
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
    """An annotation as documentation has it, without what no configuration can hold."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        names = [in_words(option) for option in options if not _is_object(option)]
        # In an order of our own: typing keeps the one in which anyone wrote that union first.
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
