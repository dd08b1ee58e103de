"""A conversion of very many work units: what is asked of a store, sent to a cluster, and kept."""

from __future__ import annotations

import gc
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flame_composer.bench.units import plan_dataset, write_sources, write_units
from flame_composer.dataset import long_json
from flame_composer.dataset.finish import published
from flame_composer.dataset.manifest import read_manifest
from flame_composer.dataset.plan import Plan, is_same, plan_parts, settings_json, unit_name
from flame_composer.dataset.publish import NotWhole
from flame_composer.dataset.streamed import object_parts
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.errors import DataError
from flame_composer.storage import files, many
from flame_composer.storage.files import dump_json
from flame_composer.text.sources import slice_json
from tests.proxy import proxy
from tests.s3 import BUCKET, S3


def plan_of(place: Path, num_units: int) -> DatasetWriter:
    place.mkdir()
    write_sources(place / "source", num_units)
    return plan_dataset(str(place / "source"), str(place / "out"))


def units_of(place: Path, num_units: int) -> DatasetWriter:
    """A conversion with all its units committed, in `place`/out."""
    dataset = plan_of(place, num_units)
    dataset.begin()
    write_units(dataset, plan_dataset(str(place / "source"), str(place / "one")))
    return dataset


# Bytes


@pytest.mark.parametrize("elements", [[], [1], list(range(2500))])
def test_a_list_written_in_parts_is_the_same_json(elements: list[int]) -> None:
    content = {"config": {"a": 'with "units": [] in it', "é": [1]}, "version": 1}
    parts = list(object_parts(content, "units", map(json.dumps, elements)))
    whole = dump_json({**content, "units": elements})
    assert b"".join(parts) == whole
    assert len(parts) <= 2 + -(-len(elements) // 1000)
    assert is_same(whole, parts)
    assert not is_same(whole + b" ", parts)
    assert not is_same(whole[:-1], parts)


def test_plan_manifest_and_index_are_the_bytes_of_their_content(tmp_path: Path) -> None:
    dataset = units_of(tmp_path / "data", 1030)
    plan: Plan = dataset.plan
    units = [[slice_json(part) for part in unit] for unit in plan.units]
    expected = dump_json({**settings_json(plan), "units": units})
    assert (tmp_path / "data/out/plan.json").read_bytes() == expected
    assert b"".join(plan_parts(plan)) == expected
    totals = dataset.publish()
    for name in ("manifest.json", "index.json"):
        data = (tmp_path / "data/out" / name).read_bytes()
        assert data == dump_json(json.loads(data))
    manifest = read_manifest(dataset.out)  # which checks that the ledger balances
    assert manifest.totals == totals
    assert totals.tokens_in == totals.tokens_out + totals.dropped
    records = [
        json.loads((path / "unit.json").read_bytes())
        for path in sorted(path for path in Path(dataset.out, "units").iterdir())
    ]
    content = json.loads(Path(dataset.out, "manifest.json").read_bytes())
    assert content["units"] == [record["record"] for record in records]


# What grows with the number of units


def test_publishing_keeps_little_of_every_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records, index entries and tails were all in memory: 9 KB a unit."""
    # Up to 2 * THREADS * BATCH are being read at a time of a slow disk, which is as many as there
    # are of few: how far the threads get ahead is not what is kept
    monkeypatch.setattr(many, "BATCH", 4)

    def peak(name: str, num_units: int) -> int:
        dataset = units_of(tmp_path / name, num_units)
        dataset.plan.config["shard_size"] = 100_000  # of the tail unit: one is in memory
        gc.collect()
        tracemalloc.start()
        dataset.publish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak("warm", 10)
    assert peak("many", 4000) - peak("few", 2000) < 2000 * 300


def test_a_finished_dataset_is_known_again_without_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record was an object, and the manifest was read twice: 5 KB a unit."""
    monkeypatch.setattr(long_json, "BLOCK", 1 << 12)  # less than the files of few have

    def peak(name: str, num_units: int) -> int:
        dataset = units_of(tmp_path / name, num_units)
        totals = dataset.publish()
        tracemalloc.start()
        assert dataset.finished() == totals
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak("warm", 10)
    few, many = peak("few", 1000), peak("many", 3000)
    assert many - few < 2000 * 300


def test_records_that_do_not_add_up_are_said_to_be_damaged(tmp_path: Path) -> None:
    dataset = units_of(tmp_path / "data", 3)
    dataset.publish()
    place = Path(dataset.out, "manifest.json")
    content = json.loads(place.read_bytes())
    content["units"][1]["ledger"]["rows"] += 1
    place.write_text(json.dumps(content))
    with pytest.raises(DataError, match="its token ledger does not balance"):
        dataset.finished()


def test_reading_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """Python makes room for all that it is asked to read; a gigabyte was asked for."""
    (tmp_path / "small").write_bytes(b"x" * 1000)
    tracemalloc.start()
    assert files.read(str(tmp_path / "small")) == b"x" * 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    with pytest.raises(DataError, match="has more than 999 bytes"):
        files.read(str(tmp_path / "small"), 999)
    assert len(files.read("/proc/self/status")) > 100, "whose size is said to be 0"


def test_items_are_taken_as_results_are() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10_000):
            taken.append(number)
            yield number

    for batch in (1, 7):
        taken.clear()
        for number, result in enumerate(many.each(lambda item: -item, items(), batch)):
            assert result == -number
            assert len(taken) <= number + 1 + (2 * many.THREADS + 1) * batch
        assert len(taken) == 10_000


def test_only_files_that_are_waited_for_are_read_by_several_threads() -> None:
    def threads_of(seconds: float) -> set[int]:
        def read(item: int) -> tuple[int, int]:
            time.sleep(seconds)
            return item, threading.get_ident()

        results = list(many.each_local(read, range(1000)))
        assert [item for item, _ in results] == list(range(1000))
        return {thread for _, thread in results}

    assert threads_of(0) == {threading.get_ident()}
    assert len(threads_of(2 * many.SLOW)) > 2
    with pytest.raises(ZeroDivisionError):
        list(many.each_local(lambda item: 1 // item, range(5)))


# Resuming in an object store


def begin_in_store(dataset: DatasetWriter, numbers: Sequence[int]) -> None:
    """What a killed conversion left in a store of these units, as far as a listing shows it."""
    dataset.begin()
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda number: files.write(f"{dataset.out}/units/{unit_name(number)}/x", b"x"),
                numbers,
            )
        )


def requests_of(s3: S3, monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> int:
    with proxy(s3.endpoint, rate=0) as line:
        monkeypatch.setenv("S3_ENDPOINT_URL", line.endpoint)
        do()
        monkeypatch.setenv("S3_ENDPOINT_URL", s3.endpoint)
        return sum(line.requests.values())


def test_resuming_in_a_store_lists_a_thousand_units_with_a_request(
    tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests a unit were an hour at 500,000 units."""
    counts = []
    for number in (10, 1990):
        dataset = plan_of(tmp_path / str(number), number + 5)
        dataset = DatasetWriter(f"s3://{BUCKET}/many{number}", dataset.plan)
        begin_in_store(dataset, range(number))
        left: set[int] = set()

        def resume(dataset: DatasetWriter = dataset, left: set[int] = left) -> None:
            assert dataset.begun_encoder() == "hf"
            assert dataset.finished() is None
            dataset.begin()
            left |= dataset.uncommitted()

        counts.append(requests_of(s3, monkeypatch, resume))
        assert left == set(range(number, number + 5))
    assert counts[1] - counts[0] <= 1, "a page of a listing more"
    assert counts[0] < 15


def test_a_unit_that_cannot_be_mended_is_an_error(tmp_path: Path) -> None:
    dataset = units_of(tmp_path / "data", 5)
    Path(dataset.out, "units", "000002", "tail.npy").unlink()
    asked: list[Sequence[int]] = []
    with pytest.raises(NotWhole, match=r"out: 1 units are not whole, such as 000002; run the same"):
        published(dataset, asked.append)
    assert asked == [[2]]
    assert "index.json" not in files.ls(dataset.out)


def test_a_plan_that_is_the_same_is_not_written_again(tmp_path: Path) -> None:
    """And units whose inputs are not those of the earlier plan are retracted before it goes."""
    dataset = units_of(tmp_path / "data", 5005)
    plan = Path(dataset.out, "plan.json")
    before = plan.stat().st_mtime_ns
    dataset.begin()
    assert plan.stat().st_mtime_ns == before
    assert dataset.uncommitted() == set()
    last = sorted(Path(tmp_path, "data", "source").iterdir())[-1]
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size - 1)
    changed = plan_dataset(str(tmp_path / "data/source"), dataset.out)
    changed.begin()
    assert plan.stat().st_mtime_ns != before
    assert changed.uncommitted() == set(range(5000, 5005)), "the units of the file that changed"
