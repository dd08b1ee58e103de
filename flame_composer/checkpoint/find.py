"""A search for the newest checkpoint that is whole, the same one on every rank."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from composer.utils import dist

from flame_composer.agree import agreed
from flame_composer.checkpoint.fetch import copy_of, fetch, file_of, has_head, remove_copy
from flame_composer.checkpoint.look import GONE, NOT_SHARED, WHOLE, look_alone, look_together
from flame_composer.checkpoint.names import list_checkpoints, step_of
from flame_composer.checkpoint.parts import Needed, OtherRun
from flame_composer.checkpoint.read import Checkpoint
from flame_composer.errors import ConfigError, DataError, StoreError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url

log = logging.getLogger(__name__)


def find_newest(
    folder: str,
    staging: Path,
    needed: Callable[[], Needed] | None = None,
    *,
    num_shards: int | None = None,
) -> Checkpoint | None:
    """Return the newest whole checkpoint, the same one on every rank, or None if there is none.

    A damaged checkpoint is named in a warning and passed over, on all ranks if any rank cannot read
    it; so is one of another run if there is one of this run before it. Each rank fetches and checks
    all of a checkpoint. With `num_shards`, the number of shards of the model that is to be loaded,
    the ranks share the work (`look_together`), and those of a machine have the same `staging`.
    Raise DataError if there are checkpoints but none is whole, because nobody would expect the run
    to start over, and ConfigError if the whole ones belong to another run.
    """
    checkpoints = _listed(folder, num_shards)
    if num_shards is not None:
        # A rank takes what it finds there for what was fetched now.
        agreed(dist.all_gather_object, functools.partial(_remove_copies, checkpoints, staging))
    problems: dict[str, DataError] = {}
    for place in checkpoints:
        if num_shards is None:
            found, pieces = look_alone(place, staging, needed), None
        else:
            found, pieces = look_together(place, staging, needed, num_shards)
        problem = next((each for each in found if isinstance(each, DataError)), None)
        if problem is None and GONE in found and WHOLE in found:
            problem = DataError(NOT_SHARED.format(place=place))
        if problem is not None:
            problems[place] = problem
            if is_url(place) and _looks(num_shards):
                remove_copy(copy_of(place, staging))  # the next copy may need the space
            if not isinstance(problem, OtherRun):
                _warn(problem)
        elif WHOLE in found:
            for each in problems.values():
                if isinstance(each, OtherRun):
                    _warn(each)
            return Checkpoint(place, file_of(place, staging), tuple(problems), pieces)
    if not checkpoints:
        return None
    raise _none_is_whole(folder, len(checkpoints), problems)


def _none_is_whole(folder: str, number: int, problems: dict[str, DataError]) -> Exception:
    """Return the error for a folder of checkpoints none of which can be used."""
    if not problems:
        return StoreError(
            f"{folder}: its {number} checkpoints were deleted a moment ago; start again"
        )
    other = next((problem for problem in problems.values() if isinstance(problem, OtherRun)), None)
    if other is not None:
        return ConfigError(
            f"{folder}: none of its {number} checkpoints is of this run: {other}; set back what"
            " changed, or give another run_name or save_folder"
        )
    return DataError(
        f"{folder}: none of its {number} checkpoints can be read; move them away (or set another"
        " run_name) to start over"
    )


def _remove_copies(places: list[str], staging: Path) -> None:
    """Remove what an earlier start has left in `staging` of checkpoints in a store."""
    for place in filter(is_url, places):
        if dist.get_local_rank() == 0:
            remove_copy(copy_of(place, staging))


def _warn(problem: DataError) -> None:
    """Warn, on the first rank, of a checkpoint that is passed over."""
    if dist.get_global_rank() == 0:
        log.warning("warning: %s; trying the one before it", problem)


def _looks(num_shards: int | None) -> bool:
    """Return whether this rank looks at a checkpoint's folder: one of each machine if they share.

    See `find_newest`.
    """
    return num_shards is None or dist.get_local_rank() == 0


def _listed(folder: str, num_shards: int | None) -> list[str]:
    """Return the checkpoints that at least one rank sees in a folder, newest first."""
    lists = dist.get_global_rank() == 0 if is_url(folder) else _looks(num_shards)
    places = {
        place
        for each in agreed(
            dist.all_gather_object, lambda: list_checkpoints(folder) if lists else []
        )
        for place in each
    }
    return sorted(places, key=lambda place: (step_of(place), place), reverse=True)


def find_start(
    folder: str,
    staging: Path,
    needed: Callable[[], Needed] | None = None,
    *,
    autoresume: bool,
    num_shards: int = 1,
) -> Checkpoint | None:
    """Return the checkpoint that a run saving in `folder` resumes from, or None for a new run.

    Every rank must call this. `num_shards` is as in `find_newest`. Raise ConfigError if there are
    checkpoints but `autoresume` is off, because the run would overwrite them. Errors of
    `find_newest` are raised as well.
    """
    if autoresume:
        return find_newest(folder, staging, needed, num_shards=num_shards)
    if existing := _listed(folder, num_shards):
        name = existing[0].rpartition("/")[2]
        raise ConfigError(
            f"{folder}: holds checkpoints of an earlier run ({name}); set autoresume=true to go on"
            " from them, or another run_name or save_folder"
        )
    return None


def find_checkpoint(place: str, staging: Path) -> Checkpoint:
    """Return the checkpoint at `place`, or the newest whole one if `place` is a run's folder.

    Raise ConfigError if there is none.
    """
    if files.stat(place) is not None or has_head(place):
        found = fetch(place, staging)
        if found is not None:
            return found
    newest = find_newest(place, staging)
    if newest is None:
        _refuse_sharded(place)
        is_folder = bool(files.ls(place)) or Path(place).is_dir()
        below = files.join(place, "checkpoints")
        meant = (
            f"did you mean {below}?"
            if list_checkpoints(below)
            else "name a checkpoint or the folder a run saved them in"
        )
        what = "a folder without checkpoints (ba*.pt)" if is_folder else "no such file or folder"
        raise ConfigError(f"{place}: {what}; {meant}")
    return newest


def _refuse_sharded(place: str) -> None:
    """Raise ConfigError for a checkpoint in the format of torch.distributed.checkpoint.

    Such a checkpoint is a folder with a file named `.metadata` and files from each rank.
    """
    for folder in (place, *(files.join(place, name) for name in files.ls(place))):
        if ".metadata" in files.ls(folder):
            raise ConfigError(
                f"{folder}: a sharded checkpoint, which cannot be read here; only those in one file"
                " can (ba*.pt)"
            )
