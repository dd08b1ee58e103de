"""Looking into a finished dataset without trusting it: its files, its shards one at a time, what is
wrong with each.

Reads MDS shards with numpy, since importing streaming takes seconds; streaming is asked for what
lies in a remote store.
"""

from __future__ import annotations

import errno
import functools
import resource
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flame_composer.dataset.manifest import (
    HASH,
    Manifest,
    ShardFile,
    check_totals,
    read_index,
    read_manifest,
)
from flame_composer.errors import ConfigError, one_line
from flame_composer.storage import files as storage
from flame_composer.text.tokenizer import TokenizerFingerprint

if TYPE_CHECKING:
    from streaming.base.storage import CloudDownloader

Lengths = NDArray[np.int64]

ROWS_AT_ONCE = 1024  # whose document lengths are in memory together, however large the shard


@dataclass(frozen=True)
class Dataset:
    """A finished dataset in a local folder or under a URL, `place` as the user named it; `files`
    in row order.
    """

    place: str
    is_remote: bool
    manifest: Manifest
    files: list[ShardFile]

    def locate(self, row: int) -> tuple[int, int]:
        """The number of the shard that holds a row, and the row's number within it."""
        ends = list(accumulate(file.rows for file in self.files))
        number = bisect_right(ends, row)
        return number, row - (ends[number] - self.files[number].rows)


@dataclass(frozen=True)
class Row:
    """`number` counts through the dataset. `input_ids` are cut into document pieces of
    `doc_lengths` tokens.
    """

    number: int
    shard: str
    input_ids: NDArray[np.unsignedinteger]
    doc_lengths: Lengths


@dataclass
class Survey:
    """What was found in the shards that were read.

    `piece_lengths[n]` is the number of document pieces of n tokens, `pieces_per_row[n]` that of
    rows of n pieces; `bad` says of a shard what is wrong with it.
    """

    piece_lengths: Lengths = field(default_factory=lambda: np.zeros(1, np.int64))
    pieces_per_row: Lengths = field(default_factory=lambda: np.zeros(1, np.int64))
    rows: list[Row] = field(default_factory=list)
    num_read: int = 0
    num_verified: int = 0
    bad: dict[str, str] = field(default_factory=dict)


class BadShard(ValueError):
    """What is wrong with a shard, in a few words."""


def open_dataset(data: str) -> Dataset:
    """The dataset in a local folder or under a URL. Raises ConfigError or DataError if it is
    none, unfinished or damaged.
    """
    is_remote = "://" in data
    if is_remote:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("manifest.json", "index.json"):
                address = f"{data.rstrip('/')}/{name}"
                try:
                    download(address, Path(folder, name), at_most=storage.MOST_READ)
                except BadShard as problem:
                    raise ConfigError(
                        f"{address}: {problem}; check the address, the credentials and that the"
                        " conversion has finished"
                    ) from None
            manifest = read_manifest(folder)
            files = read_index(folder, manifest)
    else:
        manifest = read_manifest(data)
        files = read_index(data, manifest)
    check_totals(data, manifest, files)
    return Dataset(data, is_remote, manifest, files)


def check_tokenizer(dataset: Dataset, ours: TokenizerFingerprint, name: str) -> None:
    """Raises ConfigError, saying what differs, if the dataset was made with another tokenizer
    than `name`.
    """
    theirs = dataset.manifest.tokenizer
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "sha256"):
        here, there = getattr(ours, key), getattr(theirs, key)
        if here != there:
            raise ConfigError(
                f"tokenizer: {dataset.place} was made with another one than {name} ({key}: {there}"
                f" there, {here} here); name the one it was converted with"
            )


def spread(count: int, total: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly spread, never the same twice."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def choose_shards(files: Sequence[ShardFile], max_bytes: int | None) -> set[int]:
    """The numbers of shards, evenly spread and at least one, that have about `max_bytes`
    together; all for None.
    """
    total = sum(file.bytes for file in files)
    count = (
        len(files)
        if max_bytes is None or total <= max_bytes
        else max(1, len(files) * max_bytes // total)
    )
    return set(spread(count, len(files)))


def survey(
    dataset: Dataset,
    shards: set[int],
    *,
    rows: Sequence[int],
    hash: bool,
    on_progress: Callable[[int], None],
    on_bad: Callable[[str, str], None],
) -> Survey:
    """Read the shards of these numbers, which hold the `rows` that are wanted; with `hash`, check
    their hashes.

    What is downloaded is always hashed, and the sizes of all local shards are checked. Calls
    `on_progress` with the bytes of every shard read, and `on_bad` with the name of a bad one and
    what is wrong. At most one remote shard at a time is on the disk, and no shard in memory as a
    whole.
    """
    wanted: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        number, within = dataset.locate(row)
        wanted.setdefault(number, []).append((row, within))
    assert wanted.keys() <= shards
    found: dict[int, Row] = {}
    result = Survey()
    for number, file in enumerate(dataset.files):
        try:
            if number not in shards:
                if not dataset.is_remote:
                    check_size(Path(dataset.place, file.basename), file)
                continue
            with local_copy(dataset, file) as path:
                check_size(path, file)
                if hash or dataset.is_remote:
                    check_hash(path, file)
                    result.num_verified += 1
                shard = Shard(
                    path,
                    num_rows=file.rows,
                    context_length=dataset.manifest.context_length,
                    token_dtype=dataset.manifest.token_dtype,
                )
                lengths, counts = shard.count()
                for row, within in wanted.get(number, []):
                    found[row] = Row(row, file.basename, *shard.row(within))
            result.piece_lengths = add(result.piece_lengths, lengths)
            result.pieces_per_row = add(result.pieces_per_row, counts)
            result.num_read += 1
        except BadShard as problem:
            result.bad[file.basename] = str(problem)
            on_bad(file.basename, str(problem))
        if number in shards:
            on_progress(file.bytes)
    result.rows = [found[row] for row in rows if row in found]
    return result


def check_size(path: Path, file: ShardFile) -> None:
    stat = storage.stat(str(path))
    size = None if stat is None else stat.size
    if size is None:
        raise BadShard("missing")
    if size != file.bytes:
        raise BadShard(f"{size:,} bytes long, must be {file.bytes:,}")


def check_hash(path: Path, file: ShardFile) -> None:
    import xxhash

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


@contextmanager
def local_copy(dataset: Dataset, file: ShardFile) -> Iterator[Path]:
    """The shard as a local file; a remote one is downloaded and goes when it is done with."""
    if not dataset.is_remote:
        yield Path(dataset.place, file.basename)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard.mds")
        download(f"{dataset.place.rstrip('/')}/{file.basename}", path, at_most=file.bytes)
        yield path


@functools.cache
def downloader(store: str) -> CloudDownloader:
    """One for all shards, so that they share a connection."""
    from streaming.base.storage import CloudDownloader

    return CloudDownloader.get(store)


def download(address: str, path: Path, *, at_most: int) -> None:
    """Raises BadShard that says why it cannot be had, or that there is more than `at_most` bytes
    of it.
    """
    store, separator, rest = address.partition("://")
    try:
        with _no_file_larger_than(at_most):
            downloader(store + separator + rest.partition("/")[0]).download(
                address, str(path), timeout=60
            )
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise BadShard(f"more than {at_most:,} bytes long, must be that at most") from None
        raise BadShard(f"cannot be downloaded: {one_line(error)}") from None
    except Exception as error:  # every store's client has exceptions of its own
        raise BadShard(f"cannot be downloaded: {one_line(error)}") from None


@contextmanager
def _no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """Have the system refuse to let this process write files beyond a size: clients of stores take
    all that is sent.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = num_bytes if soft == resource.RLIM_INFINITY else min(num_bytes, soft)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Shard:
    """The rows of an MDS shard as docs/dataset_format.md describes them.

    The file: the number of rows n and n + 1 offsets, all uint32, a header in JSON, the rows. A row:
    the size of its doc_lengths column (uint32), that column (a byte that says how its length is
    written, the length, the values as uint32), then the tokens. See streaming/base/format/mds in
    mosaicml-streaming 0.13.
    """

    def __init__(self, path: Path, *, num_rows: int, context_length: int, token_dtype: str):
        """Raises BadShard for rows that are not of this form; looks at every row's size, not at
        its tokens.
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
        """The numbers at these byte offsets."""
        return self.data[at[:, None] + np.arange(4)].view(np.uint32)[:, 0]

    def _doc_lengths(self, first: int, end: int) -> Lengths:
        """The piece lengths of rows `first` to `end`, one row after the other, checked."""
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

    def count(self) -> tuple[Lengths, Lengths]:
        """How many document pieces there are of each length, and how many rows of each number of
        pieces.
        """
        counts = np.zeros(1, np.int64)
        for first in range(0, len(self.starts), ROWS_AT_ONCE):
            counts = add(
                counts,
                np.bincount(self._doc_lengths(first, min(first + ROWS_AT_ONCE, len(self.starts)))),
            )
        return counts, np.bincount(self.num_pieces)

    def row(self, number: int) -> tuple[NDArray[np.unsignedinteger], Lengths]:
        """The tokens and the document lengths of a row."""
        start = int(self.first_length[number] + 4 * self.num_pieces[number])
        tokens = self.data[start : start + self.context_length * self.dtype.itemsize].tobytes()
        return np.frombuffer(tokens, self.dtype), self._doc_lengths(number, number + 1)


def add(a: Lengths, b: Lengths) -> Lengths:
    """The sum of two counts, the shorter one filled up with zeros."""
    if len(a) < len(b):
        a, b = b, a
    return a + np.pad(b, (0, len(a) - len(b)))
