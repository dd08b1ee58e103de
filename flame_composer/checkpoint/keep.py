"""The checkpoints in a run's folder: the newest whole ones are kept, older ones deleted."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.fetch import has_head, remove_copy
from flame_composer.checkpoint.look import look_at
from flame_composer.checkpoint.names import list_checkpoints, list_leftovers, step_of
from flame_composer.checkpoint.parts import Needed
from flame_composer.errors import ConfigError, DataError, StoreError, one_line
from flame_composer.storage import files
from flame_composer.storage.filesystems import Stat, is_url

# Checking old checkpoints may take this long; the rest are checked at the next save.
VERIFY_SECONDS = 60

log = logging.getLogger(__name__)


class KeptCheckpoints:
    """The checkpoints in a folder, of which the newest whole ones are kept.

    Older ones are deleted once there are enough newer ones that are whole. A checkpoint that this
    run saved or resumed from is known to be whole. Any other is read once to find out, and is not
    counted if it is damaged.
    """

    def __init__(
        self,
        folder: str,
        staging: Path,
        num_to_keep: int,
        needed: Callable[[], Needed] | None,
    ):
        """Keep the newest `num_to_keep` checkpoints in `folder`, or all if it is -1.

        `staging` and `needed` are as in `SaveCheckpoints`.
        """
        self.folder = folder
        self.staging = staging
        self.num_to_keep = num_to_keep
        self.needed = needed
        # By checkpoint: its file's size and time when it was checked, and whether it is whole
        self._is_whole: dict[str, tuple[Stat | None, bool]] = {}
        self._stays: set[str] = set()  # checkpoints that could not be deleted

    def make_way(self, place: str) -> None:
        """Rename whatever is at `place`, where a new checkpoint is about to be saved.

        It is a damaged checkpoint, or one of another run. It is not deleted, because it may be all
        that is left of that run.
        """
        is_file = files.stat(place) is not None
        if is_file and self._is_whole.get(place) == (_stat(place), True):
            return  # this run saved that checkpoint itself, so it may be replaced
        is_there = (is_file or has_head(place)) if is_url(place) else os.path.lexists(place)
        if not is_there:
            return
        number = 0
        while _is_taken(
            aside := files.join(self.folder, f"aside{number or ''}-{place.rpartition('/')[2]}")
        ):
            number += 1
        try:
            files.move(place, aside)
        except (ConfigError, StoreError) as error:  # some stores forbid deleting
            log.warning("warning: %s: cannot be set aside and is replaced: %s", place, error)
        except OSError as error:
            raise DataError(
                f"{place}: is in the way of a new checkpoint and cannot be renamed:"
                f" {error.strerror}; move it away, and the same command goes on"
            ) from None
        else:
            log.warning(
                "warning: %s: was not a checkpoint of this run that can be read; it is set aside"
                " as %s",
                place,
                aside,
            )

    def delete_old(self) -> None:
        """Delete the checkpoints that are older than the newest `num_to_keep` whole ones."""
        if self.num_to_keep <= 0:
            return
        until = time.monotonic() + VERIFY_SECONDS
        num_whole, oldest = 0, None
        try:
            for place in list_checkpoints(self.folder):
                if num_whole >= self.num_to_keep:
                    self._delete(place)
                elif place not in self._is_whole and time.monotonic() > until:
                    return
                else:
                    num_whole += self._counts(place)
                    oldest = step_of(place)
            if num_whole >= self.num_to_keep:
                assert oldest is not None
                for place in list_leftovers(self.folder, before=oldest):
                    self._delete(place)
        except (ConfigError, DataError, OSError) as error:
            log.warning(
                "warning: %s: no old checkpoint is deleted this time: %s",
                self.folder,
                one_line(error),
            )

    def note(self, place: str, is_whole: bool) -> None:
        """Remember whether a checkpoint, in its present state, is whole."""
        self._is_whole[place] = _stat(place), is_whole

    def _counts(self, place: str) -> bool:
        """Return whether a checkpoint is whole, and so counts as one of those to keep.

        It is read and checked, unless it was before and has not changed since.
        """
        now = _stat(place)
        if place in self._is_whole and self._is_whole[place][0] == now:
            return self._is_whole[place][1]
        copies = self.staging / "looked-at-ba"
        try:
            is_whole = look_at(place, copies, self.needed) is not None
        except StoreError:
            raise
        except DataError as error:
            log.warning(
                "warning: %s; it stays, and does not count as one of the %d that are kept",
                error,
                self.num_to_keep,
            )
            is_whole = False
        finally:
            remove_copy(copies)
        self._is_whole[place] = now, is_whole
        return is_whole

    def _delete(self, place: str) -> None:
        """Delete a checkpoint, or warn, once, that it cannot be deleted."""
        if place in self._stays:
            return
        try:
            self._remove(place)
            self._is_whole.pop(place, None)
        except (ConfigError, StoreError, OSError) as error:
            self._stays.add(place)
            log.warning("warning: %s: an old checkpoint stays: %s", place, one_line(error))

    def _remove(self, place: str) -> None:
        """Delete a checkpoint; what a kill leaves behind is never mistaken for a checkpoint."""
        if not is_url(place) and os.path.islink(place):
            os.unlink(place)  # only the link: its target may belong to another run
        elif place.endswith(".pt"):
            files.delete(place)
        elif is_url(place):
            files.delete(files.join(place, sharded.HEAD))  # first: it makes it a checkpoint
            files.delete_folder(place)
        else:
            # If a kill leaves this folder behind, the next start removes it.
            left = self.staging / f"unfinished-{Path(place).name}"
            os.rename(place, left)
            shutil.rmtree(left)


def _stat(place: str) -> Stat | None:
    """Return the stat of a checkpoint's file, or of its head if it is in pieces; None if gone."""
    return files.stat(place if place.endswith(".pt") else files.join(place, sharded.HEAD))


def _is_taken(place: str) -> bool:
    """Return whether anything is at `place`."""
    if is_url(place):
        return bool(files.stat(place) or files.ls(place))
    return os.path.lexists(place)
