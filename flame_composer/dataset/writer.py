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
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame_composer.dataset.index import is_made_of, read_without
from flame_composer.dataset.ledger import Ledger
from flame_composer.dataset.manifest import (
    VERSIONS,
    damaged,
    parse_record,
    read_json,
    read_manifest,
)
from flame_composer.dataset.open import check_shards, open_dataset
from flame_composer.dataset.plan import (
    Plan,
    changed_since,
    inputs_of,
    is_newer,
    is_same,
    plan_parts,
    settings_json,
    settings_of,
    short,
    unit_name,
)
from flame_composer.dataset.publish import publish
from flame_composer.dataset.unit import is_whole
from flame_composer.errors import ConfigError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.folders import (
    explained,
    private_folder,
    require_folder_inside,
    require_safe,
)
from flame_composer.storage.many import each
from flame_composer.text.documents import MAX_DOCUMENT_BYTES
from flame_composer.text.encoder import HF
from flame_composer.text.sources import Unit


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

    def without_units(self) -> DatasetWriter:
        """Return a copy of this writer that has no units: what all of them share."""
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, units={}))

    def with_unit(self, number: int, unit: Unit) -> DatasetWriter:
        """Return a copy of this writer that has one unit alone.

        Sending the inputs of all units with every unit would take quadratic time.
        """
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, units={number: unit}))

    def _place(self, *names: str) -> str:
        return files.join(self.out, *names)

    def _units(self) -> Sequence[Unit]:
        assert not isinstance(self.plan.units, Mapping), "a worker has no whole plan"
        return self.plan.units

    def finished(self) -> Ledger | None:
        """Return the totals if the folder holds this plan's finished dataset, else None.

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
            dataset = open_dataset(self.out, with_units=False)
            inputs = None
            if not is_made_of(
                out, dataset.manifest, (*self._units(), ())
            ):  # the tail has no inputs
                inputs = inputs_of(unit.inputs for unit in read_manifest(out).units)
            self._refuse_difference(settings_of(dataset.manifest), inputs)
            check_shards(dataset)
            self._clean()
            return dataset.manifest.totals
        if "plan.json" in names:
            # Inputs may differ: they may have been mended since the conversion stopped, and
            # `begin` retracts the units made from their earlier content.
            place = self._place("plan.json")
            self._refuse_difference(read_without(place, "units"))
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
                place = self._place(name)
                content = read_without(place, "units")
                settings = content.get("config") if isinstance(content, dict) else None
                return str(settings.get("encoder", HF)) if isinstance(settings, dict) else None
        return None

    def begin(self) -> None:
        """Claim the folder for this plan, or continue the conversion that was interrupted in it.

        Units that were made from other inputs than those of today are retracted before the plan
        that says so is replaced.
        """
        place = self._place("plan.json")
        with explained(self.out):
            if not is_url(self.out):
                Path(self.out).mkdir(parents=True, exist_ok=True)
            there = files.stat(place)
            earlier = b"" if there is None else files.read(place)
            if there is not None:
                suspects = changed_since(self.plan, earlier, there.modified, place)
                if suspects:
                    begun = sorted(suspects - self.uncommitted())
                    list(each(self.is_committed, begun))
            if not is_same(earlier, plan_parts(self.plan)):
                files.write_parts(place, plan_parts(self.plan))
            if not is_url(self.out):
                Path(self.out, "tmp").mkdir(exist_ok=True)
                Path(self.out, "units").mkdir(exist_ok=True)

    def uncommitted(self) -> set[int]:
        """Return the numbers of the units that are still to be converted, as a listing shows them.

        In an object store that lists 1,000 units at a time, and nothing of them is read. A unit of
        which only a part was uploaded is not among them: `publish` finds it.
        """
        with explained(self.out):
            there = set(files.ls(self._place("units")))
            numbers = range(len(self.plan.units))
            return {number for number in numbers if unit_name(number) not in there}

    def is_committed(self, number: int) -> bool:
        """Return whether the unit is there, whole, and made from the inputs as they are now.

        Otherwise, whatever is there of the unit is deleted, so that it is converted again.
        """
        folder = self._place("units", unit_name(number))
        there = files.find(folder)
        record = there.get("unit.json")
        if record is not None:
            content = read_json(files.join(folder, "unit.json"))
            whole = is_whole(content, there, self.plan.kind, folder)
            same_inputs = parse_record(content["record"], folder).inputs == self.plan.units[number]
            if whole and same_inputs and not is_newer(self.plan.units[number], record.modified):
                return True
        files.retract_folder(folder, "unit.json")
        return False

    def publish(self) -> Ledger:
        """Pack the units' tails, write manifest.json and, last, index.json; return the totals.

        Raises NotWhole if there are units that are not committed, DataError if the documents do not
        fill a single row.
        """
        with explained(self.out):
            totals = publish(self)
            self._clean()
            return totals

    def _clean(self) -> None:
        files.delete(self._place("plan.json"))
        shutil.rmtree(self.staging, ignore_errors=True)

    def _refuse_difference(self, there: Any, inputs: dict[str, str] | None = None) -> None:
        """Raise ConfigError if `there`, the plan read from the folder, is not this writer's plan.

        The error names every key that differs. Inputs are only compared if they are given, as
        `inputs_of` describes them.
        """
        here = settings_json(self.plan)
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
        inputs_here = None if inputs is None else inputs_of(self._units())
        # Plans made before documents had a size limit do not record one.
        flat = [
            {**plan, "max_document_bytes": MAX_DOCUMENT_BYTES, **plan["config"], **(of_plan or {})}
            for plan, of_plan in ((there, inputs), (here, inputs_here))
        ]
        for plan in flat:
            del plan["config"], plan["units"]
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
