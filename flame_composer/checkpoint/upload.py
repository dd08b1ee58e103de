"""Uploads of checkpoints that survive outages of a few minutes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flame_composer.errors import ConfigError, StoreError
from flame_composer.storage import files

log = logging.getLogger(__name__)

# Seconds between attempts to upload a checkpoint. Each attempt makes several requests.
UPLOAD_WAITS = (2, 10, 60, 180)

# No attempt begins later than this after the first. If the store hangs, one takes three minutes.
UPLOAD_SECONDS = 260


def upload_file(file: Path, place: str) -> None:
    """Upload a file, and try again for a few minutes if that fails."""
    try_for_minutes(partial(files.put, file, place), place)


def try_for_minutes(upload: Callable[[], None], place: str) -> None:
    """Call `upload`, which uploads to `place`, and call it again for a few minutes if it fails.

    A short outage, or credentials that are being renewed, should not end a run.
    """
    begun = time.monotonic()
    for seconds in (*UPLOAD_WAITS, None):
        try:
            upload()
            return
        except (StoreError, ConfigError) as error:
            if seconds is None or time.monotonic() - begun + seconds > UPLOAD_SECONDS:
                raise
            log.warning(
                "warning: %s: not saved yet: %s; trying again in %d s", place, error, seconds
            )
            time.sleep(seconds)
