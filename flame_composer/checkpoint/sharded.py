"""Checkpoints in pieces, of which each rank saves its own share of a sharded model.

A checkpoint is a folder with one file per piece and a head (`HEAD`). Any number of ranks can read
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from composer.core import State
from composer.utils import dist, reproducibility
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from flame_composer.checkpoint.rows import own_rows
from flame_composer.model.tensor import is_split
from flame_composer.storage.folders import flush
from flame_composer.upstream.fsdp import first_row_of

HEAD = "state.pt"
"""The file with all but weights and optimizer state; written last, it completes a checkpoint."""


def name_of(number: int) -> str:
    """Return the file name of the piece with this number."""
    return f"piece{number}.pt"


def is_name(name: str) -> bool:
    """Return whether `name` is one that `name_of` returns."""
    return re.fullmatch(r"piece(0|[1-9][0-9]{0,8})\.pt", name) is not None


def fingerprint(file: Path) -> str:
    """Return a hash of a file's content, computed from the checksums that torch stored in it."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            digest.update(f"{part.filename!a} {part.file_size} {part.CRC}\n".encode())
    return digest.hexdigest()


class Part(NamedTuple):
    """A tensor that is divided among the pieces, as a template holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Piece(NamedTuple):
    """Where the parts of all divided tensors lie in one piece.

    `place` is the piece's file, and `version` that which was checked, if it is in a store. `rows`
    holds the first row and the number of rows of its parts, by the number of rows of the whole
    tensor: FSDP2 divides all tensors of as many rows alike. `offsets` are the first bytes of the
    parts in the file, in the order of the
    template; `strides` are those of the parts that are not
    contiguous, by their index in that order. `model` and `optimizers` are hashes of all that must
    be the same in every piece.
    """

    place: str
    version: str | None
    rows: dict[int, tuple[int, int]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    strides: dict[int, tuple[int, ...]]
    model: str
    optimizers: str


class Pieces(NamedTuple):
    """All pieces of a checkpoint.

    `template` is the content of the first piece, with a `Part` for each divided tensor.
    """

    template: dict[str, Any]
    each: tuple[Piece, ...]


class Share(NamedTuple):
    """All that one rank writes of a checkpoint, in pieces or in one file."""

    content: dict[str, Any] | None = None  # of the head, or of the only file; on the first rank
    piece: dict[str, Any] | None = None  # None on ranks whose piece another replica has as well
    number: int = 0  # of the piece
    pieces: int = 0  # in the checkpoint; 0 if it is in one file


def share_of(state: State) -> Share:
    """Return this rank's share of a checkpoint in pieces, whose tensors are those of the state.

    If the model has several replicas, only the first one saves. Every rank must call this.
    """
    with _without(state.serialized_attributes, "model", "optimizers"):
        content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
    (optimizer,) = state.optimizers
    assert state.fsdp_config is not None
    mesh = state.fsdp_config.device_mesh
    assert mesh is not None
    *replica, number = mesh.get_coordinate() or [0]
    pieces = mesh.shape[-1]
    if any(map(is_split, state.model.parameters())):
        number, pieces = dist.get_global_rank(), dist.get_world_size()
    piece = None
    if not any(replica):
        # Not by Composer, which copies all tensors to memory that is allocated anew each time.
        weights = get_model_state_dict(state.model)
        moments = get_optimizer_state_dict(state.model, optimizer)
        piece = {
            "model": _map(_piece_of, weights),
            "optimizers": {type(optimizer).__qualname__: _map(_piece_of, moments)},
        }
    is_first = dist.get_global_rank() == 0
    return Share(content if is_first else None, piece, number, pieces)


def write_piece(share: Share, folder: Path) -> Path | None:
    """Write this rank's piece and force it to disk; return its file, or None if it has no piece."""
    if share.piece is None:
        return None
    file = folder / name_of(share.number)
    _write(share.piece, file)
    return file


def write_head(share: Share, folder: Path, fingerprints: dict[int, str]) -> Path:
    """Write the head, with the `fingerprints` of all pieces, and force it to disk."""
    assert share.content is not None
    head = {
        **share.content,
        "pieces": share.pieces,
        "fingerprints": [fingerprints[number] for number in range(share.pieces)],
    }
    _write(head, folder / HEAD)
    return folder / HEAD


def _write(content: dict[str, Any], file: Path) -> None:
    """Write a new file and force it to disk."""
    torch.save(content, file)
    flush(file)


def weights(pieces: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the model's tensors by name, each put together from its pieces."""
    names = pieces[0]["model"]
    return {name: _whole([piece["model"][name] for piece in pieces]) for name in names}


def shape(parts: Sequence[Any], *, all_here: bool = True) -> tuple[int, ...] | None:
    """Return the shape of the tensor whose pieces are `parts`, or which is the only part.

    Return None if they do not make exactly one tensor: if they are pieces of several tensors, if
    rows are missing or occur twice, or if they have no values. Without `all_here`, other ranks look
    at other pieces, and rows may be missing.
    """
    if isinstance(parts[0], torch.Tensor):
        return tuple(parts[0].shape) if _has_values(parts[0]) else None
    if not all(map(is_piece, parts)) or not all(_has_values(part["part"]) for part in parts):
        return None
    whole, rows = parts[0]["shape"], 0
    if not isinstance(whole, list) or not whole or any(type(size) is not int for size in whole):
        return None
    for part in sorted(
        (part for part in parts if len(part["part"])), key=lambda part: part["start"]
    ):
        follows = part["start"] == rows or (not all_here and part["start"] > rows)
        if part["shape"] != whole or not follows or list(part["part"].shape[1:]) != whole[1:]:
            return None
        rows = part["start"] + len(part["part"])
    is_whole = rows == whole[0] or (not all_here and rows < whole[0])
    return tuple(whole) if is_whole else None


@contextlib.contextmanager
def _without(names: list[str], *left_out: str) -> Iterator[None]:
    """Leave names out of a list in the body."""
    before = list(names)
    names[:] = [name for name in names if name not in left_out]
    try:
        yield
    finally:
        names[:] = before


def _map(change: Callable[[DTensor], Any], tree: Any) -> Any:
    """Return a copy of a tree of dicts and lists, with `change` applied to every DTensor in it."""
    if isinstance(tree, DTensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map(change, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map(change, value) for value in tree]
    return tree


def _piece_of(tensor: DTensor) -> dict[str, Any]:
    """Return this rank's piece of a tensor: rows, since FSDP2 shards along the first dimension."""
    if is_split(tensor):
        start, part = own_rows(tensor)
        return {"shape": list(tensor.shape), "start": start, "part": part}
    part = tensor.to_local().detach()
    return {"shape": list(tensor.shape), "start": first_row_of(tensor), "part": part}


def _has_values(tensor: Any) -> bool:
    """Return whether `tensor` is a plain tensor on the CPU.

    Tensors on the meta device have no values, and copying from one silently copies nothing.
    """
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
    )


def tensors(parts: Sequence[Any]) -> list[torch.Tensor]:
    """Return the tensors in `parts`, each of which is a tensor itself or a piece that holds one."""
    return [part["part"] if is_piece(part) else part for part in parts]


def is_piece(value: Any) -> bool:
    """Return whether a value is a piece of a tensor, as made by `_piece_of`."""
    return isinstance(value, dict) and value.keys() == {"shape", "start", "part"}


@torch.no_grad()
def _copy(pieces: Sequence[dict[str, Any]], out: torch.Tensor, start: int) -> None:
    """Fill `out`, which holds a tensor's rows from `start` on, from the pieces of the tensor."""
    filled = 0
    for piece in pieces:
        part, offset = piece["part"], piece["start"]
        first, last = max(start, offset), min(start + len(out), offset + len(part))
        if first < last:
            out[first - start : last - start].copy_(part[first - offset : last - offset])
            filled += last - first
    if filled != len(out):
        raise TypeError(f"{filled} of {len(out)} rows of a tensor of shape {pieces[0]['shape']}")


def _whole(pieces: Sequence[Any]) -> torch.Tensor:
    """Return the whole tensor, put together from its pieces."""
    if not is_piece(pieces[0]):
        return pieces[0]
    out = torch.empty(pieces[0]["shape"], dtype=pieces[0]["part"].dtype)
    _copy(pieces, out, 0)
    return out
