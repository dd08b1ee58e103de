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
import logging
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
                with _explained(path) as client:
                    head = client.head_object(Bucket=bucket, Key=key)
                return _file(
                    path, head["ContentLength"], head.get("ETag", ""), head["LastModified"]
                )
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
            pages = client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=bucket, Prefix=f"{key}/" if key else "", **options):
                yield from (
                    _folder(f"{bucket}/{item['Prefix']}".rstrip("/"))
                    for item in page.get("CommonPrefixes", [])
                )
                for item in page.get("Contents", []):
                    # The mark of an empty folder, as some tools leave it
                    if not item["Key"].endswith("/"):
                        yield _file(
                            f"{bucket}/{item['Key']}",
                            item["Size"],
                            item.get("ETag", ""),
                            item["LastModified"],
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
        assert not start
        options = {} if end is None else {"Range": f"bytes=0-{end - 1}"}
        return _fetch(self._strip_protocol(path), **options)

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
        from boto3.exceptions import RetriesExceededError
        from boto3.s3.transfer import TransferConfig

        path = self._strip_protocol(rpath)
        bucket, key = _split(path)
        config = TransferConfig(num_download_attempts=1)
        with _explained(path) as client:
            for attempt in range(ATTEMPTS):
                moved: list[int] = []
                try:
                    client.download_file(
                        bucket, key, str(lpath), Config=config, Callback=moved.append
                    )
                    return
                except RetriesExceededError as error:
                    # An answer that broke off is asked for again. One that never began was, by
                    # botocore.
                    if attempt + 1 == ATTEMPTS or not moved:
                        raise error.last_exception from None

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
            for page in client.get_paginator("list_multipart_uploads").paginate(
                Bucket=bucket, Prefix=f"{key}/" if key else ""
            ):
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
        self.path, self.size, self.position = path, size, 0
        self.condition = {"IfMatch": etag} if etag else {}

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
        data = _fetch(self.path, **self.condition, Range=f"bytes={self.position}-{end - 1}")
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _fetch(path: str, **options: str) -> bytes:
    from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError

    bucket, key = _split(path)
    with _explained(path) as client:
        for attempt in range(ATTEMPTS):
            body = client.get_object(Bucket=bucket, Key=key, **options)["Body"]
            try:  # botocore itself tries again only until an answer begins
                return body.read()
            except (HTTPClientError, IncompleteReadError, ResponseStreamingError):
                if attempt + 1 == ATTEMPTS:
                    raise
    raise AssertionError


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
    except (BotoCoreError, ValueError) as error:  # a profile, a name or an endpoint that cannot be
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

    client = _connect(_split(path)[0])
    try:
        yield client
    except S3UploadFailedError as error:
        cause = error.__context__
        raise _why(cause if isinstance(cause, Exception) else error, path, client) from None
    except (BotoCoreError, ClientError) as error:
        raise _why(error, path, client) from None


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


def _file(path: str, size: int, etag: str, modified: Any) -> Info:
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
