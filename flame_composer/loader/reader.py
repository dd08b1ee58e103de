"""Reading of rows from shards whose files stay open."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_composer.dataset.mds import read_offsets

# More files than are read at once with the default shuffling, but far fewer than a process may have
# open.
MAX_OPEN = 64


FIELDS = 5  # the number of integers that `identify` returns


class Unchecked(Exception):
    """The error for a shard's file that is not the one that was checked, or has changed since."""


def identify(found: os.stat_result) -> tuple[int, ...]:
    """Return numbers that differ for every file and every state of a file.

    They are the device, the inode number, the size and the times of the last changes, each as an
    unsigned 64-bit integer.
    """
    fields = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return tuple(field & 0xFFFF_FFFF_FFFF_FFFF for field in fields)


def state_of(found: os.stat_result) -> tuple[int, int, int]:
    """Return an open file's size and the times of its last changes, which any write changes."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class OpenShards:
    """The open files of the shards read last, at most `limit`, and where their rows begin."""

    def __init__(self, limit: int = MAX_OPEN):
        self.limit = limit
        # By path: the descriptor, where the rows begin, and the file's state (see `state_of`)
        self.files: OrderedDict[str, tuple[int, NDArray[np.uint32], tuple[int, ...]]] = (
            OrderedDict()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "files": OrderedDict()}

    def read(self, path: str, num_rows: int, row: int, whole: NDArray[np.uint64]) -> bytes:
        """Return the bytes of a row of the shard's file that was found `whole` (see `identify`).

        If that file is open, it is read even if another one is at `path` by now. Raises Unchecked
        if it was written to since it was checked, or if another file would have to be opened.
        Raises FileNotFoundError if there is no file.
        """
        if path in self.files:
            self.files.move_to_end(path)
        else:
            self._open(path, num_rows, whole)
        descriptor, offsets, state = self.files[path]
        begin, end = offsets[row : row + 2].tolist()
        if not 0 < begin < end <= state[0]:
            self.forget(path)
            raise Unchecked(path)
        found = os.pread(descriptor, end - begin, begin)
        # Compared after the row was read, so that any write before or during the read is noticed.
        if state_of(os.fstat(descriptor)) != state:
            self.forget(path)
            raise Unchecked(path)
        self.close(self.limit)
        return found

    def _open(self, path: str, num_rows: int, whole: NDArray[np.uint64]) -> None:
        # O_NONBLOCK: the opening of a named pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if identify(found) != tuple(whole.tolist()):
                raise Unchecked(path)
            offsets = read_offsets(descriptor, num_rows)
        except BaseException:
            os.close(descriptor)
            raise
        self.files[path] = descriptor, offsets, state_of(found)

    def forget(self, path: str) -> None:
        """Close a file, so that its next row is read from the file that was checked last."""
        if path in self.files:
            os.close(self.files.pop(path)[0])

    def close(self, keep: int = 0, *, close: Callable[[int], None] = os.close) -> None:
        """Close all files but the `keep` read last."""
        # An argument, since `os` may be gone when this is called at the interpreter's end
        while len(self.files) > keep:
            _, (descriptor, _, _) = self.files.popitem(last=False)
            close(descriptor)

    def __del__(self) -> None:
        self.close()
