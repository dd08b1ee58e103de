"""recipes/train.py with something happening in the middle of one of its checkpoints.

    python tests/phases.py PHASE NUMBER [file.yaml] [key=value ...]

PHASE `slow` makes every checkpoint take a second and a half to write, or until there is a file
named as in the environment's UNTIL. Any other kills the process with SIGKILL at that point of its
checkpoint with this NUMBER, counted from 1 in every process. With PHASE_RANK in the environment,
this happens on the rank with that number only.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flame_composer.checkpoint import snapshot, write
from flame_composer.checkpoint.keep import KeptCheckpoints

ROOT = Path(__file__).parent.parent
IN_FOLDER = ("copying", "writing", "forcing", "naming", "named", "deleting")
IN_STORE = ("copying", "writing", "uploading", "uploaded", "deleting")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A file that takes no more than a part of what is written to it."""

    def __init__(self, file: Any):
        self.file, self.room = file, 1 << 17

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            self.file.flush()
            kill()
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def counted(function: Callable[..., Any], number: int, then: Callable[..., Any]) -> Any:
    """`function`, in whose place `then` is called the `number`th time, or each time if 0.

    Only what the thread that writes checkpoints does counts, if `function` is not of this package.
    """
    calls = iter(range(1, 1 << 30))
    anywhere = function.__module__.startswith("flame_composer")

    def call(*args: Any, **kwargs: Any) -> Any:
        is_main = threading.current_thread() is threading.main_thread()
        if (anywhere or not is_main) and number in (0, next(calls)):
            return then(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def before(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    kill()


def after(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    function(*args, **kwargs)
    kill()


def during(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    threading.Timer(0.003, kill).start()
    function(*args, **kwargs)
    time.sleep(1)


def torn(save: Callable[..., Any], content: Any, file: Any) -> None:
    save(content, Torn(file.open("wb") if isinstance(file, Path) else file))


def slow(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    until, patience = os.environ.get("UNTIL"), 60.0
    while until is not None and not Path(until).exists() and patience > 0:
        time.sleep(0.01)
        patience -= 0.01
    time.sleep(1.5 if until is None else 0)
    function(*args, **kwargs)


def arrange(phase: str, number: int) -> None:
    if phase == "slow":
        torch.save = counted(torch.save, 0, slow)  # type: ignore[assignment]
    elif phase == "copying":
        copy = snapshot.HostMemory.copy

        def copy_half(function: Any, self: Any, *args: Any) -> None:
            part = "_laid_out_as"
            setattr(snapshot, part, counted(getattr(snapshot, part), 9, before))
            function(self, *args)

        snapshot.HostMemory.copy = counted(copy, number, copy_half)  # type: ignore[method-assign]
    elif phase == "writing":
        torch.save = counted(torch.save, number, torn)  # type: ignore[assignment]
    elif phase == "forcing":  # the log is forced to disk before, and the folder after it
        os.fsync = counted(os.fsync, 4 * number - 1, before)  # type: ignore[assignment]
    elif phase == "renaming":  # a folder of pieces
        os.rename = counted(os.rename, number, before)
    elif phase in ("naming", "named"):
        os.replace = counted(os.replace, number, before if phase == "naming" else after)
    elif phase in ("uploading", "uploaded"):
        then = during if phase == "uploading" else after
        write.upload_file = counted(write.upload_file, number, then)  # type: ignore[assignment]
    else:
        assert phase == "deleting", phase
        delete = KeptCheckpoints.delete_old
        KeptCheckpoints.delete_old = counted(delete, number, before)  # type: ignore[method-assign]


if __name__ == "__main__":
    _, what, which, *keys = sys.argv
    sys.argv = [str(ROOT / "recipes/train.py"), *keys]
    if os.environ.get("PHASE_RANK") in (None, os.environ.get("RANK")):
        arrange(what, int(which))
    runpy.run_path(sys.argv[0], run_name="__main__")
