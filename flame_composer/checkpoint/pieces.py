"""What lies where in the pieces of a checkpoint: enough to read any rows of any tensor in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.read import Checkpoint, read_content, read_layout
from flame_composer.checkpoint.sharded import Part, Piece, Pieces
from flame_composer.errors import DataError, one_line
from flame_composer.storage import files

ROOTS = ("model", "optimizers")


def divided(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the value of each `Part`, or part of a piece, in a tree of dicts."""
    if isinstance(tree, Part) or sharded.is_piece(tree):
        yield path, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from divided(value, (*path, str(name)))


def describe(checkpoint: Checkpoint, number: int, piece: Any, version: str | None) -> Piece:
    """Return where everything lies in a piece that was read and checked.

    Raise DataError if it is not divided as FSDP2 divides a model.
    """
    name = sharded.name_of(number)
    place, file = files.join(checkpoint.place, name), checkpoint.file.with_name(name)
    try:
        layout = dict(divided(read_layout(place, file)))
        rows: dict[int, tuple[int, int]] = {}
        offsets, strides = [], {}
        for index, (path, part) in enumerate(divided(piece)):
            num_rows, length = part["shape"][0], len(part["part"])
            here = (part["start"] if length else 0, length)
            if rows.setdefault(num_rows, here) != here:
                raise DataError(
                    f"{place}: not a piece that can be used: its {'.'.join(path)} has {length} rows"
                    f" from {here[0]}, and other tensors of {num_rows} rows have others"
                )
            where = layout[path]["part"]
            begins = where.storage_offset() * where.element_size()
            offsets.append(where.untyped_storage()._checkpoint_offset + begins)
            if not where.is_contiguous():
                strides[index] = tuple(where.stride())
        hashes = [_hash(piece[root]) for root in ROOTS]
    except DataError:
        raise
    except Exception as error:  # the piece is untrusted: it can make this raise anything
        raise DataError(f"{place}: not a piece that can be used: {one_line(error)}") from None
    return Piece(place, version, rows, np.array(offsets, np.int64), strides, *hashes)


def _hash(tree: Any) -> str:
    """Return a hash of names, shapes, types and plain values in a tree, but not those in lists."""
    digest = hashlib.sha256()

    def add(path: str, value: Any) -> None:
        if sharded.is_piece(value):
            value = (value["shape"], value["part"].dtype)
        elif isinstance(value, dict):
            for name, each in value.items():
                add(f"{path}.{name}", each)
            return
        elif isinstance(value, torch.Tensor):
            value = (value.shape, value.dtype, value.item() if value.numel() == 1 else None)
        elif isinstance(value, list):  # groups of parameters: those of the first piece count
            return
        digest.update(f"{path} {value!a}\n".encode())

    add("", tree)
    return digest.hexdigest()


def template_of(piece: Any) -> Any:
    """Return the content of a piece with a `Part` for each divided tensor."""
    if sharded.is_piece(piece):
        return Part(tuple(piece["shape"]), piece["part"].dtype)
    if isinstance(piece, dict):
        return {name: template_of(value) for name, value in piece.items()}
    return piece.clone() if isinstance(piece, torch.Tensor) else piece


def require_one(place: str, pieces: Sequence[Piece]) -> None:
    """Raise DataError unless the pieces together make one model with its optimizer's state."""
    problem = f"{place}: not a checkpoint that can be used: its"
    for number, piece in enumerate(pieces):
        for what in ROOTS:
            if getattr(piece, what) != getattr(pieces[0], what):
                raise DataError(f"{problem} piece{number}.pt and piece0.pt are not of one {what}")
    for num_rows in pieces[0].rows:
        end = 0
        for number, piece in enumerate(pieces):
            start, length = piece.rows[num_rows]
            if length and start != end:
                raise DataError(
                    f"{problem} piece{number}.pt has rows from {start} of tensors of {num_rows}"
                    f" rows, must be from {end}"
                )
            end += length
        if end != num_rows:
            raise DataError(f"{problem} pieces have {end} of the {num_rows} rows of their tensors")


def all_pieces(checkpoint: Checkpoint) -> Pieces:
    """Return all pieces of a checkpoint that was checked before, all of whose files are here."""
    contents = read_content(checkpoint, verify=False)["pieces"]
    each = [describe(checkpoint, number, content, None) for number, content in enumerate(contents)]
    require_one(checkpoint.place, each)
    return Pieces(template_of(contents[0]), tuple(each))


def local_copy(piece: Piece, folder: Path) -> Path | None:
    """Return the file of a piece in the local folder of its checkpoint, or None if there is none.

    A copy in a folder of downloads is there if this rank, or another one that uses the folder, has
    fetched and checked the piece.
    """
    file = folder / piece.place.replace("\\", "/").rpartition("/")[2]
    return file if file.exists() else None
