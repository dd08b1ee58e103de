"""The cache folder of a remote dataset, and the fetching of the dataset's index into it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from flame_composer.dataset.mds import BadShard, ShardFile
from flame_composer.dataset.open import Dataset, download, open_dataset
from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.storage.local import open_own
from flame_composer.storage.locks import claim_folder, is_own_folder

log = logging.getLogger(__name__)

# The folder, within a dataset's cache folder, for files that have not been checked yet
INCOMING = "incoming"

UNITS = "units"  # the folder of all shards

MAX_INDEX_BYTES = 1 << 30  # enough for some 3 million shards

INDEX_TRIES = 3

STALE_SECONDS = 3600.0

ARRIVING = re.compile("[0-9a-f]{32}")  # the names of files being fetched into INCOMING


def fetch_index(remote: str, cache: Path, *, exclusive: bool) -> Dataset:
    """Download the manifest and index of a remote dataset, and return it, without its units.

    Its cache folder is named after the index's content, so that a new dataset under the same
    address is never mixed with the old one's shards. The jobs of a machine can share it, since
    shards only appear in it whole. A shared folder that already holds the whole dataset is only
    read: it may be read-only, or another user's.

    With `exclusive`, the folder belongs to this job alone, which may then delete shards to keep
    within a limit. A later job takes the folder over.

    Raises ConfigError or DataError if the index cannot be fetched, is damaged, or cannot be
    written.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for tries_left in reversed(range(INDEX_TRIES)):
            try:
                found = _download_index(remote, temporary)
                break
            except DataError as problem:
                if tries_left == 0:
                    raise type(problem)(
                        str(problem).replace(temporary, remote.rstrip("/"))
                    ) from None
        shared = cache / found.manifest.index_sha256[:16]
        if not exclusive and _is_complete(shared, Path(temporary), found.files):
            return dataclasses.replace(found, folder=str(shared))
        try:
            folder = _place_index(Path(temporary), shared, exclusive=exclusive)
            return dataclasses.replace(found, folder=folder)
        except OSError as error:
            raise ConfigError(
                f"{cache}: cannot be written to: {error.strerror}; set local to a folder that can,"
                " on a disk with space"
            ) from None


def _is_complete(folder: Path, index: Path, files: Iterable[ShardFile]) -> bool:
    """Return whether a cache holds this very index, and all shards with the right size.

    The shards' content is checked when it is read.
    """
    try:
        for name in ("manifest.json", "index.json"):
            if not _holds(folder / name, index / name):
                return False
        return all(_is_whole(folder / file.basename, file.bytes) for file in files)
    except OSError:
        return False


def _is_whole(shard: Path, num_bytes: int) -> bool:
    found = shard.lstat()
    is_file = stat.S_ISREG(found.st_mode)
    return is_file and found.st_size == num_bytes and os.access(shard, os.R_OK)


def _holds(path: Path, other: Path) -> bool:
    """Return whether a file has the same content as `other`.

    It may belong to anybody, so no link is followed and no more is read than expected.
    """
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file, other.open("rb") as expected:
        if os.fstat(file.fileno()).st_size != os.fstat(expected.fileno()).st_size:
            return False
        while block := expected.read(1 << 20):
            if file.read(len(block)) != block:
                return False
    return True


def _place_index(index: Path, shared: Path, *, exclusive: bool) -> str:
    folder = claim_folder(shared) if exclusive else _own_cache(shared)
    incoming = incoming_folder(folder)
    # In a cache of this job alone, nobody is fetching yet.
    _sweep(incoming, older_than=0.0 if exclusive else STALE_SECONDS)
    for name in ("manifest.json", "index.json"):
        # Other jobs may do this at the same time, with the same bytes.
        whole = incoming / uuid.uuid4().hex
        shutil.copyfile(index / name, whole)
        whole.replace(Path(folder, name))
    return folder


def _own_cache(shared: Path) -> str:
    """Return `shared` or, if it is a link or somebody else's, a folder of this user's beside it.

    The folder is made if need be. Through a link, or another user's folder, our files could be
    written elsewhere.
    """
    shared.parent.mkdir(parents=True, exist_ok=True)
    for folder in (shared, shared.with_name(f"{shared.name}-user-{os.geteuid()}")):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if is_own_folder(folder):
            return str(folder)
        log.warning(
            "warning: %s belongs to another user, or is a link; another folder is used instead",
            folder,
        )
    raise PermissionError(errno.EACCES, "the folders for this dataset in it belong to another user")


def incoming_folder(folder: str) -> Path:
    """Return the folder for files that have not been checked yet, making it if need be.

    Raises PermissionError if it is not ours.
    """
    make_own(folder, INCOMING, *([UNITS] if os.path.lexists(Path(folder, UNITS)) else []))
    return Path(folder, INCOMING)


def make_own(folder: str, *names: str) -> None:
    """Make these folders in a cache folder, if they are not there.

    Raises PermissionError unless they and the cache folder are ours, and none of them is a link:
    through a link, shards would be written and deleted elsewhere.
    """
    for path in (Path(folder), *(Path(folder, name) for name in names)):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        if not is_own_folder(path):
            raise PermissionError(errno.EACCES, f"{path} belongs to another user, or is a link")


def _download_index(remote: str, folder: str) -> Dataset:
    for name in ("manifest.json", "index.json"):
        source = f"{remote.rstrip('/')}/{name}"
        try:
            download(source, Path(folder, name), at_most=MAX_INDEX_BYTES)
        except FileNotFoundError:
            raise ConfigError(
                f"{source}: not found; check the address, and that the conversion has finished"
            ) from None
        except BadShard as problem:
            raise ConfigError(f"{source}: {problem}") from None
        except (ConfigError, DataError):
            raise
        except Exception as error:  # every store's client has exceptions of its own
            raise ConfigError(
                f"{source}: cannot be read: {one_line(error)}; check the address, the credentials"
                " and that the conversion has finished"
            ) from None
    return open_dataset(folder, remote, with_units=False)


def _sweep(incoming: Path, *, older_than: float) -> None:
    """Delete the files that killed jobs left half fetched, if they are so many seconds old."""
    for path in incoming.iterdir():
        if not ARRIVING.fullmatch(path.name):
            continue
        try:
            if time.time() - path.stat().st_mtime > older_than:
                path.unlink()
        except FileNotFoundError:
            continue  # another rank has deleted it, or it is whole and moved by now
