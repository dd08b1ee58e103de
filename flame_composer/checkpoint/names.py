"""The names of checkpoints, and which of them are in a folder."""

from __future__ import annotations

import os
import re

from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.fetch import has_head
from flame_composer.errors import ConfigError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url

# The name of a file, or of a folder of pieces. Leading zeros (ba010.pt) are refused, so that no two
# names stand for the same step.
_NAME = re.compile(r"ba(0|[1-9][0-9]{0,17})(\.pt)?")


def step_of(place: str) -> int | None:
    """Return the step in a checkpoint's name, or None if the name is not that of a checkpoint."""
    match = _NAME.fullmatch(re.split(r"[/\\]", place)[-1])
    return int(match[1]) if match else None


def list_checkpoints(folder: str) -> list[str]:
    """Return the checkpoints in a folder, newest first.

    Damaged ones are included; those whose saving was never finished are not.
    """
    return [place for place in _named(folder) if place.endswith(".pt") or has_head(place)]


def list_leftovers(folder: str, before: int) -> list[str]:
    """Return the folders of steps before `before` that hold pieces of a checkpoint but no head.

    A kill leaves such a folder while a checkpoint is being deleted or uploaded. A folder that holds
    anything besides pieces is not included.
    """
    leftovers = []
    for place in _named(folder):
        step = step_of(place)
        if step is not None and step < before and not place.endswith(".pt") and not has_head(place):
            names = files.ls(place)
            if names and all(map(sharded.is_name, names)):
                leftovers.append(place)
    return leftovers


def _named(folder: str) -> list[str]:
    """Return the entries of a folder that are named like checkpoints, newest first."""
    try:
        names = files.ls(folder) if is_url(folder) else os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be read: {error.strerror}; let this user read it"
        ) from None
    found = [
        (step, files.join(folder, name)) for name in names if (step := step_of(name)) is not None
    ]
    return [place for _, place in sorted(found, reverse=True)]
