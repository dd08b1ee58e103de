"""Checkpoints: saving them whole, keeping the newest that are, and turning them into Hugging
Face models.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from composer import algorithms
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import checkpoint as composer_checkpoint
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.checkpoint import sharded as pieces
from flame_composer.checkpoint.content import Needed, check_pieces
from flame_composer.checkpoint.find import (
    find_checkpoint,
    find_start,
    has_head,
    list_checkpoints,
    list_torsos,
    look_at,
    remove_copy,
    step_of,
)
from flame_composer.checkpoint.read import (
    Checkpoint,
    read_checkpoint,
    read_content,
    read_for_composer,
)
from flame_composer.checkpoint.to_model import model_from, tokenizer_from
from flame_composer.config.train import TRAIN_LOG, RunPlan, TrainConfig
from flame_composer.errors import (
    GOES_ON,
    ConfigError,
    DataError,
    StoreError,
    TrainingError,
    one_line,
)
from flame_composer.model.causal_lm import check_runs_here, load_pretrained
from flame_composer.model.foreign import count_not_finite, warn_not_finite
from flame_composer.storage import files as storage
from flame_composer.storage.folders import flush, new_folder
from flame_composer.storage.locks import is_own_folder
from flame_composer.text.ends import ends_in, ends_of, note_ends, start_of
from flame_composer.text.tokenizer import load_tokenizer, special_tokens, vocab_size_of

# Composer makes some of its algorithms anew from their text in a checkpoint, which it evaluates;
# none of them is made so.
NEVER_EVALUATED = algorithms.__all__
# Seconds between attempts to save a checkpoint, each of which tries several times
UPLOAD_WAITS = (2, 10, 60, 180)
# After so long, looking at what lies in the folder goes on when the next checkpoint is saved
VERIFY_SECONDS = 60
# No attempt begins later than so long after the first. At a store that hangs each takes three
# minutes.
UPLOAD_SECONDS = 260

# Of what torch says of a file that it cannot write (2.7).
_CANNOT_WRITE = re.compile(
    "PytorchStreamWriter|Parent directory .* does not exist|open file failed"
)

log = logging.getLogger(__name__)


class SaveCheckpoints(Callback):
    """Saves `ba<batch>.pt` every so many batches or seconds, and at the end; what has that name is
    always whole.

    Composer's own CheckpointSaver writes under the final name and moves its `latest` link in two
    steps, so that a kill can leave a torso or a link to nothing. This one writes under a temporary
    name, forces the bytes to disk and renames, or uploads them, which an object store shows when
    all are there. There is no link: the newest is found by name. It saves at the end of a batch
    only, never at the end of an epoch: there Composer's epoch counter and StreamingDataset's
    disagree, and the next epoch would repeat the order of the last.

    A sharded model can be saved in pieces, one per rank, in a folder `ba<batch>`: renamed when all
    are there, or in an object store with its head (`pieces.HEAD`) put last.

    Old checkpoints are deleted once there are enough newer ones that are whole. One that this run
    saved, or goes on from, is known to be; any other is read once, and a damaged one counts for
    nothing.
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
        """Keeps the newest `num_to_keep` in `folder`, a path or URL; all if -1. One of `batches`
        and `seconds` says how often.

        `staging` is a local folder for copies of what is in an object store. `start` is what
        Composer loads (`load_path`): if that is the head of one in pieces, they are loaded after
        it. `needed` is what a checkpoint must hold to be one of this run. `train_log` is a file
        that has to be on disk before a checkpoint gets its name.
        """
        self.folder = folder
        self.staging = staging if storage.is_url(folder) else Path(folder)
        self.batches = batches
        self.seconds = seconds
        self.num_to_keep = num_to_keep
        self.in_pieces = in_pieces
        self.start = start
        self.needed = needed
        self.train_log = train_log
        self.saved: str | None = None  # the newest
        self._last_time = time.monotonic()
        # As it was when that was found out
        self._is_whole: dict[str, tuple[storage.Stat | None, bool]] = {}
        self._stays: set[str] = set()  # what could not be deleted

    def after_load(self, state: State, logger: Logger) -> None:
        if self.start is not None and self.start.file.name == pieces.HEAD:
            content = read_content(self.start, verify=False)  # that was done when it was chosen
            pieces.load(state, content["pieces"])

    def fit_start(self, state: State, logger: Logger) -> None:
        """Clears away what a killed run has left."""
        self._last_time = time.monotonic()
        dist.barrier()  # every rank has read what it goes on from
        if dist.get_local_rank() == 0:
            self.staging.mkdir(parents=True, exist_ok=True)
            for left in self.staging.glob(
                "*ba*" if storage.is_url(self.folder) else "unfinished-ba*"
            ):
                if (
                    storage.is_url(self.folder)
                    or step_of(left.name.removeprefix("unfinished-")) is not None
                ):
                    remove_copy(left)
        if dist.get_global_rank() == 0:
            if self.start is not None:
                self._know(self.start.place, True)
                for place in self.start.passed_over:
                    self._know(place, False)
            storage.abort_uploads(self.folder)
        dist.barrier()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None
        if self._is_due(state.timestamp.batch.value) or state.timestamp >= state.max_duration:
            self.save(state)

    def _is_due(self, batch: int) -> bool:
        if self.batches is not None:
            return batch % self.batches == 0
        assert self.seconds is not None
        # Clocks differ: the first rank's decides for all.
        decision = [time.monotonic() - self._last_time >= self.seconds]
        dist.broadcast_object_list(decision, src=0)
        return decision[0]

    def save(self, state: State) -> None:
        """Save now, unless this batch was saved already. Every rank must call it."""
        in_pieces = self.in_pieces and state.fsdp_config is not None
        name = f"ba{state.timestamp.batch.value}" + ("" if in_pieces else ".pt")
        place = storage.join(self.folder, name)
        if place == self.saved:
            return
        with _saving(place):
            if dist.get_global_rank() == 0:
                self._flush_log()
            temporary = self.staging / f"unfinished-{name}"
            (self._save_pieces if in_pieces else self._save_file)(state, temporary, place)
            if dist.get_global_rank() == 0 and not storage.is_url(place):
                flush(Path(self.folder))
        if dist.get_global_rank() == 0:
            self._know(place, True)
            self._rotate()
        dist.barrier()
        self.saved = place
        self._last_time = time.monotonic()

    def _flush_log(self) -> None:
        """A restart must find the row of every step that its checkpoint has behind it, after a
        power loss too.
        """
        if self.train_log is not None and self.train_log.exists():
            flush(self.train_log)
            flush(self.train_log.parent)

    def _save_file(self, state: State, temporary: Path, place: str) -> None:
        if dist.get_global_rank() != 0:
            save_checkpoint(state, str(temporary))
            return
        self.staging.mkdir(parents=True, exist_ok=True)
        with storage.create(temporary) as file:
            # By its descriptor: what others put under its name meanwhile is not written to
            save_checkpoint(state, f"/proc/self/fd/{file.fileno()}")
            self._make_way(place)
            if not os.path.samestat(os.lstat(temporary), os.fstat(file.fileno())):
                raise OSError(errno.EEXIST, f"somebody else has put another file at {temporary}")
            if storage.is_url(place):
                _upload(temporary, place)
                temporary.unlink()
            else:
                flush(temporary)
                os.replace(temporary, place)

    def _save_pieces(self, state: State, temporary: Path, place: str) -> None:
        is_first = dist.get_global_rank() == 0
        temporary.mkdir(parents=True, exist_ok=True)
        if not is_own_folder(temporary):
            raise OSError(errno.EEXIST, f"{temporary} is a link, or another user's")
        files = pieces.save(state, temporary)
        if storage.is_url(place):
            if is_first:
                self._make_way(place)
                storage.delete(storage.join(place, pieces.HEAD))  # of one that could not be moved
            dist.barrier()
            for file in files:
                if file.name == pieces.HEAD:
                    continue
                _upload(file, storage.join(place, file.name))
            dist.barrier()
            if is_first:
                _upload(files[-1], storage.join(place, pieces.HEAD))
            dist.barrier()
            if dist.get_local_rank() == 0:
                shutil.rmtree(temporary)
        else:
            for file in files:
                flush(file)
            dist.barrier()
            if is_first:
                flush(temporary)
                self._make_way(place)
                os.rename(temporary, place)

    def _make_way(self, place: str) -> None:
        """Set aside what has a new checkpoint's name: a damaged one, or one of another run,
        which may be all there is of it.
        """
        is_file = storage.stat(place) is not None
        if is_file and self._is_whole.get(place) == (_stat(place), True):
            return  # this run saved the same before
        if not (is_file or has_head(place) if storage.is_url(place) else os.path.lexists(place)):
            return
        number = 0
        while _is_taken(
            aside := storage.join(self.folder, f"aside{number or ''}-{place.rpartition('/')[2]}")
        ):
            number += 1
        try:
            storage.move(place, aside)
        except (ConfigError, StoreError) as error:  # some stores let nothing be deleted, on purpose
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

    def _rotate(self) -> None:
        """Delete what is older than the newest `num_to_keep` that are whole, of all that lies in
        the folder.
        """
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
                for place in list_torsos(self.folder, before=oldest):
                    self._delete(place)
        except (ConfigError, DataError, OSError) as error:
            log.warning(
                "warning: %s: no old checkpoint is deleted this time: %s",
                self.folder,
                one_line(error),
            )

    def _know(self, place: str, is_whole: bool) -> None:
        self._is_whole[place] = _stat(place), is_whole

    def _counts(self, place: str) -> bool:
        """Whether it is whole; looked at if it has changed since that was known."""
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
        if place in self._stays:
            return
        try:
            self._remove(place)
            self._is_whole.pop(place, None)
        except (ConfigError, StoreError, OSError) as error:
            self._stays.add(place)
            log.warning("warning: %s: an old checkpoint stays: %s", place, one_line(error))

    def _remove(self, place: str) -> None:
        if not storage.is_url(place) and os.path.islink(place):
            os.unlink(place)  # and not what it leads to, which may be another run's
        elif place.endswith(".pt"):
            storage.delete(place)
        elif storage.is_url(place):
            storage.delete(storage.join(place, pieces.HEAD))  # first, so that what is left is none
            storage.delete_folder(place)
        else:
            # Which the next start clears away after a kill
            left = self.staging / f"unfinished-{Path(place).name}"
            os.rename(place, left)
            shutil.rmtree(left)


@contextmanager
def _saving(place: str) -> Iterator[None]:
    """Raise TrainingError, with the checkpoint's name, if the disk does not take it."""
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
    """Return what a run goes on from, see `find_start`.

    Every rank must call it, once all have met. `needed` is what its checkpoints have to hold.
    """
    composer_checkpoint._torch_load_with_validation = read_for_composer  # type: ignore[assignment]
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
    """Return None for a run that saves nothing."""
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


def _stat(place: str) -> storage.Stat | None:
    return storage.stat(place if place.endswith(".pt") else storage.join(place, pieces.HEAD))


def _is_taken(place: str) -> bool:
    if storage.is_url(place):
        return bool(storage.stat(place) or storage.ls(place))
    return os.path.lexists(place)


def _upload(file: Path, place: str) -> None:
    """An outage of some minutes, or credentials that are being renewed, need not end a run."""
    begun = time.monotonic()
    for seconds in (*UPLOAD_WAITS, None):
        try:
            storage.put(file, place)
            return
        except (StoreError, ConfigError) as error:
            if seconds is None or time.monotonic() - begun + seconds > UPLOAD_SECONDS:
                raise
            log.warning(
                "warning: %s: not saved yet: %s; trying again in %d s", place, error, seconds
            )
            time.sleep(seconds)


def load_model(
    place_or_id: str, tokenizer: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model and tokenizer, to be run, from a Hugging Face folder or id, a checkpoint, or the newest
    checkpoint in a folder.

    `tokenizer` is the folder or id of one to take instead. Raises ConfigError for one with tokens
    that the model has not.
    """
    path = Path(place_or_id)
    if (
        storage.is_url(place_or_id)
        or path.is_file()
        or (path.is_dir() and not (path / "config.json").is_file())
    ):
        with tempfile.TemporaryDirectory() as staging:
            model, its_own = load_from_checkpoint(find_checkpoint(place_or_id, Path(staging)))
            check_runs_here(model.config, place_or_id)
            found = its_own if tokenizer is None else load_tokenizer(tokenizer)
            known = ends_of(its_own)
    else:
        model, found = load_pretrained(place_or_id), load_tokenizer(tokenizer or place_or_id)
        known = ends_in(place_or_id)
    if tokenizer is not None and known is not None:
        note_ends(found, known)  # documents began as they did, whatever tokenizer is taken
    if vocab_size_of(found) > model.config.vocab_size:
        raise ConfigError(
            f"{tokenizer or place_or_id}: its tokenizer has {vocab_size_of(found)} tokens, the"
            f" model only {model.config.vocab_size}; give the one it was trained with"
        )
    return model, found


def load_from_checkpoint(checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The Hugging Face model and tokenizer a training checkpoint holds, the weights exactly;
    their average, if there is one.
    """
    return model_in(read_checkpoint(checkpoint), checkpoint)


def model_in(
    content: dict[str, Any], checkpoint: Checkpoint, which: Literal["auto", "model", "ema"] = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """As `load_from_checkpoint`, of what `read_checkpoint` returned.

    `model` are the weights that training goes on with, `ema` their exponential moving average,
    which is what was evaluated; `auto` takes that where the run has one. Raises ConfigError for
    `ema` without one.
    """
    try:
        hf_state = content["state"]["integrations"]["huggingface"]
        average = average_of(content["state"])
        weights = (
            pieces.weights(content["pieces"]) if "pieces" in content else content["state"]["model"]
        )
        weights = dict(weights) | ({} if which == "model" else average)
        behind = check_pieces(content, checkpoint.place, may_be_behind=True)
    except DataError:
        raise
    except Exception:  # whatever a content of any kind makes of what looks at it
        raise DataError(
            f"{checkpoint.place}: not a training checkpoint of this package: it holds no Hugging"
            " Face model"
        ) from None
    if behind is not None:
        log.warning("warning: %s", behind)
    if which == "ema" and not average:
        raise ConfigError(
            f"weights=ema: {checkpoint.place}: holds no average of the weights; set weights=model"
        )
    return model_from(hf_state, weights, checkpoint.place), tokenizer_from(
        hf_state, checkpoint.place
    )


def average_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The exponential moving average of the weights, which is what was evaluated, if the run has
    one.
    """
    return next(
        (kept["average"] or {} for name, kept in state.get("algorithms", ()) if name == "EMA"), {}
    )


def save_hf_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    *,
    dtype: str,
    max_shard_size: int = 5_000_000_000,
    card: str | None = None,
) -> None:
    """Config, safetensors files of at most `max_shard_size` bytes, generation config and tokenizer
    in a `new_folder`.

    The generation config has the tokenizer's special tokens where the model names none; `card`
    becomes README.md. Weights that are infinite or not a number, or become so in `dtype`, are named
    in a warning.
    """
    if model.generation_config is not None:
        for name, token in special_tokens(tokenizer).items():
            if getattr(model.generation_config, name) is None:
                setattr(model.generation_config, name, token)
        if ends_of(tokenizer) is not None:
            # What transformers begins a text with that is given nothing to go on from.
            model.generation_config.bos_token_id = start_of(tokenizer)
        # Transformers would make it anew, without them
        model.generation_config._from_model_config = False
    with new_folder(out) as folder:
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        model.to(getattr(torch, dtype))
        warn_not_finite(
            f"{out} ({dtype})",
            {name: count_not_finite(each) for name, each in model.state_dict().items()},
        )
        model.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
