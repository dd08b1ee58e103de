"""Files of a remote dataset, fetched by the client that StreamingDataset would take."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from flame_composer.errors import StoreError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url


class TooLong(StoreError):
    """A file of more bytes than it may have."""


def fetch_file(source: str, path: Path, *, most: int, is_alone: bool = False) -> None:
    """Fetch a shard, an index or a manifest to `path`, where no file may be yet.

    Local files and those in S3 are fetched by `files.download`, as everywhere. Other stores are
    not: to train from them, users install the packages that StreamingDataset asks for, not those of
    fsspec. StreamingDataset's clients write whatever a store sends. They are stopped at `most`
    bytes only if `is_alone`, when this process writes no other file meanwhile: the limit holds for
    all its files.

    Raise TooLong for a file of more than `most` bytes, FileNotFoundError, or whatever a store's
    client raises.
    """
    if source.startswith("s3://") or not is_url(source):
        found = files.stat(source)
        if found is None:
            raise FileNotFoundError(f"{source}: there is no such file")
        if found.size > most:
            raise TooLong(f"{found.size:,} bytes long, must be {most:,} at most")
        files.download(source, path, most=most)
        return
    from streaming.base.storage import CloudDownloader

    with _no_file_larger_than(most) if is_alone else nullcontext():
        CloudDownloader.direct_download(source, str(path))


@contextmanager
def _no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """Have the system refuse to let this process write files beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = num_bytes if soft == resource.RLIM_INFINITY else min(num_bytes, soft)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise TooLong(f"longer than the {num_bytes:,} bytes it may have") from None
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
