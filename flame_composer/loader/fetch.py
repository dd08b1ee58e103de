"""Fetching a remote dataset into a cache folder: its index, then its shards, none of it trusted
before it is checked.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import logging
import os
import re
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from composer.utils import dist
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format.base.reader import FileInfo
from streaming.base.storage import CloudDownloader
from streaming.base.world import World

from flame_composer.dataset.manifest import (
    HASH,
    Manifest,
    ShardFile,
    check_totals,
    column_form,
    read_index,
    read_manifest,
)
from flame_composer.dataset.survey import BadShard, Shard, check_hash, check_size
from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.loader.reader import FIELDS, ShardReader, identify
from flame_composer.storage import files as storage
from flame_composer.storage.locks import claim_folder, is_own_folder

# The folder, within a dataset's cache folder, of what has not been checked yet
INCOMING = "incoming"
UNITS = "units"  # that of all shards
MAX_INDEX_BYTES = 1 << 30  # some 3 million shards
INDEX_TRIES = 3
STALE_SECONDS = 3600.0
ARRIVING = re.compile("[0-9a-f]{32}")  # what is fetched has such a name in INCOMING
CHECKS = 3  # of a shard that somebody writes to while it is read

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A dataset fit for training: `folder` holds it, or the part of `remote` that has been
    downloaded so far.
    """

    folder: str
    remote: str | None
    manifest: Manifest
    files: list[ShardFile]

    @property
    def place(self) -> str:
        return self.remote or self.folder


def fetch_index(remote: str, cache: Path, *, exclusive: bool) -> str:
    """Download manifest.json and index.json of a remote dataset into its cache folder, and return
    that folder.

    The folder is named after the index, so that another dataset put under the same address never
    meets the old one's shards. Jobs of one machine share it: a shard appears in it whole. With
    `exclusive`, for a job that deletes shards to keep within a limit, it is a folder of the job's
    own, which a later job takes over. One that holds the whole dataset is read as it is: it may be
    read-only, or another user's.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for tries_left in reversed(range(INDEX_TRIES)):
            try:
                manifest = _download_index(remote, temporary)
                break
            except DataError as problem:
                if tries_left == 0:
                    raise type(problem)(
                        str(problem).replace(temporary, remote.rstrip("/"))
                    ) from None
        shared = cache / manifest.index_sha256[:16]
        if not exclusive and _is_complete(shared, Path(temporary), read_index(temporary, manifest)):
            return str(shared)
        try:
            return _place_index(Path(temporary), shared, exclusive=exclusive)
        except OSError as error:
            raise ConfigError(
                f"{cache}: cannot be written to: {error.strerror}; set local to a folder that can,"
                " on a disk with space"
            ) from None


def _is_complete(folder: Path, index: Path, files: list[ShardFile]) -> bool:
    """Whether a cache holds this very index, and all shards of the right size. Their content is
    checked when it is read.
    """
    try:
        for name in ("manifest.json", "index.json"):
            if not _holds(folder / name, (index / name).read_bytes()):
                return False
        paths = [folder / file.basename for file in files]
        found = [path.lstat() for path in paths]
        return (
            all(stat.S_ISREG(each.st_mode) for each in found)
            and [each.st_size for each in found] == [file.bytes for file in files]
            and all(os.access(path, os.R_OK) for path in paths)
        )
    except OSError:
        return False


def _holds(path: Path, content: bytes) -> bool:
    """Whether there is a file with this content. Whose it is is not known: no link is followed,
    and no more is read than there should be.
    """
    with os.fdopen(storage.open_own(path, os.O_RDONLY), "rb") as file:
        return (
            os.fstat(file.fileno()).st_size == len(content) and file.read(len(content)) == content
        )


def _place_index(index: Path, shared: Path, *, exclusive: bool) -> str:
    # The node's first rank chooses the folder for all.
    chosen = ""
    if dist.get_local_rank() == 0:
        chosen = claim_folder(shared) if exclusive else _own_cache(shared)
    folder = dist.all_gather_object(chosen)[dist.get_global_rank() - dist.get_local_rank()]
    incoming = _incoming(folder)
    _sweep(incoming)
    for name in ("manifest.json", "index.json"):
        # Ranks and jobs do this side by side, with the same bytes.
        whole = incoming / uuid.uuid4().hex
        whole.write_bytes((index / name).read_bytes())
        whole.replace(Path(folder, name))
    return folder


def _own_cache(shared: Path) -> str:
    """Return `shared`, made if need be, or a folder beside it for this user where it is somebody
    else's, or a link: whose it is could have our files written elsewhere.
    """
    shared.parent.mkdir(parents=True, exist_ok=True)
    for folder in (shared, shared.with_name(f"{shared.name}-user-{os.geteuid()}")):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if is_own_folder(folder):
            return str(folder)
        log.warning(
            "warning: %s belongs to another user, or is a link; what is fetched goes elsewhere",
            folder,
        )
    raise PermissionError(errno.EACCES, "the folders for this dataset in it belong to another user")


def _incoming(folder: str) -> Path:
    """Return the folder of what has not been checked yet, made if need be. Raises
    PermissionError if it is not ours.
    """
    _make_own(folder, INCOMING, *([UNITS] if os.path.lexists(Path(folder, UNITS)) else []))
    return Path(folder, INCOMING)


def _make_own(folder: str, *names: str) -> None:
    """Make these folders in a cache folder, if need be. Raise PermissionError unless they, and it,
    are ours: through a link, shards would be written, and deleted, elsewhere.
    """
    for path in (Path(folder), *(Path(folder, name) for name in names)):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        if not is_own_folder(path):
            raise PermissionError(errno.EACCES, f"{path} belongs to another user, or is a link")


def _download_index(remote: str, folder: str) -> Manifest:
    for name in ("manifest.json", "index.json"):
        source = f"{remote.rstrip('/')}/{name}"
        try:
            _download(source, Path(folder, name), at_most=MAX_INDEX_BYTES)
        except FileNotFoundError:
            raise ConfigError(
                f"{source}: there is none; check the address, and that the conversion has finished"
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
    manifest = read_manifest(folder)
    check_totals(remote, manifest, read_index(folder, manifest))
    return manifest


def _download(source: str, path: Path, *, at_most: int) -> None:
    """Raises BadShard if there is more than `at_most` bytes of it, ConfigError,
    FileNotFoundError, or what the store does.
    """
    if source.startswith("s3://") or not storage.is_url(source):
        found = storage.stat(source)
        if found is None:
            raise FileNotFoundError(f"{source}: there is no such file")
        if found.size > at_most:
            raise BadShard(f"{found.size:,} bytes long, must be {at_most:,} at most")
        storage.download(source, path, most=at_most)
    else:  # with the packages that StreamingDataset asks for
        CloudDownloader.direct_download(source, str(path))


def _sweep(incoming: Path) -> None:
    """Delete what killed jobs left half fetched."""
    for path in incoming.iterdir():
        if not ARRIVING.fullmatch(path.name):
            continue
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue  # another rank's sweep, or whole by now


class Shards(Stream):
    """A dataset's shards as StreamingDataset reads them. One that is not in the folder is fetched,
    checked, then put there.

    Upstream a shard is checked where it lies, so that a damaged one is taken for whole the next
    time, and `remote` makes StreamingDataset refuse the folders of other jobs, dead ones included:
    it is not told of one.
    """

    def __init__(self, dataset: Dataset, *, retries: int = 3, timeout: float = 60.0, **weight: Any):
        """`timeout` in seconds for each try; `weight` is at most one of proportion, repeat and
        choose.
        """
        super().__init__(local=dataset.folder, validate_hash=None, keep_zip=False, **weight)
        self.dataset = dataset
        self.files = {file.basename: file for file in dataset.files}
        self.numbers = {file.basename: number for number, file in enumerate(dataset.files)}
        # Which file was found whole under each shard's name, as `identify` has it; `Rows` shares it
        # among processes.
        self.whole: NDArray[np.uint64] = np.zeros((len(dataset.files), FIELDS), np.uint64)
        self.retries = retries
        self.timeout = timeout
        self.stop = threading.Event()

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Any]:  # noqa: ARG002
        """Return the shards' readers. They are made of what `read_index` has checked, not of
        index.json read once more.
        """
        form = column_form(self.dataset.manifest)
        return [
            ShardReader(
                self.local,
                self.split,
                form["column_encodings"],
                form["column_names"],
                form["column_sizes"],
                None,
                [HASH],
                FileInfo(file.basename, file.bytes, {HASH: file.hash}),
                file.rows,
                None,
                None,
            )
            for file in self.dataset.files
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stop": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "stop": threading.Event()}

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Called for a shard that is not there; returns its path. Raises DataError."""
        assert to_basename is None, "only the index has two names, and it is there"
        self.fetch(self.files[from_basename])
        return str(Path(self.local, from_basename))

    def fetch(self, file: ShardFile) -> None:
        """Put a whole shard, fetched anew, in its place. Raises DataError that says what was
        wrong the last time.
        """
        path = Path(self.local, file.basename)
        if self.dataset.remote is None:
            raise DataError(f"{path}: shard is missing; restore it from a copy, or convert again")
        source = f"{self.dataset.remote.rstrip('/')}/{file.basename}"
        for attempt in range(self.retries + 1):
            if attempt and self.stop.wait(min(2 ** (attempt - 1), 30)):
                break
            arrived = None
            try:
                arrived = _incoming(self.local) / uuid.uuid4().hex
                self._wait_for(functools.partial(_download, source, arrived, at_most=file.bytes))
                _make_own(self.local, UNITS, str(path.parent.relative_to(self.local)))
                self._note(file, arrived, moved_to=path)
                return
            except BadShard as problem:
                what, remedy = (
                    f"damaged shard: {problem}",
                    "put a good copy there, or convert again",
                )
            except Exception as error:  # every store's client has exceptions of its own
                what, remedy = (
                    f"shard cannot be fetched: {one_line(error)}",
                    "the same command goes on when it can be",
                )
            finally:
                if arrived is not None:
                    arrived.unlink(missing_ok=True)
        times = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise DataError(f"{source}: {what} (tried {times}); {remedy}")

    def _wait_for(self, download: Callable[[], None]) -> None:
        """Give up `download`, whatever its client thinks, when the time is over or the run ends."""
        result: concurrent.futures.Future[None] = concurrent.futures.Future()

        def work() -> None:
            try:
                download()
                result.set_result(None)
            except Exception as error:  # raised again in the thread that waits
                result.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        give_up = time.monotonic() + self.timeout
        while not self.stop.is_set() and (left := give_up - time.monotonic()) > 0:
            concurrent.futures.wait([result], timeout=min(left, 1.0))
            if result.done():
                return result.result()
        raise TimeoutError(
            f"not there after {self.timeout:g} seconds (train_data.download_timeout)"
        )

    def check(self, file: ShardFile) -> None:
        """Make sure that a shard in the folder is whole; a bad one is fetched again if it can
        be. Raises DataError.
        """
        path = Path(self.local, file.basename)
        try:
            self._note(file, path)
        except BadShard as problem:
            if self.dataset.remote is None:
                raise DataError(
                    f"{path}: damaged shard: {problem}; restore it from a copy, or convert again"
                ) from None
            # Else it has just made room for another, and is fetched when a row of it is read
            if path.exists():
                self.fetch(file)

    def _check_rows(self, path: Path, file: ShardFile) -> None:
        """Raise BadShard for rows that are not of the form. The hash does not rule it out: the
        index may be anybody's.
        """
        manifest = self.dataset.manifest
        Shard(
            path,
            num_rows=file.rows,
            context_length=manifest.context_length,
            token_dtype=manifest.token_dtype,
        ).count()

    def _note(self, file: ShardFile, path: Path, moved_to: Path | None = None) -> None:
        """Check a file and remember which one it was, after moving it to its place if that is
        another. Raises BadShard.
        """
        for _ in range(CHECKS):
            check_size(path, file)
            try:
                # A fifo would be waited for
                number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                opened = os.fdopen(number, "rb", buffering=0)
            except OSError as error:
                raise BadShard(f"cannot be read: {error.strerror}") from None
            with opened:
                before = os.fstat(opened.fileno())
                check_hash(path, file)
                self._check_rows(path, file)
                after = os.fstat(opened.fileno())
                if identify(after) != identify(before):
                    continue  # written to meanwhile
                if moved_to is not None:
                    # What is downloaded is for this user alone, and a cache may be for several
                    path.chmod(0o644)
                    path.replace(moved_to)
                    after = os.fstat(opened.fileno())  # a new name changes one of the times
                self.whole[self.numbers[file.basename]] = identify(after)
                return
        raise BadShard("is written to while it is read")
