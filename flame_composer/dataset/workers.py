"""Conversion of work units by a pool of processes or by a Dask cluster.

The units are handed out to workers, their progress and results are collected, and the death of a
worker becomes an error.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.sharedctypes import RawArray
from typing import Any, Protocol

from flame_composer.dataset.plan import unit_name
from flame_composer.errors import ConfigError, DataError
from flame_composer.lines import clean_streams
from flame_composer.processes import can_have_processes, end_with_parent, ending_children

OnProgress = Callable[[int, int, int], None]

# Imported once, in the process that workers are forked from. Nothing here may import transformers,
# streaming or torch, which take seconds.
PRELOADED = [
    "flame_composer.fork_server",
    "flame_composer.config.cli",
    "flame_composer.config.convert",
    "flame_composer.dataset.convert",
    "flame_composer.dataset.workers",
    "gigatoken",
    "tokenizers",
    "tqdm",
]
MAX_MEMORY = 448 << 20  # bytes; a worker that has grown beyond this is replaced by a new one
MAX_INPUT = 4 << 30  # input bytes that a worker converts before it is replaced
SMALL_INPUT = 4 << 20  # input bytes up to which a single unit is not worth starting a process
POLL_SECONDS = 0.5
# Units that a cluster is given for each thread of its workers: the one that it converts, and the
# next. Without a worker it gets so many, too: some clusters start workers only for waiting tasks.
UNITS_A_THREAD = 2
LARGE_GRAPH = "distributed.admin.large-graph-warning-threshold"
CLUSTER_POLL_SECONDS = 1  # how often to look whether workers have come
CLUSTER_SECONDS = 10  # how long to wait for the cluster to answer


class Converter(Protocol):
    """A converter of work units in the process that makes it."""

    def convert(self, inputs: Any, number: int, on_progress: OnProgress) -> Any:
        """Do the work of unit `number`, and return its result, or None if there is none."""


class Job(Protocol):
    """A job of one piece of work for each of a conversion's units."""

    def settings(self) -> Job:
        """Return what all units share, without what `inputs` gives."""

    def inputs(self, number: int) -> Any:
        """Return what the work of unit `number` needs besides the settings."""

    def num_bytes(self, number: int) -> int:
        """Return the size of a unit's input in bytes."""

    def build_converter(self) -> Converter:
        """Return a converter, which may take seconds to make."""


def convert_units(
    job: Job,
    numbers: Sequence[int],
    num_workers: int,
    on_progress: OnProgress,
    cluster: str | None = None,
) -> Iterator[Any]:
    """Convert the units `numbers`, in any order, and yield the results that are not None.

    They are converted by `num_workers` processes or, with `cluster`, the address of a Dask
    scheduler, by its workers. Without a cluster, a single unit is converted in this process if it
    is small. (A large one may ask for more memory than there is, and that ends a process.)

    `on_progress` is called in this process with the number of documents, tokens and input bytes
    since the last call. The first error stops all workers, and units that were not committed are
    left for the next run.

    Raises DataError if a process dies, ConfigError if the cluster cannot be used.
    """
    if cluster is not None:
        yield from _convert_on_cluster(job, numbers, cluster, on_progress)
        return
    if not numbers:
        return
    if len(numbers) > 1 or any(job.num_bytes(number) > SMALL_INPUT for number in numbers):
        if can_have_processes():
            yield from _convert_on_pool(job, numbers, min(num_workers, len(numbers)), on_progress)
            return
        yield (
            "worker processes need a writable /dev/shm, which this machine does not have;"
            " converting in this process"
        )
    converter = job.build_converter()
    for number in numbers:
        result = converter.convert(job.inputs(number), number, on_progress)
        if result is not None:
            yield result


def _convert_on_cluster(
    job: Job, numbers: Sequence[int], cluster: str, on_progress: OnProgress
) -> Iterator[Any]:
    try:
        import dask
        from distributed import Client, KilledWorker
    except ImportError:
        raise ConfigError(
            "cluster: distributed is not installed; pip install 'flame-composer[cluster]'"
        ) from None
    try:
        client = Client(cluster, timeout=CLUSTER_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:  # TypeError: tls:// without certificates
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"cluster: {cluster}: cannot be reached: {reason}; give a Dask scheduler's address"
        ) from None
    with client:
        # Sent once to each worker, not once with each unit. As the result of a task they are not
        # lost with a worker, and need not wait for one.
        with dask.config.set({LARGE_GRAPH: "1 GiB"}):  # no warning of a large tokenizer
            sent = client.submit(_shared, job.settings(), pure=False)
        executor = client.get_executor()
        waiting, threads = iter(numbers), _Threads(client)
        busy: dict[Future[tuple[Any, list[int]]], int] = {}
        try:
            while True:
                room = UNITS_A_THREAD * max(1, threads.count()) - len(busy)
                for number in islice(waiting, max(0, room)):
                    future = executor.submit(_convert_alone, sent, job.inputs(number), number)
                    busy[future] = number
                if not busy:
                    return
                done, _ = wait(busy, CLUSTER_POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    number = busy.pop(future)
                    result, news = future.result()
                    on_progress(*news)
                    if result is not None:
                        yield result
        except KilledWorker:
            raise DataError(
                f"{cluster}: workers died again and again while they converted unit"
                f" {unit_name(number)} (short of memory?); run the same command again: it goes on"
                " from the last finished unit"
            ) from None
        finally:
            for future in busy:
                future.cancel()


class _Threads:
    """The number of threads of all workers of a cluster, asked for once in a while."""

    def __init__(self, client: Any):
        self.client, self.number, self.asked = client, 0, -float("inf")

    def count(self) -> int:
        """Return their number, as the scheduler last said."""
        if time.monotonic() - self.asked >= CLUSTER_POLL_SECONDS:
            self.asked = time.monotonic()
            with suppress(OSError):  # the scheduler does not answer; those that are busy go on
                self.number = sum(self.client.nthreads().values())
        return self.number


class _Lane:
    """A pool of one process, which is replaced when it has grown too large.

    `ProcessPoolExecutor(max_tasks_per_child=...)` would do this too, but it can hang when a process
    leaves (python/cpython#115634).
    """

    def __init__(self, job: Job):
        self.job = job
        # Documents, tokens and bytes so far; only the worker process writes them
        self.counts = RawArray("q", 3)
        self.reported = [0, 0, 0]
        self.num_bytes = 0  # input bytes given to the worker process
        self.executor: ProcessPoolExecutor | None = None

    def submit(self, number: int) -> Future[tuple[Any, int]]:
        if self.executor is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOADED)
            self.executor = ProcessPoolExecutor(
                1, context, _start, (self.job.settings(), self.counts)
            )
        self.num_bytes += self.job.num_bytes(number)
        return self.executor.submit(_convert, self.job.inputs(number), number)

    def news(self) -> list[int]:
        """Return the documents, tokens and bytes counted since the last call."""
        counts = list(self.counts)
        news = [now - before for now, before in zip(counts, self.reported, strict=True)]
        self.reported = counts
        return news

    def renew(self, memory: int) -> None:
        if memory > MAX_MEMORY or self.num_bytes >= MAX_INPUT:
            self.close()

    def close(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)
            self.executor = None
            self.num_bytes = 0


def _convert_on_pool(
    job: Job, numbers: Sequence[int], num_workers: int, on_progress: OnProgress
) -> Iterator[Any]:
    waiting = iter(numbers)
    idle = [_Lane(job) for _ in range(num_workers)]
    lanes = tuple(idle)
    busy: dict[Future[tuple[Any, int]], tuple[_Lane, int]] = {}
    with _closing(lanes):
        while True:
            while idle and (number := next(waiting, None)) is not None:
                lane = idle.pop()
                busy[lane.submit(number)] = lane, number
            if not busy:
                return
            done, _ = wait(busy, POLL_SECONDS, FIRST_COMPLETED)
            for lane in lanes:
                if any(news := lane.news()):
                    on_progress(*news)
            for future in done:
                lane, number = busy.pop(future)
                try:
                    result, memory = future.result()
                except BrokenProcessPool:
                    raise DataError(
                        f"a worker process died while it converted unit {unit_name(number)} (short"
                        " of memory? give fewer num_workers); run the same command again: it goes"
                        " on from the last finished unit"
                    ) from None
                lane.renew(memory)
                idle.append(lane)
                if result is not None:
                    yield result


@contextmanager
def _closing(lanes: Sequence[_Lane]) -> Iterator[None]:
    """Close the lanes at the end; if the body raises, kill their processes even in mid-unit."""
    try:
        with ending_children():
            yield
    finally:
        for lane in lanes:
            lane.close()


# In a worker of a cluster, which may have several threads


_thread = threading.local()


def _shared(settings: Job) -> Job:
    """Return what all units share, as the result of a task, which the workers keep."""
    return settings


def _convert_alone(job: Job, inputs: Any, number: int) -> tuple[Any, list[int]]:
    """Convert a unit; return its result, and its number of documents, tokens and bytes."""
    # A worker already runs as many of these threads as it may use cores
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if getattr(_thread, "job", None) is not job:
        _thread.job, _thread.converter = job, job.build_converter()
    counts = [0, 0, 0]

    def on_progress(*news: int) -> None:
        counts[:] = (total + count for total, count in zip(counts, news, strict=True))

    return _thread.converter.convert(inputs, number, on_progress), counts


# In a process of the pool


_worker: dict[str, Any] = {}


def _start(job: Job, counts: Any) -> None:
    end_with_parent()
    clean_streams()
    # One core for each worker; the encoders read these when they start their first thread.
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    _worker.update(job=job, counts=counts)


def _convert(inputs: Any, number: int) -> tuple[Any, int]:
    """Convert a unit; return its result, and this process's peak memory in bytes."""
    if "converter" not in _worker:
        _worker["converter"] = _worker["job"].build_converter()
    counts = _worker["counts"]

    def on_progress(*news: int) -> None:
        for i, count in enumerate(news):
            counts[i] += count

    result = _worker["converter"].convert(inputs, number, on_progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result, peak if sys.platform == "darwin" else peak << 10
