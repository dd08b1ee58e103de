"""A callback that saves checkpoints, each of them whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from composer import algorithms
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint

from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.find import find_start, remove_copy, step_of
from flame_composer.checkpoint.keep import KeptCheckpoints
from flame_composer.checkpoint.parts import Needed
from flame_composer.checkpoint.read import Checkpoint, read_content, read_for_composer
from flame_composer.checkpoint.upload import upload_file
from flame_composer.config.train import TRAIN_LOG, RunPlan, TrainConfig
from flame_composer.errors import GOES_ON, TrainingError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.folders import flush
from flame_composer.storage.local import create
from flame_composer.storage.locks import is_own_folder
from flame_composer.upstream.composer import load_checkpoints_with

# Names of Composer's algorithms. Composer rebuilds some of them from a checkpoint by calling `eval`
# on text in it; the Trainer is told to rebuild none.
ALL_ALGORITHMS = algorithms.__all__
# The errors of torch (2.7) for a file that it cannot write.
_CANNOT_WRITE = re.compile(
    "PytorchStreamWriter|Parent directory .* does not exist|open file failed"
)

log = logging.getLogger(__name__)


class SaveCheckpoints(Callback):
    """A callback that saves `ba<batch>.pt` regularly and at the end, whole or not at all.

    Composer's own CheckpointSaver writes under the final name and moves its `latest` link in two
    steps, so that a kill can leave a partial file or a dangling link. This one writes under a
    temporary name, forces the bytes to disk and renames the file. An upload to an object store
    appears there only once it is complete. There is no link: the newest checkpoint is found by its
    name.

    Checkpoints are saved only at the end of a batch, never at the end of an epoch. There Composer's
    epoch counter and StreamingDataset's disagree, and the next epoch would repeat the last one's
    order.

    A sharded model can be saved in pieces, one per rank, in a folder `ba<batch>`. The folder gets
    that name once all pieces are in it; in an object store its head (`sharded.HEAD`) is uploaded
    last.

    `KeptCheckpoints` deletes old checkpoints once there are enough newer ones that are whole.
    """

    def __init__(
        self,
        folder: str,
        staging: Path,
        *,
        batches: int | None,
        seconds: float | None = None,
        num_to_keep: int,
        in_pieces: bool = False,
        start: Checkpoint | None = None,
        needed: Callable[[], Needed] | None = None,
        train_log: Path | None = None,
    ):
        """Save a checkpoint every `batches` or every `seconds`; one of the two must be given.

        `folder`, a path or URL, keeps the newest `num_to_keep` checkpoints, or all if that is -1.
        If it is a URL, checkpoints are written to the local folder `staging` before they are
        uploaded. `start` is the checkpoint that Composer loads (`load_path`). If it is in pieces,
        Composer loads only its head, and this callback then loads the pieces. `needed` returns what
        a checkpoint must hold to be one of this run. `train_log` is a file that is forced to disk
        before a checkpoint gets its name.
        """
        self.folder = folder
        self.staging = staging if is_url(folder) else Path(folder)
        self.batches = batches
        self.seconds = seconds
        self.in_pieces = in_pieces
        self.start = start
        self.kept = KeptCheckpoints(folder, self.staging, num_to_keep, needed)
        self.train_log = train_log
        self.saved: str | None = None  # the newest checkpoint of this process
        self._last_time = time.monotonic()

    def after_load(self, state: State, logger: Logger) -> None:
        """Load the pieces of the checkpoint if Composer has loaded only its head."""
        if self.start is not None and self.start.file.name == sharded.HEAD:
            content = read_content(
                self.start, verify=False
            )  # its checksums were checked when it was chosen
            sharded.load(state, content["pieces"])

    def fit_start(self, state: State, logger: Logger) -> None:
        """Delete what a killed run left behind."""
        self._last_time = time.monotonic()
        dist.barrier()  # until every rank has read its checkpoint
        if dist.get_local_rank() == 0:
            self.staging.mkdir(parents=True, exist_ok=True)
            for left in self.staging.glob("*ba*" if is_url(self.folder) else "unfinished-ba*"):
                if (
                    is_url(self.folder)
                    or step_of(left.name.removeprefix("unfinished-")) is not None
                ):
                    remove_copy(left)
        if dist.get_global_rank() == 0:
            if self.start is not None:
                self.kept.note(self.start.place, True)
                for place in self.start.passed_over:
                    self.kept.note(place, False)
            files.abort_uploads(self.folder)
        dist.barrier()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save a checkpoint if one is due, or if training ends here."""
        assert state.max_duration is not None
        if self._is_due(state.timestamp.batch.value) or state.timestamp >= state.max_duration:
            self.save(state)

    def _is_due(self, batch: int) -> bool:
        """Return whether a checkpoint is due; the answer is the same on every rank."""
        if self.batches is not None:
            return batch % self.batches == 0
        assert self.seconds is not None
        # Clocks differ, so the first rank decides for all.
        decision = [time.monotonic() - self._last_time >= self.seconds]
        dist.broadcast_object_list(decision, src=0)
        return decision[0]

    def save(self, state: State) -> None:
        """Save a checkpoint now, unless this batch has one. Every rank must call this."""
        in_pieces = self.in_pieces and state.fsdp_config is not None
        name = f"ba{state.timestamp.batch.value}" + ("" if in_pieces else ".pt")
        place = files.join(self.folder, name)
        if place == self.saved:
            return
        with _saving(place):
            if dist.get_global_rank() == 0:
                self._flush_log()
            temporary = self.staging / f"unfinished-{name}"
            if in_pieces:
                self._save_pieces(state, temporary, place)
            else:
                self._save_file(state, temporary, place)
            if dist.get_global_rank() == 0 and not is_url(place):
                flush(Path(self.folder))
        if dist.get_global_rank() == 0:
            self.kept.note(place, True)
            self.kept.delete_old()
        dist.barrier()
        self.saved = place
        self._last_time = time.monotonic()

    def _flush_log(self) -> None:
        """Force the log to disk.

        A restart must find the row of every step up to its checkpoint, even after a power failure.
        """
        if self.train_log is not None and self.train_log.exists():
            flush(self.train_log)
            flush(self.train_log.parent)

    def _save_file(self, state: State, temporary: Path, place: str) -> None:
        """Save a checkpoint in one file."""
        if dist.get_global_rank() != 0:
            save_checkpoint(state, str(temporary))
            return
        self.staging.mkdir(parents=True, exist_ok=True)
        with create(temporary) as file:
            # By its descriptor, because others may put another file under its name meanwhile.
            save_checkpoint(state, f"/proc/self/fd/{file.fileno()}")
            self.kept.make_way(place)
            if not os.path.samestat(os.lstat(temporary), os.fstat(file.fileno())):
                raise OSError(errno.EEXIST, f"somebody else has put another file at {temporary}")
            if is_url(place):
                upload_file(temporary, place)
                temporary.unlink()
            else:
                flush(temporary)
                os.replace(temporary, place)

    def _save_pieces(self, state: State, temporary: Path, place: str) -> None:
        """Save a checkpoint in pieces."""
        is_first = dist.get_global_rank() == 0
        temporary.mkdir(parents=True, exist_ok=True)
        if not is_own_folder(temporary):
            raise OSError(errno.EEXIST, f"{temporary} is a link, or another user's")
        written = sharded.save(state, temporary)
        if is_url(place):
            if is_first:
                self.kept.make_way(place)
                files.delete(files.join(place, sharded.HEAD))  # still there if not renamed
            dist.barrier()
            for file in written:
                if file.name == sharded.HEAD:
                    continue
                upload_file(file, files.join(place, file.name))
            dist.barrier()
            if is_first:
                upload_file(written[-1], files.join(place, sharded.HEAD))
            dist.barrier()
            if dist.get_local_rank() == 0:
                shutil.rmtree(temporary)
        else:
            for file in written:
                flush(file)
            dist.barrier()
            if is_first:
                flush(temporary)
                self.kept.make_way(place)
                os.rename(temporary, place)


@contextmanager
def _saving(place: str) -> Iterator[None]:
    """Raise TrainingError, naming the checkpoint, if the body cannot write it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not _CANNOT_WRITE.search(str(error)):
            raise
        disk = next(
            (each for each in (error, error.__context__) if isinstance(each, OSError)), error
        )
        reason = disk.strerror if isinstance(disk, OSError) else "is the disk full?"
        raise TrainingError(f"{place}: cannot be saved: {reason}; {GOES_ON}") from None


def find_start_of(
    config: TrainConfig, staging: Path, needed: Callable[[], Needed]
) -> Checkpoint | None:
    """Return the checkpoint that a run resumes from, or None for a new run; see `find_start`.

    Every rank must call this after `dist.initialize_dist`. `needed` returns what a checkpoint must
    hold for this run.
    """
    load_checkpoints_with(read_for_composer)
    if config.save_folder is None:
        return None
    return find_start(config.save_folder, staging, needed, autoresume=config.autoresume)


def build_saver(
    config: TrainConfig,
    staging: Path,
    plan: RunPlan,
    start: Checkpoint | None,
    needed: Callable[[], Needed],
) -> SaveCheckpoints | None:
    """Return the callback that saves a run's checkpoints, or None if it saves none."""
    if config.save_folder is None:
        return None
    fsdp = config.parallelism.fsdp
    return SaveCheckpoints(
        config.save_folder,
        staging,
        batches=plan.save_batches,
        seconds=plan.save_seconds,
        num_to_keep=config.save_num_checkpoints_to_keep,
        in_pieces=fsdp is not None and fsdp.state_dict_type == "sharded",
        start=start,
        needed=needed,
        train_log=Path(config.log_folder, TRAIN_LOG),
    )
