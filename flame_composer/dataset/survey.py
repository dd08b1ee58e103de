"""A survey of a finished dataset, which is not trusted: what its shards hold, and what is wrong.

Shards are read with numpy, since importing streaming takes seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flame_composer.dataset.manifest import damaged
from flame_composer.dataset.mds import (
    BadShard,
    Lengths,
    ShardFile,
    ShardView,
    add,
    check_hash,
    check_size,
)
from flame_composer.dataset.open import Dataset, download_at_most


@dataclass(frozen=True)
class Row:
    """A row, and the name of the shard that holds it.

    `number` is the row's number within the whole dataset. `input_ids` consist of document pieces
    of `doc_lengths` tokens. `loss_mask` says which of them carry loss; None for all.
    """

    number: int
    shard: str
    input_ids: NDArray[np.unsignedinteger]
    doc_lengths: Lengths
    loss_mask: NDArray[np.bool_] | None = None


@dataclass
class Survey:
    """The findings about the shards that were read.

    `piece_lengths[n]` is the number of document pieces of n tokens, and `pieces_per_row[n]` the
    number of rows of n pieces. `bad` maps the name of a bad shard to what is wrong with it.
    """

    piece_lengths: Lengths = field(default_factory=lambda: np.zeros(1, np.int64))
    pieces_per_row: Lengths = field(default_factory=lambda: np.zeros(1, np.int64))
    rows: list[Row] = field(default_factory=list)
    num_read: int = 0
    num_verified: int = 0
    num_loss_tokens: int = 0
    bad: dict[str, str] = field(default_factory=dict)


def spread(count: int, total: int) -> list[int]:
    """Return at most `count` different numbers below `total`, evenly spread."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def choose_shards(files: Sequence[ShardFile], max_bytes: int | None) -> set[int]:
    """Return the numbers of evenly spread shards that have about `max_bytes` bytes together.

    That is at least one shard, and all of them if `max_bytes` is None.
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
    """Read the shards with these numbers, and return what they hold and what is wrong with them.

    `rows` are the numbers of rows to return, which must be in these shards. With `hash`, the hashes
    of local shards are checked; those of downloaded shards always are. The sizes of all local
    shards are checked, also of those that are not read.

    Calls `on_progress` with the size in bytes of every shard read, and `on_bad` with the name of
    a bad shard and what is wrong with it. At most one remote shard at a time is on disk, and no
    shard is in memory as a whole. Raises DataError as `_require_loss` does.
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
                if dataset.remote is None:
                    check_size(Path(dataset.folder, file.basename), file)
                continue
            with local_copy(dataset, file) as path:
                check_size(path, file)
                if hash or dataset.remote is not None:
                    check_hash(path, file)
                    result.num_verified += 1
                shard = ShardView(
                    path,
                    num_rows=file.rows,
                    context_length=dataset.manifest.context_length,
                    token_dtype=dataset.manifest.token_dtype,
                    has_loss_mask=dataset.manifest.has_loss_mask,
                )
                lengths, counts, num_loss_tokens = shard.count()
                for row, within in wanted.get(number, []):
                    mask = shard.loss_mask(within)
                    found[row] = Row(row, file.basename, *shard.row(within), mask)
            result.piece_lengths = add(result.piece_lengths, lengths)
            result.pieces_per_row = add(result.pieces_per_row, counts)
            result.num_loss_tokens += num_loss_tokens
            result.num_read += 1
        except BadShard as problem:
            result.bad[file.basename] = str(problem)
            on_bad(file.basename, str(problem))
        if number in shards:
            on_progress(file.bytes)
    _require_loss(dataset, result)
    result.rows = [found[row] for row in rows if row in found]
    return result


def _require_loss(dataset: Dataset, result: Survey) -> None:
    """Raise DataError if all shards were read, and have another number of tokens with loss."""
    stated = dataset.manifest.totals.loss_tokens
    if result.num_read == len(dataset.files) and result.num_loss_tokens != stated:
        raise damaged(
            f"{dataset.place.rstrip('/')}/manifest.json",
            f"{result.num_loss_tokens:,} tokens of the rows carry loss, and it says {stated:,}",
        )


@contextmanager
def local_copy(dataset: Dataset, file: ShardFile) -> Iterator[Path]:
    """Yield the path of a shard's local file; a remote shard is downloaded, and deleted at the end.

    Raises BadShard if it cannot be downloaded.
    """
    if dataset.remote is None:
        yield Path(dataset.folder, file.basename)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard.mds")
        download_at_most(f"{dataset.remote.rstrip('/')}/{file.basename}", path, file.bytes)
        yield path
