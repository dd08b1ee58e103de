"""Kernels compiled for a GPU that is not there, in processes that may die of it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from signal import SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGTRAP
from typing import Any

from flame_composer.errors import ConfigError, one_line
from flame_composer.plan.kernels import ENDED_HERE
from flame_composer.processes import end_with_parent
from flame_composer.upstream.triton import Launch, compiled_shared_memory, prepare_to_compile

CANNOT_KEEP = "what is compiled cannot be kept"
# Signals by which a compiler ends itself, for a failed assertion or a fault of its own.
OWN_SIGNALS = frozenset({SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGTRAP})
SHORT = 75  # exit status of a process that had too little memory, or whose ptxas was killed


@dataclass
class Verdict:
    """What came of compiling a launch; numbers are of configurations, or bytes of a block."""

    kernel: str
    uses: list[str]
    configurations: int
    compiled: int = 0
    fit: int = 0
    least: int | None = None  # shared memory of the configuration that asks for least
    most: int | None = None
    smallest: str = ""  # that configuration
    errors: dict[str, int] = field(default_factory=dict)  # how many do not compile, by the reason

    def add(self, configuration: str, shared: int | None, error: str, limit: int) -> None:
        """Count one configuration: its bytes of shared memory, or why it does not compile."""
        if shared is None:
            self.errors[error] = self.errors.get(error, 0) + 1
            return
        self.compiled += 1
        self.fit += shared <= limit
        if self.least is None or shared < self.least:
            self.least, self.smallest = shared, configuration
        self.most = max(shared, self.most or 0)


class _Task:
    """A launch whose configurations are compiled one after the other in a process of their own."""

    def __init__(self, launch: Launch, uses: list[str]):
        self.variants = sorted(launch.variants, key=lambda variant: variant.size)
        self.verdict = Verdict(launch.kernel, uses, len(self.variants))
        self.done = 0  # configurations
        self.again: int | None = None  # the configuration that is tried again, alone


def judge(
    launches: Sequence[tuple[Launch, list[str]]],
    limit: int,
    *,
    every: bool,
    report: Callable[[Verdict], Any],
) -> None:
    """Compile the launches for the claimed GPU, whose blocks have `limit` bytes of shared memory.

    Those of a launch's configurations that ask for little are tried first; without `every` no more
    are tried once one compiles and fits. The compiler's own failed assertions end its process, so
    each launch has a process; as many run at once as there are cores. One that the machine ends, as
    when its memory runs out, is tried once more when no other runs; a verdict whose compiler is
    ended again has an error that begins with ENDED_HERE. `report` gets each verdict. Raise
    ConfigError if what is compiled cannot be kept.
    """
    prepare_to_compile()
    context = multiprocessing.get_context("fork")
    waiting = [_Task(launch, uses) for launch, uses in reversed(launches)]
    alone: list[_Task] = []
    running: dict[Any, tuple[_Task, Any]] = {}
    while waiting or running or alone:
        if not waiting and not running:
            waiting.append(alone.pop())
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            task = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process: Any = context.Process(target=_compile, args=(task, limit, every, theirs))
            process.start()
            theirs.close()
            running[ours] = task, process
        for connection in wait(list(running)):
            task, process = running[connection]
            try:
                shared, error = typing.cast(Connection, connection).recv()
            except (EOFError, OSError):  # nothing, or half of an answer
                del running[connection]
                process.join()
                _take_end(task, process.exitcode, waiting, alone, report)
                continue
            if error.startswith(CANNOT_KEEP):
                raise ConfigError(f"{error}; set TRITON_CACHE_DIR to a folder with room")
            _add(task, shared, error, limit)


def _add(task: _Task, shared: int | None, error: str, limit: int) -> None:
    variant = task.variants[task.done]
    task.verdict.add(_text(variant.configuration), shared, error, limit)
    task.done += 1


def _take_end(
    task: _Task,
    status: int,
    waiting: list[_Task],
    alone: list[_Task],
    report: Callable[[Verdict], Any],
) -> None:
    """Report a task whose process has ended well, or put it where it goes on."""
    if status == 0:
        report(task.verdict)
    elif status == 1 or -status in OWN_SIGNALS:
        _add(task, None, f"the compiler's process ended with {status}", 0)
        waiting.append(task)
    elif task.again != task.done:
        task.again = task.done
        alone.append(task)
    else:
        reason = "for want of memory" if status == SHORT else f"by signal {-status}"
        _add(task, None, f"{ENDED_HERE} {reason}, twice", 0)
        report(task.verdict)


def _compile(task: _Task, limit: int, every: bool, connection: Connection) -> None:
    end_with_parent()
    nowhere = os.open(os.devnull, os.O_WRONLY)  # for what the compiler itself writes
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    for variant in task.variants[task.done :]:
        try:
            shared = compiled_shared_memory(variant)
        except Exception as error:  # Triton's compiler raises many kinds
            if _is_short(error):
                os._exit(SHORT)
            connection.send((None, _reason(error)))
            continue
        connection.send((shared, ""))
        if shared <= limit and not every:
            break


def _reason(error: Exception) -> str:
    cache = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
    is_cache = isinstance(error, OSError) and error.errno in cache
    return f"{CANNOT_KEEP if is_cache else type(error).__name__}: {one_line(error)}"


def _is_short(error: Exception) -> bool:
    """Return whether the machine lacks memory, or has killed ptxas, which Triton starts."""
    cause = error.__context__
    if isinstance(cause, subprocess.CalledProcessError):
        return cause.returncode < 0 and -cause.returncode not in OWN_SIGNALS
    lacks = isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN)
    return lacks or isinstance(error, MemoryError)


def _text(configuration: tuple[tuple[str, Any], ...]) -> str:
    return " ".join(f"{name}={value}" for name, value in configuration)
