"""Local copies of checkpoints, or of parts of them, from an object store."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.read import Checkpoint, read_head
from flame_composer.errors import DataError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url

log = logging.getLogger(__name__)


def has_head(place: str) -> bool:
    """Return whether `place` is a folder that holds the head of a checkpoint in pieces.

    The head (`sharded.HEAD`) may be damaged.
    """
    head = files.join(place, sharded.HEAD)
    return files.stat(head) is not None if is_url(place) else is_there(head)


def is_there(path: str) -> bool:
    """Return whether a path exists, as `os.path.lexists` does.

    A path also counts as existing if this user may not look at it, or if the disk fails.
    """
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return True


def copy_of(place: str, staging: Path) -> Path:
    """Return the local path of a checkpoint: its own, or that of its copy in `staging`."""
    return staging / place.rpartition("/")[2] if is_url(place) else Path(place)


def file_of(place: str, staging: Path) -> Path:
    """Return the local file of a checkpoint, which is its head's if it is in pieces."""
    there = copy_of(place, staging)
    is_folder = os.path.isdir(there) and is_there(str(there / sharded.HEAD))
    return there / sharded.HEAD if is_folder else there


def fetch(place: str, staging: Path) -> Checkpoint | None:
    """Return the checkpoint at `place`, copied here from a store if need be; None if it is gone."""
    checkpoint = fetch_but_pieces(place, staging)
    if checkpoint is None or not is_url(place) or checkpoint.file.name != sharded.HEAD:
        return checkpoint
    try:
        # The pieces' names follow from their number: the store's listing is not relied upon.
        for number in range(read_head(place, checkpoint.file)):
            fetch_piece(checkpoint, number)
    except FileNotFoundError:  # deleted while it was copied
        return None
    return checkpoint


def fetch_but_pieces(place: str, staging: Path) -> Checkpoint | None:
    """Return the checkpoint at `place`, copied here from a store if need be; None if it is gone.

    If it is in pieces, only its head is copied.
    """
    if not is_url(place):
        return Checkpoint(place, file_of(place, staging)) if is_there(place) else None
    copy = copy_of(place, staging)
    is_file = files.stat(files.join(place, sharded.HEAD)) is None
    if is_file and files.stat(place) is None:
        return None
    staging.mkdir(parents=True, exist_ok=True)
    # Remove an old copy of the other kind: a folder where a file is due, or the reverse.
    if (copy.is_dir() and not copy.is_symlink()) == is_file:
        remove_copy(copy)
    try:
        if is_file:
            files.download(place, copy)
            return Checkpoint(place, copy)
        copy.mkdir(exist_ok=True)
        files.download(files.join(place, sharded.HEAD), copy / sharded.HEAD)
        return Checkpoint(place, copy / sharded.HEAD)
    except FileNotFoundError:  # deleted while it was copied
        return None


def fetch_piece(checkpoint: Checkpoint, number: int) -> str | None:
    """Copy a piece from a store to beside the copy of its head; return the version of the piece.

    Raise DataError if it is missing, and FileNotFoundError if it is deleted meanwhile.
    """
    name = sharded.name_of(number)
    place = files.join(checkpoint.place, name)
    found = files.stat(place)
    if found is None:
        raise DataError(f"{place}: not a whole checkpoint: this piece is missing")
    files.download(place, checkpoint.file.with_name(name))
    return found.version


def remove_copy(copy: Path) -> None:
    """Remove a local copy of a checkpoint, a file or a folder, whole or as a kill left it.

    Other machines that share the folder may do so at the same time. If it cannot be removed, log a
    warning.
    """

    def unless_gone(_: Any, __: str, problem: Any) -> None:
        if not isinstance(problem[1], FileNotFoundError):
            raise problem[1]

    try:
        if copy.is_dir() and not copy.is_symlink():
            shutil.rmtree(copy, onerror=unless_gone)
        else:
            copy.unlink(missing_ok=True)
    except OSError as error:
        log.warning("warning: %s: cannot be removed: %s", copy, error.strerror)
