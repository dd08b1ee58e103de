"""Checkpoints: saving them whole, finding the newest one that is, and turning them into Hugging Face models."""

from __future__ import annotations

import datetime
import logging
import os
import pickle
import re
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from composer.models.huggingface import get_hf_config_from_composer_state_dict
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer import cpu
from flame_composer.config import ConfigError, DataError
from flame_composer.model import build_model, load_pretrained
from flame_composer.tokenizer import load_tokenizer
from flame_composer.train_config import RunPlan

_NAME = re.compile(r"ba(\d+)\.pt")

log = logging.getLogger(__name__)

# What a checkpoint may hold besides tensors and plain Python values: the arrays in NumPy's random state, times, versions.
_SAFE_GLOBALS: list[Any] = [
    np.ndarray, np.dtype, np.dtypes.UInt32DType, datetime.timedelta, torch.torch_version.TorchVersion,
    (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),  # type: ignore[attr-defined]
]


class SaveCheckpoints(Callback):
    """Saves `ba<batch>.pt` every so many batches or seconds, and at the end; a file under that name is always whole.

    Composer's own CheckpointSaver writes under the final name and moves its `latest` link in two steps, so that a kill
    can leave a torso or a link to nothing. This one writes under a temporary name, forces the bytes to disk and renames.
    It saves at the end of a batch only, never at the end of an epoch: there Composer's epoch counter and
    StreamingDataset's disagree, and the next epoch would repeat the order of the last.
    """

    def __init__(self, folder: Path, *, batches: int | None, seconds: float | None = None, num_to_keep: int):
        """One of `batches` and `seconds` says how often; `num_to_keep` of -1 keeps all."""
        self.folder = folder
        self.batches = batches
        self.seconds = seconds
        self.num_to_keep = num_to_keep
        self.saved: Path | None = None  # the newest
        self._last_time = time.monotonic()

    def fit_start(self, state: State, logger: Logger) -> None:
        self._last_time = time.monotonic()
        if dist.get_global_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for torso in self.folder.glob("unfinished-*.pt"):
                torso.unlink()

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
        path = self.folder / f"ba{state.timestamp.batch.value}.pt"
        if path == self.saved:
            return
        temporary = path.with_name(f"unfinished-{path.name}")
        save_checkpoint(state, str(temporary))
        if dist.get_global_rank() == 0:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self._rotate()
        dist.barrier()
        self.saved = path
        self._last_time = time.monotonic()

    def _rotate(self) -> None:
        """Counts what lies in the folder, so that it holds across restarts."""
        if self.num_to_keep > 0:
            for old in list_checkpoints(self.folder)[self.num_to_keep :]:
                old.unlink()


def build_saver(folder: Path | None, plan: RunPlan, *, num_to_keep: int) -> SaveCheckpoints | None:
    """None for a run that saves nothing."""
    if folder is None:
        return None
    return SaveCheckpoints(folder, batches=plan.save_batches, seconds=plan.save_seconds, num_to_keep=num_to_keep)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, damaged ones included."""
    found = [(int(match[1]), path) for path in folder.glob("ba*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def find_newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is named in a warning and the one before it tried.

    Raises DataError if there are checkpoints but none of them is whole: starting over would be a surprise.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        try:
            read_checkpoint(path)
            return path
        except DataError as error:
            log.warning("warning: %s; trying the one before it", error)
    if checkpoints:
        raise DataError(f"{folder}: none of its {len(checkpoints)} checkpoints can be read; "
                        "move them away (or set another run_name) to start over")
    return None


def find_start(folder: Path, *, autoresume: bool) -> Path | None:
    """The checkpoint a run that saves in `folder` goes on from; None for a fresh start.

    Raises ConfigError without `autoresume` if there are checkpoints, which the run would overwrite; see `find_newest`.
    """
    if autoresume:
        return find_newest(folder)
    if existing := list_checkpoints(folder):
        raise ConfigError(f"{folder}: holds checkpoints of an earlier run ({existing[0].name}); set autoresume=true to go on "
                          "from them, or another run_name or save_folder")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, its tensors mapped from the file; no code in it is run.

    Raises DataError if it is missing, truncated, altered (every part's CRC-32 is checked) or holds anything but tensors
    and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise DataError(f"{path}: damaged checkpoint: {damaged} does not match its checksum")
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a whole checkpoint: {' '.join(str(error).split())[:200]}") from None
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: refused, it holds something other than tensors and plain values: "
                        f"{' '.join(str(error).split())[:200]}") from None


def find_checkpoint(path: Path) -> Path:
    """`path` itself, or the newest whole checkpoint if it is a folder. Raises ConfigError if there is none."""
    if path.is_file():
        return path
    newest = find_newest(path) if path.is_dir() else None
    if newest is None:
        raise ConfigError(f"{path}: {'a folder without checkpoints (ba*.pt)' if path.is_dir() else 'no such file or folder'}; "
                          "name a checkpoint or the folder a run saved them in")
    return newest


def load_model(path_or_id: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model and tokenizer from a Hugging Face folder or id, a checkpoint, or the newest checkpoint in a folder."""
    path = Path(path_or_id)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return load_from_checkpoint(find_checkpoint(path))
    return load_pretrained(path_or_id), load_tokenizer(path_or_id)


def load_from_checkpoint(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The Hugging Face model and tokenizer a training checkpoint holds, the weights exactly."""
    content = read_checkpoint(path)
    try:
        hf_state = content["state"]["integrations"]["huggingface"]
        weights = content["state"]["model"]
    except (KeyError, TypeError):
        raise DataError(f"{path}: not a training checkpoint of this package: it holds no Hugging Face model") from None
    cpu.enable()  # fla's configs have to be known to transformers
    model = build_model(get_hf_config_from_composer_state_dict(content))
    prefix = "model."
    model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    with tempfile.TemporaryDirectory() as folder:
        HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(hf_state, tokenizer_save_dir=folder)
        tokenizer = load_tokenizer(folder)
    return model, tokenizer


def save_hf_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, *, dtype: str) -> None:
    """Config, safetensors and tokenizer in a folder that appears whole or not at all.

    Raises ConfigError if `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: already exists and is not empty; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.to(getattr(torch, dtype)).save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        for path in (temporary, *temporary.iterdir()):  # made for this user alone, as temporary and safetensors files are
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
