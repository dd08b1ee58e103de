"""recipes/sweep.py, with trials that are forked from this process instead of started anew.

Run by tests.runs.Script, this process has imported what a trial imports, which takes longer than a
trial. All else is as in `processes.start_child`: a process of its own, in the same group, that gets
SIGTERM when this one ends.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from flame_composer import processes

ROOT = Path(__file__).parent.parent.parent
_parents: list[object] = []


class Forked:
    """What the sweep uses of subprocess.Popen."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def start_forked(command: Sequence[str], out: BinaryIO, err: BinaryIO) -> Forked:
    parent = os.getpid()
    sys.stdout.flush()
    if pid := os.fork():
        return Forked(pid)
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        processes.when_parent_ends(signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        _parents.extend((sys.stdout, sys.stderr))  # which close 1 and 2 when they are collected
        sys.stdout = open(1, "w", buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
        sys.argv = list(command[1:])
        runpy.run_path(command[1], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    processes.start_child = start_forked  # type: ignore[assignment]
    sys.argv[0] = str(ROOT / "recipes/sweep.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
