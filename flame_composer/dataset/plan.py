"""A conversion's plan: its settings and its work units, on which every byte depends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flame_composer.dataset.manifest import VERSION, Manifest, Split
from flame_composer.storage.files import dump_json, stat
from flame_composer.text.sources import Slice, Unit, slice_files
from flame_composer.text.tokenizer import TokenizerFingerprint


@dataclass(frozen=True)
class Plan:
    """All that a dataset's bytes depend on. `config` holds the conversion settings, JSON values
    only, and says whatever the other fields do not. `units` holds the inputs of every unit by
    its number; of one unit alone in a worker (`DatasetWriter.only`).
    """

    split: Split
    tokenizer: TokenizerFingerprint
    context_length: int
    config: dict[str, Any]
    units: Sequence[Unit] | Mapping[int, Unit]


def plan_units(files: Sequence[str], unit_size: int) -> tuple[Unit, ...]:
    """The files in order, grouped into work units of about `unit_size` bytes; large files are
    split.

    Depends on the files alone (names, sizes, first bytes), never on the number of workers.
    """
    units: list[Unit] = []
    unit: list[Slice] = []
    num_bytes = 0
    for part in slice_files(files, unit_size):
        if unit and num_bytes + part.num_bytes > unit_size:
            units.append(tuple(unit))
            unit, num_bytes = [], 0
        unit.append(part)
        num_bytes += part.num_bytes
    return (*units, tuple(unit)) if unit else tuple(units)


def unit_name(number: int) -> str:
    return f"{number:06}"


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON holds it, lists for tuples."""
    return json.loads(dump_json({"version": VERSION, **dataclasses.asdict(plan)}))


def plan_of(manifest: Manifest) -> dict[str, Any]:
    units = tuple(record.inputs for record in manifest.units if record.name != TAIL)
    return plan_json(
        Plan(manifest.split, manifest.tokenizer, manifest.context_length, manifest.config, units)
    )


def inputs_of(units: Any) -> dict[str, str]:
    """The input files of a plan in a few words that differ when the files, their sizes or
    versions do, and what each is read as.
    """
    sizes: dict[str, int] = {}
    versions: dict[str, str] = {}
    formats: dict[str, str] = {}
    for part in (part for unit in units for part in unit):
        sizes[part["path"]] = sizes.get(part["path"], 0) + part["num_bytes"]
        if "version" in part and part["version"] is not None:
            versions[part["path"]] = part["version"]
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
    """Whether a file was written since; in an object store, versions tell."""
    paths = (part.path for part in unit if part.format != "dataset" and part.version is None)
    return any(found is None or found.modified > committed for found in map(stat, paths))


def moved(shard: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        **shard,
        "raw_data": {**shard["raw_data"], "basename": prefix + shard["raw_data"]["basename"]},
    }


def short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


TAIL = "tail"
