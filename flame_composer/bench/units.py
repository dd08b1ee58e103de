"""What a conversion of very many work units takes besides converting: plan, resume, publish, again.

    python -c "from flame_composer.bench.units import measure_units; measure_units(500_000)"

The plan is a real one, of files of JSON lines that take no space on the disk. The units are copies
of one that was really made, each with a record of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from flame_composer.bench.measure import measure
from flame_composer.dataset.plan import Plan, plan_units, unit_name
from flame_composer.dataset.unit import UnitWriter
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.quantities import align
from flame_composer.storage.files import dump_json
from flame_composer.text.encoder import HF
from flame_composer.text.sources import find_files, slice_json
from flame_composer.text.tokenizer import TokenizerFingerprint

UNIT_SIZE = 64 << 20
UNITS_A_FILE = 5000
CONTEXT_LENGTH, NUM_TAIL = 2048, 1000  # tokens in a row, and in the tail of a unit
LINKS = 50_000  # of a file; a filesystem may allow no more than 65,000
STAGES = ("plan", "resume", "publish", "again")
RUN = (
    "import sys; from flame_composer.bench.units import run; run(*sys.argv[1:3], int(sys.argv[3]))"
)


def write_sources(folder: Path, num_units: int) -> None:
    """Write JSON lines of `num_units` units to the new folder `folder`, in files full of holes."""
    folder.mkdir()
    for first in range(0, num_units, UNITS_A_FILE):
        number = min(UNITS_A_FILE, num_units - first)
        with (folder / f"{first:08}.jsonl").open("wb") as file:
            file.write(b'{"text": "the rest is a hole"}\n')
            file.truncate(number * UNIT_SIZE)
        # Written long ago, as most text was: not in the second in which the conversion began
        os.utime(folder / f"{first:08}.jsonl", (0, 0))


def plan_dataset(source: str, out: str) -> DatasetWriter:
    """Return the writer of a dataset of the text in `source`, whose units are shuffled."""
    settings = {
        "source": [source],
        "text_column": "text",
        "val_fraction": 0.0,
        "shard_size": UNIT_SIZE,
        "unit_size": UNIT_SIZE,
        "max_doc_length": None,
        "min_doc_length": None,
        "seed": 1,
        "max_document_bytes": UNIT_SIZE,
        "encoder": HF,
    }
    units = plan_units(find_files([source]), UNIT_SIZE)
    tokenizer = TokenizerFingerprint("0" * 64, 32000, None, 0)
    return DatasetWriter(out, Plan("train", tokenizer, CONTEXT_LENGTH, settings, units))


def write_units(dataset: DatasetWriter, first: DatasetWriter) -> None:
    """Write all units of `dataset`, which are those of `first` with other names and inputs.

    `first` is given its unit 0 here; its folder, on the same disk, must be new.
    """
    first.begin()
    unit = UnitWriter(first, 0)
    tokens = np.arange(2 * CONTEXT_LENGTH + NUM_TAIL, dtype=unit.dtype)
    unit.write(tokens, np.array([CONTEXT_LENGTH, CONTEXT_LENGTH + 600, NUM_TAIL - 600]))
    unit.commit(HF)
    source = Path(first.out, "units", unit_name(0))
    content = json.loads((source / "unit.json").read_bytes())
    names = sorted(path.name for path in source.iterdir() if path.name != "unit.json")
    for number, name in enumerate(map(unit_name, range(len(dataset.plan.units)))):
        folder = Path(dataset.out, "units", name)
        folder.mkdir()
        for file in names:
            if number % LINKS:
                os.link(source / file, folder / file)
            else:
                shutil.copyfile(source / file, folder / file)
        source = source if number % LINKS else folder
        inputs = [slice_json(part) for part in dataset.plan.units[number]]
        content["record"] |= {"name": name, "inputs": inputs}
        (folder / "unit.json").write_bytes(dump_json(content))


def run(stage: str, folder: str, num_units: int) -> None:
    """Run a stage of the conversion in `folder`; all begin with planning, as to_mds does."""
    dataset = plan_dataset(f"{folder}/source", f"{folder}/out")
    assert len(dataset.plan.units) == num_units
    if stage == "plan":
        assert dataset.finished() is None
        dataset.begin()
    elif stage == "resume":
        assert dataset.begun_encoder() == HF
        assert dataset.finished() is None
        dataset.begin()
        assert dataset.uncommitted() == set()
    elif stage == "publish":
        assert dataset.publish().rows > num_units
    else:  # the same command when there is nothing left to do
        totals = dataset.finished()
        assert totals is not None
        assert totals.rows > num_units


def measure_units(num_units: int, place: str | None = None) -> None:
    """Print what each stage of a conversion of `num_units` units takes, in a process of its own.

    The units are made in `place`, or the system's temporary folder, and removed in the end. They
    take about 16 KB each there.
    """
    lines: list[tuple[str, ...]] = [("stage", "seconds", "CPU-seconds", "peak MB")]
    with tempfile.TemporaryDirectory(dir=place) as folder:
        write_sources(Path(folder, "source"), num_units)
        for stage in STAGES:
            usage = measure([sys.executable, "-c", RUN, stage, folder, str(num_units)])
            figures = (usage.seconds, usage.cpu_seconds, usage.peak_bytes / 1e6)
            lines.append((stage, *(f"{figure:,.1f}" for figure in figures)))
            if stage == "plan":
                dataset = plan_dataset(f"{folder}/source", f"{folder}/out")
                write_units(dataset, plan_dataset(f"{folder}/source", f"{folder}/one"))
        print("\n".join(align(lines)), flush=True)
