"""The MDS layout of a dataset's shards: written, described in an index, decoded and checked.

Written byte for byte as streaming's MDSWriter does, at a fraction of its cost for every row and
without importing streaming, which takes seconds and hundreds of MB. A shard file is

    number of rows n, n + 1 offsets (of every row, and of the end): uint32 each
    the shard's configuration as JSON
    the rows: size of doc_lengths (uint32), doc_lengths as `_sized` gives them, input_ids, and for
    tuning data loss_mask, a bit for each token, the first token's the highest of the first byte

Source: streaming/base/format/mds in mosaicml-streaming 0.13; see also docs/dataset_format.md.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from flame_composer.dataset.packing import Rows
from flame_composer.storage import files
from flame_composer.storage.files import dump_json

Lengths = NDArray[np.int64]

SHARD_NAME = re.compile(r"units/[A-Za-z0-9_-]+/shard\.[0-9]+\.mds")
MAX_SHARD_BYTES = 2**32  # offsets within a shard are uint32
HASH = "xxh64"  # hash of every shard, to be given to StreamingDataset(validate_hash=...)
VERSION = 2  # of MDS
MASKS_AT_ONCE = 1 << 24  # tokens whose loss masks are in memory at once
ROWS_AT_ONCE = 1024  # rows whose document lengths are in memory at once, however large the shard


class BadShard(ValueError):
    """A shard that does not match its index entry; the message says why, in a few words."""


@dataclass(frozen=True)
class ShardFile:
    """A shard that index.json lists.

    `basename` is its path within the dataset, `bytes` its size, `hash` its hash by `HASH`.
    """

    basename: str
    bytes: int
    hash: str
    rows: int


def mask_bytes(context_length: int) -> int:
    """Return the size of a row's loss mask in bytes."""
    return -(-context_length // 8)


def column_form(
    token_dtype: str, context_length: int, *, has_loss_mask: bool = False
) -> dict[str, Any]:
    """Return what index.json says about the columns of every shard of a dataset."""
    form: dict[str, Any] = {
        "format": "mds",
        "version": VERSION,
        "column_names": ["doc_lengths", "input_ids"],
        "column_sizes": [None, np.dtype(token_dtype).itemsize * context_length],
        "column_encodings": ["ndarray:uint32", f"ndarray:{token_dtype}:{context_length}"],
    }
    if has_loss_mask:
        size = mask_bytes(context_length)
        form["column_names"].append("loss_mask")
        form["column_sizes"].append(size)
        form["column_encodings"].append(f"ndarray:uint8:{size}")
    return form


def shard_form(
    token_dtype: str, context_length: int, size_limit: int, *, has_loss_mask: bool = False
) -> dict[str, Any]:
    """Return the configuration stored in a shard: its columns, hashes and size limit in bytes."""
    return {
        **column_form(token_dtype, context_length, has_loss_mask=has_loss_mask),
        "compression": None,
        "hashes": [HASH],
        "size_limit": size_limit,
    }


def index_entry(file: ShardFile, form: dict[str, Any]) -> dict[str, Any]:
    """Return what index.json says about a shard of this `shard_form`."""
    raw = {"basename": file.basename, "bytes": file.bytes, "hashes": {HASH: file.hash}}
    return {"samples": file.rows, "raw_data": raw, "zip_data": None, **form}


def index_json(entries: list[dict[str, Any]]) -> bytes:
    """Return the content of index.json."""
    return dump_json({"version": VERSION, "shards": entries})


class ShardWriter:
    """A writer of rows into `folder`, as shard.00000.mds, shard.00001.mds and so on.

    A shard holds as many rows as its size limit allows. `shards` holds the index entries of the
    shards written so far.
    """

    def __init__(
        self,
        folder: Path,
        dtype: type[np.unsignedinteger],
        context_length: int,
        size_limit: int,
        *,
        has_loss_mask: bool = False,
    ):
        folder.mkdir(parents=True)
        self.folder, self.dtype, self.size_limit = folder, np.dtype(dtype), size_limit
        self.form = shard_form(
            self.dtype.name, context_length, size_limit, has_loss_mask=has_loss_mask
        )
        self.form_json = json.dumps(self.form, sort_keys=True).encode()
        self.shards: list[dict[str, Any]] = []
        self._empty()

    def _empty(self) -> None:
        self.rows: list[bytes] = []
        self.size = 8 + len(self.form_json)

    def write(self, rows: Rows) -> None:
        """Add rows; they reach the disk when a shard is full, or on `flush`."""
        assert rows.input_ids.dtype == self.dtype, rows.input_ids.dtype
        masks = None if rows.loss_mask is None else np.packbits(rows.loss_mask, axis=1)
        for number, (input_ids, doc_lengths) in enumerate(rows):
            lengths = _sized(doc_lengths)
            mask = b"" if masks is None else masks[number].tobytes()
            size = len(lengths).to_bytes(4, "little")
            row = b"".join((size, lengths, input_ids.tobytes(), mask))
            if self.size + len(row) + 4 > self.size_limit:
                self.flush()
            self.rows.append(row)
            self.size += len(row) + 4

    def flush(self) -> None:
        """Write the rows that are waiting, if there are any, as a shard."""
        if not self.rows:
            return
        sizes = [8 + 4 * len(self.rows) + len(self.form_json), *map(len, self.rows)]
        offsets = np.cumsum(sizes, dtype=np.int64).astype("<u4")
        name = f"shard.{len(self.shards):05}.mds"
        digest = xxhash.xxh64()
        with (self.folder / name).open("wb") as file:
            for part in (
                len(self.rows).to_bytes(4, "little"),
                offsets.tobytes(),
                self.form_json,
                *self.rows,
            ):
                digest.update(part)
                file.write(part)
        written = ShardFile(name, int(offsets[-1]), digest.hexdigest(), len(self.rows))
        self.shards.append(index_entry(written, self.form))
        self._empty()


def _sized(values: NDArray[Any]) -> bytes:
    """Return an array [n] as bytes: a header byte, n in as few bytes as possible, uint32 values.

    The header byte is 4 plus log2 of the number of bytes that n takes (1, 2 or 4).
    """
    count = len(values)
    for code, num_bytes in enumerate((1, 2, 4)):
        if count < 1 << 8 * num_bytes:
            return (
                bytes([1 << 2 | code])
                + count.to_bytes(num_bytes, "little")
                + values.astype("<u4").tobytes()
            )
    raise AssertionError(f"{count} document pieces in one row")


def read_offsets(descriptor: int, num_rows: int) -> NDArray[np.uint32]:
    """Return the byte offsets of an open shard's rows, and of its end [num_rows + 1]."""
    return np.frombuffer(os.pread(descriptor, 4 * (num_rows + 1), 4), "<u4")


def decode_row(
    row: bytes, dtype: np.dtype[Any], context_length: int, *, has_loss_mask: bool = False
) -> dict[str, NDArray[Any]]:
    """Return a row's columns: `doc_lengths` [pieces] and `input_ids` [context_length].

    With `has_loss_mask`, there is `loss_mask`, bool [context_length], as well. Raises ValueError or
    IndexError for a row that does not have the layout.
    """
    end = 4 + int.from_bytes(row[:4], "little")
    doc_lengths = np.frombuffer(row[5 + (1 << (row[4] & 3)) : end], "<u4")
    mask = b""
    if has_loss_mask:
        row, mask = row[: -mask_bytes(context_length)], row[-mask_bytes(context_length) :]
    input_ids = np.frombuffer(row, dtype, offset=end)
    lengths = doc_lengths.tolist()  # faster than numpy for so few numbers
    if min(lengths) < 1 or sum(lengths) != len(input_ids):
        raise ValueError("the document lengths do not sum to the number of tokens")
    if len(input_ids) != context_length:
        raise ValueError("the number of tokens is not the context length")
    columns: dict[str, NDArray[Any]] = {"doc_lengths": doc_lengths, "input_ids": input_ids}
    if has_loss_mask:
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=context_length)
        columns["loss_mask"] = bits.view(np.bool_)
    return columns


def check_size(path: Path, file: ShardFile) -> None:
    """Raise BadShard if the shard's file is missing or of the wrong size."""
    found = files.stat(str(path))
    if found is None:
        raise BadShard("missing")
    if found.size != file.bytes:
        raise BadShard(f"{found.size:,} bytes long, must be {file.bytes:,}")


def check_hash(path: Path, file: ShardFile) -> None:
    """Raise BadShard if the content of the shard's file has changed since it was written."""
    digest = getattr(xxhash, HASH)()
    try:
        with path.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise BadShard(f"cannot be read: {error.strerror}") from None
    if digest.hexdigest() != file.hash:
        raise BadShard(
            f"its {HASH} hash is {digest.hexdigest()}, must be {file.hash}: the content has changed"
        )


class ShardView:
    """The rows of a shard's file, read many at a time, without reading the whole file at once."""

    def __init__(
        self,
        path: Path,
        *,
        num_rows: int,
        context_length: int,
        token_dtype: str,
        has_loss_mask: bool = False,
    ):
        """Map the file and check the size of every row, without looking at the tokens.

        Raises BadShard if the file cannot be read, or its rows do not have the layout.
        """
        self.context_length = context_length
        self.dtype = np.dtype(token_dtype)
        try:
            self.data: Any = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise BadShard(f"cannot be read: {error}") from None
        if self.data.size < 8 + 4 * num_rows or int(self.data[:4].view(np.uint32)[0]) != num_rows:
            raise BadShard(f"does not hold {num_rows:,} rows")
        offsets = self.data[4 : 8 + 4 * num_rows].view(np.uint32).astype(np.int64)
        self.starts, sizes = offsets[:-1], np.diff(offsets)
        token_bytes = self.context_length * self.dtype.itemsize
        self.mask_bytes = mask_bytes(context_length) if has_loss_mask else 0
        token_bytes += self.mask_bytes
        smallest = 4 + 2 + 4 + token_bytes
        if (
            offsets[0] < 8 + 4 * num_rows
            or offsets[-1] != self.data.size
            or (sizes < smallest).any()
        ):
            raise BadShard("its row offsets are damaged")
        column = self._uint32(self.starts).astype(np.int64)
        kind = self.data[self.starts + 4]
        width = 1 << (kind & 3).astype(np.int64)
        self.first_length = self.starts + 5 + width
        self.num_pieces, rest = np.divmod(column - 1 - width, 4)
        wrong = (
            (kind >> 2 != 1)
            | (rest != 0)
            | (self.num_pieces < 1)
            | (sizes != 4 + column + token_bytes)
        )
        if wrong.any():
            raise BadShard(f"its row {int(wrong.argmax()):,} is damaged")

    def _uint32(self, at: Lengths) -> NDArray[np.uint32]:
        """Return the uint32 values at these byte offsets."""
        return self.data[at[:, None] + np.arange(4)].view(np.uint32)[:, 0]

    def _doc_lengths(self, first: int, end: int) -> Lengths:
        """Return the piece lengths of rows `first` to `end` (exclusive), end to end, checked."""
        num_pieces = self.num_pieces[first:end]
        row_ends = np.cumsum(num_pieces)
        within = np.arange(row_ends[-1]) - np.repeat(row_ends - num_pieces, num_pieces)
        lengths = self._uint32(
            np.repeat(self.first_length[first:end], num_pieces) + 4 * within
        ).astype(np.int64)
        sums = np.add.reduceat(lengths, row_ends - num_pieces)
        if (wrong := sums != self.context_length).any():
            row = int(wrong.argmax())
            raise BadShard(
                f"the document lengths of its row {first + row:,} sum to {sums[row]:,}, not"
                f" {self.context_length:,}"
            )
        if lengths.min() < 1:
            raise BadShard("it holds an empty document piece")
        return lengths

    def count(self) -> tuple[Lengths, Lengths, int]:
        """Return how many document pieces have each length, rows each piece count, and loss tokens.

        The first array is indexed by length in tokens, the second by the number of pieces; the last
        number is 0 if there are no loss masks. All rows are checked, with their masks.
        """
        counts = np.zeros(1, np.int64)
        num_loss_tokens = 0
        # A mask takes a byte for each token while it is looked at
        step = max(1, min(ROWS_AT_ONCE, MASKS_AT_ONCE // self.context_length))
        for first in range(0, len(self.starts), step if self.mask_bytes else ROWS_AT_ONCE):
            end = min(first + (step if self.mask_bytes else ROWS_AT_ONCE), len(self.starts))
            lengths = self._doc_lengths(first, end)
            counts = add(counts, np.bincount(lengths))
            if self.mask_bytes:
                num_loss_tokens += self._count_loss(first, end, lengths)
        return counts, np.bincount(self.num_pieces), num_loss_tokens

    def _count_loss(self, first: int, end: int, lengths: Lengths) -> int:
        """Return the number of tokens that carry loss in rows `first` to `end` (exclusive).

        Raises BadShard if an example would be predicted from another one, or a row has no loss.
        """
        masks = np.stack([self._mask_bits(row) for row in range(first, end)])
        begins = np.cumsum(lengths) - lengths  # of the pieces, in rows that are laid end to end
        wrong = masks.reshape(-1)[begins].astype(bool)
        if wrong.any():
            row = first + int(begins[wrong.argmax()]) // self.context_length
            raise BadShard(f"the first token of a document in its row {row:,} carries loss")
        has_loss = masks.any(axis=1)
        if not has_loss.all():
            raise BadShard(f"no token of its row {first + int(has_loss.argmin()):,} carries loss")
        return int(masks.sum(dtype=np.int64))

    def row(self, number: int) -> tuple[NDArray[np.unsignedinteger], Lengths]:
        """Return the tokens and the document lengths of a row."""
        start = int(self.first_length[number] + 4 * self.num_pieces[number])
        tokens = self.data[start : start + self.context_length * self.dtype.itemsize].tobytes()
        return np.frombuffer(tokens, self.dtype), self._doc_lengths(number, number + 1)

    def loss_mask(self, number: int) -> NDArray[np.bool_] | None:
        """Return which tokens of a row carry loss, bool [context_length], or None for all."""
        return self._mask_bits(number).view(np.bool_) if self.mask_bytes else None

    def _mask_bits(self, number: int) -> NDArray[np.uint8]:
        start = int(self.first_length[number] + 4 * self.num_pieces[number])
        start += self.context_length * self.dtype.itemsize
        return np.unpackbits(self.data[start : start + self.mask_bytes], count=self.context_length)


def add(a: Lengths, b: Lengths) -> Lengths:
    """Return the sum of two counts, padding the shorter one with zeros."""
    if len(a) < len(b):
        a, b = b, a
    return a + np.pad(b, (0, len(a) - len(b)))
