"""Work units on a pool of processes or a Dask cluster: who converts which, what they report,
what happens if one dies.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from typing import Any, Literal

from flame_composer.dataset.convert import EncoderMismatch, convert_unit
from flame_composer.dataset.plan import unit_name
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.errors import ConfigError, DataError
from flame_composer.lines import clean_streams
from flame_composer.processes import can_have_processes, end_with_parent, ending_children
from flame_composer.text.encoder import HF, build_fast_encoder, require_installed
from flame_composer.text.tokenizer import BareTokenizer, Encoder, build_encoder

OnProgress = Callable[[int, int, int], None]

# Imported once, in the process that workers come from: nothing of the seconds that transformers,
# streaming or torch take.
PRELOADED = [
    "flame_composer.fork_server",
    "flame_composer.config.cli",
    "flame_composer.config.convert",
    "flame_composer.dataset.workers",
    "gigatoken",
    "tokenizers",
    "tqdm",
]
MAX_MEMORY = 448 << 20  # bytes; a worker that has grown beyond gives its place to a new one
MAX_INPUT = 4 << 30  # input bytes a worker converts before it does the same
SMALL_INPUT = 4 << 20  # bytes of a unit that is not worth the start of a process
POLL_SECONDS = 0.5
CLUSTER_SECONDS = 10  # how long to wait for the cluster to answer


@dataclass(frozen=True)
class Conversion:
    """How text becomes datasets; `encoder` is what `encoder.choose_encoder` named."""

    datasets: tuple[DatasetWriter, ...]
    tokenizer: BareTokenizer
    add_bos: bool
    add_eos: bool
    encoder: str
    on_mismatch: Literal["fail", "redo"]
    on_error: Literal["fail", "skip"]

    def settings(self) -> Conversion:
        """Return what every unit needs: all but the datasets, which hold the inputs of all
        units.
        """
        return dataclasses.replace(self, datasets=())

    def unit(self, number: int) -> tuple[DatasetWriter, ...]:
        """Return what unit `number` alone needs."""
        return tuple(dataset.only(number) for dataset in self.datasets)

    def num_bytes(self, number: int) -> int:
        """Return the size of a unit's input, bytes."""
        return sum(part.num_bytes for part in self.datasets[0].plan.units[number])


class UnitConverter:
    """Converts units in the process it is made in, which builds the encoders once."""

    def __init__(self, conversion: Conversion):
        self.conversion = conversion
        ends: dict[str, bool] = {"add_bos": conversion.add_bos, "add_eos": conversion.add_eos}
        self.exact: Encoder = build_encoder(conversion.tokenizer, **ends)
        require_installed(conversion.encoder)
        self.fast = (
            None
            if conversion.encoder == HF
            else build_fast_encoder(conversion.tokenizer, self.exact, **ends)
        )

    def convert(
        self, datasets: Sequence[DatasetWriter], number: int, on_progress: OnProgress
    ) -> str | None:
        """Convert and commit unit `number`; returns a warning if it had to be done again with
        the slower encoder.
        """
        conversion = self.conversion
        common = (datasets, number)
        if self.fast is None:
            convert_unit(*common, self.exact, conversion.on_error, on_progress)
            return None
        try:
            convert_unit(
                *common,
                self.fast,
                conversion.on_error,
                on_progress,
                encoder=conversion.encoder,
                reference=self.exact,
            )
        except EncoderMismatch as mismatch:
            if conversion.on_mismatch == "fail":
                raise DataError(
                    f"{mismatch} to {conversion.encoder} than to {HF}; set encoder=auto or hf"
                ) from None
            convert_unit(*common, self.exact, conversion.on_error, on_progress)
            return (
                f"{mismatch} to {conversion.encoder} than to {HF}; this unit was encoded with {HF}"
            )
        return None


def convert_units(
    conversion: Conversion,
    numbers: Sequence[int],
    num_workers: int,
    on_progress: OnProgress,
    cluster: str | None = None,
) -> Iterator[str]:
    """Convert and commit the units `numbers`, in any order, on `num_workers` processes; yields
    warnings.

    With `cluster`, the address of a Dask scheduler, its workers do it instead. A single small unit
    is converted in this process where there is no cluster; a large one may ask for more memory than
    there is, which ends a process. `on_progress` is called in this process with the documents,
    tokens and input bytes done with since the last call. The first error stops all of them, and
    units that were not committed are left for the next time.

    Raises DataError if a process dies, ConfigError if there is no such cluster.
    """
    if cluster is not None:
        yield from _convert_on_cluster(conversion, numbers, cluster, on_progress)
        return
    if not numbers:
        return
    if len(numbers) > 1 or any(conversion.num_bytes(number) > SMALL_INPUT for number in numbers):
        if can_have_processes():
            yield from _convert_on_pool(
                conversion, numbers, min(num_workers, len(numbers)), on_progress
            )
            return
        yield (
            "there can be no worker processes without a /dev/shm that can be written to; converting"
            " in this one"
        )
    converter = UnitConverter(conversion)
    for number in numbers:
        warning = converter.convert(conversion.datasets, number, on_progress)
        if warning is not None:
            yield warning


def _convert_on_cluster(
    conversion: Conversion, numbers: Sequence[int], cluster: str, on_progress: OnProgress
) -> Iterator[str]:
    try:
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
        executor = client.get_executor()
        # Once to a worker, not once with every unit
        sent = client.scatter(conversion.settings(), hash=False)
        futures = {
            executor.submit(_convert_alone, sent, conversion.unit(number), number): number
            for number in numbers
        }
        try:
            for future in as_completed(futures):
                warning, news = future.result()
                on_progress(*news)
                if warning is not None:
                    yield warning
        except KilledWorker:
            raise DataError(
                f"{cluster}: workers died again and again while they converted unit"
                f" {unit_name(futures[future])} (short of memory?); run the same command again: it"
                " goes on from the last finished unit"
            ) from None
        finally:
            for future in futures:
                future.cancel()


class _Lane:
    """A pool of one process, made anew when that has grown too large.

    (`ProcessPoolExecutor(max_tasks_per_child=...)` can stop for good when a process leaves:
    python/cpython#115634.)
    """

    def __init__(self, conversion: Conversion):
        self.conversion = conversion
        # Documents, tokens and bytes so far; written by the process alone
        self.counts = RawArray("q", 3)
        self.reported = [0, 0, 0]
        self.num_bytes = 0  # of input, that the process was given
        self.executor: ProcessPoolExecutor | None = None

    def submit(self, number: int) -> Future[tuple[str | None, int]]:
        if self.executor is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOADED)
            self.executor = ProcessPoolExecutor(
                1, context, _start, (self.conversion.settings(), self.counts)
            )
        self.num_bytes += self.conversion.num_bytes(number)
        return self.executor.submit(_convert, self.conversion.unit(number), number)

    def news(self) -> list[int]:
        """What was counted since the last call."""
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
    conversion: Conversion, numbers: Sequence[int], num_workers: int, on_progress: OnProgress
) -> Iterator[str]:
    waiting = iter(numbers)
    idle = [_Lane(conversion) for _ in range(num_workers)]
    lanes = tuple(idle)
    busy: dict[Future[tuple[str | None, int]], tuple[_Lane, int]] = {}
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
                    warning, memory = future.result()
                except BrokenProcessPool:
                    raise DataError(
                        f"a worker process died while it converted unit {unit_name(number)} (short"
                        " of memory? give fewer num_workers); run the same command again: it goes"
                        " on from the last finished unit"
                    ) from None
                lane.renew(memory)
                idle.append(lane)
                if warning is not None:
                    yield warning


@contextmanager
def _closing(lanes: Sequence[_Lane]) -> Iterator[None]:
    """Stops the processes in the middle of their units if the body is left by an exception."""
    try:
        with ending_children():
            yield
    finally:
        for lane in lanes:
            lane.close()


# In a worker of a cluster, which may have several threads


_thread = threading.local()


def _convert_alone(
    conversion: Conversion, datasets: Sequence[DatasetWriter], number: int
) -> tuple[str | None, list[int]]:
    """Returns a warning, if any, and the documents, tokens and bytes done with."""
    # A worker has as many threads as it may use cores
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if getattr(_thread, "conversion", None) is not conversion:
        _thread.conversion, _thread.converter = conversion, UnitConverter(conversion)
    counts = [0, 0, 0]

    def on_progress(*news: int) -> None:
        counts[:] = (total + count for total, count in zip(counts, news, strict=True))

    return _thread.converter.convert(datasets, number, on_progress), counts


# In a process of the pool


_worker: dict[str, Any] = {}


def _start(conversion: Conversion, counts: Any) -> None:
    end_with_parent()
    clean_streams()
    # One core each; read when the encoder starts its first thread.
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    _worker.update(conversion=conversion, counts=counts)


def _convert(datasets: Sequence[DatasetWriter], number: int) -> tuple[str | None, int]:
    """Returns a warning, if any, and the most memory this process has taken, bytes."""
    if "converter" not in _worker:
        _worker["converter"] = UnitConverter(_worker["conversion"])
    counts = _worker["counts"]

    def on_progress(*news: int) -> None:
        for i, count in enumerate(news):
            counts[i] += count

    warning = _worker["converter"].convert(datasets, number, on_progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return warning, peak if sys.platform == "darwin" else peak << 10
