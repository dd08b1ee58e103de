"""The plan of a conversion: its settings and work units, on which every byte depends."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from flame_composer.dataset.manifest import VERSIONS, Kind, Manifest, Split, parse_json
from flame_composer.dataset.streamed import element_json, object_parts
from flame_composer.storage.files import dump_json, stat
from flame_composer.storage.filesystems import Stat
from flame_composer.text.given_tokens import beside
from flame_composer.text.sources import Slice, Unit, slice_files, slice_json
from flame_composer.text.tokenizer import TokenizerFingerprint


@dataclass(frozen=True)
class Plan:
    """Everything that a dataset's bytes depend on.

    `config` holds all conversion settings that the other fields do not, as JSON values. `units`
    holds the inputs of every unit by its number, or in a worker those of one unit alone
    (`DatasetWriter.with_unit`).
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


def settings_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values, without its units: their list is empty."""
    content = {
        "version": VERSIONS[plan.kind],
        **dataclasses.asdict(dataclasses.replace(plan, units=())),
    }
    if plan.kind == "text":
        del content["kind"]  # as such plans always were
    return json.loads(dump_json(content))


def plan_parts(plan: Plan) -> Iterator[bytes]:
    """Yield, in parts, the content of plan.json."""
    assert not isinstance(plan.units, Mapping), "a worker has no whole plan"
    units = (element_json([slice_json(part) for part in unit]) for unit in plan.units)
    return object_parts(settings_json(plan), "units", units)


def settings_of(manifest: Manifest) -> dict[str, Any]:
    """Return the plan that a finished dataset was made by, as `settings_json` does."""
    return settings_json(
        Plan(
            manifest.split,
            manifest.tokenizer,
            manifest.context_length,
            manifest.config,
            (),
            manifest.kind,
        )
    )


def inputs_of(units: Iterable[Unit]) -> dict[str, str]:
    """Return short descriptions of a plan's input files and of the formats they are read as.

    They differ whenever the files, their sizes, their versions or their formats do.
    """
    sizes: dict[str, int] = {}
    versions: dict[str, str] = {}
    formats: dict[str, str] = {}
    for part in chain.from_iterable(units):
        sizes[part.path] = sizes.get(part.path, 0) + part.num_bytes
        if part.version is not None:
            versions[part.path] = part.version
        if part.beside is not None:
            versions[f"beside {part.path}"] = part.beside
        formats[part.path] = part.format
    digest = hashlib.sha256(dump_json([list(sizes.items()), versions])).hexdigest()
    digest_of_formats = hashlib.sha256(dump_json(formats)).hexdigest()
    counts = ", ".join(
        f"{number} {name}" for name, number in sorted(Counter(formats.values()).items())
    )
    return {
        "inputs": f"{len(sizes)} files of {sum(sizes.values())} bytes, hash {digest[:8]}",
        "formats": f"{counts}, hash {digest_of_formats[:8]}",
    }


def changed_since(plan: Plan, earlier: bytes, written: float, place: str) -> set[int]:
    """Return the numbers of the units whose inputs may be others than when a plan was written.

    `earlier` is the content of that plan.json, of `place`, and `written` its time. A unit is among
    them if that plan has other inputs for it, or a local input file was written to, or deleted,
    since then. (Versions, which are in the plan, tell whether objects in a store have changed.)
    """
    assert not isinstance(plan.units, Mapping), "a worker has no whole plan"
    changed: set[int] = set()
    if not is_same(earlier, plan_parts(plan)):
        there = parse_json(earlier, place)["units"]
        for number, unit in enumerate(plan.units):
            if number >= len(there) or there[number] != [slice_json(part) for part in unit]:
                changed.add(number)
    is_touched = functools.cache(lambda path: _is_newer(stat(path), written))
    changed.update(
        number for number, unit in enumerate(plan.units) if any(map(is_touched, local_inputs(unit)))
    )
    return changed


def is_same(data: bytes, parts: Iterable[bytes]) -> bool:
    """Return whether `data` is these parts, end to end."""
    start = 0
    for part in parts:
        if not data.startswith(part, start):
            return False
        start += len(part)
    return start == len(data)


def is_newer(unit: Unit, committed: float) -> bool:
    """Return whether a local input file was written to, or deleted, after the time `committed`.

    Objects in a store are not checked here: their versions show whether they have changed.
    """
    return any(_is_newer(found, committed) for found in map(stat, local_inputs(unit)))


def _is_newer(found: Stat | None, committed: float) -> bool:
    return found is None or found.modified > committed


def local_inputs(unit: Unit) -> list[str]:
    """Return the paths of a unit's local input files, and of those beside them."""
    parts = [part for part in unit if part.format != "dataset" and part.version is None]
    return [part.path for part in parts] + [name for name in map(beside, parts) if name]


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
