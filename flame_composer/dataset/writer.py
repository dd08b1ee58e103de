"""The writing of a dataset: units committed one by one, then the manifest, then the index.

    out/index.json          what StreamingDataset reads; written last, so a folder with it is whole
    out/manifest.json       see `Manifest`
    out/units/000000/       one work unit: shard.00000.mds ..., unit.json, and the rest in tail.npy
    out/units/tail/         the rows made of the units' tails, in unit order
    out/left_out.jsonl      of tuning data: the examples that were left out, also in each unit
    out/plan.json, out/tmp/ only while a conversion is unfinished

An object store holds the same files, but no tmp/. A unit is made in a temporary local folder
(`staging`) and uploaded, unit.json last: a unit without it does not count.

Every file depends on the plan alone, not on when the units were converted, in what order, or how
often that was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flame_composer.dataset.ledger import Ledger
from flame_composer.dataset.manifest import (
    VERSIONS,
    Manifest,
    damaged,
    manifest_json,
    parse_record,
    read_json,
    read_manifest,
)
from flame_composer.dataset.mds import index_json
from flame_composer.dataset.open import check_shards, open_dataset
from flame_composer.dataset.packing import Pieces
from flame_composer.dataset.plan import (
    TAIL,
    Plan,
    inputs_of,
    is_newer,
    moved,
    plan_json,
    plan_of,
    short,
    unit_name,
)
from flame_composer.dataset.unit import UnitWriter
from flame_composer.errors import ConfigError, DataError
from flame_composer.lines import visible
from flame_composer.storage import files
from flame_composer.storage.files import dump_json
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.folders import (
    explained,
    private_folder,
    require_folder_inside,
    require_safe,
)
from flame_composer.text.documents import MAX_DOCUMENT_BYTES
from flame_composer.text.encoder import HF
from flame_composer.text.examples import REASONS
from flame_composer.text.tokenizer import token_dtype

LEFT_OUT = "left_out.jsonl"


@dataclass(frozen=True)
class DatasetWriter:
    """A writer of the dataset that is made by `plan` in the folder `out`, which may be a URL.

    It keeps nothing that is not in the folder, so any process can have one.
    """

    out: str
    plan: Plan

    @property
    def staging(self) -> Path:
        """The local folder in which units are made before they are moved or uploaded.

        It is inside `out`, and so on the same disk, or in TMPDIR if `out` is a URL.
        """
        if not is_url(self.out):
            return Path(self.out, "tmp")
        name = hashlib.sha256(self.out.encode()).hexdigest()[:16]
        return private_folder() / name

    def only(self, number: int) -> DatasetWriter:
        """Return a copy of this writer with only the inputs that the conversion of one unit needs.

        Sending the inputs of all units with every unit would take quadratic time.
        """
        return dataclasses.replace(
            self, plan=dataclasses.replace(self.plan, units={number: self.plan.units[number]})
        )

    def _place(self, *names: str) -> str:
        return files.join(self.out, *names)

    def finished(self) -> Manifest | None:
        """Return the manifest if the folder holds this plan's finished dataset, else None.

        None means that there is work to do. Raises ConfigError if the folder holds something else,
        and DataError if the finished dataset is damaged.
        """
        out = self.out
        if files.stat(out) is not None:
            raise ConfigError(f"out: {out}: is a file; name a folder")
        if not is_url(out):
            require_safe(Path(out), "out")
            for name in ("tmp", "units"):
                require_folder_inside(Path(out), name, "out")
        names = files.ls(out)
        if "index.json" in names:
            manifest = read_manifest(self.out)
            self._refuse_difference(plan_of(manifest), inputs_too=True)
            check_shards(open_dataset(self.out))
            self._clean()
            return manifest
        if "plan.json" in names:
            # Inputs may differ: they may have been mended since the conversion stopped, and
            # `is_committed` refuses the units made from their earlier content.
            self._refuse_difference(read_json(self._place("plan.json")), inputs_too=False)
        elif any(name != "plan.json.tmp" for name in names):
            raise ConfigError(
                f"out: {out}: this folder is not empty and holds no conversion; name a new one or"
                " empty it"
            )
        return None

    def begun_encoder(self) -> str | None:
        """Return the encoder of the conversion in the folder, finished or not, or None."""
        for name in ("manifest.json", "plan.json"):
            if files.stat(self._place(name)) is not None:
                content = read_json(self._place(name))
                settings = content.get("config") if isinstance(content, dict) else None
                return str(settings.get("encoder", HF)) if isinstance(settings, dict) else None
        return None

    def begin(self) -> None:
        """Claim the folder for this plan, or continue the conversion that was interrupted in it."""
        with explained(self.out):
            if not is_url(self.out):
                Path(self.out).mkdir(parents=True, exist_ok=True)
            files.write(self._place("plan.json"), dump_json(plan_json(self.plan)))
            if not is_url(self.out):
                Path(self.out, "tmp").mkdir(exist_ok=True)
                Path(self.out, "units").mkdir(exist_ok=True)

    def uncommitted(self) -> set[int]:
        """Return the numbers of the units that are still to be converted."""
        with explained(self.out):
            there = set(files.ls(self._place("units")))
            begun = [number for number in range(len(self.plan.units)) if unit_name(number) in there]
            committed = [
                number
                for number, done in zip(begun, files.each(self.is_committed, begun), strict=True)
                if done
            ]
            return set(range(len(self.plan.units))) - set(committed)

    def is_committed(self, number: int) -> bool:
        """Return whether the unit is there, whole, and made from the inputs as they are now.

        Otherwise, whatever is there of the unit is deleted, so that it is converted again.
        """
        folder = self._place("units", unit_name(number))
        there = files.find(folder)
        record = there.get("unit.json")
        if record is not None:
            content = read_json(files.join(folder, "unit.json"))
            try:
                sizes = {
                    shard["raw_data"]["basename"]: shard["raw_data"]["bytes"]
                    for shard in content["shards"]
                }
            except (KeyError, TypeError):
                raise damaged(files.join(folder, "unit.json"), "it lists no shards") from None
            whole = all(name in there and there[name].size == size for name, size in sizes.items())
            same_inputs = parse_record(content["record"], folder).inputs == self.plan.units[number]
            if whole and same_inputs and not is_newer(self.plan.units[number], record.modified):
                return True
        files.retract_folder(folder, "unit.json")
        return False

    def publish(self) -> Manifest:
        """Pack the units' tails, write manifest.json and, last, index.json; return the manifest.

        Every unit must be committed. Raises DataError if the documents do not fill a single row.
        """
        with explained(self.out):
            return self._publish()

    def _publish(self) -> Manifest:
        names = [unit_name(number) for number in range(len(self.plan.units))]
        units = dict(zip(names, files.each(self._read_unit, names), strict=True))
        order = [names[number] for number in self._unit_order()]
        tails = files.each(lambda name: files.read(self._place("units", name, "tail.npy")), order)
        lengths = [np.array(units[name]["tail_doc_lengths"], np.int64) for name in order]
        pieces = [
            Pieces(np.load(io.BytesIO(tail)), each)
            for tail, each in zip(tails, lengths, strict=True)
        ]
        self._write_tail([piece for piece in pieces if len(piece.tokens)])
        units[TAIL] = self._read_unit(TAIL)

        shards = [
            moved(shard, f"units/{name}/")
            for name in (*order, TAIL)
            for shard in units[name]["shards"]
        ]
        left_out_files = (
            [("units", name, LEFT_OUT) for name in order] if self.plan.kind == "sft" else []
        )
        self._delete_others(
            {f"units/{name}/unit.json" for name in units}
            | {f"units/{name}/tail.npy" for name in names}
            | {shard["raw_data"]["basename"] for shard in shards}
            | {"/".join(name) for name in left_out_files}
        )
        records = tuple(
            parse_record(unit["record"], self._place("units", name)) for name, unit in units.items()
        )
        totals = sum((record.ledger for record in records), Ledger())
        self._check_totals(totals)
        index = index_json(shards)
        manifest = Manifest(
            version=VERSIONS[self.plan.kind],
            split=self.plan.split,
            tokenizer=self.plan.tokenizer,
            context_length=self.plan.context_length,
            token_dtype=np.dtype(token_dtype(self.plan.tokenizer.vocab_size)).name,
            config=self.plan.config,
            units=records,
            totals=totals,
            index_sha256=hashlib.sha256(index).hexdigest(),
            kind=self.plan.kind,
        )
        if self.plan.kind == "sft":
            left_out = files.each(lambda name: files.read(self._place(*name)), left_out_files)
            files.write(self._place(LEFT_OUT), b"".join(left_out))
        files.write(self._place("manifest.json"), dump_json(manifest_json(manifest)))
        files.write(self._place("index.json"), index)
        self._clean()
        return manifest

    def _write_tail(self, tails: list[Pieces]) -> None:
        """Write the tail unit, made of the tokens that filled no row of their own unit."""
        files.retract_folder(self._place("units", TAIL), "unit.json")
        writer = UnitWriter(self, None)
        try:
            for tail in tails:
                writer.carry(tail)
            writer.commit(None)
        except BaseException:
            writer.discard()
            raise

    def _check_totals(self, totals: Ledger) -> None:
        """Raise DataError if the dataset has no documents, or too few tokens for a row."""
        assert totals.balances, totals
        assert totals.carried_in == totals.carried_out, totals
        assert totals.tokens_out == totals.rows * self.plan.context_length, totals
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
                f"{self.out}: no {what} for the {self.plan.split} split "
                f"({totals.documents_skipped} skipped{left_out}{self._first_detail()}); {remedy}"
            )
        if totals.rows == 0:
            raise DataError(
                f"{self.out}: the {self.plan.split} split's {totals.tokens_in} tokens do not fill"
                f" one row of context_length={self.plan.context_length}; remove this folder and"
                " give more text or shorter rows"
            )

    def _first_detail(self) -> str:
        """Return what exactly was wrong with the first example that was left out, for an error."""
        for number in range(len(self.plan.units) if self.plan.kind == "sft" else 0):
            lines = files.read(self._place("units", unit_name(number), LEFT_OUT)).splitlines()
            details = (json.loads(line)["detail"] for line in lines)
            if detail := next(filter(None, details), ""):
                return f"; the first: {visible(detail)[:200]}"
        return ""

    def _unit_order(self) -> list[int]:
        """Return the unit numbers in the dataset's order: shuffled if there is a seed."""
        number = len(self.plan.units)
        seed = self.plan.config["seed"] if self.plan.kind == "text" else None
        return (
            list(range(number))
            if seed is None
            else np.random.default_rng(seed).permutation(number).tolist()
        )

    def _read_unit(self, name: str) -> Any:
        return read_json(self._place("units", name, "unit.json"))

    def _delete_others(self, wanted: set[str]) -> None:
        """Delete what killed processes and earlier plans have left among the units."""
        folders = {name.split("/")[1] for name in wanted}
        for name in files.ls(self._place("units")):
            if name not in folders:
                files.delete_folder(self._place("units", name))
        for name in files.find(self._place("units")):
            if f"units/{name}" not in wanted:
                files.delete(self._place("units", name))
        files.abort_uploads(self.out)

    def _clean(self) -> None:
        files.delete(self._place("plan.json"))
        shutil.rmtree(self.staging, ignore_errors=True)

    def _refuse_difference(self, there: Any, *, inputs_too: bool) -> None:
        """Raise ConfigError if `there`, the plan read from the folder, is not this writer's plan.

        The error names every key that differs. Inputs are only compared if `inputs_too`.
        """
        here = plan_json(self.plan)
        if (
            not isinstance(there, dict)
            or there.keys() - {"kind"} != here.keys() - {"kind"}
            or not isinstance(there["config"], dict)
        ):
            raise damaged(self.out, "it holds no plan this version can read")
        if there["version"] != here["version"]:
            kinds = {number: kind for kind, number in VERSIONS.items()}
            raise ConfigError(
                f"out: {self.out}: holds a conversion of another kind"
                f" ({kinds.get(there['version'], 'unknown')} there, {self.plan.kind} now); name"
                " another out, or remove this folder"
            )
        flat = []
        for plan in (there, here):
            # Plans made before documents had a size limit do not record one.
            config, units = (
                {"max_document_bytes": MAX_DOCUMENT_BYTES, **plan.pop("config")},
                plan.pop("units"),
            )
            flat.append({**plan, **config, **(inputs_of(units) if inputs_too else {})})
        differing = [key for key in flat[0] | flat[1] if flat[0].get(key) != flat[1].get(key)]
        if differing:
            shown = [
                f"{key} ({short(flat[0].get(key))} there, {short(flat[1].get(key))} now)"
                for key in differing
            ]
            raise ConfigError(
                f"out: {self.out}: holds a conversion with other settings: {', '.join(shown)}; name"
                " another out, or remove this folder"
            )
