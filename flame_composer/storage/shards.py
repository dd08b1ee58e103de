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
    """Fetch a shard, an index or a manifest to `path`, where there must be no file yet.

    S3 and local files are read as everywhere (`files.download`). Other stores are not: training
    from them takes the packages that StreamingDataset asks for, not those that fsspec does. Its
    clients write whatever comes. They can be stopped at `most` bytes only `is_alone`: where this
    process writes no other file meanwhile, for the limit holds for all of them.

    Raise TooLong for more than `most` bytes, FileNotFoundError, or what the store's client does.
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
            raise TooLong(f"more than {num_bytes:,} bytes long, must be that at most") from None
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
