"""A reader of checkpoints that never runs code in them.

If anything is wrong with a file, the error is one line that names it.
"""

from __future__ import annotations

import datetime
import os
import pickle
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flame_composer.checkpoint import sharded
from flame_composer.errors import DataError, one_line
from flame_composer.storage import files
from flame_composer.upstream.unpickling import checked_keys

# Types that a checkpoint may hold besides tensors and plain values: arrays (in NumPy's random
# state), times and versions
_reconstruct: Any = vars(np._core.multiarray)["_reconstruct"]  # type: ignore[attr-defined]
_SAFE_GLOBALS: list[Any] = [
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
]
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# The most bytes that everything but the tensors may take when written out. A tokenizer takes about
# 50 MB.
MOST_TEXT = 1 << 30


@dataclass(frozen=True)
class Checkpoint:
    """The place of a checkpoint, and the local file to read it from.

    `file` is the place itself, or a local copy if that is in an object store. If the checkpoint is
    in pieces, `place` is a folder, and `file` its head, which lies beside the pieces. `passed_over`
    names newer checkpoints in the same folder that could not be used. `pieces` says where
    everything lies in the pieces; None if it is not known, and all of them are here.
    """

    place: str
    file: Path
    passed_over: tuple[str, ...] = ()
    pieces: sharded.Pieces | None = field(default=None, compare=False)


def read_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's content, with its tensors memory-mapped; no code in it is run.

    If the checkpoint is in pieces, their contents are a list under the key `pieces`. Raise
    DataError if a file is missing, truncated, altered (every part's CRC-32 is checked) or not a
    plain file, or if it holds anything but tensors and plain values.
    """
    return read_content(checkpoint, verify=True)


def read_content(
    checkpoint: Checkpoint, *, verify: bool, numbers: Iterable[int] | None = None
) -> dict[str, Any]:
    """Return what `read_checkpoint` returns; check the checksums only if `verify`.

    Of a checkpoint in pieces, read only those with the given `numbers`, if any are given.
    """
    place, file = checkpoint.place, checkpoint.file
    content = _read_file(place, file, verify=verify)
    if file.name == sharded.HEAD:
        total = num_pieces(content, place)
        content["pieces"] = [
            _read_piece(checkpoint, content, number, verify=verify)
            for number in (range(total) if numbers is None else numbers)
        ]
    elif isinstance(content, dict) and "pieces" in content:
        # Its pieces may be whole, but what loads a single file would not look for them.
        raise DataError(
            f"{place}: not a whole checkpoint: the head of one in pieces, in place of one in a file"
        )
    return content


def order_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings of the row order that a checkpoint was trained with, which was checked.

    Raise DataError if it has been damaged since.
    """
    content = _read_file(checkpoint.place, checkpoint.file, verify=False)
    try:
        order: dict[str, Any] = content["state"]["callbacks"]["SameData"]["order"]
        return dict(order)
    except Exception:
        raise DataError(f"{checkpoint.place}: not a whole checkpoint: it has changed") from None


def _read_piece(checkpoint: Checkpoint, head: dict[str, Any], number: int, *, verify: bool) -> Any:
    """Return the content of one piece.

    Raise DataError if it was not saved together with the checkpoint's head.
    """
    name = sharded.name_of(number)
    place, file = files.join(checkpoint.place, name), checkpoint.file.with_name(name)
    content = _read_file(place, file, verify=verify)
    if "fingerprints" in head:  # not until 2026-11-28; see optimizer_state.check_pieces
        try:
            is_own = head["fingerprints"][number] == sharded.fingerprint(file)
        except Exception:  # the head is untrusted: it can make this raise anything
            is_own = False
        if not is_own:
            raise DataError(
                f"{place}: not a whole checkpoint: not the piece that was saved with its head"
            )
    return content


def read_layout(place: str, file: Path) -> Any:
    """Return the content of a file that was checked before, with tensors that have no values.

    The storage of each knows where it lies in the file: its `_checkpoint_offset`, in bytes.
    """
    with FakeTensorMode():
        return _read_file(place, file, verify=False)


def read_head(place: str, file: Path) -> int:
    """Return how many pieces the checkpoint `place` has, from the copy `file` of its head."""
    return num_pieces(_read_file(place, file, verify=True), place)


def num_pieces(head: Any, place: str) -> int:
    """Return how many pieces a checkpoint has, according to its head; raise DataError if unsaid."""
    number = head.get("pieces") if isinstance(head, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise DataError(f"{place}: not the head of a checkpoint in pieces")
    return number


def read_for_composer(file: str | Path, map_location: str) -> Any:
    """Return the content of a file that was checked before, read into memory.

    This replaces Composer's `_torch_load_with_validation` (0.32.1), which unpickles without limits:
    if the file was replaced since the check, code in it would run.
    """
    assert map_location == "cpu"
    file = Path(file).resolve()  # Composer passes a symbolic link that it made
    return _read_file(str(file), file, verify=False, mapped=False)


def _read_file(place: str, file: Path, *, verify: bool, mapped: bool = True) -> Any:
    """Return the content of one file; raise DataError if it cannot be trusted."""
    try:
        _require_plain_file(place, file)
        if verify:
            _verify(place, file)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), checked_keys():
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        if _size(content, {}) > MOST_TEXT:
            raise DataError(
                f"{place}: refused: it holds the same parts over and over, which would take more"
                f" than {MOST_TEXT:,} bytes written out; take another checkpoint"
            )
        return content
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        what = f"it holds something other than tensors and plain values: {one_line(error)}"
        raise DataError(f"{place}: refused, {what}") from None
    except Exception as error:  # a damaged file can make torch raise anything
        raise DataError(f"{place}: not a whole checkpoint: {one_line(error)}") from None


def _size(part: Any, known: dict[int, int]) -> int:
    """Return about how many bytes `part` takes when written out, counting repeated objects again.

    A list that holds one list twice, which holds another twice, and so on, is small in a pickle and
    in memory, but iterating over all of it, or writing it as JSON, never ends. Raise RecursionError
    for a list that contains itself.
    """
    if isinstance(part, str | bytes | bytearray):
        return 8 + len(part)
    if not isinstance(part, dict | list | tuple | set):
        return 8
    if id(part) not in known:
        size = sum(_size(each, known) for each in part)
        if isinstance(part, dict):
            size += sum(_size(each, known) for each in part.values())
        known[id(part)] = 8 + size
    return known[id(part)]


def _require_plain_file(place: str, file: Path) -> None:
    """Raise DataError for an empty file, or for one that is not a regular file, such as a pipe."""
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something")
        raise DataError(f"{place}: not a whole checkpoint: {kind}, where a file must be")
    if found.st_size == 0:
        raise DataError(f"{place}: not a whole checkpoint: an empty file")


def _verify(place: str, file: Path) -> None:
    """Raise DataError unless every part of a file matches its checksum."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        # torch never compresses, so the parts together cannot be larger than the file.
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise DataError(f"{place}: not a whole checkpoint: parts of it are compressed")
        if sum(part.file_size for part in parts) > file.stat().st_size:
            raise DataError(f"{place}: not a whole checkpoint: its parts are larger than the file")
        damaged = archive.testzip()
    if damaged is not None:
        raise DataError(f"{place}: damaged checkpoint: {damaged!a} does not match its checksum")
