"""Fetching of a remote dataset's files, with the client that StreamingDataset would use."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.s3_errors import TooLong


def fetch_file(source: str, path: Path, *, most: int, is_alone: bool = False) -> None:
    """Fetch a shard, an index or a manifest to `path`, where there must be no file yet.

    Local files and those in S3 are fetched by `files.download`, as everywhere else. For other
    stores StreamingDataset's clients are used, because users who train from them install the
    packages that StreamingDataset asks for, not those of fsspec. These clients write whatever a
    store sends. They can be stopped at `most` bytes only by a limit on all files of this process,
    which is set if `is_alone`: if the process writes no other file meanwhile.

    Raise TooLong for a file of more than `most` bytes, FileNotFoundError, or whatever a store's
    client raises.
    """
    if source.startswith("s3://"):
        try:
            files.download(source, path, most=most)  # it looks at the size first
        except TooLong as error:
            if error.size is None:
                raise
            raise _larger(error.size, most) from None
        except FileNotFoundError:
            raise FileNotFoundError(f"{source}: there is no such file") from None
        return
    if not is_url(source):
        found = files.stat(source)
        if found is None:
            raise FileNotFoundError(f"{source}: there is no such file")
        if found.size > most:
            raise _larger(found.size, most)
        files.download(source, path, most=most)
        return
    from streaming.base.storage import CloudDownloader

    with _no_file_larger_than(most) if is_alone else nullcontext():
        CloudDownloader.direct_download(source, str(path))


def _larger(size: int, most: int) -> TooLong:
    return TooLong(f"{size:,} bytes long, must be {most:,} at most", size)


@contextmanager
def _no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """Limit, in the body, the size of all files that this process writes."""
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
