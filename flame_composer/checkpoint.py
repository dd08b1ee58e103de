"""Checkpoints: saving them whole, finding the newest one that is, and turning them into Hugging Face models."""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import pickle
import re
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from composer import algorithms
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer import pieces, storage
from flame_composer.checkpoint_model import model_from, tokenizer_from
from flame_composer.config import ConfigError, DataError, StoreError, one_line
from flame_composer.folders import flush, new_folder
from flame_composer.foreign import count_not_finite, warn_not_finite
from flame_composer.model import check_runs_here, load_pretrained
from flame_composer.tokenizer import load_tokenizer, vocab_size_of
from flame_composer.train_config import RunPlan, TrainConfig

_NAME = re.compile(r"ba(\d+)(\.pt)?")  # a file, or a folder of pieces
# Composer makes some of its algorithms anew from their text in a checkpoint, which it evaluates; none of them is made so.
NEVER_EVALUATED = algorithms.__all__
UPLOAD_WAITS = (2, 10, 60, 180)  # seconds between attempts to save a checkpoint, each of which tries several times

log = logging.getLogger(__name__)

# What a checkpoint may hold besides tensors and plain Python values: the arrays in NumPy's random state, times, versions.
_SAFE_GLOBALS: list[Any] = [
    np.ndarray, np.dtype, np.dtypes.UInt32DType, datetime.timedelta, torch.torch_version.TorchVersion,
    (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),  # type: ignore[attr-defined]
]


class Checkpoint(NamedTuple):
    """Where a checkpoint is, and the local file it can be read from: the same, or a copy out of an object store.

    Of one in pieces, `place` is a folder and `file` its head, beside which the pieces lie.
    """

    place: str
    file: Path


class SaveCheckpoints(Callback):
    """Saves `ba<batch>.pt` every so many batches or seconds, and at the end; what has that name is always whole.

    Composer's own CheckpointSaver writes under the final name and moves its `latest` link in two steps, so that a kill
    can leave a torso or a link to nothing. This one writes under a temporary name, forces the bytes to disk and renames,
    or uploads them, which an object store shows when all are there. There is no link: the newest is found by name.
    It saves at the end of a batch only, never at the end of an epoch: there Composer's epoch counter and
    StreamingDataset's disagree, and the next epoch would repeat the order of the last.

    A sharded model can be saved in pieces, one per rank, in a folder `ba<batch>`: renamed when all are there, or in an
    object store with its head (`pieces.HEAD`) put last.
    """

    def __init__(
        self, folder: str, staging: Path, *, batches: int | None, seconds: float | None = None, num_to_keep: int,
        in_pieces: bool = False, start: Checkpoint | None = None,
    ):
        """Keeps the newest `num_to_keep` in `folder`, a path or URL; all if -1. One of `batches` and `seconds` says how often.

        `staging` is a local folder for copies of what is in an object store. `start` is what Composer loads (`load_path`):
        if that is the head of one in pieces, they are loaded after it.
        """
        self.folder = folder
        self.staging = staging if storage.is_url(folder) else Path(folder)
        self.batches = batches
        self.seconds = seconds
        self.num_to_keep = num_to_keep
        self.in_pieces = in_pieces
        self.start = start
        self.saved: str | None = None  # the newest
        self._last_time = time.monotonic()

    def after_load(self, state: State, logger: Logger) -> None:
        if self.start is not None and self.start.file.name == pieces.HEAD:
            content = _read(self.start, verify=False)  # that was done when it was chosen
            pieces.load(state, content["pieces"])

    def fit_start(self, state: State, logger: Logger) -> None:
        """Clears away what a killed run has left."""
        self._last_time = time.monotonic()
        dist.barrier()  # every rank has read what it goes on from
        if dist.get_local_rank() == 0:
            self.staging.mkdir(parents=True, exist_ok=True)
            for left in self.staging.glob("*ba*" if storage.is_url(self.folder) else "unfinished-*"):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        if dist.get_global_rank() == 0:
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
        temporary = self.staging / f"unfinished-{name}"
        (self._save_pieces if in_pieces else self._save_file)(state, temporary, place)
        if dist.get_global_rank() == 0:
            self._rotate()
        dist.barrier()
        self.saved = place
        self._last_time = time.monotonic()

    def _save_file(self, state: State, temporary: Path, place: str) -> None:
        save_checkpoint(state, str(temporary))
        if dist.get_global_rank() == 0:
            if storage.is_url(place):
                _upload(temporary, place)
                temporary.unlink()
            else:
                flush(temporary)
                os.replace(temporary, place)

    def _save_pieces(self, state: State, temporary: Path, place: str) -> None:
        is_first = dist.get_global_rank() == 0
        temporary.mkdir(parents=True, exist_ok=True)
        files = pieces.save(state, temporary)
        if storage.is_url(place):
            if is_first:
                storage.delete(storage.join(place, pieces.HEAD))  # of one that was found to be damaged
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
                storage.delete_folder(place)
                os.rename(temporary, place)

    def _rotate(self) -> None:
        """Counts what lies in the folder, so that it holds across restarts."""
        if self.num_to_keep > 0:
            for old in list_checkpoints(self.folder)[self.num_to_keep :]:
                try:
                    _delete(old)
                except (ConfigError, StoreError) as error:  # some stores let nothing be deleted, on purpose
                    log.warning("warning: %s: an old checkpoint stays: %s", old, error)


def build_saver(config: TrainConfig, staging: Path, plan: RunPlan, start: Checkpoint | None) -> SaveCheckpoints | None:
    """None for a run that saves nothing."""
    if config.save_folder is None:
        return None
    fsdp = config.parallelism.fsdp
    return SaveCheckpoints(
        config.save_folder, staging, batches=plan.save_batches, seconds=plan.save_seconds,
        num_to_keep=config.save_num_checkpoints_to_keep, in_pieces=fsdp is not None and fsdp.state_dict_type == "sharded",
        start=start,
    )


def _delete(checkpoint: str) -> None:
    if not checkpoint.endswith(".pt"):
        storage.delete(storage.join(checkpoint, pieces.HEAD))  # first, so that what is left is none
        storage.delete_folder(checkpoint)
    else:
        storage.delete(checkpoint)


def _upload(file: Path, place: str) -> None:
    """An outage of some minutes, or credentials that are being renewed, need not end a run."""
    for seconds in (*UPLOAD_WAITS, None):
        try:
            storage.put(file, place)
            return
        except (StoreError, ConfigError) as error:
            if seconds is None:
                raise
            log.warning("warning: %s: not saved yet: %s; trying again in %d s", place, error, seconds)
            time.sleep(seconds)


def list_checkpoints(folder: str) -> list[str]:
    """The checkpoints in a folder, newest first, damaged ones included; not what was never finished."""
    found = [(int(match[1]), storage.join(folder, name)) for name in storage.ls(folder) if (match := _NAME.fullmatch(name))]
    places = [place for _, place in sorted(found, reverse=True)]
    return [place for place in places if place.endswith(".pt") or storage.stat(storage.join(place, pieces.HEAD))]


def find_newest(folder: str, staging: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is named in a warning and the one before it tried.

    What is in an object store is copied to the local folder `staging`, once for all ranks of a machine; a copy that is not
    of the very object there is now is never used. Raises DataError if there are checkpoints but none of them is whole
    (starting over would be a surprise), and StoreError or ConfigError if the store does not answer.
    """
    checkpoints = list_checkpoints(folder)
    for place in checkpoints:
        checkpoint = _fetched(place, staging)
        try:
            read_checkpoint(checkpoint)
            return checkpoint
        except DataError as error:
            log.warning("warning: %s; trying the one before it", error)
    if checkpoints:
        raise DataError(f"{folder}: none of its {len(checkpoints)} checkpoints can be read; "
                        "move them away (or set another run_name) to start over")
    return None


def _fetched(place: str, staging: Path) -> Checkpoint:
    head = storage.stat(storage.join(place, pieces.HEAD))
    in_pieces = head is not None
    if not storage.is_url(place):
        return Checkpoint(place, Path(place, pieces.HEAD) if in_pieces else Path(place))
    there = head or storage.stat(place)
    if there is None:
        raise StoreError(f"{place}: was deleted a moment ago; start again")
    key = hashlib.sha256(f"{place} {there}".encode()).hexdigest()[:16]
    staging.mkdir(parents=True, exist_ok=True)
    copy = staging / f"{key}-{place.rpartition('/')[2]}"
    with FileLock(staging / ".lock"):
        if in_pieces:
            copy.mkdir(exist_ok=True)
            # The head last: with it, the copy is whole.
            for name in sorted(storage.ls(place), key=lambda name: name == pieces.HEAD):
                if not (copy / name).exists():
                    storage.download(storage.join(place, name), copy / name)
        elif not copy.exists():
            storage.download(place, copy)
    return Checkpoint(place, copy / pieces.HEAD if in_pieces else copy)


def find_start(folder: str, staging: Path, *, autoresume: bool) -> Checkpoint | None:
    """The checkpoint a run that saves in `folder` goes on from; None for a fresh start.

    Raises ConfigError without `autoresume` if there are checkpoints, which the run would overwrite; see `find_newest`.
    """
    if autoresume:
        return find_newest(folder, staging)
    if existing := list_checkpoints(folder):
        name = existing[0].rpartition("/")[2]
        raise ConfigError(f"{folder}: holds checkpoints of an earlier run ({name}); set autoresume=true to go on from them, or "
                          "another run_name or save_folder")
    return None


def read_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's content, its tensors mapped from the file; no code in it is run. `pieces` has those it is in, if it is.

    Raises DataError if it is missing, truncated, altered (every part's CRC-32 is checked) or holds anything but tensors
    and plain values.
    """
    return _read(checkpoint, verify=True)


def _read(checkpoint: Checkpoint, *, verify: bool) -> dict[str, Any]:
    content = _read_file(checkpoint, verify=verify)
    if checkpoint.file.name == pieces.HEAD:
        number = content.get("pieces") if isinstance(content, dict) else None
        if not isinstance(number, int) or number < 1:
            raise DataError(f"{checkpoint.place}: not the head of a checkpoint in pieces")
        names = map(pieces.name_of, range(number))
        content["pieces"] = [
            _read_file(Checkpoint(storage.join(checkpoint.place, name), checkpoint.file.with_name(name)), verify=verify)
            for name in names
        ]
    return content


def _read_file(checkpoint: Checkpoint, *, verify: bool) -> dict[str, Any]:
    place, file = checkpoint
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip() if verify else None
        if damaged is not None:
            raise DataError(f"{place}: damaged checkpoint: {damaged} does not match its checksum")
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        raise DataError(f"{place}: not a whole checkpoint: {one_line(error)}") from None
    except pickle.UnpicklingError as error:
        raise DataError(f"{place}: refused, it holds something other than tensors and plain values: "
                        f"{one_line(error)}") from None


def find_checkpoint(place: str, staging: Path) -> Checkpoint:
    """`place` itself, or the newest whole checkpoint in it if it is a run's folder. Raises ConfigError if there is none."""
    if storage.stat(place) is not None or storage.stat(storage.join(place, pieces.HEAD)) is not None:
        return _fetched(place, staging)
    newest = find_newest(place, staging)
    if newest is None:
        _refuse_sharded(place)
        is_folder = bool(storage.ls(place)) or Path(place).is_dir()
        below = storage.join(place, "checkpoints")
        meant = f"did you mean {below}?" if list_checkpoints(below) else "name a checkpoint or the folder a run saved them in"
        raise ConfigError(f"{place}: {'a folder without checkpoints (ba*.pt)' if is_folder else 'no such file or folder'}; "
                          f"{meant}")
    return newest


def _refuse_sharded(place: str) -> None:
    """Raises ConfigError for torch's distributed checkpoints: a folder each, of files for each rank and one `.metadata`."""
    for folder in (place, *(storage.join(place, name) for name in storage.ls(place))):
        if ".metadata" in storage.ls(folder):
            raise ConfigError(f"{folder}: a sharded checkpoint, which cannot be read here; only those in one file can (ba*.pt)")


def load_model(place_or_id: str, tokenizer: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model and tokenizer, to be run, from a Hugging Face folder or id, a checkpoint, or the newest checkpoint in a folder.

    `tokenizer` is the folder or id of one to take instead. Raises ConfigError for one with tokens that the model has not.
    """
    path = Path(place_or_id)
    if storage.is_url(place_or_id) or path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        with tempfile.TemporaryDirectory() as staging:
            model, its_own = load_from_checkpoint(find_checkpoint(place_or_id, Path(staging)))
            check_runs_here(model.config, place_or_id)
            found = its_own if tokenizer is None else load_tokenizer(tokenizer)
    else:
        model, found = load_pretrained(place_or_id), load_tokenizer(tokenizer or place_or_id)
    if vocab_size_of(found) > model.config.vocab_size:
        raise ConfigError(f"{tokenizer or place_or_id}: its tokenizer has {vocab_size_of(found)} tokens, the model only "
                          f"{model.config.vocab_size}; give the one it was trained with")
    return model, found


def load_from_checkpoint(checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The Hugging Face model and tokenizer a training checkpoint holds, the weights exactly; their average, if there is one."""
    return model_in(read_checkpoint(checkpoint), checkpoint)


def model_in(
    content: dict[str, Any], checkpoint: Checkpoint, which: Literal["auto", "model", "ema"] = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """As `load_from_checkpoint`, of what `read_checkpoint` returned.

    `model` are the weights that training goes on with, `ema` their exponential moving average, which is what was evaluated;
    `auto` takes that where the run has one. Raises ConfigError for `ema` without one.
    """
    try:
        hf_state = content["state"]["integrations"]["huggingface"]
        average = average_of(content["state"])
        weights = pieces.weights(content["pieces"]) if "pieces" in content else content["state"]["model"]
        weights = dict(weights) | ({} if which == "model" else average)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"{checkpoint.place}: not a training checkpoint of this package: it holds no Hugging Face model"
        ) from None
    if which == "ema" and not average:
        raise ConfigError(f"weights=ema: {checkpoint.place}: holds no average of the weights; set weights=model")
    return model_from(hf_state, weights, checkpoint.place), tokenizer_from(hf_state, checkpoint.place)


def average_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The exponential moving average of the weights, which is what was evaluated, if the run has one."""
    return next((kept["average"] or {} for name, kept in state.get("algorithms", ()) if name == "EMA"), {})


def save_hf_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, *, dtype: str, max_shard_size: int = 5_000_000_000,
    card: str | None = None,
) -> None:
    """Config, safetensors files of at most `max_shard_size` bytes, generation config and tokenizer in a `new_folder`.

    The generation config has the tokenizer's special tokens where the model names none; `card` becomes README.md. Weights
    that are infinite or not a number, or become so in `dtype`, are named in a warning.
    """
    if model.generation_config is not None:
        for name, token in special_tokens(tokenizer).items():
            if getattr(model.generation_config, name) is None:
                setattr(model.generation_config, name, token)
        model.generation_config._from_model_config = False  # transformers would make it anew, without them
    with new_folder(out) as folder:
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        model.to(getattr(torch, dtype))
        warn_not_finite(f"{out} ({dtype})", {name: count_not_finite(each) for name, each in model.state_dict().items()})
        model.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """As generation names them. A batch is filled up with the end-of-text token where there is none for padding."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}
