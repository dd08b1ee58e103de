"""The plan of a conversion: its settings and work units, on which every byte depends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flame_composer.dataset.manifest import VERSIONS, Kind, Manifest, Split
from flame_composer.storage.files import dump_json, stat
from flame_composer.text.given_tokens import beside
from flame_composer.text.sources import Slice, Unit, slice_files, slice_json
from flame_composer.text.tokenizer import TokenizerFingerprint


@dataclass(frozen=True)
class Plan:
    """Everything that a dataset's bytes depend on.

    `config` holds all conversion settings that the other fields do not, as JSON values. `units`
    holds the inputs of every unit by its number, or in a worker those of one unit alone
    (`DatasetWriter.only`).
    """

    split: Split
    tokenizer: TokenizerFingerprint
    context_length: int
    config: dict[str, Any]
    units: Sequence[Unit] | Mapping[int, Unit]
    kind: Kind = "text"


def plan_units(files: Sequence[str], unit_size: int, *, arrays: bool = False) -> tuple[Unit, ...]:
    """Return the files in order, grouped into work units of about `unit_size` bytes.

    Large files are split; with `arrays`, a file may hold one JSON array. The units depend on the
    files alone (names, sizes, first bytes), never on the number of workers.
    """
    return group(slice_files(files, unit_size, arrays=arrays), unit_size)


def group(parts: Iterable[Slice], unit_size: int) -> tuple[Unit, ...]:
    """Return slices of files in order, grouped into work units of about `unit_size` bytes."""
    units: list[Unit] = []
    unit: list[Slice] = []
    num_bytes = 0
    for part in parts:
        if unit and num_bytes + part.num_bytes > unit_size:
            units.append(tuple(unit))
            unit, num_bytes = [], 0
        unit.append(part)
        num_bytes += part.num_bytes
    return (*units, tuple(unit)) if unit else tuple(units)


def unit_name(number: int) -> str:
    return f"{number:06}"


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values, with lists in place of tuples."""
    content = {"version": VERSIONS[plan.kind], **dataclasses.asdict(plan)}
    assert not isinstance(plan.units, Mapping), "a worker has no whole plan"
    content["units"] = [[slice_json(part) for part in unit] for unit in plan.units]
    if plan.kind == "text":
        del content["kind"]  # as such plans always were
    return json.loads(dump_json(content))


def plan_of(manifest: Manifest) -> dict[str, Any]:
    """Return the plan that a finished dataset was made by, as `plan_json` does."""
    units = tuple(record.inputs for record in manifest.units if record.name != TAIL)
    return plan_json(
        Plan(
            manifest.split,
            manifest.tokenizer,
            manifest.context_length,
            manifest.config,
            units,
            manifest.kind,
        )
    )


def inputs_of(units: Any) -> dict[str, str]:
    """Return short descriptions of a plan's input files and of the formats they are read as.

    They differ whenever the files, their sizes, their versions or their formats do.
    """
    sizes: dict[str, int] = {}
    versions: dict[str, str] = {}
    formats: dict[str, str] = {}
    for part in (part for unit in units for part in unit):
        sizes[part["path"]] = sizes.get(part["path"], 0) + part["num_bytes"]
        if "version" in part and part["version"] is not None:
            versions[part["path"]] = part["version"]
        if "beside" in part:
            versions[f"beside {part['path']}"] = part["beside"]
        formats[part["path"]] = part["format"]
    digest = hashlib.sha256(dump_json([list(sizes.items()), versions])).hexdigest()
    digest_of_formats = hashlib.sha256(dump_json(formats)).hexdigest()
    counts = ", ".join(
        f"{number} {name}" for name, number in sorted(Counter(formats.values()).items())
    )
    return {
        "inputs": f"{len(sizes)} files of {sum(sizes.values())} bytes, hash {digest[:8]}",
        "formats": f"{counts}, hash {digest_of_formats[:8]}",
    }


def is_newer(unit: Unit, committed: float) -> bool:
    """Return whether a local input file was written to, or deleted, after the time `committed`.

    Objects in a store are not checked here: their versions show whether they have changed.
    """
    parts = [part for part in unit if part.format != "dataset" and part.version is None]
    paths = [part.path for part in parts] + [name for name in map(beside, parts) if name]
    return any(found is None or found.modified > committed for found in map(stat, paths))


def moved(shard: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return a shard's index entry with `prefix` before its basename."""
    return {
        **shard,
        "raw_data": {**shard["raw_data"], "basename": prefix + shard["raw_data"]["basename"]},
    }


def short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


TAIL = "tail"
