"""The examples in the inputs of a work unit, and the census that finds those that occur twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.dataset.workers import OnProgress, convert_units
from flame_composer.errors import DataError
from flame_composer.text.documents import DamagedRecord
from flame_composer.text.examples import (
    Conversation,
    Form,
    LeftOut,
    conversation_of,
    hash_of,
    prompt_of,
)
from flame_composer.text.jsonl import InvalidRecord
from flame_composer.text.records import Record, read_records
from flame_composer.text.sources import Unit

OnError = Literal["fail", "skip"]
REPORT_EVERY = 4096  # examples


class Example(NamedTuple):
    """An example: the record that it is made from, and its conversation or why it has none."""

    record: Record
    found: Conversation | LeftOut


def read_examples(
    unit: Unit, form: Form, on_damage: Callable[[DataError], None], max_record_bytes: int
) -> Iterator[Example]:
    """Yield the examples of a work unit in order.

    `on_damage` is called for each record that cannot be read, or lacks a column.
    """
    for part in unit:
        for record in read_records(part, form.names, on_damage, max_record_bytes):
            try:
                yield Example(record, conversation_of(record.values, form))
            except LeftOut as problem:
                yield Example(record, problem)
            except InvalidRecord as problem:
                reason = str(problem)
                if part.format == "jsonl":
                    on_damage(DamagedRecord(part.path, record.position, part.compression, reason))
                else:
                    kind = "element" if part.format == "json" else "row"
                    on_damage(DataError(f"{part.path}: {kind} {record.position}: {reason}"))


def new_digest() -> Any:
    """Return an empty digest of examples, to be updated with their hashes."""
    return hashlib.blake2b(digest_size=16)


class Hashes(NamedTuple):
    """The hashes of a unit's examples in order, uint8 [num_examples, 16] each.

    `messages` are of whole conversations, and `prompts` of what comes before their first answers.
    Examples without a conversation are not among them.
    """

    messages: NDArray[np.uint8]
    prompts: NDArray[np.uint8]

    @property
    def digest(self) -> str:
        """A digest of the unit's examples, as `new_digest` makes it of their hashes in order."""
        digest = new_digest()
        digest.update(self.messages.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Census:
    """A job that hashes the examples of every unit.

    `units` holds the inputs of each unit, and `forms` the form of its records.
    """

    units: Sequence[Unit]
    forms: Sequence[Form]
    on_error: OnError
    max_record_bytes: int

    def settings(self) -> Census:
        """Return what all units share."""
        return Census((), (), self.on_error, self.max_record_bytes)

    def inputs(self, number: int) -> tuple[Unit, Form]:
        """Return the inputs of unit `number`, and the form of its records."""
        return self.units[number], self.forms[number]

    def num_bytes(self, number: int) -> int:
        """Return the size of a unit's input in bytes."""
        return sum(part.num_bytes for part in self.units[number])

    def build_converter(self) -> CensusTaker:
        """Return a converter of units into their hashes."""
        return CensusTaker(self)


class CensusTaker:
    """A converter of a work unit into its number and its `Hashes`."""

    def __init__(self, census: Census):
        self.census = census

    def convert(
        self, inputs: tuple[Unit, Form], number: int, on_progress: OnProgress
    ) -> tuple[int, Hashes]:
        """Return the unit's number, and the hashes of its examples."""
        unit, form = inputs
        messages: list[bytes] = []
        prompts: list[bytes] = []
        on_damage = fail if self.census.on_error == "fail" else ignore
        for _, found in read_examples(unit, form, on_damage, self.census.max_record_bytes):
            if isinstance(found, LeftOut):
                continue
            messages.append(hash_of(found))
            prompts.append(hash_of(prompt_of(found)))
            if len(messages) % REPORT_EVERY == 0:
                on_progress(REPORT_EVERY, 0, 0)
        on_progress(len(messages) % REPORT_EVERY, 0, sum(part.num_bytes for part in unit))
        return number, Hashes(_table(messages), _table(prompts))


def fail(error: DataError) -> None:
    """Raise the error about a record that cannot be read."""
    raise error


def ignore(_: DataError) -> None:
    """Do nothing about a record that cannot be read: it is counted elsewhere."""


def _table(hashes: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)


def take_census(
    census: Census, num_workers: int, on_progress: OnProgress, cluster: str | None
) -> list[Hashes]:
    """Return the hashes of every unit's examples, in the order of the units."""
    numbers = range(len(census.units))
    results = convert_units(census, numbers, num_workers, on_progress, cluster)
    # Warnings are left out: the conversion that follows gives the same ones.
    found = dict(each for each in results if not isinstance(each, str))
    return [found[number] for number in numbers]


def find_left_out(
    hashes: Sequence[Hashes], val_hashes: Sequence[Hashes], *, duplicates: bool
) -> tuple[dict[int, dict[int, str]], str]:
    """Return the examples to leave out, and a digest of all examples that this was decided by.

    The examples are given as a reason for each, by their number in a unit, by the unit's number.
    Examples without a conversation are not counted. With `duplicates`, an example is left out if an
    earlier one has the same messages. One whose prompt is among those of `val_hashes`, the
    validation split, is always left out.
    """
    messages, prompts = (_joined([each[kind] for each in hashes]) for kind in (0, 1))
    reasons = np.zeros(len(messages), np.uint8)
    if duplicates:
        _, first = np.unique(messages, return_index=True)
        reasons[:] = 1
        reasons[first] = 0
    held_out = _joined([each.prompts for each in val_hashes])
    reasons[np.isin(prompts, held_out)] = 2
    digest = hashlib.blake2b(messages.tobytes(), digest_size=16)
    digest.update(reasons.tobytes())
    names = {1: "duplicate", 2: "in_validation"}
    found: dict[int, dict[int, str]] = {}
    start = 0
    for number, each in enumerate(hashes):
        of_unit = reasons[start : start + len(each.messages)]
        start += len(of_unit)
        which = np.flatnonzero(of_unit)
        if len(which):
            found[number] = {place: names[int(of_unit[place])] for place in which.tolist()}
    return found, digest.hexdigest()


def _joined(tables: Sequence[NDArray[np.uint8]]) -> NDArray[Any]:
    """Return the hashes of all tables as one array of values that can be compared."""
    empty = np.zeros((0, 16), np.uint8)
    joined = np.concatenate([empty, *tables])
    # As strings, which compare fast. They leave out trailing zeros, but all have one length.
    return np.ascontiguousarray(joined).view("S16").reshape(-1)
