"""Batches made of datasets' rows, for training and for evaluation."""

from __future__ import annotations

import functools
import logging
import math
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from composer.core import DataSpec, Evaluator, Event, State
from composer.core.data_spec import default_split_batch
from composer.utils import dist
from numpy.typing import NDArray
from streaming.base.util import bytes_to_int
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flame_composer.batch import IGNORE, Batch, collate, count_tokens
from flame_composer.config.data import DataConfig, EvalDataConfig
from flame_composer.config.sections import RepetitionConfig
from flame_composer.dataset.open import Dataset
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.loader.fetch import Shards
from flame_composer.loader.footprint import cache_needs, index_bytes, sizes_of
from flame_composer.loader.layout import SPREAD, Order, build_order, window_of
from flame_composer.loader.machine import Machine, this_machine
from flame_composer.loader.repetition import leave_out
from flame_composer.loader.rows import Loader, Rows
from flame_composer.model.ranks import ALL_APART, Ranks
from flame_composer.processes import can_have_processes, end_with_parent
from flame_composer.upstream.streaming import StreamingOrder

SHUFFLE_ALGO = "train_data.shuffle_algo"  # what `describe_order` calls it

log = logging.getLogger(__name__)


class EvalBatches(IterableDataset):
    """Batches that hold every row of a dataset exactly once, for any number of ranks and workers.

    Rank r reads rows r, r + world size, and so on; ranks that work on the same rows count as one.
    If the rows do not divide evenly, the last batches are filled with rows without labels. Every
    rank thus has the same number of batches, and a mean weighted by tokens stays exact.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        max_rows: int | None,
        loss_across_documents: bool = True,
        ranks: Ranks = ALL_APART,
    ):
        self.shards = shards
        self.loss_across_documents = loss_across_documents
        self.batch_size = batch_size
        self.num_rows = min(shards.num_rows, max_rows or shards.num_rows)
        self.place, self.places = ranks.place, ranks.places

    def __len__(self) -> int:
        """Return the number of batches of each rank."""
        return math.ceil(self.num_rows / (self.places * self.batch_size))

    def __iter__(self) -> Iterator[Batch | Sent]:
        worker = get_worker_info()
        id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(id, len(self), num_workers):
            first = index * self.batch_size
            numbers = [self.place + self.places * (first + i) for i in range(self.batch_size)]
            batch = collate(
                [self.shards.row(min(number, self.num_rows - 1)) for number in numbers],
                loss_across_documents=self.loss_across_documents,
            )
            batch["labels"][[number >= self.num_rows for number in numbers]] = IGNORE
            yield batch if worker is None else Sent(batch)


class Sent:
    """A batch to be sent through a loader process's pipe; it arrives as a plain `Batch`.

    By default, torch puts every tensor into /dev/shm, where containers have little or no space, and
    keeps a file open for each.
    """

    def __init__(self, batch: Batch):
        self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, ({name: tensor.numpy() for name, tensor in self.batch.items()},)


def _receive(arrays: dict[str, NDArray[Any]]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def collate_for_sending(
    rows: list[dict[str, NDArray[Any]]],
    *,
    loss_across_documents: bool,
    repetition: RepetitionConfig | None,
) -> Batch | Sent:
    """Return the batch that `collate` makes of the rows; in a loader process, ready to be sent.

    Rows that repeat themselves have no labels, if `repetition` says what those are.
    """
    batch = collate(rows, loss_across_documents=loss_across_documents)
    if repetition is not None:
        batch = leave_out(batch, repetition)
    return batch if get_worker_info() is None else Sent(batch)


def loader_processes(wanted: int) -> int:
    """Return `wanted`, or 0 with a warning if this machine can have no loader processes.

    With 0, this process loads the same rows itself.
    """
    if wanted and not can_have_processes():
        log.warning(
            "warning: loader processes need a writable /dev/shm, which this machine does not have;"
            " num_workers is set to 0, and loading is slower"
        )
        return 0
    return wanted


def describe_order(
    datasets: Mapping[str, Dataset], config: DataConfig, *, global_batch_size: int, seed: int
) -> dict[str, Any]:
    """Return the settings that decide which rows are in which global batch.

    A run must not be resumed if any of them has changed.
    """
    order: dict[str, Any] = {
        f"train_data{name and f'.streams.{name}'} (index.json)": dataset.manifest.index_sha256
        for name, dataset in datasets.items()
    }
    for name, stream in config.streams.items():
        weight = stream.weight()
        order |= {f"train_data.streams.{name}.{kind}": value for kind, value in weight.items()}
    return order | {
        "train_data.streams": ", ".join(config.streams) or None,  # numbered in this order
        "train_data.batching_method": config.batching_method if config.streams else "random",
        "global_batch_size": global_batch_size,
        "train_data.shuffle": config.shuffle,
        SHUFFLE_ALGO: config.shuffle_algo or SPREAD,
        "train_data.shuffle_seed": seed if config.shuffle_seed is None else config.shuffle_seed,
        # Also the default, which a later version may change
        "train_data.shuffle_block_size": window_of(list(datasets.values()), config),
        "train_data.num_canonical_nodes": config.num_canonical_nodes,
    }


def build_train_loader(
    datasets: Mapping[str, Dataset],
    config: DataConfig,
    *,
    global_batch_size: int,
    seed: int,
    repetition: RepetitionConfig | None = None,
    ranks: Ranks = ALL_APART,
) -> DataSpec:
    """Return a loader of this rank's share of every global batch, which `ranks` may have together.

    Rows are shuffled with `shuffle_seed` of the config or, if there is none, with `seed`. Those
    that repeat themselves are left out of the loss if `repetition` is given. Raises ConfigError if
    the datasets do not hold one global batch, need a larger cache than `cache_limit`, or hold
    padding, which `repetition` would take for tokens that repeat.
    """
    may_be_void, (count_rows, count) = _may_be_void(datasets, repetition), counters_of(ranks)
    order = build_order(datasets, config, global_batch_size=global_batch_size, seed=seed)
    num_workers = loader_processes(config.num_workers)
    limit = _limit(order, datasets, config, this_machine(ranks.together))
    shards = Shards(
        list(datasets.values()), retries=config.download_retries, timeout=config.download_timeout
    )
    if limit is not None:
        shards.limit_cache(limit, places=dist.get_local_world_size() * max(1, num_workers))
    if isinstance(order, StreamingOrder):
        order.folder = shards.folder.path
    rows = Rows(
        order,
        shards,
        predownload=config.predownload,
        state={
            "shuffle_seed": seed if config.shuffle_seed is None else config.shuffle_seed,
            "num_canonical_nodes": config.num_canonical_nodes,
        },
        together=ranks.together,
    )
    across = config.loss_across_documents
    collated = functools.partial(
        collate_for_sending, loss_across_documents=across, repetition=repetition
    )
    loader = Loader(
        rows,
        batch_size=rows.batch_size,
        drop_last=True,
        num_workers=num_workers,
        collate_fn=collated,
        prefetch_factor=config.prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=follow_parent,
        # Otherwise every new epoch would draw from the global random state, which the model uses.
        generator=torch.Generator(),
    )
    return DataSpec(
        loader,
        get_num_samples_in_batch=count_rows,
        get_num_tokens_in_batch=count,
        split_batch=functools.partial(split_noting_void, count=count) if may_be_void else None,
    )


def counters_of(
    ranks: Ranks,
) -> tuple[Callable[[Batch], int], Callable[[Batch], dict[str, int]]]:
    """Return what counts this rank's rows in a batch, and its tokens (`count_tokens`).

    Composer adds up what all ranks count, of which those of `ranks` have the same rows.
    """
    of_tokens = functools.partial(
        count_tokens, part=ranks.part, parts=ranks.context, counts_all=ranks.counts_tokens
    )
    return lambda batch: len(batch["input_ids"]) * ranks.counts_rows, of_tokens


def _limit(
    order: Order, datasets: Mapping[str, Dataset], config: DataConfig, machine: Machine
) -> int | None:
    """Return the bytes that cached shards may take, or None for no limit.

    Raises InvalidField if shards in use would have to be deleted, and fetched again and again.
    """
    if config.cache_limit is None:
        return None
    limit = bytes_to_int(config.cache_limit)
    indexes = index_bytes(datasets.values())
    needs = cache_needs(order, sizes_of(datasets.values()), config, machine, indexes=indexes)
    if limit < needs.smallest:
        raise InvalidField(
            "train_data.cache_limit",
            f"must be at least {needs.smallest} bytes: so much is in use at once with"
            f" shuffle_block_size={needs.window},"
            f" num_canonical_nodes={config.num_canonical_nodes} and shards of up to"
            f" {needs.largest} bytes; a smaller train_data.shuffle_block_size needs less",
        )
    return limit - indexes


def _may_be_void(datasets: Mapping[str, Dataset], repetition: RepetitionConfig | None) -> bool:
    """Return whether there may be batches without a token that carries loss.

    Raises ConfigError if `repetition` is given with examples to tune on.
    """
    has_masks = [each.place for each in datasets.values() if each.manifest.has_loss_mask]
    if has_masks and repetition is not None:
        raise ConfigError(
            f"repetition_filter: {has_masks[0]} holds examples to tune on, whose rows are filled up"
            " with one token that repeats; set repetition_filter=null"
        )
    return bool(has_masks) or repetition is not None


def split_noting_void(
    batch: Batch,
    microbatch_size: int | float,
    *,
    count: Callable[[Batch], dict[str, int]] = count_tokens,
) -> Sequence[Batch]:
    """Return the batch in microbatches; if no rank has a token with loss, they say so (`is_void`).

    Composer divides by the number of those tokens, which `count` returns.
    """
    parts = default_split_batch(batch, microbatch_size)
    number = torch.tensor(sum(count(part)["loss_generating"] for part in parts))
    if torch.cuda.is_available():
        number = number.cuda()
    dist.all_reduce(number)
    if not number.item():
        for part in parts:
            part["is_void"] = torch.ones(len(part["input_ids"]), dtype=torch.bool)
    return parts


def follow_parent(_worker_id: int) -> None:
    """Make this loader process end only when the training process ends it or dies.

    SIGTERM and Ctrl-C are often sent to the whole process group, but the training process still
    needs the current batch. And if the training process is killed, streaming's threads would keep
    this process alive forever, with its memory and its share of the shared memory.
    """
    # Without this, streaming's threads would keep this process from ending until the training
    # process kills it after 5 s.
    multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=-100)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = multiprocessing.parent_process()
        assert parent is not None
        threading.Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()
    end_with_parent()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def build_evaluator(
    dataset: Dataset,
    config: EvalDataConfig,
    *,
    batch_size: int,
    eval_interval: Callable[[State, Event], bool] | None = None,
    until: Callable[[DataLoader], Any] | None = None,
    ranks: Ranks = ALL_APART,
) -> Evaluator:
    """Return an evaluator over every row of the dataset once, or over its first `max_rows`.

    Each rank, or those that work on the same rows, reads `batch_size` rows at a time. `until`, if
    given, takes the loader and returns one that can end early.
    """
    loader = DataLoader(
        EvalBatches(
            Shards([dataset]),
            batch_size=batch_size,
            max_rows=config.max_rows,
            loss_across_documents=config.loss_across_documents,
            ranks=ranks,
        ),
        batch_size=None,
        num_workers=loader_processes(config.num_workers),
        generator=torch.Generator(),
        worker_init_fn=follow_parent,
    )
    batches = until(loader) if until else loader
    count_rows, count = counters_of(ranks)
    return Evaluator(
        label="eval",
        dataloader=DataSpec(
            batches, get_num_samples_in_batch=count_rows, get_num_tokens_in_batch=count
        ),
        eval_interval=eval_interval,
        device_eval_microbatch_size=batch_size,
    )
