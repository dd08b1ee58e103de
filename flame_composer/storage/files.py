"""Functions that work on files in local folders and in object stores alike.

A place is a path, or a URL such as s3://bucket/folder/file. `put`, `write` and `download` make a
file appear whole or not at all.

Errors of an object store are one line: a ConfigError for what the user has to put right
(credentials, a bucket, an endpoint), a StoreError for what failed again and again. A file that does
not exist is a FileNotFoundError, and any other failure of a local disk is an OSError, as everywhere
in Python.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from flame_composer.errors import DataError, StoreError
from flame_composer.storage.filesystems import (
    Stat,
    at,
    below,
    find_flat,
    is_url,
    local_stat,
    stat_of,
    strange_name,
    walk_folders,
)
from flame_composer.storage.local import appearing, require_room
from flame_composer.storage.many import each

# The most bytes of a config, an index or a tokenizer. Real ones have less than a third of that, and
# reading one takes 20 times its size in memory.
MOST_JSON = 1 << 27
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # Linux's limits
# The most bytes of a file that is read as a whole: enough for the index of 3 million shards.
MOST_READ = 1 << 30
T = TypeVar("T")


def join(place: str, *names: str) -> str:
    """Return the place of a file or folder below a place."""
    return "/".join((place.rstrip("/"), *names)) if is_url(place) else os.path.join(place, *names)


def is_plain_name(name: object) -> bool:
    """Return whether `name` can be the name of a file directly in a folder.

    Names come from checkpoints, indexes, listings and the like. Only a plain one may be joined to a
    path: a separator or `..` would lead out of the folder.
    """
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(letter in "/\\" or not letter.isprintable() for letter in name)
        and len(name.encode(errors="replace")) <= MAX_NAME_BYTES
    )


def stat(place: str) -> Stat | None:
    """Return a file's size, time and version, or None if there is none or it is a folder."""
    if not is_url(place):
        return local_stat(place) if os.path.isfile(place) else None
    with at(place) as (fs, path):
        try:
            info = fs.info(path)
        except FileNotFoundError:
            return None
        return stat_of(info) if info["type"] == "file" else None


def find(place: str) -> dict[str, Stat]:
    """Return all files below a folder, at any depth, by their path within it, sorted.

    The result is empty if there is no such folder.
    """
    if not is_url(place):
        if (flat := find_flat(place)) is not None:
            return flat
        paths = [
            os.path.join(folder, name) for folder, names in walk_folders(place) for name in names
        ]
        return {
            os.path.relpath(path, place): local_stat(path)
            for path in sorted(paths)
            if os.path.exists(path)
        }
    with at(place) as (fs, path):
        infos = fs.find(path, detail=True)
        return {
            below(path, name): stat_of(info) for name, info in sorted(infos.items()) if name != path
        }


def ls(place: str) -> list[str]:
    """Return the sorted names of the files and folders directly in a folder.

    The result is empty if there is no such folder. Raise DataError if a store lists something that
    is not a plain name: joined to a path, it would lead elsewhere.
    """
    if not is_url(place):
        return sorted(os.listdir(place)) if os.path.isdir(place) else []
    with at(place) as (fs, path):
        try:
            listed = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        names = [below(path, name.rstrip("/")) for name in listed if name != path]
        for name in names:
            if not is_plain_name(name):
                raise strange_name(path, name)
        return sorted(names)


def glob(pattern: str) -> list[str]:
    """Return the URLs of the files that match a pattern, sorted.

    `*` matches within a folder, `**` any number of folders.
    """
    with at(pattern) as (fs, path):
        found = fs.glob(path, detail=True)
        return sorted(
            str(fs.unstrip_protocol(name)) for name, info in found.items() if info["type"] == "file"
        )


def read(place: str, most: int = MOST_READ) -> bytes:
    """Return the content of a file.

    Raise DataError if it has more than `most` bytes, without reading the rest.
    """
    if not is_url(place):
        with open(place, "rb") as file:  # noqa: PTH123 - faster than a Path
            return _at_most(most, file, place, os.fstat(file.fileno()).st_size)
    with at(place) as (fs, path):
        if fs.protocol == "s3":
            return bytes(fs.cat_file(path, most=most))
        with fs.open(path, "rb") as file:
            return _at_most(most, file, place, most)


def _at_most(most: int, file: Any, place: str, size: int) -> bytes:
    # Python makes room for all that it is asked to read, so first ask for what there should be.
    content = bytes(file.read(min(most, size) + 1))
    if size < len(content) <= most:
        content += file.read(most + 1 - len(content))
    if len(content) > most:
        raise DataError(
            f"{place}: has more than {most:,} bytes, which no such file has; put the right one"
            " there"
        )
    return content


def read_small(path: str | Path) -> bytes:
    """Return the content of a local JSON or text file that somebody else made.

    Raise ValueError if it is not a file, or has more than `MOST_JSON` bytes (a sparse file can be
    that large without taking space on a disk).
    """
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise ValueError("is not a file")
    with Path(path).open("rb") as file:
        content = file.read(MOST_JSON + 1)
    if len(content) > MOST_JSON:
        raise ValueError(f"has more than {MOST_JSON:,} bytes")
    return content


def read_start(place: str, num_bytes: int) -> bytes:
    """Return the first bytes of a file that is not empty, with one request.

    A file of fewer than `num_bytes` bytes is returned as a whole.
    """
    if not is_url(place):
        with open(place, "rb", buffering=0) as file:  # noqa: PTH123 - faster than a Path
            return file.read(num_bytes)
    with at(place) as (fs, path):
        return bytes(fs.cat_file(path, start=0, end=num_bytes))[:num_bytes]


def open_file(place: str, version: str | None = None, block_size: int = 8 << 20) -> BinaryIO:
    """Open a file for reading in any order.

    About `block_size` bytes are fetched at a time; with 0, just what is asked for. In a store,
    raise StoreError if the file is not of this `version`; in S3, also if it is replaced while it is
    read.
    """
    if not is_url(place):
        return Path(place).open("rb")
    with at(place) as (fs, path):
        if fs.protocol == "s3":
            return cast(BinaryIO, fs.open(path, "rb", block_size=block_size, version=version))
        if version is not None and stat_of(fs.info(path)).version != version:
            raise StoreError(f"{place}: has been replaced since it was looked at")
        # fsspec's own readline is slow
        return cast(BinaryIO, io.BufferedReader(fs.open(path, "rb"), 1 << 20))


def write(place: str, data: bytes) -> None:
    """Write `data` to a file in an existing folder, whole or not at all."""
    if is_url(place):
        with at(place) as (fs, path):
            fs.pipe_file(path, data)
        return
    with appearing(place) as file:
        file.write(data)


def write_parts(place: str, parts: Iterable[bytes]) -> None:
    """Write a file in an existing folder, whole or not at all, given its content in parts.

    A file in a store is first made in TMPDIR.
    """
    if not is_url(place):
        with appearing(place) as file:
            file.writelines(parts)
        return
    with tempfile.NamedTemporaryFile() as local:
        local.writelines(parts)
        local.flush()
        put(local.name, place)


def put(local: str | Path, place: str) -> None:
    """Copy a local file to a place, whole or not at all; make the folder if need be."""
    if is_url(place):
        with at(place) as (fs, path):
            fs.put_file(str(local), path)
        return
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    with appearing(place) as file, Path(local).open("rb") as content:
        shutil.copyfileobj(content, file, 1 << 20)


def put_folder(local: str | Path, place: str, last: str) -> None:
    """Move a local folder of files to a place; the file named `last` appears last.

    Whoever sees that file therefore sees all of them. A local place must be on the same disk: the
    folder is renamed, and FileExistsError is raised if the place exists and is not empty. In an
    object store, existing files of the same names are replaced and others are left alone.
    """
    if not is_url(place):
        try:
            os.rename(local, place)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), place) from None
        return
    for path in sorted(Path(local).iterdir(), key=lambda path: (path.name == last, path.name)):
        put(path, join(place, path.name))
    shutil.rmtree(local)


def retract_folder(place: str, last: str) -> None:
    """Undo `put_folder`, if it was done.

    In an object store only `last` is deleted: others may be putting the same files.
    """
    if is_url(place):
        delete(join(place, last))
    else:
        delete_folder(place)


def download(place: str, local: str | Path, most: int | None = None) -> None:
    """Copy a file to a local one, whole or not at all.

    Raise StoreError if it has more than `most` bytes, does not fit on the disk, or turns out larger
    than the store announced. For files of a remote dataset, use `shards.fetch_file`.
    """
    temporary = Path(tempfile.mkstemp(dir=Path(local).parent, prefix=f".{Path(local).name}.")[1])
    try:
        if is_url(place):
            with at(place) as (fs, path):
                if fs.protocol == "s3":  # it checks the size itself
                    fs.get_file(path, str(temporary), most=most)
                else:
                    _get(fs, path, place, temporary, most)
        else:
            shutil.copyfile(place, temporary)
        os.replace(temporary, local)
    finally:
        temporary.unlink(missing_ok=True)


def _get(fs: Any, path: str, place: str, local: Path, most: int | None) -> None:
    """Download a file from a store that fsspec supports to the local file `local`."""
    from fsspec.callbacks import Callback

    size = fs.info(path).get("size")
    if most is not None and size is not None and size > most:
        raise StoreError(f"{place}: {size:,} bytes long, must be {most:,} at most")
    if size is not None:
        require_room(place, size, local.parent)

    class Limit(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if size is not None and self.value > size:
                raise StoreError(
                    f"{place}: the store sends more than the {size:,} bytes it announced"
                )

    fs.get_file(path, str(local), callback=Limit())
    if size is not None and local.stat().st_size != size:
        raise StoreError(
            f"{place}: the store sends {local.stat().st_size:,} bytes, must be the {size:,} it"
            " announced"
        )


def delete(place: str) -> None:
    """Delete a file if it exists."""
    if not is_url(place):
        Path(place).unlink(missing_ok=True)
        return
    with at(place) as (fs, path), suppress(FileNotFoundError):
        fs.rm_file(path)


def delete_folder(place: str) -> None:
    """Delete all files below a folder, and in a store what unfinished uploads left there."""
    if not is_url(place):
        if os.path.isdir(place):
            shutil.rmtree(place)
        return
    list(each(lambda name: delete(join(place, name)), find(place)))
    abort_uploads(place)


def move(place: str, other: str) -> None:
    """Rename a file or a folder; in an object store it is copied, then deleted."""
    if not is_url(place):
        os.rename(place, other)
        return
    names = [""] if stat(place) is not None else list(find(place))
    for name in names:
        with (
            at(join(place, name) if name else place) as (fs, path),
            at(join(other, name) if name else other) as (_, to),
        ):
            fs.cp_file(path, to)
    for name in names:
        delete(join(place, name) if name else place)


def abort_uploads(place: str) -> None:
    """Free the storage of uploads to a folder that were never finished.

    Must not be called while anything is being uploaded to it.
    """
    if is_url(place):
        with at(place) as (fs, path):
            if fs.protocol == "s3":
                fs.abort_uploads(path)


def dump_json(value: Any) -> bytes:
    """Return a value as one line of JSON, with sorted keys."""
    return (json.dumps(value, sort_keys=True) + "\n").encode("ascii")
