"""Folders that appear whole or not at all, and one that nobody else can enter."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from flame_composer.errors import ConfigError, DataError, StoreError, one_line


def require_new(out: Path) -> None:
    """Raises ConfigError for a place where no `new_folder` can be made, before any work is done
    for it.
    """
    place = Path(os.path.realpath(out))
    if os.path.ismount(place):
        raise ConfigError(
            f"out={out}: is a mount point, which no folder can take the place of; name a folder"
            " in it"
        )
    above = next(path for path in place.parents if path.exists())
    if not above.is_dir():
        raise ConfigError(f"out={out}: {above} is a file; choose another folder")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"out={out}: {above} cannot be written to; choose another folder")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"out={out}: already exists and is not empty; choose another folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` at the end, whole, or is removed if that is not reached.

    What a conversion to `out` that was killed has left is removed first. Raises ConfigError if
    `out` exists and is not an empty folder, DataError if the disk is full or the like.
    """
    require_new(out)
    place = Path(os.path.realpath(out))  # a link stays one
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for left in place.parent.glob(f".{glob.escape(place.name)}-*.unfinished"):
            with _locked(left) as alone:
                if alone:
                    shutil.rmtree(left, ignore_errors=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{place.name}-", suffix=".unfinished", dir=place.parent)
        )
        try:
            with _locked(temporary):
                yield temporary
                for path in (*temporary.iterdir(), temporary):
                    # Made for this user alone, as temporary files are
                    path.chmod(0o755 if path.is_dir() else 0o644)
                    flush(path)
                os.replace(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except Exception as error:
        # What goes wrong when a tokenizer is written is no more than an Exception.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            raise DataError(f"{out}: cannot be written: {one_line(error)}") from None
        raise


def private_folder() -> Path:
    """Return this user's folder in the machine's temporary folder (TMPDIR), which nobody else can
    enter; made if need be.

    TMPDIR may be everybody's, and whoever comes first can put a folder or a link under any name
    that can be guessed. So it has a random name, and is found again by its owner and permissions.
    Raises ConfigError where none can be made.
    """
    prefix = f"flame_composer-{os.geteuid()}-"
    try:
        parent = Path(tempfile.gettempdir())
        found = (path for path in sorted(parent.glob(f"{prefix}*")) if _is_private(path))
        return next(found, None) or Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise ConfigError(
            f"TMPDIR: no folder can be made in it: {reason}; set it to a folder that can be"
            " written to"
        ) from None


def _is_private(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    is_closed = stat.S_IMODE(found.st_mode) & 0o077 == 0
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and is_closed


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    with _opened(path) as number:
        os.fsync(number)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    number = os.open(path, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether no other process has this folder locked; if so, it is until the end, or until this
    process dies.
    """
    with _opened(folder) as number:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


@contextmanager
def explained(folder: str) -> Iterator[None]:
    remedy = (
        "when that is mended, run the same command again: it goes on from the last finished unit"
    )
    try:
        yield
    except StoreError as error:
        raise DataError(f"{error}; {remedy}") from None
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise DataError(f"{folder}: {error.strerror or error}{where}; {remedy}") from None
