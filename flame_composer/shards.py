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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flame_composer.config import ConfigError, DataError
from flame_composer.corpus import Slice, read_documents, slice_file
from flame_composer.manifest import (
    HASH,
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
from flame_composer.packing import Pieces, no_pieces, pack
from flame_composer.tokenizer import Encoder, TokenizerFingerprint, token_dtype

TAIL = "tail"
HASH_KEY = b"flame_composer document"
BATCH_CHARACTERS = 4 << 20  # texts encoded in one call: enough to keep every core busy, little enough memory


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


def document_hash(text: str) -> bytes:
    """16 bytes that depend on the text alone."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=HASH_KEY).digest()


def split_of(digest: bytes, val_fraction: float) -> Split:
    """The side a document is on, by its hash: equal documents are on the same side, whatever their order or source."""
    return "val" if int.from_bytes(digest[:8], "big") < round(val_fraction * 2**64) else "train"


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

    def begin(self) -> None:
        """Take possession of the folder, or go on with the conversion that was interrupted in it."""
        with _explained(self.out):
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
        with _explained(self.out):
            return self._publish()

    def _publish(self) -> Manifest:
        folders = [Path(self.out, "units", unit_name(number)) for number in range(len(self.plan.units))]
        shutil.rmtree(Path(self.out, "units", TAIL), ignore_errors=True)
        writer = UnitWriter(self, TAIL, ())
        for folder in folders:
            tail = Pieces(
                np.load(folder / "tail.npy"), np.array(read_json(folder / "unit.json")["tail_doc_lengths"], np.int64)
            )
            writer.write(tail.tokens, tail.doc_lengths, carried=True)
        writer.commit()

        folders.append(Path(self.out, "units", TAIL))
        contents = [read_json(folder / "unit.json") for folder in folders]
        records = tuple(
            parse_record(content["record"], str(folder)) for folder, content in zip(folders, contents, strict=True)
        )
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
        index = dump_json(
            {
                "version": 2,
                "shards": [
                    _moved(shard, f"units/{folder.name}/")
                    for folder, content in zip(folders, contents, strict=True)
                    for shard in content["shards"]
                ],
            }
        )
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
    """Writes one work unit into a temporary folder; `commit` puts it in its place with one rename."""

    def __init__(self, dataset: DatasetWriter, name: str, inputs: Unit):
        from streaming import MDSWriter

        plan = dataset.plan
        self.name, self.inputs, self.context_length = name, inputs, plan.context_length
        # A name of its own: whoever else is at work on this unit must not write into the same folder.
        self.temporary = Path(dataset.out, "tmp", f"{name}.{uuid.uuid4().hex}")
        self.final = Path(dataset.out, "units", name)
        dtype = token_dtype(plan.tokenizer.vocab_size)
        self.tail = no_pieces(dtype)
        self.counts = {field.name: 0 for field in dataclasses.fields(Ledger)}
        self.hash = hashlib.blake2b(digest_size=16)
        self.mds = MDSWriter(
            columns={"input_ids": f"ndarray:{np.dtype(dtype).name}:{plan.context_length}", "doc_lengths": "ndarray:uint32"},
            out=str(self.temporary),
            hashes=[HASH],
            size_limit=plan.config["shard_size"],
        )

    def write(self, tokens: Any, doc_lengths: Any, *, carried: bool = False) -> None:
        """Append documents (see `packing.pack`); `carried` ones were counted by the unit they come from."""
        rows, self.tail = pack(tokens, doc_lengths, self.context_length, self.tail)
        for input_ids, lengths in rows:
            self.mds.write({"input_ids": input_ids, "doc_lengths": lengths.astype(np.uint32)})
        self.counts["carried_in" if carried else "tokens_in"] += len(tokens)
        self.counts["rows"] += len(rows)

    def commit(self) -> UnitRecord:
        self.mds.finish()
        (self.temporary / "index.json").unlink()  # its content is in unit.json; the dataset has one index
        shards: list[dict[str, Any]] = self.mds.shards
        is_tail = self.name == TAIL
        self.counts["dropped" if is_tail else "carried_out"] = len(self.tail.tokens)
        self.counts["tokens_out"] = self.counts["rows"] * self.context_length
        self.counts["shards"] = len(shards)
        self.counts["bytes"] = sum(shard["raw_data"]["bytes"] for shard in shards)
        record = UnitRecord(self.name, self.inputs, self.hash.hexdigest(), Ledger(**self.counts))
        assert record.ledger.balances, record
        if not is_tail:
            np.save(self.temporary / "tail.npy", self.tail.tokens)
        (self.temporary / "unit.json").write_bytes(
            dump_json(
                {
                    "record": dataclasses.asdict(record),
                    "shards": shards,
                    "tail_doc_lengths": [] if is_tail else self.tail.doc_lengths.tolist(),
                }
            )
        )
        try:
            os.rename(self.temporary, self.final)
        except OSError:
            if not self.final.exists():
                raise
            shutil.rmtree(self.temporary)  # another process has committed this unit, and the same plan gives the same bytes
        return record


@contextmanager
def _explained(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror or error}{f': {error.filename}' if error.filename else ''}; when that is "
            "mended, run the same command again: it goes on from the last finished unit"
        ) from None


def unit_name(number: int) -> str:
    return f"{number:06}"


def convert_unit(
    datasets: Sequence[DatasetWriter],
    number: int,
    encode: Encoder,
    on_error: Literal["fail", "skip"] = "fail",
    on_progress: Callable[[int, int, int], None] | None = None,
) -> list[UnitRecord]:
    """Read work unit `number` once and commit it to each of `datasets` (one a split) that does not have it yet.

    `on_progress` is called after every batch with the documents, tokens and input bytes done with since the last call.
    A document that cannot be read is left out and counted with `on_error="skip"`, which changes nothing for the others,
    and raises DataError with "fail"; nothing of this unit is committed then.
    """
    missing = [dataset for dataset in datasets if not dataset.is_committed(number)]
    if not missing:
        return []
    plan = missing[0].plan
    writers = {dataset.plan.split: UnitWriter(dataset, unit_name(number), plan.units[number]) for dataset in missing}
    texts: dict[Split, list[str]] = {split: [] for split in writers}
    skipped = num_bytes = 0

    def flush() -> None:
        nonlocal num_bytes
        documents = num_tokens = 0
        for split, batch in texts.items():
            if batch:
                tokens, doc_lengths = encode(batch)
                writers[split].write(tokens, doc_lengths)
                writers[split].counts["documents"] += len(batch)
                documents += len(batch)
                num_tokens += len(tokens)
                batch.clear()
        if on_progress is not None:
            on_progress(documents, num_tokens, num_bytes)
        num_bytes = 0

    def skip(error: DataError) -> None:
        nonlocal skipped
        if on_error == "fail":
            raise error
        skipped += 1

    with _explained(" and ".join(dataset.out for dataset in missing)):
        characters = 0
        for part in plan.units[number]:
            for document in read_documents(part, plan.config["text_column"], skip):
                digest = document_hash(document.text)
                split = split_of(digest, plan.config["val_fraction"])
                if split not in writers:
                    continue
                writers[split].hash.update(digest)
                texts[split].append(document.text)
                characters += len(document.text)
                if characters >= BATCH_CHARACTERS:
                    flush()
                    characters = 0
            num_bytes += part.num_bytes
        flush()
        if "train" in writers:
            writers["train"].counts["documents_skipped"] = skipped
        return [writer.commit() for writer in writers.values()]


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
    return any(Path(part.path).stat().st_mtime > committed for part in unit)


def _moved(shard: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {**shard, "raw_data": {**shard["raw_data"], "basename": prefix + shard["raw_data"]["basename"]}}


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
