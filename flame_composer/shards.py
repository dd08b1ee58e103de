"""The dataset on disk: work units and their atomic commit, the manifest and its token ledger, index.json last.

    out/index.json          what StreamingDataset reads; published last, so a folder that has it is complete
    out/manifest.json       `Manifest`
    out/units/000000/       one work unit: shard.00000.mds ..., unit.json, and tail.npy, the tokens that fill no row
    out/units/tail/         the rows made of the units' tails, in unit order
    out/plan.json, out/tmp/ only while a conversion is unfinished

Every file depends on the plan alone: not on when, how often interrupted, or in what order its units were converted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_composer.config import ConfigError, DataError
from flame_composer.corpus import Slice, slice_file
from flame_composer.manifest import (
    HF,
    VERSION,
    Ledger,
    Manifest,
    Split,
    Unit,
    UnitRecord,
    check_shards,
    damaged,
    dump_json,
    file_size,
    parse_record,
    read_json,
    read_manifest,
)
from flame_composer.mds import ShardWriter
from flame_composer.packing import Pieces, cut, no_pieces, pack, shuffled
from flame_composer.tokenizer import TokenizerFingerprint, token_dtype

TAIL = "tail"


@dataclass(frozen=True)
class Plan:
    """All that a dataset's bytes depend on. `config` holds the conversion settings, JSON values only, and says
    whatever the other fields do not."""

    split: Split
    tokenizer: TokenizerFingerprint
    context_length: int
    config: dict[str, Any]
    units: tuple[Unit, ...]


# What is to be converted


def plan_units(files: Sequence[str], unit_size: int) -> tuple[Unit, ...]:
    """The files in order, grouped into work units of about `unit_size` bytes; large files are split.

    Depends on the files' names and sizes alone, never on the number of workers.
    """
    units: list[Unit] = []
    unit: list[Slice] = []
    num_bytes = 0
    for part in (part for path in files for part in slice_file(path, unit_size)):
        if unit and num_bytes + part.num_bytes > unit_size:
            units.append(tuple(unit))
            unit, num_bytes = [], 0
        unit.append(part)
        num_bytes += part.num_bytes
    return (*units, tuple(unit)) if unit else tuple(units)


# Writing


@dataclass(frozen=True)
class DatasetWriter:
    """A dataset in the making: `out` is its folder. Holds nothing that is not on disk, so any process can have one."""

    out: str
    plan: Plan

    def finished(self) -> Manifest | None:
        """The manifest if this very plan is already finished in the folder, None if there is work to do.

        Raises ConfigError if the folder holds something else, and DataError if a finished dataset is damaged.
        """
        out = Path(self.out)
        if out.exists() and not out.is_dir():
            raise ConfigError(f"out: {out}: is a file; name a folder")
        if (out / "index.json").exists():
            manifest = read_manifest(self.out)
            self._refuse_difference(_plan_of(manifest), inputs_too=True)
            check_shards(self.out)
            self._clean()
            return manifest
        if (out / "plan.json").exists():
            # Inputs may have been mended since the conversion stopped; `is_committed` sees to the units they are in.
            self._refuse_difference(read_json(out / "plan.json"), inputs_too=False)
        elif out.exists() and any(path.name != "plan.json.tmp" for path in out.iterdir()):
            raise ConfigError(f"out: {out}: this folder is not empty and holds no conversion; name a new one or empty it")
        return None

    def begun_encoder(self) -> str | None:
        """The encoder of the conversion that the folder holds, finished or not; None if it holds none."""
        for name in ("manifest.json", "plan.json"):
            path = Path(self.out, name)
            if path.is_file():
                content = read_json(path)
                settings = content["config"] if isinstance(content, dict) else None
                return str(settings.get("encoder", HF)) if isinstance(settings, dict) else None
        return None

    def begin(self) -> None:
        """Take possession of the folder, or go on with the conversion that was interrupted in it."""
        with explained(self.out):
            Path(self.out).mkdir(parents=True, exist_ok=True)
            self._publish_file("plan.json", dump_json(_plan_json(self.plan)))
            Path(self.out, "tmp").mkdir(exist_ok=True)
            Path(self.out, "units").mkdir(exist_ok=True)
            planned = {unit_name(number) for number in range(len(self.plan.units))}
            for folder in Path(self.out, "units").iterdir():
                if folder.name not in planned:
                    shutil.rmtree(folder)

    def is_committed(self, number: int) -> bool:
        """Whether the unit is there, whole, and made from the inputs as they are now; if there but not so, it goes."""
        folder = Path(self.out, "units", unit_name(number))
        if not folder.exists():
            return False
        content = read_json(folder / "unit.json")
        whole = all(
            file_size(folder / shard["raw_data"]["basename"]) == shard["raw_data"]["bytes"] for shard in content["shards"]
        )
        same_inputs = parse_record(content["record"], str(folder)).inputs == self.plan.units[number]
        if whole and same_inputs and not _is_newer(self.plan.units[number], folder / "unit.json"):
            return True
        shutil.rmtree(folder)
        return False

    def publish(self) -> Manifest:
        """Pack the units' tails, then publish manifest.json and, last, index.json. Every unit must be committed.

        Raises DataError if the documents do not fill a single row.
        """
        with explained(self.out):
            return self._publish()

    def _publish(self) -> Manifest:
        folders = [Path(self.out, "units", unit_name(number)) for number in range(len(self.plan.units))]
        shutil.rmtree(Path(self.out, "units", TAIL), ignore_errors=True)
        tail = Path(self.out, "units", TAIL)
        order = self._unit_order()
        writer = UnitWriter(self, None)
        for folder in (folders[number] for number in order):
            lengths = np.array(read_json(folder / "unit.json")["tail_doc_lengths"], np.int64)
            writer.carry(Pieces(np.load(folder / "tail.npy"), lengths))
        writer.commit(None)

        shards = [
            _moved(shard, f"units/{folder.name}/")
            for folder in (*(folders[number] for number in order), tail)
            for shard in read_json(folder / "unit.json")["shards"]
        ]
        folders.append(tail)
        records = tuple(parse_record(read_json(folder / "unit.json")["record"], str(folder)) for folder in folders)
        totals = sum((record.ledger for record in records), Ledger())
        assert totals.balances, totals
        assert totals.carried_in == totals.carried_out, totals
        assert totals.tokens_out == totals.rows * self.plan.context_length, totals
        if totals.documents == 0:
            raise DataError(
                f"{self.out}: no documents for the {self.plan.split} split "
                f"({totals.documents_skipped} skipped); check source, or raise val_fraction"
            )
        if totals.rows == 0:
            raise DataError(
                f"{self.out}: the {self.plan.split} split's {totals.tokens_in} tokens do not fill one row of "
                f"context_length={self.plan.context_length}; remove this folder and give more text or shorter rows"
            )
        index = dump_json({"version": 2, "shards": shards})
        manifest = Manifest(
            version=VERSION,
            split=self.plan.split,
            tokenizer=self.plan.tokenizer,
            context_length=self.plan.context_length,
            token_dtype=np.dtype(token_dtype(self.plan.tokenizer.vocab_size)).name,
            config=self.plan.config,
            units=records,
            totals=totals,
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        self._publish_file("manifest.json", dump_json(dataclasses.asdict(manifest)))
        self._publish_file("index.json", index)
        self._clean()
        return manifest

    def _unit_order(self) -> list[int]:
        """The order of the units in the dataset, which is not that of their names if there is a seed."""
        seed, number = self.plan.config["seed"], len(self.plan.units)
        return list(range(number)) if seed is None else np.random.default_rng(seed).permutation(number).tolist()

    def _publish_file(self, name: str, data: bytes) -> None:
        temporary = Path(self.out, f"{name}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, Path(self.out, name))

    def _clean(self) -> None:
        Path(self.out, "plan.json").unlink(missing_ok=True)
        shutil.rmtree(Path(self.out, "tmp"), ignore_errors=True)

    def _refuse_difference(self, there: Any, *, inputs_too: bool) -> None:
        """Raise ConfigError naming every key in which the plan `there`, read from the folder, is not this one."""
        here = _plan_json(self.plan)
        if not isinstance(there, dict) or there.keys() != here.keys() or not isinstance(there["config"], dict):
            raise damaged(self.out, "it holds no plan this version can read")
        flat = []
        for plan in (there, here):
            config, units = plan.pop("config"), plan.pop("units")
            flat.append({**plan, **config, **({"inputs": _inputs(units)} if inputs_too else {})})
        differing = [key for key in flat[0] | flat[1] if flat[0].get(key) != flat[1].get(key)]
        if differing:
            shown = [f"{key} ({_short(flat[0].get(key))} there, {_short(flat[1].get(key))} now)" for key in differing]
            raise ConfigError(
                f"out: {self.out}: holds a conversion with other settings: {', '.join(shown)}; name another out, "
                "or remove this folder"
            )


class UnitWriter:
    """Writes one work unit, or the tail unit (`number` None), into a temporary folder; `commit` puts it in its place with
    one rename."""

    def __init__(self, dataset: DatasetWriter, number: int | None):
        self.plan, self.number = dataset.plan, number
        self.name = TAIL if number is None else unit_name(number)
        # A name of its own: whoever else is at work on this unit must not write into the same folder.
        self.temporary = Path(dataset.out, "tmp", f"{self.name}.{uuid.uuid4().hex}")
        self.final = Path(dataset.out, "units", self.name)
        dtype = token_dtype(self.plan.tokenizer.vocab_size)
        self.tail = no_pieces(dtype)
        self.waiting = [no_pieces(dtype)]  # with a seed, the unit's documents, to be shuffled
        self.counts = {field.name: 0 for field in dataclasses.fields(Ledger)}
        self.hash = hashlib.blake2b(digest_size=16)
        self.mds = ShardWriter(self.temporary, dtype, self.plan.context_length, self.plan.config["shard_size"])

    def write(self, tokens: NDArray[np.unsignedinteger], doc_lengths: NDArray[np.int64]) -> None:
        """Append documents: their tokens, end to end, and the number of tokens of each."""
        self.counts["documents"] += len(doc_lengths)
        self.counts["tokens_in"] += len(tokens)
        minimum = self.plan.config["min_doc_length"]
        if minimum is not None:
            is_kept = doc_lengths >= minimum
            self.counts["documents_short"] += int((~is_kept).sum())
            self.counts["dropped"] += int(doc_lengths[~is_kept].sum())
            tokens, doc_lengths = tokens[np.repeat(is_kept, doc_lengths)], doc_lengths[is_kept]
        if self.plan.config["seed"] is None:
            self._pack(tokens, doc_lengths)
        else:
            self.waiting.append(Pieces(tokens, doc_lengths))

    def carry(self, tail: Pieces) -> None:
        """Append what filled no row of another unit, which has counted it."""
        self.counts["carried_in"] += len(tail.tokens)
        self._pack(tail.tokens, tail.doc_lengths)

    def _pack(self, tokens: NDArray[np.unsignedinteger], doc_lengths: NDArray[np.int64]) -> None:
        longest = self.plan.config["max_doc_length"]
        pieces = doc_lengths if longest is None else cut(doc_lengths, longest)
        rows, self.tail = pack(tokens, pieces, self.plan.context_length, self.tail)
        self.mds.write(rows)
        self.counts["rows"] += len(rows)

    def commit(self, encoder: str | None) -> UnitRecord:
        """Put the unit in its place; `encoder` is what made its tokens, None for the tail unit."""
        if self.number is not None and self.plan.config["seed"] is not None:
            documents = shuffled(self.waiting, [self.plan.config["seed"], self.number])
            self._pack(documents.tokens, documents.doc_lengths)
        self.mds.flush()
        shards = self.mds.shards
        self.counts["dropped" if self.number is None else "carried_out"] += len(self.tail.tokens)
        self.counts["tokens_out"] = self.counts["rows"] * self.plan.context_length
        self.counts["shards"] = len(shards)
        self.counts["bytes"] = sum(shard["raw_data"]["bytes"] for shard in shards)
        inputs = () if self.number is None else self.plan.units[self.number]
        record = UnitRecord(self.name, inputs, encoder, self.hash.hexdigest(), Ledger(**self.counts))
        assert record.ledger.balances, record
        if self.number is not None:
            np.save(self.temporary / "tail.npy", self.tail.tokens)
        (self.temporary / "unit.json").write_bytes(
            dump_json(
                {
                    "record": dataclasses.asdict(record),
                    "shards": shards,
                    "tail_doc_lengths": [] if self.number is None else self.tail.doc_lengths.tolist(),
                }
            )
        )
        try:
            os.rename(self.temporary, self.final)
        except OSError:
            if not self.final.exists():
                raise
            self.discard()  # another process has committed this unit, and the same plan gives the same bytes
        return record

    def discard(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)


@contextmanager
def explained(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror or error}{f': {error.filename}' if error.filename else ''}; when that is "
            "mended, run the same command again: it goes on from the last finished unit"
        ) from None


def unit_name(number: int) -> str:
    return f"{number:06}"


def _plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON holds it, lists for tuples."""
    return json.loads(dump_json({"version": VERSION, **dataclasses.asdict(plan)}))


def _plan_of(manifest: Manifest) -> dict[str, Any]:
    units = tuple(record.inputs for record in manifest.units if record.name != TAIL)
    return _plan_json(Plan(manifest.split, manifest.tokenizer, manifest.context_length, manifest.config, units))


def _inputs(units: Any) -> str:
    """The input files of a plan in a few words that differ when the files or their sizes do."""
    sizes: dict[str, int] = {}
    for part in (part for unit in units for part in unit):
        sizes[part["path"]] = sizes.get(part["path"], 0) + part["num_bytes"]
    digest = hashlib.sha256(dump_json(list(sizes.items()))).hexdigest()
    return f"{len(sizes)} files of {sum(sizes.values())} bytes, hash {digest[:8]}"


def _is_newer(unit: Unit, record: Path) -> bool:
    committed = record.stat().st_mtime
    return any(Path(part.path).stat().st_mtime > committed for part in unit if part.format != "dataset")


def _moved(shard: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {**shard, "raw_data": {**shard["raw_data"], "basename": prefix + shard["raw_data"]["basename"]}}


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
