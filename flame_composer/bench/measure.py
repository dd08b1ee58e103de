"""The tools of the benchmarks: figures and their limits, turns, and the cost of processes.

A process is counted with all its descendants, since a command costs whatever it starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from tqdm import tqdm

from flame_composer.errors import ConfigError, DataError
from flame_composer.processes import end_session, lead_session

T = TypeVar("T")

# Figures


@dataclass(frozen=True)
class Figure:
    """A measured value, or None if it was not measured, and the limit stated for it."""

    name: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None

    def is_missed(self, slack: float = 0.1) -> bool:
        """Return whether the value misses its limit by more than a share of `slack`."""
        if self.value is None:
            return False
        too_low = self.at_least is not None and self.value < self.at_least * (1 - slack)
        return too_low or (self.at_most is not None and self.value > self.at_most * (1 + slack))

    def line(self) -> str:
        """Return the figure as a line: its name, value, limit, and whether that was reached."""
        value = "not measured"
        if self.value is not None:
            value = f"{self.value:,.{0 if self.value > 999 else 2}f}"
        stated = "" if self.at_least is None else f"at least {self.at_least:g}"
        stated = stated if self.at_most is None else f"at most {self.at_most:g}"
        verdict = self._verdict() if stated and self.value is not None else ""
        return f"{self.name:68} {value:>14}   {stated:16} {verdict}".rstrip()

    def _verdict(self) -> str:
        if self.is_missed():
            return "missed"
        return "short" if self.is_missed(slack=0) else "reached"


def report(name: str, result: dict[str, Any], figures: Sequence[Figure]) -> None:
    """Print the figures of a benchmark, and all that it measured as a line of JSON."""
    for figure in figures:
        print(figure.line(), flush=True)
    shown = {"figures": [vars(figure) for figure in figures]}
    print(json.dumps({"benchmark": name, **machine(), **result, **shown}))


def machine() -> dict[str, Any]:
    """Return a description of this machine: its processor, cores and load."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "machine": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios of `above` to `below`, taken turn by turn."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


class Progress:
    """Tells on stderr what a benchmark is doing, with the time since it began."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def tell(self, line: str) -> None:
        """Print a line after the minutes and seconds that have passed."""
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        print(f"{minutes:3}:{seconds:02}  {line}", file=sys.stderr, flush=True)


def interleaved(
    what: Mapping[str, Callable[[], T]], repeats: int, title: str | None, *, warm: int = 1
) -> dict[str, list[T]]:
    """Call the functions `what` in turns, and return the list of values of each, by name.

    There are `repeats` turns, after `warm` others whose values are dropped. On a terminal, a bar
    with the title shows how far they are; with None there is no bar.
    """
    values: dict[str, list[T]] = {name: [] for name in what}
    hidden = True if title is None else None
    for _ in tqdm(range(warm + repeats), desc=title, disable=hidden):
        for name, run in what.items():
            values[name].append(run())
    return {name: found[warm:] for name, found in values.items()}


# Processes


@dataclass(frozen=True)
class Usage:
    """The cost of a command with all the processes that it started."""

    seconds: float
    cpu_seconds: float  # of all processes together
    peak_bytes: int  # of the process that took the most memory
    output: str  # its stdout


def measure(command: Sequence[str], env: Mapping[str, str] = MappingProxyType({})) -> Usage:
    """Run a command until it and all its descendants have ended, and return its cost.

    Raise DataError if it fails, and ConfigError on another system than Linux.
    """
    if sys.platform != "linux":
        raise ConfigError(
            "this benchmark needs Linux, which can hand over the processes that a command leaves"
            " behind"
        )
    # Run it from a separate process that has no other children and is small: a new process starts
    # with the peak memory of the one that forked it.
    code = "from flame_composer.bench.measure import run_and_count; run_and_count()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **env},
        start_new_session=True,
    )
    try:
        output, lines = process.communicate()
    except BaseException:
        end_session(process.pid)
        process.communicate()
        raise
    *errors, last = [line for line in lines.splitlines() if line.strip()]
    if process.returncode != 0:
        reason = (
            errors[-1].removeprefix("error: ") if errors else f"exit status {process.returncode}"
        )
        raise DataError(f"{' '.join(command[:2])}: failed: {reason}")
    seconds, cpu_seconds, peak_bytes = json.loads(last)
    return Usage(seconds, cpu_seconds, peak_bytes, output)


def run_and_count() -> None:
    """Run the command in sys.argv, exit with its status, and print what it took to stderr.

    The last line of stderr is a JSON list of the first three fields of `Usage`.
    """
    # Processes that the command leaves behind are counted, and end if the benchmark is killed.
    lead_session()
    started = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:])
    _, code, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    usages = [usage]
    with contextlib.suppress(ChildProcessError):
        while True:
            usages.append(os.wait4(-1, 0)[2])
    process.returncode = os.waitstatus_to_exitcode(code)
    cpu_seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    counted = json.dumps([seconds, cpu_seconds, max(usage.ru_maxrss for usage in usages) << 10])
    print(f"\n{counted}", file=sys.stderr)
    sys.exit(process.returncode)


@contextlib.contextmanager
def workplace(parent: str | None) -> Iterator[Path]:
    """Yield a new folder in `parent`, and remove it with its contents at the end.

    If `parent` is None, it is in the system's temporary folder. Raise DataError if that fails.
    """
    try:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)
    except OSError as error:
        place = error.filename or parent or tempfile.gettempdir()
        raise DataError(
            f"folder: {place}: {error.strerror or error}; give another one with folder=..."
        ) from None
