"""Rows out of shards that stay open: upstream opens the file again for every row, which a network's file system is slow at."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.format.mds.reader import MDSReader

from flame_composer.config import DataError

MAX_OPEN = 64  # more than shuffling reads from at once with its defaults, far fewer than a process may have


class OpenShards:
    """The shards' files read last, `limit` of them at most, and where their rows are."""

    def __init__(self, limit: int = MAX_OPEN):
        self.limit = limit
        self.files: OrderedDict[str, tuple[int, NDArray[np.uint32]]] = OrderedDict()  # descriptors, offsets

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "files": OrderedDict()}

    def read(self, path: str, num_rows: int, row: int) -> bytes:
        """The bytes of a row. Raises DataError, or FileNotFoundError, by which StreamingDataset knows that it has to fetch."""
        if path in self.files:
            self.files.move_to_end(path)
        else:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.files[path] = descriptor, np.frombuffer(os.pread(descriptor, 4 * (num_rows + 1), 4), "<u4")
        descriptor, offsets = self.files[path]
        begin, end = (int(offset) for offset in offsets[row : row + 2])
        found = os.pread(descriptor, end - begin, begin)
        self.close(self.limit)
        if len(found) != end - begin:
            raise DataError(f"{path}: was cut short while it was read; restore it from a copy, or convert again")
        return found

    def close(self, keep: int = 0) -> None:
        """All but the last `keep`."""
        while len(self.files) > keep:
            _, (descriptor, _) = self.files.popitem(last=False)
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


class ShardReader(MDSReader):
    """A shard laid out as `mds.ShardWriter` says, which `read_index` has made sure of."""

    opened: OpenShards

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.column_encodings[1].split(":")[1]).newbyteorder("<")

    def get_item(self, idx: int) -> dict[str, Any]:
        row = self.opened.read(f"{self.dirname}/{self.raw_data.basename}", self.samples, idx)
        # The size of doc_lengths; doc_lengths: a byte whose last bits say in how many their count is, it, them; the tokens.
        end = 4 + int.from_bytes(row[:4], "little")
        return {
            "doc_lengths": np.frombuffer(row[5 + (1 << (row[4] & 3)) : end], "<u4"),
            "input_ids": np.frombuffer(row, self.dtype, offset=end),
        }
