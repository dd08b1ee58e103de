"""A reader for torch.distributed.checkpoint: of a checkpoint's pieces, only the bytes asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    StorageReader,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.tensor import DTensor
from torch.futures import Future

from flame_composer.checkpoint.pieces import divided, local_copy
from flame_composer.checkpoint.sharded import Part, Piece, Pieces
from flame_composer.errors import DataError
from flame_composer.storage import files
from flame_composer.storage.many import each
from flame_composer.upstream.fsdp import first_row_of

RUN = 8 << 20
"""The most bytes of a request, unless a single row has more."""
GAP = 256 << 10
"""Bytes that nobody asked for are fetched along if they are no more than these between two rows."""
LANES = 8
"""Requests in flight at a time."""
ALIGNMENT = 64
"""A request begins at a multiple of these bytes, as tensors in a file do."""


def read_rows(tensors: dict[str, torch.Tensor], pieces: Pieces, folder: Path) -> None:
    """Fill tensors, or this rank's rows of them, from the pieces of a checkpoint.

    The names are paths in the pieces' template, joined by dots. A piece in the local folder
    `folder` is read there. This rank asks no other for anything.
    """
    # Of an empty part, torch (2.7) would ask for rows that it has no place for.
    tensors = {name: tensor for name, tensor in tensors.items() if _mine(tensor).numel()}
    reader = PieceReader(pieces, folder, {_rows_of(tensor) for tensor in tensors.values()})
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            # Else the first rank would gather the plans of all, a gigabyte of 1,024 ranks.
            torch_checkpoint.load(tensors, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as failed:
        raise next(iter(failed.failures.values()))[0] from None


def _mine(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows_of(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return how many rows a tensor has, the first one on this rank, and how many are on it."""
    first = first_row_of(tensor) if isinstance(tensor, DTensor) else 0
    return tensor.shape[0], first, len(_mine(tensor))


class _Rows(NamedTuple):
    """Rows of one tensor's part in a piece: where they lie in its file, and where they belong."""

    first: int  # byte
    last: int  # byte, exclusive
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    out: torch.Tensor


class PieceReader(StorageReader):
    """A storage reader that reads rows out of the pieces of a checkpoint, by byte ranges."""

    def __init__(self, pieces: Pieces, folder: Path, rows: set[tuple[int, int, int]]):
        """Read the pieces that hold any of `rows`, from `folder` where they are in it.

        A row is named by how many its tensor has: the elements of `rows` are that number, the
        first row, and the number of rows.
        """
        self.folder = folder
        self.parts: dict[str, tuple[int, Part]] = {
            ".".join(path): (index, part)
            for index, (path, part) in enumerate(divided(pieces.template))
        }
        # Of 1,024 pieces a rank needs a few: torch's metadata of all would take gigabytes.
        self.near = [piece for piece in pieces.each if _overlaps(piece, rows)]

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: a reader is for one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        """Return False: a checkpoint is given to the constructor."""
        return False

    def read_metadata(self) -> Metadata:
        """Return the tensors in the pieces, with the parts of the pieces that are needed."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(part.dtype),
                    torch.Size(part.shape),
                    [
                        ChunkStorageMetadata(
                            torch.Size((start, *(0 for _ in part.shape[1:]))),
                            torch.Size((length, *part.shape[1:])),
                        )
                        for start, length in (piece.rows[part.shape[0]] for piece in self.near)
                    ],
                )
                for name, (_, part) in self.parts.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Do nothing: everything is known from the pieces."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read all that a plan asks for, piece by piece."""
        wanted: dict[int, list[_Rows]] = {}
        for item in plan.items:
            number = _chunk_of(item.storage_index)
            wanted.setdefault(number, []).extend(self._rows(item, number, planner))
        for number, rows in wanted.items():
            runs = list(_in_runs(sorted(rows, key=lambda row: row.first)))
            lanes = [runs[lane::LANES] for lane in range(min(LANES, len(runs)))]
            list(each(partial(_read_runs, self.near[number], self.folder), lanes))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _rows(self, item: ReadItem, number: int, planner: LoadPlanner) -> Iterator[_Rows]:
        """Yield the rows that an item of a plan asks for, in portions of `RUN` bytes at most."""
        index, part = self.parts[item.storage_index.fqn]
        piece = self.near[number]
        shape = tuple(item.lengths)
        contiguous = torch.empty((1, *shape[1:]), device="meta").stride()
        strides = piece.strides.get(index, tuple(contiguous))
        size = part.dtype.itemsize
        begins = int(piece.offsets[index]) + item.storage_offsets[0] * strides[0] * size
        row = _span((1, *shape[1:]), strides) * size
        at_a_time = max(1, RUN // max(row, 1)) if strides[0] * size >= row else shape[0]
        out = planner.resolve_tensor(item).detach()
        for start in range(0, shape[0], at_a_time):
            some = (min(at_a_time, shape[0] - start), *shape[1:])
            first = begins + start * strides[0] * size
            last = first + _span(some, strides) * size
            yield _Rows(first, last, some, strides, out[start : start + some[0]])


def _chunk_of(index: MetadataIndex) -> int:
    """Return the number of the chunk in the metadata that an index of a plan names."""
    assert index.index is not None
    return index.index


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return how many elements lie from the first to the last of a tensor of one or more."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _overlaps(piece: Piece, rows: set[tuple[int, int, int]]) -> bool:
    """Return whether a piece holds any of the rows; see `PieceReader`."""
    for num_rows, first, length in rows:
        start, here = piece.rows.get(num_rows, (0, 0))
        if here and start < first + length and first < start + here:
            return True
    return False


def _in_runs(rows: list[_Rows]) -> Iterator[list[_Rows]]:
    """Yield the rows, sorted by where they lie, in groups that are fetched by one request each."""
    run: list[_Rows] = []
    for row in rows:
        if run and (row.last - run[0].first > RUN or row.first - run[-1].last > GAP):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _read_runs(piece: Piece, folder: Path, runs: list[list[_Rows]]) -> None:
    """Read groups of rows of a piece, and copy them to where they belong."""
    copy = local_copy(piece, folder)
    try:
        with (
            files.open_file(piece.place, piece.version, block_size=0)
            if copy is None
            else files.open_file(str(copy))
        ) as file:
            for run in runs:
                first = run[0].first // ALIGNMENT * ALIGNMENT
                last = max(each.last for each in run)
                data = memoryview(_read(file, piece.place, first, last))
                for each in run:
                    values = torch.frombuffer(data[each.first - first :], dtype=torch.uint8)
                    rows = values[: each.last - each.first].view(each.out.dtype)
                    each.out.copy_(rows.as_strided(each.shape, each.strides))
    except OSError as error:
        raise DataError(f"{piece.place}: cannot be read: {error.strerror or error}") from None


def _read(file: BinaryIO, place: str, first: int, last: int) -> bytearray:
    """Return the bytes of a file from `first` to `last` (exclusive)."""
    data = bytearray(last - first)
    rest = memoryview(data)
    file.seek(first)
    while rest:
        num_bytes = file.readinto(rest)  # type: ignore[attr-defined]
        if not num_bytes:
            raise DataError(f"{place}: ends before byte {last:,}; it was longer when checked")
        rest = rest[num_bytes:]
    return data
