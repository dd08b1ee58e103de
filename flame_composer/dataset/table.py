"""The shards of a dataset in arrays, which processes can share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from flame_composer.dataset.mds import ShardFile

# A shard's size, rows, hash, and where its name ends, which is beside the table
_FIELDS = np.dtype([("bytes", "<i8"), ("rows", "<i8"), ("hash", "S16"), ("name_end", "<i8")])


class ShardTable(Sequence[ShardFile]):
    """The shards that index.json lists, in row order; about 70 bytes for each."""

    def __init__(self, fields: NDArray[np.void], names: NDArray[np.uint8]):
        """Take an array of `_FIELDS` [S], and the names one after the other, in ASCII."""
        self.fields, self.names = fields, names

    @classmethod
    def of(cls, files: Iterable[ShardFile]) -> ShardTable:
        """Return a table of these shards, whose hashes have 16 characters at most."""
        builder = TableBuilder()
        for file in files:
            builder.add(file)
        return builder.table()

    @property
    def rows(self) -> NDArray[np.int64]:
        """The number of rows of each shard [S]."""
        return self.fields["rows"]

    @property
    def bytes(self) -> NDArray[np.int64]:
        """The size of each shard [S]."""
        return self.fields["bytes"]

    def __len__(self) -> int:
        return len(self.fields)

    @overload
    def __getitem__(self, index: int) -> ShardFile: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardFile]: ...

    def __getitem__(self, index: int | slice) -> ShardFile | Sequence[ShardFile]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        size, rows, digest, end = self.fields[index].item()
        begin = int(self.fields["name_end"][index - 1]) if index else 0
        name = self.names[begin:end].tobytes().decode("ascii")
        return ShardFile(name, size, digest.decode("ascii"), rows)

    def __iter__(self) -> Iterator[ShardFile]:
        return map(self.__getitem__, range(len(self)))

    def find_twice(self) -> str | None:
        """Return a name that is there more than once, or None."""
        ends = [0, *self.fields["name_end"].tolist()]
        names = self.names.tobytes()
        digests = (xxhash.xxh3_64_intdigest(names[a:b]) for a, b in itertools.pairwise(ends))
        hashes = np.fromiter(digests, np.uint64, len(self))
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            if self[first].basename == self[second].basename:
                return self[first].basename
        return None

    def save(self, folder: Path) -> None:
        """Write the table to two new files in `folder`, for `load`."""
        np.save(folder / "shards.npy", self.fields)
        np.save(folder / "names.npy", self.names)

    @classmethod
    def load(cls, folder: Path) -> ShardTable:
        """Return the table in `folder`, whose files are mapped into memory."""
        fields, names = (
            np.load(folder / name, mmap_mode="r" if (folder / name).stat().st_size else None)
            for name in ("shards.npy", "names.npy")
        )
        return cls(fields, names)


class TableBuilder:
    """A `ShardTable` that is being made, shard by shard."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._fields = np.empty(1024, _FIELDS)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, file: ShardFile) -> None:
        """Add a shard at the end."""
        if self._size == len(self._fields):
            self._fields = np.concatenate([self._fields, np.empty_like(self._fields)])
        self._names += file.basename.encode("ascii")
        self._fields[self._size] = (file.bytes, file.rows, file.hash, len(self._names))
        self._size += 1

    def table(self) -> ShardTable:
        """Return the table of the shards so far."""
        return ShardTable(
            self._fields[: self._size].copy(), np.frombuffer(bytes(self._names), np.uint8)
        )
