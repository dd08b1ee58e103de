"""Folders that belong to one job on a machine, and the number of files that it may open.

A folder belongs to a job until the last process of the job has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import resource
import shutil
import stat
import tempfile
import time
import weakref
from pathlib import Path

from flame_composer.errors import ConfigError
from flame_composer.storage.folders import close_to_others, is_ours, private_folder

CLAIM_SECONDS = 15.0
# Numbers of files that a process must, and should, be able to open at once: shards, logs, shared
# memory and pipes to loader processes.
MIN_FILES = 64
WANTED_FILES = 256


def hold(path: str | Path) -> int | None:
    """Lock a file for this process and those it forks from now on, and return its descriptor.

    Closing the descriptor unlocks the file. Return None if another job holds the lock, or if
    somebody else has put something there: in a shared folder, anyone can take a name first.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError:
        if os.path.lexists(path):
            return None
        raise
    try:
        found = os.fstat(lock)
        if stat.S_ISREG(found.st_mode) and is_ours(found, Path(path).parent):
            close_to_others(lock, found)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None


def is_own_folder(path: Path) -> bool:
    """Return whether `path` is a folder of this user's, and not a link to one.

    Only this user can have made such a folder.
    """
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and is_ours(found, path.parent)


def claim_folder(shared: Path) -> str:
    """Return the first of the folders `shared`-1, `shared`-2, ... that no living job holds.

    Folders of other users are passed over. A killed job holds its folder until its loader processes
    notice, some seconds later. The job that replaces it waits for that rather than start with an
    empty cache.
    """
    shared.parent.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + CLAIM_SECONDS
    while True:
        for number in itertools.count(1):
            folder = shared.with_name(f"{shared.name}-{number}")
            if number > 1 and not folder.exists() and time.monotonic() < give_up:
                break
            if (lock := hold(f"{folder}.lock")) is not None:
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                if is_own_folder(folder):
                    return str(folder)
                os.close(lock)
        time.sleep(0.2)


class JobFolder:
    """A folder for the processes of one job, removed when the last of them ends.

    It lies in this user's private folder. The lock is on the folder itself, which also keeps
    systemd-tmpfiles from deleting it during a long run.
    """

    def __init__(self, path: str | None = None):
        """Make a new folder, or enter the one at `path` that another process of the job made."""
        is_new = path is None
        while True:
            path = path or tempfile.mkdtemp(prefix="job-", dir=private_folder())
            self.path = Path(path)
            # Until it is locked, another job may mistake it for that of a dead job, and remove it.
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                fcntl.flock(lock, fcntl.LOCK_SH)
                if os.path.exists(path):
                    break
                os.close(lock)
            path = None
        if is_new:
            _sweep(self.path.parent)
        weakref.finalize(self, _leave, lock, self.path if is_new else None, os.getpid())


def _leave(lock: int, path: Path | None, pid: int) -> None:
    """Release the lock of a job's folder, and remove the folder if `path` is given.

    Do nothing unless this is the process `pid`, which took the lock.
    """
    if os.getpid() == pid:
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _sweep(private: Path) -> None:
    """Remove the folders that killed jobs left behind."""
    for path in private.glob("job-*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # its job has just ended
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def allow_files() -> int:
    """Return how many files this process may have open, after raising the limit if it is low.

    Raise ConfigError if that is fewer than training needs.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return WANTED_FILES
    if limit < WANTED_FILES:
        limit = WANTED_FILES if most == resource.RLIM_INFINITY else min(WANTED_FILES, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    if limit < MIN_FILES:
        raise ConfigError(
            f"ulimit -n: a process may have {limit} files open, and this takes {MIN_FILES} or more;"
            " raise the limit"
        )
    return limit
