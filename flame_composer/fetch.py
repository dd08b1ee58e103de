"""Fetching a remote dataset into a cache folder: its index, then its shards, none of it trusted before it is checked."""

from __future__ import annotations

import concurrent.futures
import functools
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.utils import dist
from streaming import Stream
from streaming.base.storage import CloudDownloader
from streaming.base.world import World

from flame_composer import storage
from flame_composer.config import ConfigError, DataError, one_line
from flame_composer.inspection import BadShard, check_hash, check_size
from flame_composer.machine import claim_folder
from flame_composer.manifest import Manifest, ShardFile, check_totals, read_index, read_manifest
from flame_composer.reader import ShardReader

INCOMING = "incoming"  # the folder, within a dataset's cache folder, of what has not been checked yet
MAX_INDEX_BYTES = 1 << 30  # some 3 million shards
INDEX_TRIES = 3
STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class Dataset:
    """A dataset fit for training: `folder` holds it, or the part of `remote` that has been downloaded so far."""

    folder: str
    remote: str | None
    manifest: Manifest
    files: list[ShardFile]

    @property
    def place(self) -> str:
        return self.remote or self.folder


def fetch_index(remote: str, cache: Path, *, exclusive: bool) -> str:
    """Download manifest.json and index.json of a remote dataset into its cache folder, and return that folder.

    The folder is named after the index, so that another dataset put under the same address never meets the old one's
    shards. Jobs of one machine share it: a shard appears in it whole. With `exclusive`, for a job that deletes shards to
    keep within a limit, it is a folder of the job's own, which a later job takes over.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for tries_left in reversed(range(INDEX_TRIES)):
            try:
                manifest = _download_index(remote, temporary)
                break
            except DataError as problem:
                if tries_left == 0:
                    raise type(problem)(str(problem).replace(temporary, remote.rstrip("/"))) from None
        try:
            return _place_index(Path(temporary), cache / manifest.index_sha256[:16], exclusive=exclusive)
        except OSError as error:
            raise ConfigError(f"{cache}: cannot be written to: {error.strerror}; set local to a folder that can, on a disk "
                              "with space") from None


def _place_index(index: Path, shared: Path, *, exclusive: bool) -> str:
    folder = str(shared)
    if exclusive:
        # The node's first rank claims it for all.
        claimed = claim_folder(shared) if dist.get_local_rank() == 0 else ""
        folder = dist.all_gather_object(claimed)[dist.get_global_rank() - dist.get_local_rank()]
    incoming = Path(folder, INCOMING)
    incoming.mkdir(parents=True, exist_ok=True)
    _sweep(incoming)
    for name in ("manifest.json", "index.json"):
        # Ranks and jobs do this side by side, with the same bytes.
        whole = incoming / uuid.uuid4().hex
        whole.write_bytes((index / name).read_bytes())
        whole.replace(Path(folder, name))
    return folder


def _download_index(remote: str, folder: str) -> Manifest:
    for name in ("manifest.json", "index.json"):
        source = f"{remote.rstrip('/')}/{name}"
        try:
            _download(source, Path(folder, name), at_most=MAX_INDEX_BYTES)
        except FileNotFoundError:
            raise ConfigError(f"{source}: there is none; check the address, and that the conversion has finished") from None
        except BadShard as problem:
            raise ConfigError(f"{source}: {problem}") from None
        except (ConfigError, DataError):
            raise
        except Exception as error:  # every store's client has exceptions of its own
            raise ConfigError(f"{source}: cannot be read: {one_line(error)}; check the address, the credentials and that "
                              "the conversion has finished") from None
    manifest = read_manifest(folder)
    check_totals(remote, manifest, read_index(folder, manifest))
    return manifest


def _download(source: str, path: Path, *, at_most: int) -> None:
    """Raises BadShard if there is more than `at_most` bytes of it, ConfigError, FileNotFoundError, or what the store does."""
    if source.startswith("s3://") or not storage.is_url(source):
        found = storage.stat(source)
        if found is None:
            raise FileNotFoundError(f"{source}: there is no such file")
        if found.size > at_most:
            raise BadShard(f"{found.size:,} bytes long, must be {at_most:,} at most")
        storage.download(source, path)
    else:  # with the packages that StreamingDataset asks for
        CloudDownloader.direct_download(source, str(path))


def _sweep(incoming: Path) -> None:
    """Delete what killed jobs left half fetched."""
    for path in incoming.iterdir():
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue  # another rank's sweep, or whole by now


class Shards(Stream):
    """A dataset's shards as StreamingDataset reads them. One that is not in the folder is fetched, checked, then put there.

    Upstream a shard is checked where it lies, so that a damaged one is taken for whole the next time, and `remote` makes
    StreamingDataset refuse the folders of other jobs, dead ones included: it is not told of one.
    """

    def __init__(self, dataset: Dataset, *, retries: int = 3, timeout: float = 60.0, **weight: Any):
        """`timeout` in seconds for each try; `weight` is at most one of proportion, repeat and choose."""
        super().__init__(local=dataset.folder, validate_hash=None, keep_zip=False, **weight)
        self.dataset = dataset
        self.files = {file.basename: file for file in dataset.files}
        self.retries = retries
        self.timeout = timeout
        self.stop = threading.Event()

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Any]:
        readers = super().get_shards(world, allow_unsafe_types)
        for reader in readers:
            reader.__class__ = ShardReader
        return readers

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
        """Put a whole shard, fetched anew, in its place. Raises DataError that says what was wrong the last time."""
        path = Path(self.local, file.basename)
        if self.dataset.remote is None:
            raise DataError(f"{path}: shard is missing; restore it from a copy, or convert again")
        source = f"{self.dataset.remote.rstrip('/')}/{file.basename}"
        for attempt in range(self.retries + 1):
            if attempt and self.stop.wait(min(2 ** (attempt - 1), 30)):
                break
            arrived = Path(self.local, INCOMING, uuid.uuid4().hex)
            try:
                self._wait_for(functools.partial(_download, source, arrived, at_most=file.bytes))
                check_size(arrived, file)
                check_hash(arrived, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                arrived.replace(path)
                return
            except BadShard as problem:
                what, remedy = f"damaged shard: {problem}", "put a good copy there, or convert again"
            except Exception as error:  # every store's client has exceptions of its own
                what, remedy = f"shard cannot be fetched: {one_line(error)}", "the same command goes on when it can be"
            finally:
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
        raise TimeoutError(f"not there after {self.timeout:g} seconds (train_data.download_timeout)")

    def check(self, file: ShardFile) -> None:
        """Make sure that a shard in the folder is whole; a bad one is fetched again if it can be. Raises DataError."""
        path = Path(self.local, file.basename)
        try:
            check_size(path, file)
            check_hash(path, file)
        except BadShard as problem:
            if self.dataset.remote is None:
                raise DataError(f"{path}: damaged shard: {problem}; restore it from a copy, or convert again") from None
            if path.exists():  # else it has just made room for another, and is fetched when a row of it is read
                self.fetch(file)
