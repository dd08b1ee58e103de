"""Answers of all ranks, or one error on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from flame_composer.errors import ConfigError, DataError, InvalidField, TrainingError, one_line

Gather = Callable[[Any], list[Any]]
"""A function that every rank calls with an object of its own, and that returns those of all."""

T = TypeVar("T")


def agreed(gather: Gather, answer: Callable[[], T]) -> list[T]:
    """Return the answers of all ranks, in order of rank; if one rank raises, all ranks do.

    Every rank must call this. Ranks that have answers raise the error of the first that has none:
    the same one if it is one of ours, else a TrainingError with its text.
    """
    mine: Any
    failed = None
    try:
        mine = answer()
    except Exception as error:
        mine, failed = _Failed.of(error), error
    answers = gather(mine)
    if failed is not None:
        raise failed
    for each in answers:
        if isinstance(each, _Failed):
            raise each.kind(each.message)
    return answers


class _Failed(NamedTuple):
    """An error of one rank, in a form that can be sent to the others."""

    kind: type[Exception]
    message: str

    @classmethod
    def of(cls, error: Exception) -> _Failed:
        if isinstance(error, InvalidField):
            return cls(ConfigError, str(error))
        if isinstance(error, ConfigError | DataError | TrainingError):
            return cls(type(error), str(error))
        return cls(TrainingError, f"another rank failed: {one_line(error)}")
