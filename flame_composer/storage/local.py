"""Local files, made and opened without following links that others have put there."""

from __future__ import annotations

import errno
import os
import shutil
import stat as modes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flame_composer.errors import StoreError

# Number of attempts to create a file while somebody else keeps putting files under its name.
CREATE_TRIES = 16


def create(path: str | Path) -> BinaryIO:
    """Make a new local file and open it for writing.

    An existing file of that name is deleted first, and links are not followed. In a shared folder,
    anyone could otherwise put a link under a name that can be guessed, and so have another file
    overwritten.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(CREATE_TRIES):
        with suppress(FileNotFoundError):
            os.unlink(path)
        with suppress(FileExistsError):
            return os.fdopen(os.open(path, flags, 0o666), "wb")
    raise FileExistsError(errno.EEXIST, "another process keeps creating it", str(path))


@contextmanager
def appearing(path: str) -> Iterator[BinaryIO]:
    """Yield a new file to write, which replaces `path` once the body has ended without error."""
    temporary = f"{path}.tmp"
    with create(temporary) as file:
        yield file
    os.replace(temporary, path)


def open_own(path: str | Path, flags: int) -> int:
    """Open a local file with the `flags` of `os.open`, and return its descriptor.

    Raise OSError for a link, a pipe, a device or a folder, without following or waiting for it.
    """
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError:
        if os.path.lexists(path) and not modes.S_ISREG(os.lstat(path).st_mode):
            raise _no_file(path) from None
        raise
    if modes.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise _no_file(path)


def require_room(place: str, size: int, folder: Path) -> None:
    """Raise StoreError if the `size` bytes of `place` do not fit into a local folder."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StoreError(
            f"{place}: its {size:,} bytes do not fit into {folder}, where {free:,} are free; make"
            " room there"
        )


def _no_file(path: str | Path) -> OSError:
    return OSError(errno.EINVAL, "is a link, or no file", str(path))
