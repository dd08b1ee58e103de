"""S3 as an fsspec filesystem on boto3, which StreamingDataset downloads with as well (s3fs and its
botocore do not agree).

Credentials and region are found as boto3 finds them; S3_ENDPOINT_URL, or AWS_ENDPOINT_URL, names
another S3 server. What the user has to put right is a ConfigError, what failed again and again a
`StoreError`: one line, within seconds.
"""

from __future__ import annotations

import errno
import functools
import io
import ipaddress
import itertools
import logging
import multiprocessing
import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem

from flame_composer.errors import ConfigError, StoreError, masked

Info = dict[str, Any]
log = logging.getLogger(__name__)

ATTEMPTS = 5  # for each request; botocore waits longer after each
CONNECT_SECONDS, READ_SECONDS = 5, 30  # READ_SECONDS without a byte fail an attempt
# A bucket's first request: who named a wrong endpoint is told within 15 seconds
FIRST_ATTEMPTS, FIRST_SECONDS = 2, 5
SINGLE_PUT = 256 << 20  # bytes; what is larger is sent in parts, several at a time
PART = 64 << 20
# A download is fetched in pieces of so many bytes, so many at a time
PIECE, PIECES = 8 << 20, 10
BLOCK = 1 << 20  # bytes of an answer read at a time
# S3 lists 1,000 names a page, and now and then none: not so often in a row, and not so many
IDLE_PAGES, MOST_PAGES, MOST_NAMES = 100, 50_000, 10_000_000

DENIED = {
    "403",
    "AccessDenied",
    "AllAccessDisabled",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
REDIRECTED = {
    "301",
    "302",
    "303",
    "307",
    "308",
    "PermanentRedirect",
    "Redirect",
    "TemporaryRedirect",
}
MISSING = {"404", "NoSuchKey", "NotFound"}
CHANGED = {"412", "PreconditionFailed"}


class S3FileSystem(AbstractFileSystem):
    """What `storage` needs of a filesystem. A file's `info` has its `version` (the ETag) and
    when it was `modified`.
    """

    protocol = "s3"
    cachable = False  # it holds nothing

    def info(self, path: str, **kwargs: Any) -> Info:
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        if key:
            try:
                return _head(path)
            except FileNotFoundError:
                pass
        with _explained(path) as client:
            below = client.list_objects_v2(
                Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1
            )
        if key and not below.get("KeyCount", 0):
            raise _missing(path)
        return _folder(path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
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
        """All files below `path` with a request per thousand, whatever folders they are in."""
        found = self.ls(path) if maxdepth == 1 else list(self._list(self._strip_protocol(path)))
        files = {info["name"]: info for info in found if withdirs or info["type"] == "file"}
        return files if detail else sorted(files)

    def _list(self, path: str, **options: Any) -> Iterator[Info]:
        bucket, key = _split(path)
        with _explained(path) as client:
            options = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", **options}
            for page in _pages(client, "list_objects_v2", path, **options):
                yield from (
                    _folder(f"{bucket}/{item['Prefix']}".rstrip("/"))
                    for item in page.get("CommonPrefixes", [])
                )
                for item in page.get("Contents", []):
                    # The mark of an empty folder, as some tools leave it
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
        assert mode == "rb", mode
        info = self.info(path)
        if info["type"] != "file":
            raise _missing(path)
        if kwargs.get("version") not in (None, info["version"]):
            raise StoreError(f"s3://{path}: has been replaced since it was looked at")
        file = _Ranges(path, info["size"], info["etag"])
        return file if block_size == 0 else io.BufferedReader(file, block_size or 8 << 20)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """Return the first `end` bytes of a file, or all of it; StoreError where that is more than
        `most` bytes.
        """
        assert not start
        return _fetch(self._strip_protocol(path), end=end, most=kwargs.get("most"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with _explained(path) as client:
            client.put_object(Bucket=bucket, Key=key, Body=value)

    def put_file(
        self, lpath: str, rpath: str, callback: Any = None, mode: str = "overwrite", **kwargs: Any
    ) -> None:
        from boto3.s3.transfer import TransferConfig

        path = self._strip_protocol(rpath)
        bucket, key = _split(path)
        config = TransferConfig(multipart_threshold=SINGLE_PUT, multipart_chunksize=PART)
        with _explained(path) as client:
            client.upload_file(str(lpath), bucket, key, Config=config)

    def get_file(
        self, rpath: str, lpath: str, callback: Any = None, outfile: Any = None, **kwargs: Any
    ) -> None:
        """Fetch a file, of which no byte more is taken than it was said to have."""
        path = self._strip_protocol(rpath)
        info = _head(path)
        size, etag, most = info["size"], info["etag"], kwargs.get("most")
        if most is not None and size > most:
            raise _too_long(path, most)
        free = shutil.disk_usage(Path(lpath).parent).free
        if size > free:
            raise StoreError(
                f"s3://{path}: its {size:,} bytes do not fit into {Path(lpath).parent}, where"
                f" {free:,} are free; make room there"
            )
        Path(lpath).write_bytes(b"")
        if size <= PIECE:  # whole, so that botocore compares the checksum, if there is one
            Path(lpath).write_bytes(_fetch(path, size=size, etag=etag))
            return

        def fetch(start: int) -> None:
            data = _fetch(path, start, min(start + PIECE, size), size=size, etag=etag)
            with Path(lpath).open("r+b") as file:
                file.seek(start)
                file.write(data)

        with ThreadPoolExecutor(PIECES) as pool:
            try:
                list(pool.map(fetch, range(0, size, PIECE)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        source, path = self._strip_protocol(path1), self._strip_protocol(path2)
        bucket, key = _split(path)
        with _explained(path) as client:
            client.copy(dict(zip(("Bucket", "Key"), _split(source), strict=True)), bucket, key)

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with _explained(path) as client:
            client.delete_object(Bucket=bucket, Key=key)

    def abort_uploads(self, path: str) -> None:
        """Give up what was sent of files below `path` that never got whole: invisible, but stored
        and paid for.

        Where that is not allowed, it is left to the bucket's own rules.
        """
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with suppress(ConfigError, StoreError), _explained(path) as client:
            options = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
            for page in _pages(client, "list_multipart_uploads", path, **options):
                for upload in page.get("Uploads", []):
                    client.abort_multipart_upload(
                        Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )


class _Ranges(io.RawIOBase):
    """A file of which only what is asked for is fetched; a StoreError if it is no longer the one
    that was opened.
    """

    def __init__(self, path: str, size: int, etag: str):
        super().__init__()
        self.path, self.size, self.etag, self.position = path, size, etag, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        )
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        if self.position >= end:
            return 0
        data = _fetch(self.path, self.position, end, size=self.size, etag=self.etag)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class _WrongAnswer(Exception):
    """What is wrong with an answer, in a few words. The next one may be right."""


def _fetch(
    path: str,
    start: int = 0,
    end: int | None = None,
    *,
    size: int | None = None,
    etag: str = "",
    most: int | None = None,
) -> bytes:
    """Return bytes `start` to `end` of an object, fewer only where it ends; all of it without
    `end`.

    `size` and `etag` are what was said of it before, if anything was. Raise StoreError if it is now
    another, if it has more than `most` bytes, and if the server does not send just what was asked
    for, however often it is asked.
    """
    from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError

    bucket, key = _split(path)
    options = {"IfMatch": etag} if etag else {}
    if end is not None:
        options["Range"] = f"bytes={start}-{end - 1}"
    with _explained(path) as client:
        for attempt in range(ATTEMPTS):
            is_last = attempt + 1 == ATTEMPTS
            answer = client.get_object(Bucket=bucket, Key=key, **options)
            try:  # botocore itself tries again only until an answer begins
                _require_same(path, etag, answer.get("ETag") or "")
                return _read(path, answer, start, end, size, most)
            except (HTTPClientError, IncompleteReadError, ResponseStreamingError):
                if is_last:
                    raise
            except _WrongAnswer as problem:
                if is_last:
                    raise StoreError(
                        f"s3://{path}: {client.meta.endpoint_url} {problem} (asked {ATTEMPTS}"
                        " times); put the file there again, or use a server that answers as S3 does"
                    ) from None
            finally:
                answer["Body"].close()  # what is left of it is not read
    raise AssertionError


def _require_same(path: str, etag: str, found: str) -> None:
    """Raise StoreError for an answer of another version, by a server that took no notice of
    `IfMatch`.
    """
    known, now = (tag.removeprefix("W/").strip('"') for tag in (etag, found))
    if known and now and known != now:
        raise StoreError(f"s3://{path}: was replaced while it was read")


def _read(
    path: str,
    answer: Any,
    start: int,
    end: int | None,
    size: int | None,
    most: int | None,
) -> bytes:
    """Return what an answer brings to what `_fetch` has asked for. Raise _WrongAnswer if that is
    not it, StoreError if no other answer can be hoped for.
    """
    announced = answer.get("ContentLength")  # None where it comes in chunks
    wanted = size if end is None else _length(path, answer, start, end, size)
    if wanted is None:
        wanted = announced
    elif announced not in (None, wanted):
        raise _WrongAnswer(f"sends {announced:,} bytes, must be {wanted:,}")
    if wanted is None and most is None:
        raise _WrongAnswer("does not say how many bytes it sends")
    if most is not None and wanted is not None and wanted > most:
        raise _too_long(path, most)
    blocks, num_bytes = [], 0
    while block := answer["Body"].read(BLOCK):
        blocks.append(block)
        num_bytes += len(block)
        if wanted is not None and num_bytes > wanted:
            raise _WrongAnswer(f"sends more than {wanted:,} bytes, must be as many")
        if most is not None and num_bytes > most:
            raise _too_long(path, most)
    if wanted is not None and num_bytes != wanted:
        raise _WrongAnswer(f"sends {num_bytes:,} bytes, must be {wanted:,}")
    return b"".join(blocks)


def _length(path: str, answer: Any, start: int, end: int, size: int | None) -> int:
    """Return how many bytes an answer has for the range from `start` to `end`."""
    if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
        announced = answer.get("ContentLength")
        # The whole of a file, where that is no more than was asked for
        if start == 0 and announced is not None and announced <= end and size in (None, announced):
            return int(announced)
        raise StoreError(
            f"s3://{path}: the server ignores ranges: it sends the whole file where bytes"
            f" {start}-{end - 1} were asked for; use one that answers them as S3 does, or copy the"
            " file to this machine"
        )
    said = str(answer.get("ContentRange") or "")
    match = re.fullmatch(r"bytes ([0-9]{1,20})-([0-9]{1,20})/([0-9]{1,20}|\*)", said)
    if match is None:
        raise _WrongAnswer(f"does not say which bytes it sends, of {start}-{end - 1}")
    first, last = int(match[1]), int(match[2])
    total = size if match[3] == "*" else int(match[3])
    wanted = end if total is None else min(end, total)
    if total is not None:  # some servers repeat what they were asked for, beyond the end
        last = min(last, total - 1)
    is_end = total is None and first <= last < end  # it may be
    if size not in (None, total) or first != start or not (last == wanted - 1 or is_end):
        of = "" if size is None else f" of {size:,}"
        raise _WrongAnswer(f"sends {said}, must be bytes {start}-{end - 1}{of}")
    return last - first + 1


def _too_long(path: str, most: int) -> StoreError:
    return StoreError(
        f"s3://{path}: has more than {most:,} bytes, which no such file has; put the right one"
        " there"
    )


def _head(path: str) -> Info:
    bucket, key = _split(path)
    with _explained(path) as client:
        head = client.head_object(Bucket=bucket, Key=key)
        return _file(
            path, head.get("ContentLength"), head.get("ETag", ""), head.get("LastModified")
        )


def _pages(client: Any, operation: str, path: str, **options: Any) -> Iterator[Any]:
    """Yield the pages of a listing. Raise StoreError for one that does not end."""
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


# Clients


_warned_of: set[str] = set()  # servers


def warn_if_readable(server: str) -> None:
    """Say once that what goes to a plain http address, unless it is this machine's own, can be
    read on the way.
    """
    address = urlsplit(server)
    host = (address.hostname or "").rstrip(".")
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost" or host.endswith(".localhost")
    is_first = os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None
    if address.scheme == "http" and not is_here and is_first and address.netloc not in _warned_of:
        _warned_of.add(address.netloc)
        log.warning(
            "warning: http://%s: is not encrypted: what is sent and fetched can be read and changed"
            " on the way; use an https:// address",
            address.netloc,
        )


_lock = threading.Lock()


def _connect(bucket: str) -> Any:
    """A client for which `bucket` has answered; made anew where the environment has changed, or
    after a fork.
    """
    environment = tuple(
        (name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith(("AWS_", "S3_"))
    )
    with _lock:  # making clients is not thread-safe, using them is
        return _client(bucket, os.getpid(), environment)


@functools.lru_cache(maxsize=8)
def _client(bucket: str, pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    from boto3 import Session
    from botocore.config import Config
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        NoCredentialsError,
    )
    from botocore.parsers import ResponseParserError

    endpoint = os.environ.get("S3_ENDPOINT_URL") or None

    def make(attempts: int, connect: float, read: float) -> Any:
        retries: Any = {"mode": "standard", "total_max_attempts": attempts}
        config = Config(
            retries=retries, connect_timeout=connect, read_timeout=read, max_pool_connections=32
        )
        client = session.client("s3", endpoint_url=endpoint, config=config)
        client.meta.events.register("before-call.s3.HeadBucket", _stay)
        return client

    try:
        session = Session()
        first = make(FIRST_ATTEMPTS, FIRST_SECONDS, FIRST_SECONDS)
        warn_if_readable(first.meta.endpoint_url)
        try:
            first.list_objects_v2(Bucket=bucket, MaxKeys=1)
        except ClientError as error:
            # Who may not list the bucket may read or write in it all the same
            if _code(error) != "AccessDenied":
                raise _why(error, bucket, first) from None
        except (ConnectionError, HTTPClientError, NoCredentialsError) as error:
            raise _why(error, bucket, first, ConfigError) from None
        return make(ATTEMPTS, CONNECT_SECONDS, READ_SECONDS)
    # A profile, a name or an endpoint that cannot be, or an answer that is none of S3
    except (BotoCoreError, ResponseParserError, ValueError) as error:
        if isinstance(error, (ConfigError, StoreError)):
            raise
        raise ConfigError(f"s3://{bucket}: {_line(error)}") from None


def _stay(params: dict[str, Any], **_: Any) -> None:
    """Have one HeadBucket request not be redirected.

    botocore 1.44 asks by it for a bucket's region when a server redirects. Where that is redirected
    as well, and names no region, it asks again, until Python's stack is full.
    """
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


@contextmanager
def _explained(path: str) -> Iterator[Any]:
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    client = _connect(_split(path)[0])
    try:
        yield client
    except S3UploadFailedError as error:
        cause = error.__context__
        raise _why(cause if isinstance(cause, Exception) else error, path, client) from None
    except (BotoCoreError, ClientError) as error:
        raise _why(error, path, client) from None
    except (ConfigError, StoreError):
        raise
    # What botocore makes of sizes, dates and XML that are none
    except (ResponseParserError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(
            f"s3://{path}: {client.meta.endpoint_url} answers otherwise than S3 does:"
            f" {_line(error)}; check S3_ENDPOINT_URL"
        ) from None


def _why(
    error: Exception, path: str, client: Any, failed: type[Exception] = StoreError
) -> Exception:
    from botocore.exceptions import (
        ClientError,
        ConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    place, bucket, server = f"s3://{path}", _split(path)[0], client.meta.endpoint_url
    code = _code(error) if isinstance(error, ClientError) else ""
    if code == "NoSuchBucket":
        return ConfigError(
            f"{place}: there is no bucket '{bucket}' at {server}; check its name, or create it"
        )
    if code in REDIRECTED and isinstance(error, ClientError):
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        target = headers.get("location", "")
        where = f" to {masked(target)[:200]}" if target else ""
        return ConfigError(
            f"{place}: {server} redirects{where}, and is not followed there with credentials; set"
            " S3_ENDPOINT_URL to the address that answers, or AWS_DEFAULT_REGION to the bucket's"
            " region"
        )
    if code in MISSING:
        return _missing(path)
    if code in DENIED:
        return ConfigError(
            f"{place}: access denied by {server} ({code}); check the credentials and what they"
            " allow"
        )
    if code in CHANGED:
        return StoreError(f"{place}: was replaced while it was read")
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return ConfigError(
            f"{place}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
            " AWS_PROFILE"
        )
    if isinstance(error, (ConnectionError, HTTPClientError)):
        hint = "; check the network and S3_ENDPOINT_URL" if failed is ConfigError else ""
        return failed(f"{place}: {server} cannot be reached: {_line(error)}{hint}")
    return failed(f"{place}: {_line(error)}")


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"s3://{path}")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _line(error: Exception) -> str:
    line = masked(re.sub(r'( on| to the)? endpoint URL: "[^"]*"', "", " ".join(str(error).split())))
    return line.rstrip(".")[:200] or type(error).__name__


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key


def _file(path: str, size: Any, etag: str, modified: Any) -> Info:
    is_size, is_date = isinstance(size, int) and size >= 0, isinstance(modified, datetime)
    if not is_size or not is_date:
        what = "size" if is_date else "date" if is_size else "size and date"
        raise StoreError(
            f"s3://{path}: the store does not tell its {what}, as S3 does; check S3_ENDPOINT_URL"
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
    return {"name": path, "size": 0, "type": "directory"}
