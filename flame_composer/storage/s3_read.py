"""Reading of bytes from objects in S3, with checks that they are the requested ones."""

from __future__ import annotations

import io
import re
from typing import Any

from flame_composer.errors import StoreError
from flame_composer.storage import s3_client
from flame_composer.storage.s3_client import explained, split
from flame_composer.storage.s3_errors import too_long

BLOCK = 1 << 20  # bytes of an answer read at a time


class Ranges(io.RawIOBase):
    """A file in S3 of which only the bytes that are read are fetched.

    Reading raises StoreError if the file is no longer the one that was opened.
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
        data = fetch(self.path, self.position, end, size=self.size, etag=self.etag)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class _WrongAnswer(Exception):
    """The error for a wrong answer, after which asking again may help."""


def fetch(
    path: str,
    start: int = 0,
    end: int | None = None,
    *,
    size: int | None = None,
    etag: str = "",
    most: int | None = None,
) -> bytes:
    """Return bytes `start` to `end` (exclusive) of an object, or all of it without `end`.

    Fewer bytes are returned only if the object ends before `end`. `size` and `etag` are those that
    the store reported earlier, if it did. Raise StoreError if the object has been replaced since,
    if it has more than `most` bytes, or if the server does not send exactly what was asked for in
    any of several attempts.
    """
    from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError

    bucket, key = split(path)
    options = {"IfMatch": etag} if etag else {}
    if end is not None:
        options["Range"] = f"bytes={start}-{end - 1}"
    with explained(path) as client:
        for attempt in range(s3_client.ATTEMPTS):
            is_last = attempt + 1 == s3_client.ATTEMPTS
            answer = client.get_object(Bucket=bucket, Key=key, **options)
            try:  # botocore does not retry once an answer has begun
                _require_same(path, etag, answer.get("ETag") or "")
                return _read(path, answer, start, end, size, most)
            except (HTTPClientError, IncompleteReadError, ResponseStreamingError):
                if is_last:
                    raise
            except _WrongAnswer as problem:
                if is_last:
                    raise StoreError(
                        f"s3://{path}: {client.meta.endpoint_url} {problem} (asked"
                        f" {s3_client.ATTEMPTS} times); put the file there again, or use a server"
                        " that answers as S3 does"
                    ) from None
            finally:
                answer["Body"].close()  # without reading the rest
    raise AssertionError


def _require_same(path: str, etag: str, found: str) -> None:
    """Raise StoreError if the answer is of another version of the object.

    This happens with servers that ignore `IfMatch`.
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
    """Return the bytes of an answer to a request of `fetch`.

    Raise _WrongAnswer if they are not what was asked for, and StoreError if asking again cannot
    help.
    """
    announced = answer.get("ContentLength")  # None if it is sent in chunks
    wanted = size if end is None else _length(path, answer, start, end, size)
    if wanted is None:
        wanted = announced
    elif announced not in (None, wanted):
        raise _WrongAnswer(f"sends {announced:,} bytes, must be {wanted:,}")
    if wanted is None and most is None:
        raise _WrongAnswer("does not say how many bytes it sends")
    if most is not None and wanted is not None and wanted > most:
        raise too_long(path, most)
    blocks, num_bytes = [], 0
    while block := answer["Body"].read(BLOCK):
        blocks.append(block)
        num_bytes += len(block)
        if wanted is not None and num_bytes > wanted:
            raise _WrongAnswer(f"sends more than {wanted:,} bytes, must be as many")
        if most is not None and num_bytes > most:
            raise too_long(path, most)
    if wanted is not None and num_bytes != wanted:
        raise _WrongAnswer(f"sends {num_bytes:,} bytes, must be {wanted:,}")
    return b"".join(blocks)


def _length(path: str, answer: Any, start: int, end: int, size: int | None) -> int:
    """Return how many bytes an answer must have for the range from `start` to `end`."""
    if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
        announced = answer.get("ContentLength")
        # A server may send the whole file if it is no longer than the range.
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
    is_end = total is None and first <= last < end  # it may be, as the total is unknown
    if size not in (None, total) or first != start or not (last == wanted - 1 or is_end):
        of = "" if size is None else f" of {size:,}"
        raise _WrongAnswer(f"sends {said}, must be bytes {start}-{end - 1}{of}")
    return last - first + 1
