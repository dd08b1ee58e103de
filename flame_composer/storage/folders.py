"""Folders that appear whole or not at all, and a folder that nobody else can enter."""

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

from filelock import FileLock
from safetensors import SafetensorError

from flame_composer.errors import ConfigError, DataError, StoreError, one_line
from flame_composer.storage.local import open_own


def require_new(out: Path) -> None:
    """Raise ConfigError if `new_folder` could not make this folder.

    Call it before the work that is to fill the folder.
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
    """Yield a temporary folder to fill, which becomes `out` when the body ends.

    It is removed if the body raises. What an earlier, killed process left of it is removed first.
    Raise ConfigError if `out` exists and is not an empty folder, and DataError if the disk is full
    or fails.
    """
    require_new(out)
    place = Path(os.path.realpath(out))  # so that a link stays a link
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        there = sorted(place.parent.glob(f".{glob.escape(place.name)}-*.unfinished"))
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{place.name}-", suffix=".unfinished", dir=place.parent)
        )
        for left in there:
            _remove_left(left, owner=temporary.stat().st_uid)
        try:
            with locked(temporary):
                yield temporary
                for path in (*temporary.iterdir(), temporary):
                    # Temporary files are readable by this user alone.
                    path.chmod(0o755 if path.is_dir() else 0o644)
                    flush(path)
                os.replace(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except Exception as error:
        # A tokenizer that cannot be written raises a plain Exception.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            raise DataError(f"{out}: cannot be written: {one_line(error)}") from None
        raise


def private_folder() -> Path:
    """Return this user's folder in TMPDIR, which nobody else can enter; make it if need be.

    TMPDIR may be shared, and another user could put a folder or a link under any name that can be
    guessed. The folder therefore has a random name, and is found again by its owner and
    permissions. Raise ConfigError if it cannot be made.
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
    """Return whether `path` is a folder of this user's that nobody else can enter."""
    try:
        found = path.lstat()
    except OSError:
        return False
    is_closed = stat.S_IMODE(found.st_mode) & 0o077 == 0
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and is_closed


def is_ours(found: os.stat_result, parent: Path) -> bool:
    """Return whether something found in the folder `parent` belongs to this process's user.

    Some filesystems map the user to another id: on NFS, root may appear as nobody.
    """
    if found.st_uid == os.geteuid():
        return True
    try:
        made = tempfile.mkdtemp(dir=parent)
    except OSError:
        return False
    owner = os.lstat(made).st_uid
    os.rmdir(made)
    return found.st_uid == owner


def file_lock(path: Path) -> FileLock:
    """Return a lock on the file at `path`, which only its owner may open.

    Anybody who could read the file could also lock it. Raise OSError if the path is not a file.
    """
    # Do not create the file here: on a disk without flock, its existence is the lock.
    with contextlib.suppress(FileNotFoundError, PermissionError):
        file = open_own(path, os.O_RDWR)
        try:
            close_to_others(file, os.fstat(file))
        finally:
            os.close(file)
    return FileLock(path, mode=0o600)


def close_to_others(file: int, found: os.stat_result) -> None:
    """Remove the permissions of everybody but the owner from an open file."""
    if stat.S_IMODE(found.st_mode) & 0o077:
        with contextlib.suppress(OSError):  # another user's file, or a disk without permissions
            os.fchmod(file, 0o600)


def require_safe(folder: Path, key: str) -> None:
    """Raise ConfigError if the folder is another user's and everybody may write in it.

    Anybody could plant files there that make us write elsewhere or stop us. Root's folders, and
    those that are writable only for a group, are accepted.
    """
    try:
        found = folder.stat()
    except OSError:
        return
    is_open = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_IWOTH
    if is_open and found.st_uid != 0 and not is_ours(found, Path(os.path.realpath(folder)).parent):
        raise ConfigError(
            f"{key}: {folder}: belongs to user {found.st_uid}, this is {os.geteuid()}, and"
            " everybody may write in it; name a folder of your own, which may be one in it"
        )


def require_folder_inside(folder: Path, name: str, key: str) -> None:
    """Raise ConfigError unless `name` in `folder` can safely be used as a folder.

    It need not exist yet. It must not be a link or a file, or belong to another user.
    """
    path = folder / name
    try:
        found, above = path.lstat(), folder.stat()
    except OSError:
        return
    is_planted = (
        above.st_mode & stat.S_IWOTH
        and found.st_uid not in (0, above.st_uid)
        and not is_ours(found, folder)
    )
    if not stat.S_ISDIR(found.st_mode) or is_planted:
        raise ConfigError(
            f"{key}: {path}: is a link, not a folder, or another user's; remove it, or name another"
            " folder"
        )
    require_safe(path, key)


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    with _opened(path) as number:
        os.fsync(number)


@contextlib.contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    """Yield the descriptor of a file or folder, opened for reading."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)  # or opening a pipe would wait
    try:
        yield number
    finally:
        os.close(number)


def _remove_left(folder: Path, *, owner: int) -> None:
    """Remove the temporary folder that a killed process left behind, unless it is in use.

    Anything that is not a folder, belongs to another user or cannot be opened is left alone,
    because anybody may have put it there.
    """
    with contextlib.suppress(OSError):
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == owner:
            with locked(folder) as alone:
                if alone:
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock a folder in the body, and yield whether that succeeded.

    Yield False if another process has locked it. The lock also ends when this process dies.
    """
    with _opened(folder, os.O_DIRECTORY | os.O_NOFOLLOW) as number:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


@contextmanager
def explained(folder: str) -> Iterator[None]:
    """Raise DataError, with a remedy, if a disk or store fails while the body writes work units."""
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
