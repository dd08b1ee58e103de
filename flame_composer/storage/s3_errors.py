"""S3's errors, turned into our own types with one line for the user."""

from __future__ import annotations

import errno
import os
import re
from typing import Any

from flame_composer.errors import ConfigError, StoreError, masked

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


def explain(
    error: Exception, path: str, server: str, failed: type[Exception] = StoreError
) -> Exception:
    """Return the error to raise for a request for `path` that failed with `error`.

    It is a ConfigError if the user can correct the cause, a FileNotFoundError if there is no such
    file, and of the type `failed` otherwise.
    """
    from botocore.exceptions import (
        ClientError,
        ConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    place, bucket = f"s3://{path}", path.partition("/")[0]
    code = code_of(error) if isinstance(error, ClientError) else ""
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
        return missing(path)
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
        return failed(f"{place}: {server} cannot be reached: {line_of(error)}{hint}")
    return failed(f"{place}: {line_of(error)}")


def missing(path: str) -> FileNotFoundError:
    """Return the error for a file that does not exist."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"s3://{path}")


class TooLong(StoreError):
    """The error for a file that has more bytes than it may have.

    `size` is how many it has, if that is known.
    """

    def __init__(self, message: str, size: int | None = None):
        super().__init__(message)
        self.size = size


def too_long(path: str, most: int, size: int | None = None) -> TooLong:
    """Return the error for a file of more than `most` bytes; it has `size` if that is known."""
    return TooLong(
        f"s3://{path}: has more than {most:,} bytes, which no such file has; put the right one"
        " there",
        size,
    )


def code_of(error: Any) -> str:
    """Return the error code in an answer of S3, or an empty text if there is none."""
    return str(error.response.get("Error", {}).get("Code", ""))


def line_of(error: Exception) -> str:
    """Return the message of botocore's error, in at most 200 characters and without secrets."""
    line = masked(re.sub(r'( on| to the)? endpoint URL: "[^"]*"', "", " ".join(str(error).split())))
    return line.rstrip(".")[:200] or type(error).__name__
