"""Folders and file limits of one job among those of a machine.

A folder belongs to a job until the last of its processes has ended.
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
# Files that a process must be able to open: shards, logs, shared memory, pipes to loaders
MIN_FILES = 64
WANTED_FILES = 256


def hold(path: str | Path) -> int | None:
    """Lock a file for this process and those it forks from now on, and return its descriptor.

    Closing the descriptor unlocks the file. Return None if another job holds the lock, or if the
    path is not a file of ours: in a folder of several users, anyone can put something under a name.
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
    """Return whether this is a folder of this user's, and not a link to one.

    Nobody else can have put it there.
    """
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and is_ours(found, path.parent)


def claim_folder(shared: Path) -> str:
    """Return the first of the folders `shared`-1, `shared`-2, ... that no living job has.

    Folders that somebody else has put there are passed over. A job that was killed keeps its folder
    until its loader processes have noticed, some seconds later: the job that takes its place waits
    for them rather than begin with an empty cache.
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
    """A folder for the processes of this job alone, removed with the last of them.

    It lies in this user's private folder. Its lock is on the folder itself, which also keeps
    systemd-tmpfiles from clearing it away in a long run.
    """

    def __init__(self, path: str | None = None):
        """Make a new folder, or enter the one at `path` that another process of the job made."""
        is_new = path is None
        while True:
            path = path or tempfile.mkdtemp(prefix="job-", dir=private_folder())
            self.path = Path(path)
            # Before it is opened or locked, another job may take it for a dead job's and remove
            # it.
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
    """Remove a job's folder, if it has a path, and its lock; do nothing in a forked process."""
    if os.getpid() == pid:  # not in a process that was forked from it
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _sweep(private: Path) -> None:
    """Remove the folders of jobs that were killed, so that nobody has to clean up by hand."""
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
    """Return how many files this process may have open, after asking for more if there are few.

    Raise ConfigError if they are fewer than training takes.
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
