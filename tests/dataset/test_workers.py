"""Units on a pool of processes: the same bytes whatever the number of workers, and whoever is
killed when.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_composer.dataset import workers
from flame_composer.dataset.convert import Conversion
from flame_composer.dataset.finish import published
from flame_composer.dataset.manifest import read_manifest
from flame_composer.dataset.plan import Plan, plan_units
from flame_composer.dataset.publish import NotWhole
from flame_composer.dataset.workers import UNITS_A_THREAD, convert_units
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.text import encoder
from flame_composer.text.encoder import HF
from flame_composer.text.sources import find_files
from flame_composer.text.tokenizer import bare, fingerprint, load_tokenizer
from tests.data_fixtures import byte_tokenizer, files_under, words, write_jsonl
from tests.s3 import BUCKET, Relay
from tests.stack import TRANSFORMERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`corpus` (JSONL of about 20 work units), `tokenizer`, and `whole`: the dataset and its val
    split, made in peace.
    """
    folder = tmp_path_factory.mktemp("workers")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "corpus").mkdir()
    for i in range(4):
        write_jsonl(
            folder / "corpus" / f"{i}.jsonl",
            [words(1 + j * 31 % 800, i * 1000 + j) for j in range(100)],
        )
    datasets = writers(folder, "whole")
    for dataset in datasets:
        dataset.begin()
    for number in range(len(datasets[0].plan.units)):
        assert (
            list(convert_units(conversion(folder, datasets), [number], 1, lambda *news: None)) == []
        )
    for dataset in datasets:
        dataset.publish()
    return folder


def writers(folder: Path, name: str) -> list[DatasetWriter]:
    settings = {
        "source": [str(folder / "corpus")],
        "name": None,
        "split": None,
        "suffixes": [],
        "text_column": "text",
        "add_bos": False,
        "add_eos": True,
        "max_doc_length": 700,
        "min_doc_length": 5,
        "seed": 3,
        "val_fraction": 0.2,
        "shard_size": 20000,
        "unit_size": 32000,
        "encoder": HF,
        "max_document_bytes": 67108864,
    }
    units = plan_units(find_files(settings["source"]), settings["unit_size"])
    print_of = fingerprint(load_tokenizer(str(folder / "tokenizer")))
    return [
        DatasetWriter(str(folder / name / split), Plan(split, print_of, 64, settings, units))
        for split in ("train", "val")
    ]


def conversion(folder: Path, datasets: list[DatasetWriter]) -> Conversion:
    return Conversion(
        tuple(datasets),
        bare(load_tokenizer(str(folder / "tokenizer"))),
        False,
        True,
        HF,
        "redo",
        "fail",
    )


def place_of(folder: Path, name: str) -> str:
    """Where the datasets called `name` are: in `folder`, unless it is a URL."""
    return name if is_url(name) else str(folder / name)


def command(folder: Path, name: str, num_workers: int | None, *more: str) -> list[str]:
    """The same conversion as a user gives it."""
    place = place_of(folder, name)
    arguments = [
        f"source={folder}/corpus",
        f"tokenizer={folder}/tokenizer",
        f"out={place}/train",
        "context_length=64",
        f"val_out={place}/val",
        "val_fraction=0.2",
        "max_doc_length=700",
        "min_doc_length=5",
        "seed=3",
        "shard_size=20000",
        "unit_size=32000",
        "encoder=hf",
        *more,
    ]
    arguments += [] if num_workers is None else [f"num_workers={num_workers}"]
    return [sys.executable, str(ROOT / "convert" / "to_mds.py"), *arguments]


def start(folder: Path, name: str, num_workers: int | None, *more: str) -> subprocess.Popen[str]:
    """In a session of its own, so that all its processes are known by it."""
    arguments = command(folder, name, num_workers, *more)
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def processes(session: int) -> Iterator[tuple[int, int]]:
    """The process ids of a session that are alive, with those of their parents."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            yield int(path.parent.name), int(fields[1])


def workers_of(session: int) -> list[int]:
    """The grandchildren of the process that leads the session: workers come from the fork
    server.
    """
    parents = dict(processes(session))
    return [pid for pid, parent in parents.items() if parents.get(parent) == session]


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def check_finished(folder: Path, name: str) -> None:
    place = place_of(folder, name)
    assert {file: files.read(f"{place}/{file}") for file in files.find(place)} == files_under(
        folder / "whole"
    )
    for split in ("train", "val"):
        totals = read_manifest(f"{place}/{split}").totals  # which checks that the ledger balances
        assert totals.tokens_in == totals.tokens_out + totals.dropped


def test_what_a_worker_is_sent_does_not_grow_with_the_number_of_units(folder):
    """It did, with a new worker every 64 units: 20,000 small files as units of their own took
    minutes.
    """

    def sent(datasets: list[DatasetWriter]) -> tuple[int, int]:
        whole = conversion(folder, datasets)
        return len(pickle.dumps(whole.settings())), len(pickle.dumps((whole.inputs(3), 3)))

    datasets = writers(folder, "sent")
    plan = datasets[0].plan
    many = dataclasses.replace(plan, units=tuple(plan.units) * 1000)
    assert sent([DatasetWriter(datasets[0].out, many)]) == sent(datasets[:1])


def test_a_worker_is_replaced_by_what_it_has_read_not_by_the_number_of_units(folder, monkeypatch):
    lane = workers._Lane(conversion(folder, writers(folder, "lane")))
    closed: list[int] = []
    monkeypatch.setattr(lane, "close", lambda: closed.append(1))
    lane.num_bytes = workers.MAX_INPUT - 1
    lane.renew(memory=workers.MAX_MEMORY)
    assert not closed
    lane.num_bytes += 1
    lane.renew(memory=workers.MAX_MEMORY)
    assert len(closed) == 1
    lane.num_bytes = 0
    lane.renew(memory=workers.MAX_MEMORY + 1)
    assert len(closed) == 2


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bytes(folder, num_workers, monkeypatch):
    if num_workers == 3:
        monkeypatch.setattr(workers, "MAX_MEMORY", 0)  # a new process for every unit
    datasets = writers(folder, f"by{num_workers}")
    for dataset in datasets:
        dataset.begin()
    numbers = list(range(len(datasets[0].plan.units)))
    assert len(numbers) >= 20
    numbers = numbers if num_workers < 3 else numbers[:6]
    seen = np.zeros(3, int)
    for number in numbers:
        assert not datasets[0].is_committed(number)

    def on_progress(*news: int) -> None:
        seen[:] += news

    started: list[int] = []
    monkeypatch.setattr(
        workers._Lane,
        "close",
        lambda lane, close=workers._Lane.close: (started.append(1), close(lane)),
    )
    assert (
        list(convert_units(conversion(folder, datasets), numbers, num_workers, on_progress)) == []
    )
    if num_workers == 3:
        assert len(started) == 6 + 3, (
            "a process is given up after each unit, and all lanes at the end"
        )
        assert (
            list(
                convert_units(
                    conversion(folder, datasets),
                    range(6, len(datasets[0].plan.units)),
                    2,
                    on_progress,
                )
            )
            == []
        )
    totals = [dataset.publish() for dataset in datasets]
    check_finished(folder, f"by{num_workers}")
    size = sum(path.stat().st_size for path in (folder / "corpus").iterdir())
    assert seen.tolist() == [
        sum(t.documents for t in totals),
        sum(t.tokens_in for t in totals),
        size,
    ]
    assert totals[0].documents_short > 0, "the corpus must try min_doc_length"


def test_a_conversion_imports_none_of_what_takes_seconds(folder):
    """Of transformers what tokenizers need, and that in the process in charge alone: torch is 4
    s and 250 MB, in each. (In transformers 5 tokenizers need torch.)
    """
    tell = (
        "sys.stderr.write(repr(sorted({'torch', 'streaming', 'composer', 'datasets',"
        " 'transformers'} & set(sys.modules))))"
    )
    run = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: "
    )
    in_charge = [sys.executable, "-c", run + tell, *command(folder, "told", 2)[1:]]
    process = subprocess.run(in_charge, capture_output=True, text=True)
    needed = ["transformers"] if TRANSFORMERS < (5, 0) else ["torch", "transformers"]
    assert (process.returncode, process.stderr) == (0, repr(needed))

    datasets = writers(folder, "told again")
    for dataset in datasets:
        dataset.begin()
    sent = dataclasses.replace(conversion(folder, datasets), encoder=encoder._installed() or HF)
    worker = (
        "import importlib, pickle, sys\nfrom flame_composer.dataset import workers\n"
        "for name in workers.PRELOADED: importlib.import_module(name)\n"
        "settings, unit = pickle.load(sys.stdin.buffer)\n"
        "workers._worker.update(job=settings, counts=[0, 0, 0])\n"
        f"assert workers._convert(unit, 1)[0] is None\n{tell}"
    )
    given = pickle.dumps((sent.settings(), sent.inputs(1)))
    process = subprocess.run([sys.executable, "-c", worker], capture_output=True, input=given)
    assert (process.returncode, process.stderr) == (0, b"[]")
    assert all(dataset.is_committed(1) for dataset in datasets)


def test_an_error_in_a_worker_is_the_error_of_all(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("whole", "by*"))
    folder = tmp_path / "copy"
    with (folder / "corpus" / "1.jsonl").open("a") as file:
        file.write("oops\n")
    datasets = writers(folder, "out")
    for dataset in datasets:
        dataset.begin()
    numbers = range(len(datasets[0].plan.units))
    with pytest.raises(
        DataError, match=r"corpus/1\.jsonl:101: not valid JSON: Expecting value at column 1"
    ) as caught:
        list(convert_units(conversion(folder, datasets), numbers, 2, lambda *news: None))
    assert "\n" not in str(caught.value)
    assert not (folder / "out" / "train" / "index.json").exists()
    committed = list((folder / "out" / "train" / "units").iterdir())
    assert 0 < len(committed) < len(numbers)


def test_a_dask_cluster_gives_the_same_bytes(folder, s3):
    """One split to a folder, the other to an object store."""
    from distributed import LocalCluster

    val = f"s3://{BUCKET}/cluster/val"
    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, env=s3.env
    ) as cluster:
        process = start(
            folder, "cluster", None, f"cluster={cluster.scheduler_address}", f"val_out={val}"
        )
        _, err = process.communicate(timeout=240)
        assert (process.returncode, err) == (0, "")
    assert list((folder / "cluster").iterdir()) == [folder / "cluster" / "train"]
    for file in files.find(val):
        (folder / "cluster" / "val" / file).parent.mkdir(parents=True, exist_ok=True)
        files.download(f"{val}/{file}", folder / "cluster" / "val" / file)
    check_finished(folder, "cluster")


def test_what_a_listing_does_not_show_is_found_before_publishing(folder, s3):
    """A unit of which a kill left a part, one that lost a byte, and one of other inputs."""
    base = f"s3://{BUCKET}/parts"
    datasets = [
        DatasetWriter(f"{base}/{each.plan.split}", each.plan) for each in writers(folder, "parts")
    ]
    job = conversion(folder, datasets)
    converter = job.build_converter()
    converted: list[list[int]] = []

    def convert(numbers: Sequence[int]) -> None:
        converted.append(list(numbers))
        for number in numbers:
            converter.convert(job.inputs(number), number, lambda *news: None)

    for dataset in datasets:
        dataset.begin()
    convert(range(len(datasets[0].plan.units)))
    units = f"{base}/train/units"
    files.delete(f"{units}/000003/unit.json")
    shard = f"{units}/000004/shard.00000.mds"
    files.write(shard, files.read(shard)[:-1])
    record = files.read(f"{units}/000005/unit.json")
    files.write(f"{units}/000005/unit.json", record.replace(b".jsonl", b".json"))
    files.write(f"{units}/000006/left", b"by a kill")
    for dataset in datasets:
        dataset.begin()
        assert dataset.uncommitted() == set(), "none of it shows in a listing"
    with pytest.raises(NotWhole, match="parts/train: 3 units are not whole, such as 000003; run"):
        datasets[0].publish()
    for dataset in datasets:
        published(dataset, convert)
    assert converted[1:] == [[3, 4, 5]]
    check_finished(folder, base)


class Counted:
    """A conversion that counts how many units were handed out."""

    def __init__(self, job: Any):
        self.job, self.handed_out = job, 0
        self.settings, self.num_bytes = job.settings, job.num_bytes

    def inputs(self, number: int) -> Any:
        self.handed_out += 1
        return self.job.inputs(number)


def test_a_cluster_is_given_units_as_its_workers_ask(folder):
    from distributed import LocalCluster

    datasets = writers(folder, "asked")
    for dataset in datasets:
        dataset.begin()
    numbers = range(len(datasets[0].plan.units))
    job = Counted(conversion(folder, datasets))
    done = 0
    ahead: list[int] = []

    def on_progress(*news: int) -> None:
        nonlocal done
        done += 1
        ahead.append(job.handed_out - done + 1)

    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        assert list(convert_units(job, numbers, 1, on_progress, address)) == []
    assert (done, job.handed_out) == (len(numbers), len(numbers))
    assert max(ahead) <= 2 * UNITS_A_THREAD < len(numbers), "two threads"
    for dataset in datasets:
        dataset.publish()
    check_finished(folder, "asked")


def test_units_wait_for_a_worker_to_come(folder):
    """Without one, few are handed out: some clusters start workers for tasks that wait."""
    from distributed import LocalCluster

    (dataset, _) = writers(folder, "waited")
    dataset.begin()
    job = Counted(conversion(folder, [dataset]))
    numbers = range(len(dataset.plan.units))
    with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) as cluster:
        timer = threading.Timer(3, cluster.scale, [1])
        waiting: list[int] = []
        look = threading.Timer(2, lambda: waiting.append(job.handed_out))
        look.start()
        timer.start()
        address = cluster.scheduler_address
        assert list(convert_units(job, numbers, 1, lambda *news: None, address)) == []
        timer.join()
    assert waiting == [UNITS_A_THREAD]
    assert dataset.uncommitted() == set()


def test_a_unit_costs_a_cluster_less_than_two_kilobytes(folder):
    """All that goes to the scheduler, also for its answers; the plan and settings do not."""
    from distributed import LocalCluster

    datasets = writers(folder, "sent to a cluster")
    for dataset in datasets:
        # As of a command that names many sources
        dataset.plan.config["source"] += [f"/corpus/part-{i:05}" for i in range(2000)]
        dataset.begin()
    numbers = list(range(len(datasets[0].plan.units)))
    sent = []
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        for some in (numbers[:2], numbers):
            host, port = cluster.scheduler_address.removeprefix("tcp://").split(":")
            with Relay(f"http://{host}:{port}") as line:
                address = line.endpoint.replace("http", "tcp")
                job = conversion(folder, datasets)
                assert list(convert_units(job, some, 1, lambda *news: None, address)) == []
                sent.append(line.num_sent)
    assert sent[0] > 10_000, "the sources and the tokenizer, once"
    assert (sent[1] - sent[0]) / (len(numbers) - 2) < 2000


def test_a_cluster_that_is_not_there(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "CLUSTER_SECONDS", 1)
    datasets = writers(folder, "nowhere")
    with pytest.raises(
        ConfigError,
        match=r"^cluster: tcp://127\.0\.0\.1:1: cannot be reached: .*; give a Dask scheduler's",
    ):
        list(
            convert_units(
                conversion(folder, datasets), [0, 1], 1, lambda *news: None, "tcp://127.0.0.1:1"
            )
        )
    asked = start(folder, str(tmp_path), None, "cluster=tcp://127.0.0.1:1")
    out, err = asked.communicate(timeout=60)
    assert (asked.returncode, out) == (2, "")
    assert err.startswith("error: cluster: tcp://127.0.0.1:1: cannot be reached")
    assert err.count("\n") == 1


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(folder):
    process = start(folder, "interrupted", 2)
    units = folder / "interrupted" / "train" / "units"
    wait_until(lambda: units.exists() and any(units.iterdir()))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert (
        err == "interrupted; what was finished is kept, and the same command goes on from there\n"
    )
    assert not (folder / "interrupted" / "train" / "index.json").exists()
    wait_until(lambda: not list(processes(process.pid)))
    finish(folder, "interrupted")


def test_sigterm_again_and_again_is_one_status(folder):
    """Until the process has ended, while Python clears up, too."""
    process = start(folder, "terminated", 2)
    units = folder / "terminated" / "train" / "units"
    wait_until(lambda: units.exists() and any(units.iterdir()))
    while process.poll() is None:
        process.terminate()
        time.sleep(0.002)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (143, "", "")
    wait_until(lambda: not list(processes(process.pid)))
    finish(folder, "terminated")


def test_workers_that_are_stopped_end_with_the_process_in_charge(folder):
    """SIGSTOP to all, then SIGKILL to one: who is stopped cannot look after itself."""
    process = start(folder, "stopped", 2)
    units = folder / "stopped" / "train" / "units"
    wait_until(lambda: units.exists() and any(units.iterdir()) and workers_of(process.pid))
    os.killpg(process.pid, signal.SIGSTOP)
    process.kill()
    process.wait(timeout=30)
    try:
        # Python's own resource tracker is nobody's to end; continued, it clears up and ends.
        wait_until(
            lambda: all("resource_tracker" in command_of(pid) for pid, _ in processes(process.pid)),
            10,
        )
    finally:
        for pid, _ in processes(process.pid):
            os.kill(pid, signal.SIGCONT)
    process.communicate(timeout=30)
    wait_until(lambda: not list(processes(process.pid)))
    finish(folder, "stopped")


def command_of(pid: int) -> str:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_text() if path.exists() else "resource_tracker, which has just ended"


def finish(folder: Path, name: str) -> None:
    process = start(folder, name, 2)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    check_finished(folder, name)


FAULTS = [
    pytest.mark.faults,
    pytest.mark.skipif(
        "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
    ),
]


@pytest.mark.parametrize(
    ("store", "num_kills"),
    [
        ("folder", 6),
        ("s3", 3),
        pytest.param("folder", 20, marks=FAULTS),
        pytest.param("s3", 20, marks=FAULTS),
    ],
)
def test_killed_at_any_instant_with_any_number_of_workers(folder, store, num_kills, request):
    """SIGKILL to the process in charge, to all, or to one worker; the next run goes on, until
    one gets to the end.
    """
    if store == "s3":
        request.getfixturevalue("s3")
    rng = random.Random(num_kills)
    attempt = kills = 0
    name = base = (
        f"killed{num_kills}." if store == "folder" else f"s3://{BUCKET}/killed{num_kills}."
    )
    name += "0"
    while kills < num_kills:
        process = start(folder, name, 1 + kills % 3)
        train = f"{place_of(folder, name)}/train"
        wait_until(lambda: files.ls(train) or process.poll() is not None, 60)  # noqa: B023
        time.sleep(rng.uniform(0, 1) if rng.random() < 0.5 else rng.uniform(0.3, 0.7))
        victim = rng.choice(["leader", "all", "worker"])
        targets = workers_of(process.pid)
        if victim == "worker" and targets and process.poll() is None:
            os.kill(rng.choice(targets), signal.SIGKILL)
        elif process.poll() is None:
            victim = victim if victim == "all" else "leader"
            (os.killpg if victim == "all" else os.kill)(process.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        # Who is left behind must not live on
        wait_until(lambda pid=process.pid: not list(processes(pid)))
        if process.returncode == 0:
            check_finished(folder, name)
            attempt += 1
            name = f"{base}{attempt}"
            continue
        kills += 1
        if victim == "worker":
            assert process.returncode == 1
            assert re.fullmatch(
                r"error: a worker process died while it converted unit \d{6} \(short of"
                r" memory\?.*\n",
                err,
            )
        else:
            assert process.returncode == -signal.SIGKILL
    finish(folder, name)
