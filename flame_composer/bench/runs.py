"""Benchmarks of the parts of a run: checkpoints, reading data, and a bare training loop."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from composer import Trainer
from composer.core import State
from composer.utils import get_device
from streaming import Stream, StreamingDataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flame_composer.bench.measure import Figure, interleaved, median, ratio
from flame_composer.bench.models import build_pair, seconds
from flame_composer.bench.saving import stalls
from flame_composer.checkpoint.read import Checkpoint, read_checkpoint
from flame_composer.checkpoint.save import SaveCheckpoints
from flame_composer.config.bench import CheckpointBenchmarkConfig
from flame_composer.config.data import DataConfig, StreamConfig
from flame_composer.config.load import load
from flame_composer.config.sections import OptimizerConfig
from flame_composer.config.train import TrainConfig
from flame_composer.dataset.open import open_dataset
from flame_composer.loader.batches import build_train_loader
from flame_composer.loader.datasets import open_train_data
from flame_composer.model.build import build_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.optimizer import build_optimizer
from flame_composer.text.tokenizer import load_tokenizer

ROWS_READ = 20_000
ROWS_OF_A_BATCH = 8

Call = Callable[[], Any]

# A run's checkpoints


def checkpoints(
    config: CheckpointBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """Time how a run saves and reads its state, against PyTorch's own way, and what it waits for.

    torch.save writes the same tensors, forced to disk as a run's are.
    """
    state = training_state(config)
    plain = folder / "plain.pt"
    save, read = save_and_read(state, folder)
    torch_save, torch_load = save_and_read_plainly(state, plain)
    timed = {"save": save, "torch_save": torch_save, "read": read, "torch_load": torch_load}
    found = interleaved(
        {name: partial(seconds, run) for name, run in timed.items()}, config.repeats, "checkpoint"
    )
    result = {f"{name}_seconds": round(median(values), 3) for name, values in found.items()}
    stalled, figures = stalls(state, folder, config.repeats)
    return {"bytes": plain.stat().st_size, **result, **stalled}, [
        *figures,
        Figure(
            "checkpoint: save_async=false waits, over torch.save and fsync",
            ratio(found["save"], found["torch_save"]),
            at_most=1.1,
        ),
        Figure(
            "checkpoint: checking and reading, over torch.load",
            ratio(found["read"], found["torch_load"]),
        ),
    ]


def training_state(config: CheckpointBenchmarkConfig) -> State:
    """Return the state of a run that has taken a step, so that its optimizer has moments.

    It comes from a bare Trainer. `train.assemble.build_run` would need a dataset, a tokenizer and a
    configuration, and nothing is trained here.
    """
    model = build_pair(config.hidden_size, config.num_layers, config.vocab_size)["gla"]
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return Trainer(
        model=CausalLM(model, plain_tokenizer(config.vocab_size), varlen=False),
        optimizers=optimizer,
        device=get_device(),
        progress_bar=False,
        max_duration="1ba",
    ).state


def save_and_read(state: State, folder: Path) -> tuple[Call, Call]:
    """Return a function that saves a state as a run does, and one that checks and reads it."""
    place = folder / "ours"
    place.mkdir()
    saver = SaveCheckpoints(str(place), folder, batches=1, num_to_keep=1)

    def save() -> None:
        saver.saved = None
        saver.save(state)

    return save, lambda: read_checkpoint(Checkpoint("", place / "ba0.pt"))


def save_and_read_plainly(state: State, path: Path) -> tuple[Call, Call]:
    """Return a function that saves a state's tensors with torch.save, and one that reads them."""
    (optimizer,) = state.optimizers
    model = cast(CausalLM, state.model).model
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def save() -> None:
        with path.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())

    return save, lambda: torch.load(path, weights_only=True)


def plain_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `vocab_size` tokens, for a model that must have one but reads none."""
    words = {f"{number}": number for number in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="0"
    )


# Data


def rows_of(folder: str, *, num_rows: int, num_workers: int = 0) -> Any:
    """Return the loader that a run would have for a dataset, with epochs of `num_rows` rows.

    Rows are repeated or left out to reach that number.
    """
    dataset = open_dataset(folder, with_units=False)
    config = DataConfig(
        num_workers=num_workers, streams={"all": StreamConfig(local=folder, choose=num_rows)}
    )
    return build_train_loader(
        {"all": dataset}, config, global_batch_size=ROWS_OF_A_BATCH, seed=1
    ).dataloader


def read_all(folder: str) -> list[float]:
    """Return rows per second from shards to collated batches, after the first one.

    They are those with no loader process, with one, and with two.
    """
    speeds = []
    for num_workers in range(3):
        batches = iter(rows_of(folder, num_rows=ROWS_READ, num_workers=num_workers))
        next(batches)
        start = time.perf_counter()
        count = sum(len(batch["input_ids"]) for batch in batches)
        speeds.append(count / (time.perf_counter() - start))
    return speeds


def read_all_plainly(folder: str) -> list[float]:
    """Return rows per second of StreamingDataset alone, one by one, after the first one."""
    streams = [Stream(local=folder, choose=ROWS_READ)]
    rows = iter(
        StreamingDataset(streams=streams, batch_size=ROWS_OF_A_BATCH, shuffle=True, shuffle_seed=1)
    )
    next(rows)
    start = time.perf_counter()
    count = sum(1 for _ in rows)
    return [count / (time.perf_counter() - start)]


def first_batch(folder: str, epoch_rows: float, at: float) -> list[float]:
    """Return what it takes from opening a dataset to its first batch, at a fraction of an epoch.

    That is seconds, and MB of memory above what the imports took. `epoch_rows` is the number of
    rows in the epoch, and `at` the fraction of them that is skipped.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loader = rows_of(folder, num_rows=int(epoch_rows))
    rows = loader.dataset
    row = int(epoch_rows * at) // ROWS_OF_A_BATCH * ROWS_OF_A_BATCH
    state = rows.state_dict(0, True)
    rows.load_state_dict({**state, "sample_in_epoch": row})
    next(iter(loader))
    took = time.perf_counter() - start
    return [took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]


# The whole trainer


def bare_loop(config_file: str, *overrides: str) -> None:
    """Train as recipes/train.py does, and print the median of tokens per second of a step.

    This is what the recipe is measured against, so it is bare on purpose: neither a Trainer nor
    `train.assemble`, no callbacks, no log, and all batches in memory before the first step.
    """
    config = load(TrainConfig, [config_file, *overrides])
    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(config.seed)
    hf_model = build_model(build_hf_config(config.model.config, tokenizer, config.context_length))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CausalLM(hf_model, tokenizer, varlen=config.varlen).to(device)
    in_precision = torch.autocast(device, torch.bfloat16, enabled=config.precision == "amp_bf16")
    sets = open_train_data(
        config.train_data, tokenizer=tokenizer, context_length=config.context_length
    )
    loader = build_train_loader(
        sets, config.train_data, global_batch_size=config.global_batch_size, seed=config.seed
    )
    num_steps = config.plan(epoch_batches=10**9).total
    batches: list[Any] = list(islice(loader.dataloader, num_steps))
    optimizer = build_optimizer(model, config.optimizer, config.model.mup_base_width)
    microbatch_size = cast(int, config.microbatch_size)

    def step(batch: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        for first in range(0, config.global_batch_size, microbatch_size):
            rows = slice(first, first + microbatch_size)
            part = {name: values[rows].to(device) for name, values in batch.items()}
            with in_precision:
                loss = model(part)["loss"]
            (loss * (microbatch_size / config.global_batch_size)).backward()
        if config.optimizer.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip_norm)
        optimizer.step()

    model.train()
    speeds = [batch["input_ids"].numel() / seconds(partial(step, batch)) for batch in batches]
    print(median(speeds[2:]))
