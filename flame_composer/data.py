"""Datasets to batches: checking a dataset before use, streaming its rows in a resumable order, collating them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec, Evaluator, Event, State
from composer.utils import dist
from filelock import FileLock
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from flame_composer.config import ConfigError, DataError
from flame_composer.manifest import HASH, Manifest, ShardFile, check_shards, read_index, read_manifest
from flame_composer.tokenizer import fingerprint
from flame_composer.train_config import DataConfig, EvalDataConfig

IGNORE = -100  # the label that carries no loss
CACHE = Path("~/.cache/flame_composer")

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Dataset:
    """A dataset fit for training: `folder` holds it, or the part of `remote` that has been downloaded so far."""

    folder: str
    remote: str | None
    manifest: Manifest
    files: list[ShardFile]


def open_dataset(
    local: str | None, remote: str | None, *, tokenizer: PreTrainedTokenizerFast, context_length: int | None = None
) -> Dataset:
    """Read manifest and index; refuse a dataset that is damaged, or made for another tokenizer or `context_length`.

    A remote dataset is cached under `local` (or ~/.cache/flame_composer) in a folder named after its index, so that
    another dataset put under the same address never meets the old one's shards.

    Raises ConfigError or DataError.
    """
    if remote is None:
        assert local is not None
        folder, manifest = local, read_manifest(local)
        files = check_shards(folder)
    else:
        folder = _fetch_index(remote, Path(local or CACHE).expanduser())
        manifest = read_manifest(folder)
        files = read_index(folder, manifest)
    place = remote or local
    if context_length is not None and manifest.context_length != context_length:
        raise ConfigError(f"{place}: its rows are {manifest.context_length} tokens long, context_length is {context_length}; "
                          f"set context_length={manifest.context_length} or convert the text again")
    ours, theirs = fingerprint(tokenizer), manifest.tokenizer
    if ours != theirs:
        what = next(f"{name}: {getattr(theirs, name)} there, {getattr(ours, name)} here"
                    for name in ("vocab_size", "bos_token_id", "eos_token_id", "sha256")
                    if getattr(ours, name) != getattr(theirs, name))
        raise ConfigError(f"{place}: was made with another tokenizer than {tokenizer.name_or_path} ({what}); "
                          "set tokenizer to the one it was converted with, or convert the text again")
    return Dataset(folder, remote, manifest, files)


def _fetch_index(remote: str, cache: Path) -> str:
    """Download manifest.json and index.json of a remote dataset into its cache folder, and return that folder."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("manifest.json", "index.json"):
            source = f"{remote.rstrip('/')}/{name}"
            try:
                CloudDownloader.get(remote).download(source, str(Path(temporary, name)), timeout=15)
            except Exception as error:  # every store's client has exceptions of its own
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(f"{source}: cannot be read: {reason[:200]}; check the address, the credentials and that "
                                  "the conversion has finished") from None
        manifest = read_manifest(temporary)
        read_index(temporary, manifest)
        folder = cache / manifest.index_sha256[:16]
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("manifest.json", "index.json"):
            # Ranks do this side by side, with the same bytes.
            whole = Path(tempfile.mkstemp(dir=folder)[1])
            whole.write_bytes(Path(temporary, name).read_bytes())
            whole.replace(folder / name)
    return str(folder)


class Rows(StreamingDataset):
    """StreamingDataset that reads whole global batches only, and checks every shard's hash before it uses it.

    StreamingDataset pads an epoch with repeated rows until it divides among the ranks, so the number of batches, and the
    last ones' rows, depend on how many ranks there are. This one ends at the last full global batch on any number.
    """

    def __init__(self, dataset: Dataset, *, batch_size: int, **options: Any):
        """`batch_size` is this rank's share of the global batch."""
        # Two jobs that start together would take the same name for their shared memory; the local leader chooses it.
        lock = FileLock(Path(tempfile.gettempdir(), "flame_composer.lock")) if dist.get_local_rank() == 0 else None
        with lock or contextlib.nullcontext():
            super().__init__(local=dataset.folder, remote=dataset.remote, validate_hash=HASH, batch_size=batch_size, **options)
        self.files = dataset.files
        self.global_batch_size = batch_size * dist.get_world_size()
        self.batches_per_epoch = self.num_samples // self.global_batch_size
        self.length = self.batches_per_epoch * batch_size
        self._checked: set[int] = set()
        self._failures: dict[int, str] = {}

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """This worker's row ids from `sample_in_epoch` on, in order; its batches are every num_workers-th one."""
        ids = super()._get_work(epoch, sample_in_epoch)
        assert self.batch_size is not None
        batches_left = self.batches_per_epoch - math.ceil(sample_in_epoch / self.global_batch_size)
        worker = get_worker_info()
        id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return ids[: max(0, math.ceil((batches_left - id) / num_workers)) * self.batch_size]

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard; one that cannot be had counts as prepared, and `get_item` says what is wrong with it.

        Upstream a background thread dies of it, unheard: the epoch ends early, or workers wait for one another for ever.
        """
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:  # every store's client has exceptions of its own
            self._failures[shard_id] = " ".join(str(error).split())[:200] or type(error).__name__
            self._shard_states[shard_id] = _ShardState.LOCAL

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        shard_id, _ = self.spanner[sample_id]
        if shard_id not in self._checked:
            self.prepare_shard(shard_id)
            try:
                self._check(self.files[shard_id], self._failures.get(shard_id) if self.streams[0].remote else None)
            except DataError:
                if hasattr(self, "_event"):
                    self._event.set()  # ends the background threads, which the process would wait for before it ends
                raise
            self._checked.add(shard_id)
        return super().get_item(sample_id, retry)

    def _check(self, file: ShardFile, failure: str | None) -> None:
        path = Path(self.streams[0].local, file.basename)
        try:
            content = path.read_bytes()
        except OSError as error:
            reason = failure or error.strerror
            raise DataError(f"{path}: shard cannot be read: {reason}; restore it, or convert again") from None
        if len(content) != file.bytes or get_hash(HASH, content) != file.hash:
            raise DataError(f"{path}: damaged shard: its {len(content)} bytes are not those it was written with "
                            f"({file.bytes} bytes, {HASH} {file.hash}); restore it from a copy, or delete it if it is "
                            "the cached copy of a remote dataset")


class EvalBatches(IterableDataset):
    """Every row of a dataset exactly once, in batches, over any number of ranks and workers.

    Rank r reads rows r, r + world size, ...; where the rows do not divide, rows without labels fill up, so that every
    rank has as many batches and a token-weighted mean is exact.
    """

    def __init__(self, rows: Rows, *, batch_size: int, max_rows: int | None):
        self.rows = rows
        self.batch_size = batch_size
        self.num_rows = min(rows.num_samples, max_rows or rows.num_samples)
        self.rank, self.world_size = dist.get_global_rank(), dist.get_world_size()

    def __len__(self) -> int:
        """Batches per rank."""
        return math.ceil(self.num_rows / (self.world_size * self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(id, len(self), num_workers):
            first = index * self.batch_size
            numbers = [self.rank + self.world_size * (first + i) for i in range(self.batch_size)]
            batch = collate([self.rows[min(number, self.num_rows - 1)] for number in numbers])
            batch["labels"][[number >= self.num_rows for number in numbers]] = IGNORE
            yield batch


def collate(rows: list[dict[str, NDArray[Any]]]) -> Batch:
    """`input_ids`, `labels` and `sequence_id` (the number of the token's document within its row), all int64 [B, T].

    Labels are the tokens themselves: the model shifts them. The first one predicts nothing, so it is never a label.
    """
    input_ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
    sequence_id = np.stack([np.repeat(np.arange(len(row["doc_lengths"])), row["doc_lengths"]) for row in rows])
    labels = input_ids.clone()
    labels[:, 0] = IGNORE
    return {"input_ids": input_ids, "labels": labels, "sequence_id": torch.from_numpy(sequence_id)}


def describe_order(dataset: Dataset, config: DataConfig, *, global_batch_size: int, seed: int) -> dict[str, Any]:
    """All that decides which rows are in which global batch: a run must not go on with another."""
    return {
        "train_data (index.json)": dataset.manifest.index_sha256, "global_batch_size": global_batch_size,
        "train_data.shuffle": config.shuffle, "train_data.shuffle_algo": config.shuffle_algo,
        "train_data.shuffle_seed": seed if config.shuffle_seed is None else config.shuffle_seed,
        "train_data.shuffle_block_size": config.shuffle_block_size,
        "train_data.num_canonical_nodes": config.num_canonical_nodes,
    }


def count_tokens(batch: Batch) -> dict[str, int]:
    """All tokens of a batch, and those that carry loss."""
    return {"total": batch["input_ids"].numel(), "loss_generating": int((batch["labels"] != IGNORE).sum())}


def build_train_loader(dataset: Dataset, config: DataConfig, *, global_batch_size: int, seed: int) -> DataSpec:
    """This rank's share of every global batch, shuffled with `seed` unless the config has one of its own.

    Raises ConfigError if the dataset does not hold one global batch.
    """
    batch_size = global_batch_size // dist.get_world_size()
    rows = Rows(
        dataset, batch_size=batch_size, shuffle=config.shuffle, shuffle_algo=config.shuffle_algo,
        shuffle_seed=seed if config.shuffle_seed is None else config.shuffle_seed,
        shuffle_block_size=config.shuffle_block_size, num_canonical_nodes=config.num_canonical_nodes,
        predownload=config.predownload, cache_limit=config.cache_limit,
    )
    if rows.batches_per_epoch == 0:
        raise ConfigError(f"{dataset.remote or dataset.folder}: holds {rows.num_samples} rows, fewer than one global batch "
                          f"(global_batch_size={global_batch_size})")
    loader = DataLoader(
        rows, batch_size=batch_size, drop_last=True, collate_fn=collate, num_workers=config.num_workers,
        prefetch_factor=config.prefetch_factor if config.num_workers else None, persistent_workers=config.num_workers > 0,
        pin_memory=torch.cuda.is_available(), worker_init_fn=follow_parent,
        # Its own generator: with the global one, every new epoch would draw from the model's random state.
        generator=torch.Generator(),
    )
    return DataSpec(loader, get_num_tokens_in_batch=count_tokens)


def follow_parent(_worker_id: int) -> None:
    """In a loader process: the training process, which still needs the batch in hand, ends it, and nobody else.

    SIGTERM and Ctrl-C are often sent to the whole process group. When the training process was killed, upstream's threads
    would keep this one alive for ever, with its memory and its share of the shared memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        heard = signal.sigtimedwait({signal.SIGTERM}, 1)
        if heard is not None and heard.si_pid == parent:
            break
    os._exit(0)


def build_evaluator(
    dataset: Dataset, config: EvalDataConfig, *, batch_size: int,
    eval_interval: Callable[[State, Event], bool] | None = None, until: Callable[[DataLoader], Any] | None = None,
) -> Evaluator:
    """Every row of the dataset once (or its first `max_rows`), `batch_size` rows at a time on each rank.

    `until` wraps the loader in what can end it early.
    """
    rows = Rows(dataset, batch_size=batch_size, shuffle=False)
    loader = DataLoader(
        EvalBatches(rows, batch_size=batch_size, max_rows=config.max_rows), batch_size=None, num_workers=config.num_workers,
        generator=torch.Generator(), worker_init_fn=follow_parent,
    )
    batches = until(loader) if until else loader
    return Evaluator(
        label="eval", dataloader=DataSpec(batches, get_num_tokens_in_batch=count_tokens), eval_interval=eval_interval,
        device_eval_microbatch_size=batch_size,
    )
