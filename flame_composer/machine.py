"""What belongs to one job among those of a machine, until the last of its processes has ended: a folder, shared memory."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from composer.utils import dist
from streaming.base.constant import LOCALS
from streaming.base.shared import SharedMemory, _get_path
from streaming.base.shared.prefix import _pack_locals
from streaming.base.world import World

CLAIM_SECONDS = 15.0
UNLINK_SECONDS = 60.0
SHARED_MEMORY = Path("/dev/shm")


def hold(path: str | Path) -> int | None:
    """Lock a file for this process and those it forks from now on; None if another job has it. Closing the result undoes it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def claim_folder(shared: Path) -> str:
    """The first of `shared`-1, `shared`-2, ... that no living job has.

    A job that was killed has its folder until its loader processes have noticed, some seconds later: the job that takes
    its place waits for them rather than begin with an empty cache.
    """
    shared.parent.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + CLAIM_SECONDS
    while True:
        for number in itertools.count(1):
            folder = shared.with_name(f"{shared.name}-{number}")
            if number > 1 and not folder.exists() and time.monotonic() < give_up:
                break
            if hold(f"{folder}.lock") is not None:
                folder.mkdir(exist_ok=True)
                return str(folder)
        time.sleep(0.2)


def claim_shared_memory(streams_local: list[str], _streams_remote: Any, world: World) -> tuple[int, SharedMemory]:
    """In place of streaming's get_shm_prefix: a number for the names of this dataset's shared memory, and their first.

    Upstream takes the first number that nothing has, which two jobs can do at once; it keeps all that it has looked at
    open, and never removes what killed jobs left, so that after some hundred of them no file can be opened any more.
    """
    number, memory = 0, None
    if world.is_local_leader:
        number = _claim_number()
        content = _pack_locals(streams_local, number)
        memory = SharedMemory(_get_path(number, LOCALS), True, len(content))
        memory.buf[: len(content)] = content
    number = dist.all_gather_object(number)[dist.get_global_rank() - dist.get_local_rank()]
    return number, memory or SharedMemory(_get_path(number, LOCALS), False)


def _claim_number() -> int:
    """The first number of this user that no living job has, with nothing left of a dead one."""
    first = (os.getuid() + 1) * 100_000  # far from those that upstream takes
    for number in itertools.count(first):
        lock = hold(Path(tempfile.gettempdir(), f"flame_composer-{number}.lock"))
        if lock is None:
            continue
        left = list(SHARED_MEMORY.glob(f"{number}_*"))
        # What a job that was killed just now leaves, its resource tracker removes, by name, in a moment.
        with contextlib.suppress(FileNotFoundError):  # it does so just now
            if all(time.time() - path.stat().st_mtime > UNLINK_SECONDS for path in left):
                for path in left:
                    path.unlink()
                return number
        os.close(lock)
    raise AssertionError
