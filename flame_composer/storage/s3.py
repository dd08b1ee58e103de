"""S3 as an fsspec filesystem on top of boto3.

boto3 is what StreamingDataset downloads with. s3fs would be the usual choice, but it needs a
version of botocore that conflicts with boto3's.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from flame_composer.errors import ConfigError, StoreError
from flame_composer.storage.local import require_room
from flame_composer.storage.s3_client import explained, split
from flame_composer.storage.s3_errors import missing, too_long
from flame_composer.storage.s3_read import Ranges, fetch

Info = dict[str, Any]

SINGLE_PUT = 256 << 20  # bytes; larger files are sent in parts, several at a time
PART = 64 << 20
# Bytes of a piece of a download, and pieces fetched at a time
PIECE, PIECES = 8 << 20, 10
# S3 lists 1,000 names a page, and now and then an empty page. A listing with more empty pages in a
# row, more pages or more names than these is taken to be endless.
IDLE_PAGES, MOST_PAGES, MOST_NAMES = 100, 50_000, 10_000_000


class S3FileSystem(AbstractFileSystem):
    """The parts of a filesystem for S3 that `storage` needs.

    The `info` of a file has its `version` (the ETag) and the time at which it was `modified`.
    """

    protocol = "s3"
    cachable = False  # it has no state worth caching

    def info(self, path: str, **kwargs: Any) -> Info:
        """Return the `info` of a file, or of a folder that has files in it.

        Raise FileNotFoundError if there is neither.
        """
        path = self._strip_protocol(path)
        bucket, key = split(path)
        if key:
            try:
                return _head(path)
            except FileNotFoundError:
                pass
        with explained(path) as client:
            below = client.list_objects_v2(
                Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1
            )
        if key and not below.get("KeyCount", 0):
            raise missing(path)
        return _folder(path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """Return the files and folders directly in a folder."""
        found = list(self._list(self._strip_protocol(path), Delimiter="/"))
        return found if detail else [info["name"] for info in found]

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return all files below `path`, at any depth, with one request per thousand files."""
        found = self.ls(path) if maxdepth == 1 else list(self._list(self._strip_protocol(path)))
        files = {info["name"]: info for info in found if withdirs or info["type"] == "file"}
        return files if detail else sorted(files)

    def scan(self, path: str) -> Iterator[Info]:
        """Yield the files below `path`, at any depth, sorted, while the listing goes on."""
        return self._list(self._strip_protocol(path))

    def _list(self, path: str, **options: Any) -> Iterator[Info]:
        """Yield all files below a folder; with a `Delimiter`, only its direct files and folders."""
        bucket, key = split(path)
        with explained(path) as client:
            prefix = f"{key}/" if key else ""
            for page in _pages(
                client, "list_objects_v2", path, Bucket=bucket, Prefix=prefix, **options
            ):
                yield from (
                    _folder(f"{bucket}/{item['Prefix']}".rstrip("/"))
                    for item in page.get("CommonPrefixes", [])
                )
                for item in page.get("Contents", []):
                    # Some tools create a key that ends with a slash to mark an empty folder.
                    if not item["Key"].endswith("/"):
                        yield _file(
                            f"{bucket}/{item['Key']}",
                            item.get("Size"),
                            item.get("ETag", ""),
                            item.get("LastModified"),
                        )

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any
    ) -> Any:
        """Open a file for reading; with `block_size` 0, fetch just what is asked for.

        Raise StoreError if it is not of the requested `version`, or is replaced while it is read.
        """
        assert mode == "rb", mode
        info = self.info(path)
        if info["type"] != "file":
            raise missing(path)
        if kwargs.get("version") not in (None, info["version"]):
            raise StoreError(f"s3://{path}: has been replaced since it was looked at")
        file = Ranges(path, info["size"], info["etag"])
        return file if block_size == 0 else io.BufferedReader(file, block_size or 8 << 20)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """Return the first `end` bytes of a file, or all of it.

        Raise StoreError if that is more than `most` bytes.
        """
        assert not start
        return fetch(self._strip_protocol(path), end=end, most=kwargs.get("most"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Write `value` to a file."""
        path = self._strip_protocol(path)
        bucket, key = split(path)
        with explained(path) as client:
            client.put_object(Bucket=bucket, Key=key, Body=value)

    def put_file(
        self, lpath: str, rpath: str, callback: Any = None, mode: str = "overwrite", **kwargs: Any
    ) -> None:
        """Upload a local file, in several parts at a time if it is large."""
        from boto3.s3.transfer import TransferConfig

        path = self._strip_protocol(rpath)
        bucket, key = split(path)
        config = TransferConfig(multipart_threshold=SINGLE_PUT, multipart_chunksize=PART)
        with explained(path) as client:
            client.upload_file(str(lpath), bucket, key, Config=config)

    def get_file(
        self, rpath: str, lpath: str, callback: Any = None, outfile: Any = None, **kwargs: Any
    ) -> None:
        """Download a file, but never more bytes than the store says that it has.

        Raise StoreError if it has more than `most` bytes, or more than the disk has free.
        """
        path = self._strip_protocol(rpath)
        info = _head(path)
        size, etag, most = info["size"], info["etag"], kwargs.get("most")
        if most is not None and size > most:
            raise too_long(path, most, size)
        require_room(f"s3://{path}", size, Path(lpath).parent)
        Path(lpath).write_bytes(b"")
        if size <= PIECE:  # as a whole: botocore compares the checksum, if there is one
            Path(lpath).write_bytes(fetch(path, size=size, etag=etag))
            return

        def fetch_piece(start: int) -> None:
            data = fetch(path, start, min(start + PIECE, size), size=size, etag=etag)
            with Path(lpath).open("r+b") as file:
                file.seek(start)
                file.write(data)

        with ThreadPoolExecutor(PIECES) as pool:
            try:
                list(pool.map(fetch_piece, range(0, size, PIECE)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy a file within the store."""
        path = self._strip_protocol(path2)
        from_bucket, from_key = split(self._strip_protocol(path1))
        bucket, key = split(path)
        with explained(path) as client:
            client.copy({"Bucket": from_bucket, "Key": from_key}, bucket, key)

    def rm_file(self, path: str) -> None:
        """Delete a file; do nothing if it does not exist."""
        path = self._strip_protocol(path)
        bucket, key = split(path)
        with explained(path) as client:
            client.delete_object(Bucket=bucket, Key=key)

    def abort_uploads(self, path: str) -> None:
        """Abort the uploads below `path` that were never completed.

        Their parts are invisible, but are stored and paid for. If the user is not allowed to abort
        them, they are left to the bucket's lifecycle rules.
        """
        path = self._strip_protocol(path)
        bucket, key = split(path)
        with suppress(ConfigError, StoreError), explained(path) as client:
            prefix = f"{key}/" if key else ""
            for page in _pages(
                client, "list_multipart_uploads", path, Bucket=bucket, Prefix=prefix
            ):
                for upload in page.get("Uploads", []):
                    client.abort_multipart_upload(
                        Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )


def _head(path: str) -> Info:
    """Return the `info` of a file."""
    bucket, key = split(path)
    with explained(path) as client:
        head = client.head_object(Bucket=bucket, Key=key)
        return _file(
            path, head.get("ContentLength"), head.get("ETag", ""), head.get("LastModified")
        )


def _pages(client: Any, operation: str, path: str, **options: Any) -> Iterator[Any]:
    """Yield the pages of a listing; raise StoreError if it does not end."""
    from botocore.exceptions import PaginationError

    seen: set[int] = set()
    num_idle = 0
    pages = iter(client.get_paginator(operation).paginate(**options))
    for number in itertools.count(1):
        what = ""
        try:
            page = next(pages)
        except StopIteration:
            return
        except PaginationError:
            page, what = {}, "repeats a page"
        yield page
        before = len(seen)
        for kind in ("Contents", "CommonPrefixes", "Uploads"):
            for item in page.get(kind, []):
                seen.add(hash((item.get("Key"), item.get("Prefix"), item.get("UploadId"))))
        num_idle = 0 if len(seen) > before else num_idle + 1
        if num_idle >= IDLE_PAGES and not what:
            what = f"has nothing new in {IDLE_PAGES} pages"
        elif number >= MOST_PAGES or len(seen) >= MOST_NAMES:
            what = f"goes on after {number:,} pages with {len(seen):,} names"
        if not what:
            continue
        raise StoreError(
            f"s3://{path}: the listing of {client.meta.endpoint_url} {what}, and does not end;"
            " name a folder with fewer files, or use a server that lists as S3 does"
        )


def _file(path: str, size: Any, etag: str, modified: Any) -> Info:
    """Return the `info` of a file.

    Raise StoreError if the store does not report its size and date.
    """
    is_size, is_date = isinstance(size, int) and size >= 0, isinstance(modified, datetime)
    if not is_size or not is_date:
        what = "size" if is_date else "date" if is_size else "size and date"
        raise StoreError(
            f"s3://{path}: the store does not report its {what}, as S3 does; check S3_ENDPOINT_URL"
        )
    return {
        "name": path,
        "size": size,
        "type": "file",
        "modified": modified.timestamp(),
        "etag": etag,
        "version": etag.strip('"') or modified.isoformat(),
    }


def _folder(path: str) -> Info:
    """Return the `info` of a folder."""
    return {"name": path, "size": 0, "type": "directory"}
