"""Rows out of shards that stay open: upstream opens the file again for every row, which a
network's file system is slow at.
"""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.format.mds.reader import MDSReader

from flame_composer.dataset.mds import decode_row, read_offsets

# More than shuffling reads from at once with its defaults, far fewer than a process may have
MAX_OPEN = 64


FIELDS = 5  # of what `identify` returns


class Unchecked(Exception):
    """A shard's file is another than the one that was checked, or was written to since."""


def identify(found: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file and its state from every other: device, number, size, and the
    times of its last changes, each as an unsigned 64-bit integer.
    """
    fields = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return tuple(field & 0xFFFF_FFFF_FFFF_FFFF for field in fields)


def state_of(found: os.stat_result) -> tuple[int, int, int]:
    """Return what changes in an open file when it is written to: its size, and the times of its
    last changes.
    """
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class OpenShards:
    """The shards' files read last, `limit` of them at most, and where their rows are."""

    def __init__(self, limit: int = MAX_OPEN):
        self.limit = limit
        # The descriptor, where the rows begin, and the file's state
        self.files: OrderedDict[str, tuple[int, NDArray[np.uint32], tuple[int, ...]]] = (
            OrderedDict()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "files": OrderedDict()}

    def read(self, path: str, num_rows: int, row: int, whole: NDArray[np.uint64]) -> bytes:
        """Return the bytes of a row of the file that was found `whole`, whichever other may lie
        there by now.

        Raises Unchecked, or FileNotFoundError, by which StreamingDataset knows that it has to
        fetch.
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
        # After the row was read: what is written to the file from now on is not in it.
        if state_of(os.fstat(descriptor)) != state:
            self.forget(path)
            raise Unchecked(path)
        self.close(self.limit)
        return found

    def _open(self, path: str, num_rows: int, whole: NDArray[np.uint64]) -> None:
        # A fifo would be waited for
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
        """Close a file, so that the next row of it is read of whichever was checked last."""
        if path in self.files:
            os.close(self.files.pop(path)[0])

    def close(self, keep: int = 0, *, close: Callable[[int], None] = os.close) -> None:
        # `close` is at hand when the interpreter ends, and `os` is gone
        """All but the last `keep`."""
        while len(self.files) > keep:
            _, (descriptor, _, _) = self.files.popitem(last=False)
            close(descriptor)

    def __del__(self) -> None:
        self.close()


class ShardReader(MDSReader):
    """A shard laid out as `mds.ShardWriter` says, which `read_index` has made sure of."""

    opened: OpenShards
    whole: NDArray[np.uint64]  # which file was checked, as `identify` has it

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.column_encodings[1].split(":")[1]).newbyteorder("<")

    @functools.cached_property
    def context_length(self) -> int:
        return int(self.column_encodings[1].split(":")[2])

    def get_item(self, idx: int) -> dict[str, Any]:
        path = f"{self.dirname}/{self.raw_data.basename}"
        row = self.opened.read(path, self.samples, idx, self.whole)
        try:
            return decode_row(row, self.dtype, self.context_length)
        except (ValueError, IndexError):
            # Of a checked file: it was written to in a way that leaves its times as they were, as
            # who has it mapped into memory can
            self.opened.forget(path)
            raise Unchecked(path) from None
