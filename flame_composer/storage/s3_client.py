"""Clients of S3, each tried on its bucket before use, that raise our own errors.

boto3 finds the credentials and the region as usual; S3_ENDPOINT_URL, or AWS_ENDPOINT_URL, names
another S3 server. A mistake that the user has to correct raises ConfigError; a request that failed
in all its attempts raises StoreError. Both are one line, and come within seconds.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flame_composer.errors import ConfigError, StoreError
from flame_composer.storage.plain_http import warn_if_readable
from flame_composer.storage.s3_errors import code_of, explain, line_of

ATTEMPTS = 5  # for each request; botocore waits longer after each
CONNECT_SECONDS, READ_SECONDS = 5, 30  # an attempt fails after READ_SECONDS without a byte
# For the first request to a bucket, so that a wrong endpoint is reported within 15 seconds.
FIRST_ATTEMPTS, FIRST_SECONDS = 2, 5
MOST_ANSWER = 64 << 20  # bytes; a page of a listing has some 5 MB at most

_locks: dict[int, threading.Lock] = {}  # by process


def connect(bucket: str) -> Any:
    """Return a client that has had an answer from `bucket`.

    Clients are cached. A new one is made after a fork, or if the environment has changed.
    """
    environment = tuple(
        (name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith(("AWS_", "S3_"))
    )
    # Using clients is thread-safe, making them is not. A process that is forked has a lock of its
    # own: another thread, which is not in it, may hold its parent's at that moment.
    with _locks.setdefault(os.getpid(), threading.Lock()):
        return _client(bucket, os.getpid(), environment)


def limit_answers() -> None:
    """Make botocore read at most MOST_ANSWER bytes of an answer that it reads as a whole.

    Upstream: botocore 1.44, `AWSResponse.content`.
    Mends: it takes all that a server sends into memory, until the system ends the process.
    """
    from botocore.awsrequest import AWSResponse

    def content(self: Any) -> bytes:
        if self._content is None:
            parts, length = [], 0
            for part in self.raw.stream():
                parts.append(part)
                length += len(part)
                if length > MOST_ANSWER:
                    self.raw.close()
                    raise OSError(f"an answer of more than {MOST_ANSWER:,} bytes")
            self._content = b"".join(parts)
        return self._content

    AWSResponse.content = property(content)  # type: ignore[assignment]


@functools.lru_cache(maxsize=8)
def _client(bucket: str, pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """Return a client tried on `bucket`; `pid` and `environment` only distinguish cached ones."""
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

    limit_answers()
    endpoint = os.environ.get("S3_ENDPOINT_URL") or None

    def make(attempts: int, connect_seconds: float, read_seconds: float) -> Any:
        config = Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=connect_seconds,
            read_timeout=read_seconds,
            max_pool_connections=32,
        )
        client = session.client("s3", endpoint_url=endpoint, config=config)
        client.meta.events.register("before-call.s3.HeadBucket", _stay)
        return client

    try:
        session = Session()
        first = make(FIRST_ATTEMPTS, FIRST_SECONDS, FIRST_SECONDS)
        server = first.meta.endpoint_url
        warn_if_readable(server)
        try:
            first.list_objects_v2(Bucket=bucket, MaxKeys=1)
        except ClientError as error:
            # A user who may not list the bucket may still be allowed to read or write in it.
            if code_of(error) != "AccessDenied":
                raise explain(error, bucket, server) from None
        except (ConnectionError, HTTPClientError, NoCredentialsError) as error:
            raise explain(error, bucket, server, ConfigError) from None
        return make(ATTEMPTS, CONNECT_SECONDS, READ_SECONDS)
    # An invalid profile, bucket name or endpoint, or an answer that S3 would not give.
    except (BotoCoreError, ResponseParserError, ValueError) as error:
        if isinstance(error, (ConfigError, StoreError)):
            raise
        raise ConfigError(f"s3://{bucket}: {line_of(error)}") from None


def _stay(params: dict[str, Any], **_: Any) -> None:
    """Keep a HeadBucket request from being redirected.

    Upstream: botocore 1.44, `S3RegionRedirectorv2`.
    Mends: it sends HeadBucket to learn a bucket's region when a server redirects. If that is
    redirected as well, and no region is named, it asks again until Python's stack is full.
    """
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


@contextmanager
def explained(path: str) -> Iterator[Any]:
    """Yield a client for the bucket of `path`; raise its errors as our own types."""
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    client = connect(split(path)[0])
    server = client.meta.endpoint_url
    try:
        yield client
    except S3UploadFailedError as error:
        cause = error.__context__
        raise explain(cause if isinstance(cause, Exception) else error, path, server) from None
    except (BotoCoreError, ClientError) as error:
        raise explain(error, path, server) from None
    except (ConfigError, StoreError):
        raise
    # botocore raises these for malformed sizes, dates and XML.
    except (ResponseParserError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(
            f"s3://{path}: {server} does not answer as S3 does:"
            f" {line_of(error)}; check S3_ENDPOINT_URL"
        ) from None


def split(path: str) -> tuple[str, str]:
    """Return the bucket and the key of a path."""
    bucket, _, key = path.partition("/")
    return bucket, key
