"""A warning about servers that are reached without encryption."""

from __future__ import annotations

import ipaddress
import logging
import multiprocessing
import os
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

_warned_of: set[str] = set()  # servers


def warn_if_readable(server: str) -> None:
    """Warn, once for each server, about an http address other than this machine's own.

    Everything sent there can be read on the way.
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
