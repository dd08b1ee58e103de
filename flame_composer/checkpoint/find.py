"""A search for the newest checkpoint that is whole, the same one on every rank."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from composer.utils import dist

from flame_composer.agree import agreed
from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.content import check_content
from flame_composer.checkpoint.parts import Needed, OtherRun
from flame_composer.checkpoint.read import Checkpoint, read_checkpoint, read_head
from flame_composer.errors import ConfigError, DataError, StoreError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url

# The name of a file, or of a folder of pieces. Leading zeros (ba010.pt) are refused, so that no two
# names stand for the same step.
_NAME = re.compile(r"ba(0|[1-9][0-9]{0,17})(\.pt)?")
_WHOLE, _GONE = "whole", "gone"  # what a rank may find, besides a damaged checkpoint

log = logging.getLogger(__name__)


def step_of(place: str) -> int | None:
    """Return the step in a checkpoint's name, or None if the name is not that of a checkpoint."""
    match = _NAME.fullmatch(re.split(r"[/\\]", place)[-1])
    return int(match[1]) if match else None


def has_head(place: str) -> bool:
    """Return whether `place` is a folder that holds the head of a checkpoint in pieces.

    The head (`sharded.HEAD`) may be damaged.
    """
    head = files.join(place, sharded.HEAD)
    return files.stat(head) is not None if is_url(place) else _is_there(head)


def _is_there(path: str) -> bool:
    """Return whether a path exists, as `os.path.lexists` does.

    A path also counts as existing if this user may not look at it, or if the disk fails.
    """
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return True


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


def look_at(
    place: str, staging: Path, needed: Callable[[], Needed] | None = None
) -> Checkpoint | None:
    """Return the checkpoint at `place` after reading and checking it, or None if it is gone.

    A checkpoint in an object store is first copied, anew, to the local folder `staging`. `needed`
    returns what a checkpoint must hold for a run to continue from it. Raise DataError if it is
    damaged or is not of the step in its name, and StoreError or ConfigError if the store fails.
    """
    checkpoint = _fetched(place, staging)
    if checkpoint is not None:
        content = read_checkpoint(checkpoint)
        check_content(content, place, step=step_of(place), needed=needed and needed())
    return checkpoint


def find_newest(
    folder: str, staging: Path, needed: Callable[[], Needed] | None = None, *, shared: bool = False
) -> Checkpoint | None:
    """Return the newest whole checkpoint, the same one on every rank, or None if there is none.

    A damaged checkpoint is named in a warning and passed over, on all ranks if any rank cannot read
    it; so is one of another run if there is one of this run before it. With `shared`, the ranks of
    a machine have the same `staging`, and the first of them checks for all. Raise DataError if
    there are checkpoints but none is whole, because nobody would expect the run to start over, and
    ConfigError if the whole ones belong to another run.
    """
    checkpoints = _listed(folder)
    problems: dict[str, DataError] = {}
    for place in checkpoints:
        looks = dist.get_local_rank() == 0 or not shared
        found = agreed(
            dist.all_gather_object,
            functools.partial(_look, place, staging, needed) if looks else lambda: None,
        )
        problem = next((each for each in found if isinstance(each, DataError)), None)
        if problem is None and _GONE in found and _WHOLE in found:
            problem = DataError(
                f"{place}: is not there for every rank; save_folder must be one that all machines"
                " share"
            )
        if problem is not None:
            problems[place] = problem
            if not isinstance(problem, OtherRun):
                _warn(problem)
        elif _WHOLE in found:
            for each in problems.values():
                if isinstance(each, OtherRun):
                    _warn(each)
            return Checkpoint(place, _local(place, staging), tuple(problems))
    if not checkpoints:
        return None
    if not problems:
        raise StoreError(
            f"{folder}: its {len(checkpoints)} checkpoints were deleted a moment ago; start again"
        )
    other = next((problem for problem in problems.values() if isinstance(problem, OtherRun)), None)
    if other is not None:
        raise ConfigError(
            f"{folder}: none of its {len(checkpoints)} checkpoints is of this run: {other}; set"
            " back what changed, or give another run_name or save_folder"
        )
    raise DataError(
        f"{folder}: none of its {len(checkpoints)} checkpoints can be read; "
        "move them away (or set another run_name) to start over"
    )


def _warn(problem: DataError) -> None:
    """Warn, on the first rank, of a checkpoint that is passed over."""
    if dist.get_global_rank() == 0:
        log.warning("warning: %s; trying the one before it", problem)


def _listed(folder: str) -> list[str]:
    """Return the checkpoints that at least one rank sees in a folder, newest first."""
    places = {
        place
        for each in agreed(dist.all_gather_object, lambda: list_checkpoints(folder))
        for place in each
    }
    return sorted(places, key=lambda place: (step_of(place), place), reverse=True)


def _look(place: str, staging: Path, needed: Callable[[], Needed] | None) -> DataError | str:
    """Return `_WHOLE`, `_GONE` or the DataError that says what is wrong with a checkpoint."""
    try:
        return _GONE if look_at(place, staging, needed) is None else _WHOLE
    except StoreError:
        raise
    except DataError as error:
        if is_url(place):
            remove_copy(staging / place.rpartition("/")[2])  # the next copy may need the space
        return error


def _local(place: str, staging: Path) -> Path:
    """Return the local file of a checkpoint, which is its head's if it is in pieces."""
    there = staging / place.rpartition("/")[2] if is_url(place) else Path(place)
    return (
        there / sharded.HEAD
        if os.path.isdir(there) and _is_there(str(there / sharded.HEAD))
        else there
    )


def _fetched(place: str, staging: Path) -> Checkpoint | None:
    """Return the checkpoint at `place`, copied here from a store if need be; None if it is gone."""
    if not is_url(place):
        return Checkpoint(place, _local(place, staging)) if _is_there(place) else None
    copy = staging / place.rpartition("/")[2]
    is_file = files.stat(files.join(place, sharded.HEAD)) is None
    if is_file and files.stat(place) is None:
        return None
    staging.mkdir(parents=True, exist_ok=True)
    # Remove an old copy of the other kind: a folder where a file is due, or the reverse.
    if (copy.is_dir() and not copy.is_symlink()) == is_file:
        remove_copy(copy)
    try:
        if is_file:
            files.download(place, copy)
            return Checkpoint(place, copy)
        copy.mkdir(exist_ok=True)
        files.download(files.join(place, sharded.HEAD), copy / sharded.HEAD)
        # The pieces' names follow from their number: the store's listing is not relied upon.
        for name in map(sharded.name_of, range(read_head(place, copy / sharded.HEAD))):
            if files.stat(files.join(place, name)) is None:
                raise DataError(
                    f"{files.join(place, name)}: not a whole checkpoint: this piece is missing"
                )
            files.download(files.join(place, name), copy / name)
        return Checkpoint(place, copy / sharded.HEAD)
    except FileNotFoundError:  # deleted while it was copied
        return None


def remove_copy(copy: Path) -> None:
    """Remove a local copy of a checkpoint, a file or a folder, whole or as a kill left it.

    If it cannot be removed, log a warning.
    """
    try:
        if copy.is_dir() and not copy.is_symlink():
            shutil.rmtree(copy)
        else:
            copy.unlink(missing_ok=True)
    except OSError as error:
        log.warning("warning: %s: cannot be removed: %s", copy, error.strerror)


def find_start(
    folder: str, staging: Path, needed: Callable[[], Needed] | None = None, *, autoresume: bool
) -> Checkpoint | None:
    """Return the checkpoint that a run saving in `folder` resumes from, or None for a new run.

    Every rank must call this. Raise ConfigError if there are checkpoints but `autoresume` is off,
    because the run would overwrite them. Errors of `find_newest` are raised as well.
    """
    if autoresume:
        return find_newest(folder, staging, needed, shared=True)
    if existing := _listed(folder):
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
        found = _fetched(place, staging)
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
