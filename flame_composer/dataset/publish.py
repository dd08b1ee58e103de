"""Publishing a dataset: its units are read once, their tails packed, manifest and index written.

A large dataset has a million units. What is read of them is kept in temporary files, so that
memory does not grow with their records, and each is read by one request for each of its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flame_composer.dataset.ledger import Ledger
from flame_composer.dataset.manifest import (
    VERSIONS,
    Manifest,
    current_record,
    damaged,
    header_json,
    read_json,
)
from flame_composer.dataset.mds import VERSION as MDS_VERSION
from flame_composer.dataset.packing import Pieces
from flame_composer.dataset.plan import TAIL, moved, unit_name
from flame_composer.dataset.streamed import Spool, element_json, object_parts
from flame_composer.dataset.unit import LEFT_OUT, UnitWriter, is_whole
from flame_composer.errors import DataError
from flame_composer.lines import visible
from flame_composer.storage import files
from flame_composer.storage.filesystems import Stat, find_by_folder, is_url
from flame_composer.storage.many import each, each_local
from flame_composer.text.examples import REASONS
from flame_composer.text.tokenizer import token_dtype

if TYPE_CHECKING:
    from flame_composer.dataset.writer import DatasetWriter

NPY_1 = b"\x93NUMPY\x01\x00"  # what tail.npy begins with
TAILS_AT_ONCE = 256


class NotWhole(DataError):
    """Units that are not committed, by their `numbers`: missing, not whole, or of other inputs."""

    def __init__(self, out: str, numbers: set[int]):
        super().__init__(
            f"{out}: {len(numbers):,} units are not whole, such as {unit_name(min(numbers))}; run"
            " the same command again: it converts them"
        )
        self.numbers = numbers


class _Found(NamedTuple):
    """What is kept of a committed unit: JSON for manifest and index, its tail, its counts."""

    number: int
    record: bytes
    shards: bytes
    tail_lengths: bytes
    ledger: dict[str, Any]


class Publisher:
    """The publishing of one dataset, with its temporary files in `folder`."""

    def __init__(self, dataset: DatasetWriter, folder: Path):
        self.dataset, self.plan, self.folder = dataset, dataset.plan, folder
        self.units = files.join(dataset.out, "units")
        self.each = each if is_url(dataset.out) else each_local
        self.number = len(dataset.plan.units)
        self.spools = [Spool(folder / str(i), self.number + 1) for i in range(3)]
        self.records, self.shards, self.tail_lengths = self.spools
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def publish(self) -> Ledger:
        """Write tail unit, manifest.json and, last, index.json, and return the totals.

        Raises NotWhole if there are units that are not committed, DataError if the documents do not
        fill a single row.
        """
        self._collect()
        order = self._order()
        self._write_tail(order)
        files.abort_uploads(self.dataset.out)
        totals = Ledger(**self.counts, left_out=dict(sorted(self.left_out.items())))
        self._check(totals)
        self._write(order, totals)
        return totals

    def _collect(self) -> None:
        """Read all units, and delete what killed processes and earlier plans left among them."""
        if is_url(self.dataset.out):
            found = each(lambda unit: self._look(*unit), find_by_folder(self.units))
        else:
            found = each_local(
                lambda name: self._look(name, files.find(files.join(self.units, name))),
                files.ls(self.units),
            )
        missing = set(range(self.number))
        for unit in found:
            if unit is not None:
                self._keep(unit)
                missing.discard(unit.number)
        if missing:
            raise NotWhole(self.dataset.out, missing)

    def _look(self, name: str, there: dict[str, Stat]) -> _Found | None:
        """Return what is kept of the unit of this name, or None if there is no whole one.

        `there` are the files in its folder. Those that are not the unit's are deleted.
        """
        folder = files.join(self.units, name)
        number = int(name) if name.isdecimal() else self.number
        if name == TAIL:
            return None
        if number >= self.number or unit_name(number) != name:
            files.delete_folder(folder)
            if not there:
                files.delete(folder)
            return None
        if "unit.json" not in there:
            return None
        content = read_json(files.join(folder, "unit.json"))
        unit = self.plan.units[number]
        record = current_record(content, unit, self.plan.kind, folder)
        if record is None or not is_whole(content, there, self.plan.kind, folder):
            files.retract_folder(folder, "unit.json")
            return None
        self._delete_others(folder, there, content)
        return _Found(
            number,
            element_json(record).encode(),
            self._entries(name, content),
            np.array(content["tail_doc_lengths"], np.int64).tobytes(),
            record["ledger"],
        )

    def _entries(self, name: str, content: dict[str, Any]) -> bytes:
        """Return a unit's shards as they are in the list of index.json."""
        shards = (moved(shard, f"units/{name}/") for shard in content["shards"])
        return ", ".join(map(element_json, shards)).encode()

    def _delete_others(self, folder: str, there: Iterable[str], content: dict[str, Any]) -> None:
        wanted = {"unit.json", "tail.npy", LEFT_OUT}
        wanted |= {shard["raw_data"]["basename"] for shard in content["shards"]}
        for name in there:
            if name not in wanted:
                files.delete(files.join(folder, name))

    def _keep(self, unit: _Found) -> None:
        self.records.put(unit.number, unit.record)
        self.shards.put(unit.number, unit.shards)
        self.tail_lengths.put(unit.number, unit.tail_lengths)
        for name, count in unit.ledger.items():
            if name == "left_out":
                self.left_out.update(count)
            else:
                self.counts[name] += count

    def _order(self) -> list[int]:
        """Return the unit numbers in the dataset's order: shuffled if there is a seed."""
        seed = self.plan.config["seed"] if self.plan.kind == "text" else None
        if seed is None:
            return list(range(self.number))
        return np.random.default_rng(seed).permutation(self.number).tolist()

    def _write_tail(self, order: list[int]) -> None:
        """Write the tail unit, made of the tokens that filled no row of their own unit."""
        folder = files.join(self.units, TAIL)
        files.retract_folder(folder, "unit.json")
        writer = UnitWriter(self.dataset, None)
        filled = (number for number in order if self.tail_lengths.get(number))
        tails = self.each(self._read_tail, filled)
        try:
            while some := list(islice(tails, TAILS_AT_ONCE)):
                tokens, lengths = (b"".join(each) for each in zip(*some, strict=True))
                writer.carry(
                    Pieces(np.frombuffer(tokens, writer.dtype), np.frombuffer(lengths, np.int64))
                )
            writer.commit(None)
        except BaseException:
            writer.discard()
            raise
        content = read_json(files.join(folder, "unit.json"))
        self._delete_others(folder, files.find(folder), content)
        record = current_record(content, (), self.plan.kind, folder)
        assert record is not None
        record_json, shards = element_json(record).encode(), self._entries(TAIL, content)
        self._keep(_Found(self.number, record_json, shards, b"", record["ledger"]))

    def _read_tail(self, number: int) -> tuple[bytes, bytes]:
        """Return the tokens of a unit's tail, and the lengths of its pieces, as bytes of arrays."""
        place = files.join(self.units, unit_name(number), "tail.npy")
        data, lengths = files.read(place), self.tail_lengths.get(number)
        start = len(NPY_1) + 2 + int.from_bytes(data[len(NPY_1) : len(NPY_1) + 2], "little")
        num_tokens = int(np.frombuffer(lengths, np.int64).sum())
        size = num_tokens * np.dtype(token_dtype(self.plan.tokenizer.vocab_size)).itemsize
        if not data.startswith(NPY_1) or len(data) != start + size:
            raise damaged(place, f"it is not an array of {num_tokens:,} tokens")
        return data[start:], lengths

    def _write(self, order: list[int], totals: Ledger) -> None:
        index, digest = self.folder / "index.json", hashlib.sha256()
        entries = (entry.decode() for entry in self._in_order(self.shards, order) if entry)
        with index.open("wb") as file:
            for part in object_parts({"version": MDS_VERSION}, "shards", entries):
                digest.update(part)
                file.write(part)
        manifest = Manifest(
            version=VERSIONS[self.plan.kind],
            split=self.plan.split,
            tokenizer=self.plan.tokenizer,
            context_length=self.plan.context_length,
            token_dtype=np.dtype(token_dtype(self.plan.tokenizer.vocab_size)).name,
            config=self.plan.config,
            units=(),
            totals=totals,
            index_sha256=digest.hexdigest(),
            kind=self.plan.kind,
        )
        out = self.dataset.out
        if self.plan.kind == "sft":
            files.write_parts(files.join(out, LEFT_OUT), self.each(self._left_out, order))
        records = (each.decode() for each in self._in_order(self.records, range(self.number)))
        files.write_parts(
            files.join(out, "manifest.json"), object_parts(header_json(manifest), "units", records)
        )
        files.put(index, files.join(out, "index.json"))

    def _in_order(self, spool: Spool, order: Iterable[int]) -> Iterator[bytes]:
        """Yield what a spool holds of all units in order, and last of the tail unit."""
        yield from map(spool.get, order)
        yield spool.get(self.number)

    def _left_out(self, number: int) -> bytes:
        return files.read(files.join(self.units, unit_name(number), LEFT_OUT))

    def _check(self, totals: Ledger) -> None:
        """Raise DataError if the dataset has no documents, or too few tokens for a row."""
        assert totals.balances, totals
        assert totals.carried_in == totals.carried_out, totals
        assert totals.tokens_out == totals.rows * self.plan.context_length, totals
        out, split = self.dataset.out, self.plan.split
        if totals.documents == 0:
            if self.plan.kind == "text":
                what, remedy = "documents", "check source, or raise val_fraction"
            else:
                what = "examples"
                remedy = "remove this folder, and check format, columns and template"
                if "too_long" in totals.left_out:
                    remedy += ", or give longer rows"
                if self.plan.config["val_fraction"]:
                    remedy += ", or another val_fraction"
            left_out = "".join(
                f", {count} left out: {REASONS[reason]}"
                for reason, count in totals.left_out.items()
            )
            raise DataError(
                f"{out}: no {what} for the {split} split "
                f"({totals.documents_skipped} skipped{left_out}{self._first_detail()}); {remedy}"
            )
        if totals.rows == 0:
            raise DataError(
                f"{out}: the {split} split's {totals.tokens_in} tokens do not fill"
                f" one row of context_length={self.plan.context_length}; remove this folder and"
                " give more text or shorter rows"
            )

    def _first_detail(self) -> str:
        """Return what exactly was wrong with the first example that was left out, for an error."""
        for number in range(self.number if self.plan.kind == "sft" else 0):
            details = (json.loads(line)["detail"] for line in self._left_out(number).splitlines())
            if detail := next(filter(None, details), ""):
                return f"; the first: {visible(detail)[:200]}"
        return ""


def publish(dataset: DatasetWriter) -> Ledger:
    """Publish a dataset, and return its totals; see `Publisher.publish`."""
    os.makedirs(dataset.staging, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dataset.staging) as folder:
        publisher = Publisher(dataset, Path(folder))
        try:
            return publisher.publish()
        finally:
            for spool in publisher.spools:
                spool.file.close()
