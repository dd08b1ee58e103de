"""A callback that saves checkpoints while training goes on, each of them whole or not at all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer import algorithms
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility

from flame_composer.agree import Gather
from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.fetch import remove_copy
from flame_composer.checkpoint.find import find_start
from flame_composer.checkpoint.keep import KeptCheckpoints
from flame_composer.checkpoint.load import load
from flame_composer.checkpoint.names import step_of
from flame_composer.checkpoint.parts import Needed
from flame_composer.checkpoint.pieces import all_pieces
from flame_composer.checkpoint.read import Checkpoint, read_for_composer
from flame_composer.checkpoint.sharded import Share
from flame_composer.checkpoint.snapshot import HostMemory
from flame_composer.checkpoint.write import CheckpointFiles, saving
from flame_composer.config.train import TRAIN_LOG, RunPlan, TrainConfig
from flame_composer.errors import ConfigError, one_line
from flame_composer.model.sharding import sharding_of
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.upstream.composer import load_checkpoints_with, remember_environment

# Names of Composer's algorithms. Composer rebuilds some of them from a checkpoint by calling `eval`
# on text in it; the Trainer is told to rebuild none.
ALL_ALGORITHMS = algorithms.__all__
# A save that is due is worth a line if it had to wait longer than this for the one before, seconds.
WORTH_A_LINE = 1.0

# One rank's upload may take hours longer than another's; stall_timeout ends what hangs.
GROUP_TIMEOUT = timedelta(days=1)

log = logging.getLogger(__name__)


class SaveCheckpoints(Callback):
    """A callback that saves `ba<batch>.pt` regularly and at the end, whole or not at all.

    Composer's own CheckpointSaver writes under the final name and moves its `latest` link in two
    steps, so that a kill can leave a partial file or a dangling link. `CheckpointFiles` gives a
    checkpoint its name once it is whole. There is no link: the newest checkpoint is found by its
    name.

    In the background, training waits only until each rank has copied its share of the state to host
    memory. A thread of every rank then writes and uploads it. One checkpoint is saved at a time: if
    another is due before that, training waits. What prevented a checkpoint is raised by `wait`.

    Checkpoints are saved only at the end of a batch, never at the end of an epoch. There Composer's
    epoch counter and StreamingDataset's disagree, and the next epoch would repeat the last one's
    order.

    A sharded model can be saved in pieces, one per rank, in a folder `ba<batch>`.

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
        in_background: bool = False,
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
        self.files = CheckpointFiles(folder, self.staging, self.kept, train_log)
        self.saved: str | None = None  # the newest checkpoint of this process
        self.memory = HostMemory(pins=True) if in_background else None
        self._background = ThreadPoolExecutor(1, "save")
        self._under_way: tuple[str, Future[None]] | None = None
        self._gather: Gather | None = None  # among the threads of all ranks
        self._last_time = time.monotonic()

    def after_load(self, state: State, logger: Logger) -> None:
        """Load the pieces of the checkpoint if Composer has loaded only its head."""
        if self.start is not None and self.start.file.name == sharded.HEAD:
            pieces = self.start.pieces or all_pieces(self.start)
            load(state, pieces, self.start.file.parent)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Delete what a killed run left behind."""
        self._last_time = time.monotonic()
        if self.memory is not None and self._gather is None:
            self._gather = _meet_in_background()
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
        is_last = state.timestamp >= state.max_duration
        if self._is_due(state.timestamp.batch.value) or is_last:
            self.save(state)
        if is_last:
            self.wait()

    def close(self, state: State, logger: Logger) -> None:
        self.settle()

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
        """Save a checkpoint now, unless this batch has one. Every rank must call this.

        In the background, return once it is copied; `wait` then waits until it is whole. Raise what
        prevented the checkpoint before it.
        """
        if self.has_saved(state):
            return
        in_pieces, place = self._saves_pieces(state), self._place(state)
        self._wait_for_the_one_before(state.timestamp.batch.value)
        with saving(place):
            share = sharded.share_of(state) if in_pieces else _whole(state)
        if self.memory is None:
            # Pieces are copied: views would be saved with the whole buffers that they lie in.
            share = HostMemory().copy(share) if in_pieces else share
            self.files.write(share, place, dist.all_gather_object)
            self.saved = place
        else:
            gather = self._gather or dist.all_gather_object
            # The config and the tokenizer's files: the same object in each state.
            constant = share.content and share.content["state"]["integrations"].get("huggingface")
            share = self.memory.copy(share, constant)
            self._under_way = (
                place,
                self._background.submit(self.files.write, share, place, gather),
            )
        self._last_time = time.monotonic()

    def has_saved(self, state: State) -> bool:
        """Return whether a checkpoint of this batch is saved, or being saved, on every rank."""
        return self._place(state) == (self._under_way[0] if self._under_way else self.saved)

    def _place(self, state: State) -> str:
        """Return where the checkpoint of this batch belongs."""
        name = f"ba{state.timestamp.batch.value}" + ("" if self._saves_pieces(state) else ".pt")
        return files.join(self.folder, name)

    def _saves_pieces(self, state: State) -> bool:
        return self.in_pieces and state.fsdp_config is not None

    def _wait_for_the_one_before(self, batch: int) -> None:
        """Wait for the checkpoint under way, and say so if that took long."""
        if self._under_way is None:
            return
        place, since = self._under_way[0], time.monotonic()
        self.wait()
        waited = time.monotonic() - since
        if waited > WORTH_A_LINE and dist.get_global_rank() == 0:
            log.warning(
                "warning: step %d: training waited %.1f s for %s to be saved, before it could save"
                " the next checkpoint; raise save_interval if it is often so",
                batch,
                waited,
                place,
            )

    def wait(self) -> None:
        """Wait until the checkpoint under way, if any, is whole; raise what prevented it."""
        if self._under_way is not None:
            place, written = self._under_way
            try:
                written.result()
            finally:
                self._under_way = None
            self.saved = place

    def settle(self) -> None:
        """Wait until the checkpoint under way, if any, is whole; log what may have prevented it."""
        try:
            self.wait()
        except Exception as error:
            log.warning("warning: the last checkpoint may not be saved: %s", one_line(error))

    def is_saving(self) -> bool:
        """Return whether a checkpoint is being written in the background at this moment."""
        return self._under_way is not None and not self._under_way[1].done()

    def has_failed(self) -> bool:
        """Return whether something has prevented the checkpoint under way; `wait` then raises it.

        A rank may know this earlier than others.
        """
        if self._under_way is None:
            return False
        _, written = self._under_way
        return written.done() and written.exception() is not None


def _whole(state: State) -> Share:
    """Return this rank's share of a checkpoint in one file. Every rank must call this."""
    if state.fsdp_config is not None:
        torch.cuda.empty_cache()  # weights are gathered, which takes memory
    content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
    return Share(content if dist.get_global_rank() == 0 else None)


def _meet_in_background() -> Gather:
    """Return a function that gathers objects of all ranks, in whatever thread they call it.

    It has a group of its own, as operations of two threads in one group would be mixed up. Every
    rank must call this. Raise ConfigError if the ranks cannot meet over gloo.
    """
    if dist.get_world_size() == 1:
        return lambda each: [each]
    try:
        group: Any = torch.distributed.new_group(timeout=GROUP_TIMEOUT, backend="gloo")
    except RuntimeError as error:
        raise ConfigError(
            f"save_async: ranks cannot meet over gloo: {one_line(error)}; name the network"
            " interface to the other machines (GLOO_SOCKET_IFNAME), or set save_async=false"
        ) from None
    return partial(dist.all_gather_object, group=group)


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
    replicas = None
    if config.parallelism.fsdp is not None:
        num_nodes = dist.get_world_size() // dist.get_local_world_size()
        replicas = sharding_of(config.parallelism.fsdp, num_nodes=num_nodes).replicas
    return find_start(
        config.save_folder,
        staging,
        needed,
        autoresume=config.autoresume,
        num_shards=dist.get_world_size() // (replicas or 1),
    )


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
    remember_environment()
    fsdp = config.parallelism.fsdp
    return SaveCheckpoints(
        config.save_folder,
        staging,
        batches=plan.save_batches,
        seconds=plan.save_seconds,
        num_to_keep=config.save_num_checkpoints_to_keep,
        in_pieces=fsdp is not None and fsdp.state_dict_type == "sharded",
        in_background=config.save_async,
        start=start,
        needed=needed,
        train_log=Path(config.log_folder, TRAIN_LOG),
    )
