"""Remote datasets: what is fetched is whole or fetched again, bounded, and nothing of it is
trusted.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flame_composer.config.data import DataConfig
from flame_composer.dataset.manifest import read_manifest
from flame_composer.dataset.open import Dataset
from flame_composer.errors import ConfigError, DataError, InvalidField
from flame_composer.loader import cache, fetch, room
from flame_composer.loader.batches import build_train_loader
from flame_composer.loader.cache import STALE_SECONDS
from flame_composer.loader.datasets import open_for_model
from flame_composer.loader.footprint import footprint, sizes_of
from flame_composer.loader.machine import Machine
from flame_composer.storage import locks
from tests.conftest import CONTEXT_LENGTH, make_dataset
from tests.data_fixtures import byte_tokenizer
from tests.proxy import FAULTS, proxy
from tests.runs import Corpus, Ranks, Script, check, read_log

Row = tuple[int, ...]


def remote_of(remote: object, cache: Path, **options: Any) -> Dataset:
    return open_for_model(str(cache), str(remote), tokenizer=byte_tokenizer(), **options)


def loader_of(dataset: Dataset, **options: Any) -> Any:
    config = DataConfig(**{"num_workers": 0, "shuffle_block_size": 20, **options})
    return build_train_loader({"": dataset}, config, global_batch_size=4, seed=7).dataloader


def rows_of(loader: Any) -> list[Row]:
    return [tuple(row) for batch in loader for row in batch["input_ids"].tolist()]


def stream(dataset: Dataset, num_workers: int = 0, **options: Any) -> list[Row]:
    return rows_of(loader_of(dataset, num_workers=num_workers, **options))


@pytest.fixture(scope="session")
def expected(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """An epoch's rows, read from a local copy."""
    folder = shutil.copytree(dataset, tmp_path_factory.mktemp("expected") / "copy")
    rows = stream(open_for_model(str(folder), None, tokenizer=byte_tokenizer()))
    assert len(rows) > 100
    return rows


def shards_of(folder: Path | str) -> list[Path]:
    shards = json.loads(Path(folder, "index.json").read_bytes())["shards"]
    return [Path(folder, shard["raw_data"]["basename"]) for shard in shards]


def bytes_of(paths: list[Path]) -> int:
    """What lies there, in bytes; a file may go while it is looked at."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def flip_a_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)


def message_of(caught: pytest.ExceptionInfo[DataError]) -> str:
    """The last line: before it there may be the traceback of a loader process."""
    return (
        str(caught.value).strip().splitlines()[-1].removeprefix("flame_composer.errors.DataError: ")
    )


# The cache


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_remote_dataset_is_cached_under_its_index(
    dataset, copy_of, tmp_path, expected, num_workers
):
    remote = copy_of(dataset)
    found = remote_of(remote, tmp_path / "cache", context_length=CONTEXT_LENGTH)
    name = read_manifest(str(remote)).index_sha256[:16]
    assert found.folder == str(tmp_path / "cache" / name)
    assert sorted(path.name for path in (tmp_path / "cache" / name).iterdir()) == [
        "incoming",
        "index.json",
        "manifest.json",
    ]
    assert stream(found, num_workers) == expected
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [name]
    for ours, theirs in zip(shards_of(found.folder), shards_of(remote), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert list((tmp_path / "cache" / name / "incoming").iterdir()) == []


def test_another_dataset_at_the_same_address_never_meets_the_old_shards(
    dataset, copy_of, tmp_path, expected
):
    remote = copy_of(dataset)
    first = remote_of(remote, tmp_path / "cache")
    assert stream(first) == expected
    shutil.rmtree(remote)
    make_dataset(tmp_path / "new", num_documents=30, seed=5)
    (tmp_path / "new" / "out").rename(remote)
    second = remote_of(remote, tmp_path / "cache")
    assert second.folder != first.folder
    new = stream(second)
    assert len(new) > 20
    assert not set(new) & set(expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_shard_in_the_cache_is_fetched_again(
    dataset, copy_of, tmp_path, expected, num_workers
):
    found = remote_of(copy_of(dataset), tmp_path / "cache")
    assert stream(found) == expected
    first, second, third, *_ = shards_of(found.folder)
    flip_a_bit(first)
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    again = remote_of(found.remote, tmp_path / "cache")
    assert again.folder == found.folder
    assert stream(again, num_workers) == expected


def test_a_cache_that_cannot_be_written_to(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    message = (
        rf"{tmp_path}/file: cannot be written to: (Not a directory|File exists); set local to a"
        r" folder that can"
    )
    for exclusive in (False, True):
        with pytest.raises(ConfigError, match=f"^{message}"):
            remote_of(dataset, tmp_path / "file", exclusive=exclusive)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_under_the_cache_is_named_with_what_helps(dataset, copy_of, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        found = remote_of(copy_of(dataset), disk)
        with (disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
            while True:
                ballast.write(bytes(512))
        with pytest.raises(DataError, match="No space left on device") as caught:
            stream(found, download_retries=0)
        assert message_of(caught).endswith(
            f"(tried once); free space on the disk of {found.folder}, or set train_data.cache_limit"
        )
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_what_a_killed_job_left_half_fetched_goes_in_time(dataset, copy_of, tmp_path):
    remote = copy_of(dataset)
    found = remote_of(remote, tmp_path / "cache")
    old, new, other = (
        Path(found.folder, "incoming", name) for name in ("0" * 32, "1" * 32, "not ours")
    )
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, time.time() - 2 * STALE_SECONDS))
    remote_of(remote, tmp_path / "cache")
    assert not old.exists()
    assert new.exists(), "another job may be at it"
    assert other.exists(), "nothing else is deleted"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_in_the_cache_that_is_overwritten_after_its_check_is_fetched_again(
    dataset, copy_of, tmp_path, expected, num_workers
):
    found = remote_of(copy_of(dataset), tmp_path / "cache")
    loader = loader_of(found, num_workers=num_workers)
    undisturbed = loader_of(open_for_model(str(copy_of(dataset)), None, tokenizer=byte_tokenizer()))
    assert rows_of(loader) == rows_of(undisturbed) == expected
    for shard in shards_of(found.folder)[::2]:
        with shard.open("r+b") as file:
            file.seek(-40, 2)
            file.write(bytes(40))
    assert rows_of(loader) == rows_of(undisturbed), "the next epoch"
    for ours, theirs in zip(shards_of(found.folder), shards_of(found.remote), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def as_user(number: int, do: Any) -> Any:
    """What `do` returns, or the error that it raises, in a process of another user."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def work() -> None:
        os.setgroups([])
        os.setgid(number)
        os.setuid(number)
        try:
            theirs.send(do())
        except BaseException as error:
            theirs.send(error)

    process = fork.Process(target=work)
    process.start()
    found = ours.recv()
    process.join()
    return found


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user, which takes root")


@pytest.fixture
def open_tmp(tmp_path: Path) -> Path:
    """A folder that other users get into, and may write to."""
    for folder in (*tmp_path.parents, tmp_path):
        if folder.is_relative_to(Path(tempfile.gettempdir())) and folder != Path(
            tempfile.gettempdir()
        ):
            folder.chmod(0o755)
    tmp_path.chmod(0o1777)
    return tmp_path


@needs_root
def test_a_complete_cache_that_cannot_be_written_to_is_read(dataset, copy_of, open_tmp, expected):
    """By another user, with every folder closed for writing."""
    found = remote_of(copy_of(dataset), open_tmp / "cache")
    assert stream(found) == expected
    shutil.rmtree(Path(found.folder, "incoming"))

    def read() -> Any:
        again = remote_of(found.remote, open_tmp / "cache")
        return again.folder, stream(again)

    assert as_user(54321, read) == (found.folder, expected)
    assert not Path(found.folder, "incoming").exists()

    shard = shards_of(found.folder)[1]
    shard.chmod(0o600)
    error = as_user(54321, lambda: remote_of(found.remote, open_tmp / "cache"))
    assert re.match(
        rf"{open_tmp}/cache: cannot be written to: .*; set local to a folder that can", str(error)
    ), error
    shard.chmod(0o644)
    flip_a_bit(shards_of(found.folder)[0])
    error = as_user(
        54321, lambda: stream(remote_of(found.remote, open_tmp / "cache"), download_retries=0)
    )
    assert isinstance(error, DataError)
    assert "\n" not in str(error)
    assert re.search(r"shard cannot be fetched: .*(denied|another user)", str(error)), error

    shards_of(found.folder)[0].unlink()
    error = as_user(54321, lambda: remote_of(found.remote, open_tmp / "cache"))
    assert isinstance(error, ConfigError)
    assert re.match(
        rf"{open_tmp}/cache: cannot be written to: .*; set local to a folder that can", str(error)
    ), error


@needs_root
def test_a_cache_that_another_user_planted_leads_nowhere(dataset, copy_of, open_tmp, expected):
    """Neither a link in place of the cache, nor of what is in it, has our files written, or
    deleted, elsewhere.
    """
    remote, cache, victim = copy_of(dataset), open_tmp / "cache", open_tmp / "victim"
    cache.mkdir()
    cache.chmod(0o1777)
    name = read_manifest(str(remote)).index_sha256[:16]
    victim.mkdir(mode=0o700)
    (victim / ("0" * 32)).write_text("precious")
    os.utime(victim / ("0" * 32), (0, 0))
    for plant in (
        lambda: (cache / name).symlink_to(victim),
        lambda: (cache / name).mkdir(mode=0o777),
    ):
        as_user(54321, plant)
        if not (cache / name).is_symlink():
            as_user(54321, lambda: (cache / name / "incoming").symlink_to(victim))
        found = remote_of(remote, cache)
        assert found.folder == str(cache / f"{name}-user-0")
        assert stream(found) == expected
        assert [path.name for path in victim.iterdir()] == ["0" * 32]
        if (cache / name).is_symlink():
            (cache / name).unlink()
        else:
            shutil.rmtree(cache / name)

    own = remote_of(remote, cache)
    assert own.folder == str(cache / name)
    shutil.rmtree(Path(own.folder, "incoming"))
    Path(own.folder, "incoming").symlink_to(victim)
    with pytest.raises(
        ConfigError,
        match=rf"^{cache}: cannot be written to: .*incoming belongs to another user, or is a link",
    ):
        remote_of(remote, cache)
    assert (victim / ("0" * 32)).exists()


# Damage and faults


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_shard_that_is_bad_at_the_source_is_named(
    dataset, copy_of, tmp_path, num_workers, damage
):
    remote = copy_of(dataset)
    shard = shards_of(remote)[-1]
    if damage == "flipped":
        flip_a_bit(shard)
    else:
        shard.unlink()
    found = remote_of(remote, tmp_path / "cache")
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        stream(found, num_workers, download_retries=1)
    assert time.monotonic() - began < 60
    what = (
        "damaged shard: its xxh64 hash is " if damage == "flipped" else "shard cannot be fetched: "
    )
    assert message_of(caught).startswith(f"{shard}: {what}")
    assert "(tried 2 times); " in message_of(caught)
    assert not shards_of(found.folder)[-1].exists(), "what is in the cache is whole"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_from_s3_are_the_same_whatever_happens_on_the_way(
    s3, dataset, tmp_path, monkeypatch, expected, num_workers
):
    """Nearly half of all answers are spoiled, in each way there is."""
    remote = s3.upload(dataset, f"faults{num_workers}")
    with proxy(s3.endpoint, rate=0.45, seed=num_workers + 1) as between:
        monkeypatch.setenv("S3_ENDPOINT_URL", between.endpoint)
        found = remote_of(remote, tmp_path / "cache")
        assert stream(found, num_workers, download_retries=10) == expected
        assert set(between.faults) == set(FAULTS)


def test_a_store_that_stays_broken_is_given_up(s3, dataset, tmp_path, monkeypatch):
    remote = s3.upload(dataset, "broken")
    found = remote_of(remote, tmp_path / "cache")
    with proxy(s3.endpoint, rate=1.0, faults=("flipped",)) as between:
        monkeypatch.setenv("S3_ENDPOINT_URL", between.endpoint)
        with pytest.raises(DataError) as caught:
            stream(found, download_retries=2)
    assert re.match(
        rf"{remote}/units/000000/shard\.\d{{5}}\.mds: damaged shard: .* \(tried 3 times\); ",
        message_of(caught),
    )


# A limited cache


@pytest.mark.parametrize("algo", [None, "py1e"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_limit_that_shuffling_cannot_keep_to_is_refused_with_the_least_that_will_do(
    dataset, copy_of, tmp_path, monkeypatch, algo, num_workers
):
    """The least is enough: shards go to make room, and none has to be fetched twice in an epoch."""
    monkeypatch.setattr(locks, "CLAIM_SECONDS", 0.1)
    remote = copy_of(dataset)
    total = sum(file.bytes for file in remote_of(remote, tmp_path / "cache").files)
    options: Any = {
        "predownload": 4,
        "prefetch_factor": 1,
        "num_workers": num_workers,
        "shuffle_algo": algo,
    }
    expected = stream(remote_of(remote, tmp_path / "cache"), **options)
    with pytest.raises(
        InvalidField, match=r"must be at least \d+ bytes: so much is in use at once"
    ) as caught:
        loader_of(
            remote_of(remote, tmp_path / "cache", exclusive=True), cache_limit="1kb", **options
        )
    assert caught.value.name == "train_data.cache_limit"
    least = int(re.findall("least ([0-9]+)", caught.value.rule)[0])
    indexes = sum(Path(remote, name).stat().st_size for name in ("index.json", "manifest.json"))
    assert least - indexes < total, "the limit is felt"

    with pytest.raises(InvalidField):
        loader_of(
            remote_of(remote, tmp_path / "cache", exclusive=True),
            cache_limit=str(least - 1),
            **options,
        )
    found = remote_of(remote, tmp_path / "cache", exclusive=True)
    loader = loader_of(found, cache_limit=str(least), **options)
    log, fetch_one = tmp_path / "fetched", loader.dataset.shards.fetch

    def fetch_noting(shard: int, stop: Any) -> None:
        with log.open("a") as lines:
            lines.write(f"{shard}\n")
        fetch_one(shard, stop)

    loader.dataset.shards.fetch = fetch_noting
    for epoch in range(2):
        log.write_text("")
        rows = []
        for batch in loader:
            rows += [tuple(row) for row in batch["input_ids"].tolist()]
            assert bytes_of(shards_of(found.folder)) <= least - indexes
        assert epoch or rows == expected
        counts = Counter(map(int, log.read_text().split()))
        assert set(counts.values()) == {1}
        assert epoch or len(counts) == len(found.files)
    assert any(not path.exists() for path in shards_of(found.folder))


def test_a_limit_that_is_too_low_after_all_is_kept_to(dataset, copy_of, tmp_path, monkeypatch):
    """Shards that will be needed again are deleted, rather than that processes wait for ever."""
    monkeypatch.setattr(room, "PATIENCE", 0.1)
    found = remote_of(copy_of(dataset), tmp_path / "cache", exclusive=True)
    expected = stream(found, predownload=4)
    largest = max(file.bytes for file in found.files)
    shutil.rmtree(Path(found.folder, "units"))
    loader = loader_of(found, predownload=4, num_workers=2, cache_limit="1gb")
    loader.dataset.shards.room.limit = 3 * largest
    rows = []
    for batch in loader:
        rows += [tuple(row) for row in batch["input_ids"].tolist()]
        assert bytes_of(shards_of(found.folder)) <= 3 * largest
    assert rows == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_full_of_what_is_needed_last_is_taken_over(
    dataset, copy_of, tmp_path, expected, num_workers
):
    """What an earlier job left goes to make room, although this one has not checked it."""
    remote = copy_of(dataset)
    found = remote_of(remote, tmp_path / "cache", exclusive=True)
    loader = loader_of(found, predownload=4, num_workers=num_workers, cache_limit="1gb")
    rows_of(loader)
    first, *_ = loader.dataset.order.batches(0)
    numbers = {*loader.dataset.shards.shards_of(first).tolist()}
    paths = shards_of(found.folder)
    for number in numbers:
        paths[number].unlink()
    limit = bytes_of(paths)  # without them it is full
    loader = loader_of(found, predownload=4, num_workers=num_workers, cache_limit="1gb")
    loader.dataset.shards.room.limit = limit
    began = time.monotonic()
    for batch, _ in zip(loader, range(3), strict=False):
        assert len(batch["input_ids"]) == 4
        assert bytes_of(paths) <= limit
    assert time.monotonic() - began < 30


def test_a_shard_that_goes_whenever_it_has_come_is_named(dataset, copy_of, tmp_path):
    shards = loader_of(remote_of(copy_of(dataset), tmp_path / "cache")).dataset.shards
    prepare = shards.prepare

    def prepare_in_vain(shard: int) -> None:
        prepare(shard)
        shards.path_of(shard).unlink()

    shards.prepare = prepare_in_vain
    message = "it is deleted whenever it has been fetched; set a larger train_data.cache_limit, or"
    with pytest.raises(DataError, match=rf"^{shards.path_of(0)}: {message}"):
        shards.row(0)


def test_a_process_that_is_not_forked_shares_what_is_known(dataset, copy_of, tmp_path):
    found = remote_of(copy_of(dataset), tmp_path / "cache", exclusive=True)
    ours = loader_of(found, cache_limit="1gb").dataset
    theirs = copy.deepcopy(ours)  # by what pickle uses, too
    row = theirs.shards.row(0)["input_ids"].tolist()
    theirs.shards.room.at[0] = 7
    assert ours.shards.is_ready(0)
    assert (ours.shards.room.there[0], ours.shards.room.at[0]) == (1, 7)
    assert ours.shards.row(0)["input_ids"].tolist() == row
    assert [ids.tolist() for ids in theirs.order.batches(1)] == [
        ids.tolist() for ids in ours.order.batches(1)
    ]


def test_a_local_dataset_is_never_deleted_to_make_room(dataset, copy_of):
    folder = copy_of(dataset)
    found = open_for_model(str(folder), None, tokenizer=byte_tokenizer())
    loader = loader_of(found, predownload=4, cache_limit="1gb")
    loader.dataset.shards.room.limit = 1
    assert len(rows_of(loader)) > 100
    assert all(path.exists() for path in shards_of(folder))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle_block_size": 1000},
        {"shuffle": False},
        {"num_canonical_nodes": 2},
        {"shuffle_algo": "naive"},
        {"shuffle_algo": "py1s"},
        {"shuffle_algo": "py1br", "num_canonical_nodes": 2},
        {"num_workers": 2, "prefetch_factor": 1},
    ],
)
def test_bytes_in_use(dataset, copy_of, options):
    """As counted by hand, shard by shard and batch by batch; by windows, at most a bit more."""
    found = open_for_model(str(copy_of(dataset)), None, tokenizer=byte_tokenizer())
    rows = loader_of(found, predownload=8, **options).dataset
    num_workers, prefetch = options.get("num_workers", 0), options.get("prefetch_factor", 2)
    apart = max(1, num_workers) * (2 + prefetch + 1)
    ends = [sum(file.rows for file in found.files[: i + 1]) for i in range(len(found.files))]
    order = [
        [next(i for i, end in enumerate(ends) if row < end) for row in batch]
        for batch in [ids.tolist() for ids in rows.order.batches(0)]
    ]

    def most_of(mine: list[list[int]]) -> int:
        most = 0
        for now in range(len(mine)):
            in_use = {
                shard
                for shard in range(len(ends))
                if any(shard in batch for batch in mine[: now + apart + 1])
                and any(shard in batch for batch in mine[now:])
            }
            most = max(most, sum(found.files[shard].bytes for shard in in_use))
        return most

    sizes = sizes_of([found])
    everything = int(sizes.sum())
    is_exact = options.get("shuffle_algo") is not None
    seen = footprint(rows.order, sizes, Machine(0, 1, 1), apart=apart)
    most = most_of(order)
    assert 0 < most <= seen.in_use
    assert seen.in_use == most or not is_exact
    assert seen.in_use <= everything
    assert seen.read == everything

    # A machine of two reads its half of every batch: with two canonical nodes, that is one of them.
    for node in range(2):
        mine = [batch[node::2] for batch in order]
        half = footprint(rows.order, sizes, Machine(node, 2, 2), apart=apart)
        assert half.in_use >= most_of(mine)
        read = {shard for batch in mine for shard in batch}
        by_hand = sum(found.files[shard].bytes for shard in read)
        assert half.read >= by_hand
        assert half.read == by_hand or not is_exact
        if "num_canonical_nodes" in options:
            assert half.read <= everything / 2 + 2 * int(sizes.max())


# Several jobs on one machine


def _job(remote: str, cache: Path, options: dict[str, Any], connection: Any) -> None:
    found = remote_of(remote, cache, exclusive=options.get("cache_limit") is not None)
    loader = iter(loader_of(found, **options))
    rows = [tuple(row) for _ in range(3) for row in next(loader)["input_ids"].tolist()]
    connection.send((found.folder, None))
    connection.recv()  # the other one is under way
    connection.send((found.folder, rows + rows_of(loader)))
    connection.recv()


@pytest.fixture
def jobs(dataset, copy_of, tmp_path) -> Iterator[Any]:
    """Starts jobs that read three batches, say where they are, wait to be told, and read the
    rest.
    """
    remote = str(copy_of(dataset))
    fork = multiprocessing.get_context("fork")
    started: list[Any] = []

    def start(**options: Any) -> Any:
        ours, theirs = fork.Pipe()
        process = fork.Process(
            target=_job, args=(remote, tmp_path / "cache", {"predownload": 4, **options}, theirs)
        )
        process.start()
        started.append(process)
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("limit", [None, "60kb"])
def test_two_jobs_at_once_with_the_same_cache(jobs, expected, limit, monkeypatch):
    """Without a limit they share what is fetched; with one, neither deletes what the other
    needs.
    """
    monkeypatch.setattr(locks, "CLAIM_SECONDS", 1.0)
    both = [jobs(cache_limit=limit), jobs(cache_limit=limit)]
    folders = [connection.recv()[0] for _, connection in both]
    assert (folders[0] == folders[1]) == (limit is None)
    for _, connection in both:
        connection.send(None)
    for _, connection in both:
        assert connection.recv()[1] == expected


@pytest.mark.parametrize("limit", [None, "60kb"])
def test_the_job_after_a_killed_one_takes_over_its_cache(jobs, expected, limit):
    killed, connection = jobs(cache_limit=limit, num_workers=2)
    folder, _ = connection.recv()
    os.kill(killed.pid, signal.SIGKILL)
    half = Path(folder, "incoming", "2" * 32)
    half.write_bytes(b"half a shard")
    _, connection = jobs(cache_limit=limit, num_workers=2)
    assert connection.recv()[0] == folder, "its loader processes end soon after it"
    assert half.exists() == (limit is None), "in a cache of its own, nobody else is fetching"
    connection.send(None)
    assert connection.recv()[1] == expected


# What is not there, or not to be trusted


def test_a_remote_that_is_not_there(tmp_path):
    message = (
        f"{tmp_path}/nothing/manifest.json: not found; check the address, and that the"
        " conversion has finished"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        remote_of(tmp_path / "nothing", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def alter_index(folder: Path, change: Any) -> None:
    """Change what index.json says of the first shard, and make manifest.json agree with it."""
    index = json.loads((folder / "index.json").read_bytes())
    change(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["index_sha256"] = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


OUTSIDE = "it names a file outside the dataset: "
UNTRUSTED: list[tuple[str, Any, str]] = [
    *(
        (key, name, f"{OUTSIDE}{name!r}")
        for key, name in (
            ("basename", "../outside.mds"),
            ("basename", "/etc/passwd.mds"),
            ("basename", "units/../../outside.mds"),
            ("basename", "..\\outside.mds"),
            ("basename", "C:outside.mds"),
            ("basename", "./../x.mds"),
            ("basename", ""),
            ("basename", "incoming/x.mds"),
            ("basename", "a\0b.mds"),
            ("basename", "index.json"),
            ("basename", "a//b.mds"),
        )
    ),
    ("basename", "units/000000/shard.00001.mds", "it names units/000000/shard.00001.mds twice"),
    (
        "bytes",
        2**33,
        "units/000000/shard.00000.mds: 8589934592 bytes are more than a shard can have",
    ),
    ("samples", 10**9, "units/000000/shard.00000.mds: 1000000000 rows do not fit into"),
    ("format", "json", "units/000000/shard.00000.mds is not of this format"),
    ("column_encodings", ["pkl", "pkl"], "units/000000/shard.00000.mds is not of this format"),
    ("column_names", ["a", "b"], "units/000000/shard.00000.mds is not of this format"),
    ("column_sizes", [None, 2**40], "units/000000/shard.00000.mds is not of this format"),
    ("version", 3, "units/000000/shard.00000.mds is not of this format"),
    ("samples", 1, "its totals (rows, shards, bytes) are "),
    ("compression", "zstd", "units/000000/shard.00000.mds is compressed"),
]


@pytest.mark.parametrize(("key", "value", "message"), UNTRUSTED)
@pytest.mark.parametrize("remote", [False, True])
def test_an_index_that_is_not_to_be_trusted_is_refused(
    dataset, copy_of, tmp_path, key, value, message, remote
):
    folder = copy_of(dataset)
    alter_index(
        folder,
        lambda shard: (shard["raw_data"] if key in shard["raw_data"] else shard).update(
            {key: value}
        ),
    )
    local, place = (str(tmp_path / "cache"), str(folder)) if remote else (str(folder), None)
    with pytest.raises(DataError, match=rf"^{folder}/\w+\.json: damaged: {re.escape(message)}"):
        open_for_model(local, place, tokenizer=byte_tokenizer())
    assert not (tmp_path / "cache").exists()


# What is found out before a model is built


SECONDS = 15


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            r"access denied by http://.* \(SignatureDoesNotMatch\); check the credentials",
        ),
        (
            {"AWS_ACCESS_KEY_ID": "nobody"},
            r"access denied by http://.* \(InvalidAccessKeyId\); check the credentials",
        ),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            r"no credentials; set AWS_ACCESS_KEY_ID and",
        ),
        (
            {"S3_ENDPOINT_URL": "http://127.0.0.1:9"},
            r"http://127\.0\.0\.1:9 cannot be reached: .*; check the network and S3",
        ),
        (
            {"S3_ENDPOINT_URL": "http://127.0.0.1:SILENT"},
            r"http://127\.0\.0\.1:\d+ cannot be reached: .*; check the network",
        ),
        ({"S3_ENDPOINT_URL": "nonsense"}, r".*nonsense"),
    ],
)
def test_a_store_that_is_not_reached_says_why_in_seconds(
    s3, tmp_path, monkeypatch, silent_port, env, message
):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    # Of 5, as test_storage asserts
    monkeypatch.setattr("flame_composer.storage.s3_client.FIRST_SECONDS", 1)
    for name, value in env.items():
        monkeypatch.delenv(name)
        if value is not None:
            monkeypatch.setenv(name, value.replace("SILENT", str(silent_port)))
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"^s3://data[^ ]*: {message}") as caught:
        remote_of("s3://data/any", tmp_path / "cache")
    assert time.monotonic() - began < SECONDS
    assert "\n" not in str(caught.value)


def test_what_is_missing_in_a_store_is_named(s3, dataset, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"^s3://nobucket[^ ]*: there is no bucket 'nobucket' at http://.*; check its name",
    ):
        remote_of("s3://nobucket/any", tmp_path / "cache")
    nothing = "not found; check the address, and that the conversion has finished"
    with pytest.raises(ConfigError, match=f"^s3://data/nothing/manifest.json: {nothing}$"):
        remote_of("s3://data/nothing/", tmp_path / "cache")
    remote = s3.upload(dataset, "unfinished")
    s3.client.delete_object(Bucket="data", Key="unfinished/index.json")
    with pytest.raises(ConfigError, match=f"^{remote}/index.json: {nothing}$"):
        remote_of(remote, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_another_tokenizer_or_context_length_in_a_store(s3, dataset, tmp_path):
    remote = s3.upload(dataset, "other")
    with pytest.raises(
        ConfigError, match=f"^{remote}: its rows are 32 tokens long, but context_length is 64; "
    ):
        remote_of(remote, tmp_path / "cache", context_length=64)
    with pytest.raises(ConfigError, match=f"^{remote}: was made with another tokenizer than "):
        open_for_model(str(tmp_path / "cache"), remote, tokenizer=byte_tokenizer(300))


def test_an_index_of_endless_size_is_not_downloaded(s3, dataset, tmp_path, monkeypatch):
    remote = s3.upload(dataset, "endless")
    monkeypatch.setattr(cache, "MAX_INDEX_BYTES", 1000)
    with pytest.raises(
        ConfigError, match=rf"^{remote}/manifest.json: [\d,]+ bytes long, must be 1,000 at most$"
    ):
        remote_of(remote, tmp_path / "cache")


def test_a_shard_of_another_size_is_not_downloaded(s3, dataset, tmp_path, monkeypatch):
    remote = s3.upload(dataset, "larger")
    name = shards_of(dataset)[0].relative_to(dataset)
    size = (dataset / name).stat().st_size
    s3.client.put_object(Bucket="data", Key=f"larger/{name}", Body=b"x" * 100_000)
    found = remote_of(remote, tmp_path / "cache")
    with proxy(s3.endpoint, rate=0) as between:
        monkeypatch.setenv("S3_ENDPOINT_URL", between.endpoint)
        problem = f"damaged shard: 100,000 bytes long, must be {size:,} at most (tried once); "
        with pytest.raises(DataError, match=f"^{remote}/{name}: {re.escape(problem)}"):
            stream(found, download_retries=0)
        assert between.requests[f"HEAD /data/larger/{name}"]
        assert not between.requests[f"GET /data/larger/{name}"]


def test_a_download_that_does_not_end_is_given_up(
    dataset, copy_of, tmp_path, expected, monkeypatch
):
    """The second try finds a store that answers."""
    found = remote_of(copy_of(dataset), tmp_path / "cache")
    download, tries = fetch.download, []

    def hang_once(source: str, path: Path, *, at_most: int) -> None:
        tries.append(source)
        if len(tries) == 1:
            time.sleep(5)
        download(source, path, at_most=at_most)

    monkeypatch.setattr(fetch, "download", hang_once)
    assert stream(found, download_timeout=0.5, download_retries=1) == expected
    assert tries.count(tries[0]) == 2


# Whole runs


def s3_keys(corpus: Corpus, run: Path, remote: str, cache: Path, *more: str) -> list[str]:
    return corpus.keys(
        run,
        f"train_data.remote={remote}",
        f"train_data.local={cache}",
        "train_data.num_workers=2",
        *more,
    )


def test_ranks_of_a_machine_ask_for_each_file_once(s3, corpus, tmp_path):
    """Of the index and the manifest, and of every shard, whichever of their processes needs it."""
    remote = s3.upload(corpus.train, "once")
    keys = s3_keys(corpus, tmp_path / "run", remote, tmp_path / "cache", "eval_data=null")
    with proxy(s3.endpoint, rate=0) as between:
        env = s3.env | {"S3_ENDPOINT_URL": between.endpoint}
        Ranks(2, *keys, "microbatch_size=1", env=env).finish()
        asked = {key: number for key, number in between.requests.items() if "/once/" in key}
    names = [str(path.relative_to(corpus.train)) for path in shards_of(corpus.train)]
    expected = {f"{how} /data/once/{name}" for name in names for how in ("HEAD", "GET")}
    for name in ("index.json", "manifest.json"):
        expected |= {f"{how} /data/once/{name}" for how in ("HEAD", "GET")}
    assert asked == dict.fromkeys(expected, 1)


def test_a_shard_damaged_at_the_source_stops_a_run_with_one_line(s3, corpus, tmp_path):
    remote = s3.upload(corpus.train, "damaged")
    name = min(key for key in s3.keys("damaged") if key.endswith(".mds"))
    content = s3.read(f"damaged/{name}")
    s3.client.put_object(
        Bucket="data", Key=f"damaged/{name}", Body=content[:-1] + bytes([content[-1] ^ 1])
    )
    keys = s3_keys(
        corpus,
        tmp_path / "run",
        remote,
        tmp_path / "cache",
        "train_data.download_retries=1",
        "eval_data=null",
    )
    process = Script("recipes/train.py", *keys, env=s3.env).wait()
    assert process.returncode == 1
    assert re.fullmatch(
        rf"error: {remote}/{name}: damaged shard: .*", process.stderr.splitlines()[-1]
    )


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
)
def test_a_killed_run_behind_a_faulty_network_ends_as_the_undisturbed_one(
    s3, corpus, undisturbed, tmp_path
):
    remote = s3.upload(corpus.train, "network")
    run, cache = tmp_path / "run", tmp_path / "cache"
    with proxy(s3.endpoint, rate=0.1, seed=3) as between:
        env = s3.env | {"S3_ENDPOINT_URL": between.endpoint}
        for step in (7, 22, None):
            shutil.rmtree(cache, ignore_errors=True)
            script = Script("recipes/train.py", *s3_keys(corpus, run, remote, cache), env=env)
            if step is None:
                check(script.wait())
                break
            while (
                not (run / "train_log.jsonl").exists()
                or (run / "train_log.jsonl").read_text().count("\n") < step
            ):
                assert script.process.is_alive(), script.read("err")
            script.process.kill()
            script.wait()
        assert between.faults
    assert read_log(run) == read_log(undisturbed)


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
)
@pytest.mark.parametrize(
    "limit", [(), ("train_data.cache_limit=300kb", "train_data.shuffle_block_size=8")]
)
def test_two_runs_at_once_with_the_same_cache(s3, corpus, tmp_path, limit):
    remote = s3.upload(corpus.train, "together")
    runs = [tmp_path / name for name in ("one", "other", "alone")]
    keys = {run: s3_keys(corpus, run, remote, tmp_path / "cache", *limit) for run in runs}
    both = [Script("recipes/train.py", *keys[run], env=s3.env) for run in runs[:2]]
    for script in both:
        check(script.wait())
    check(Script("recipes/train.py", *keys[runs[2]], env=s3.env).wait())
    assert read_log(runs[0]) == read_log(runs[1]) == read_log(runs[2])
