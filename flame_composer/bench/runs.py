"""Parts of a run that recipes/benchmark.py times: checkpoints, the way of the data, and a loop
with nothing around it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerFast

from flame_composer.bench.measure import Figure, interleaved, median, ratio
from flame_composer.bench.models import build_pair, seconds
from flame_composer.config.bench import CheckpointBenchmarkConfig
from flame_composer.model.build import build_model
from flame_composer.model.causal_lm import CausalLM

ROWS_READ = 20_000
ROWS_OF_A_BATCH = 8

# A run's checkpoints


def checkpoints(
    config: CheckpointBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """Seconds to save a training state as a run does against torch.save of the same, forced to
    disk; and to read them.
    """
    from composer import Trainer

    from flame_composer.checkpoint.read import Checkpoint, read_checkpoint
    from flame_composer.checkpoint.save import SaveCheckpoints
    from flame_composer.config.sections import OptimizerConfig
    from flame_composer.model.optimizer import build_optimizer

    model = build_pair(config.hidden_size, config.num_layers, config.vocab_size)["gla"]
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    trainer = Trainer(
        model=CausalLM(model, plain_tokenizer(config.vocab_size), varlen=False),
        optimizers=optimizer,
        device="cpu",
        progress_bar=False,
        max_duration="1ba",
    )
    place, plain = folder / "ours", folder / "plain.pt"
    place.mkdir()
    saver = SaveCheckpoints(str(place), folder, batches=1, num_to_keep=1)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def save() -> None:
        saver.saved = None
        saver.save(trainer.state)

    def save_plainly() -> None:
        with plain.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def read() -> None:
        read_checkpoint(Checkpoint("", place / "ba0.pt"))

    timed: dict[str, Callable[[], Any]] = {
        "save": save,
        "torch_save": save_plainly,
        "read": read,
        "torch_load": lambda: torch.load(plain, weights_only=True),
    }
    found = interleaved(
        {name: partial(seconds, run) for name, run in timed.items()}, config.repeats, "checkpoint"
    )
    result = {f"{name}_seconds": round(median(values), 3) for name, values in found.items()}
    return {"bytes": plain.stat().st_size, **result}, [
        Figure(
            "checkpoint: training waits, over torch.save and fsync",
            ratio(found["save"], found["torch_save"]),
            at_most=1.1,
        ),
        Figure(
            "checkpoint: checking and reading, over torch.load",
            ratio(found["read"], found["torch_load"]),
        ),
    ]


def plain_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One that has as many tokens and is never used."""
    from tokenizers import Tokenizer, models

    words = {f"{number}": number for number in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="0"
    )


# Data


@contextlib.contextmanager
def rows_of(folder: str, *, num_rows: int, num_workers: int = 0) -> Iterator[Any]:
    """The loader a run has for a dataset, whose rows are repeated, or some left out, to come to
    `num_rows` an epoch.
    """
    from flame_composer.config.data import DataConfig, StreamConfig
    from flame_composer.dataset.open import open_dataset
    from flame_composer.loader import batches as data

    dataset = open_dataset(folder)
    config = DataConfig(
        num_workers=num_workers, streams={"all": StreamConfig(local=folder, choose=num_rows)}
    )
    yield data.build_train_loader(
        {"all": dataset}, config, global_batch_size=ROWS_OF_A_BATCH, seed=1
    ).dataloader


def read_all(folder: str, num_workers: float) -> float:
    """Rows per second from shards to collated batches, after the first one."""
    with rows_of(folder, num_rows=ROWS_READ, num_workers=int(num_workers)) as loader:
        batches = iter(loader)
        next(batches)
        start = time.perf_counter()
        count = sum(len(batch["input_ids"]) for batch in batches)
        return count / (time.perf_counter() - start)


def read_all_plainly(folder: str) -> float:
    """The same with StreamingDataset alone, its rows as they come."""
    from streaming import Stream, StreamingDataset

    streams = [Stream(local=folder, choose=ROWS_READ)]
    rows = iter(
        StreamingDataset(streams=streams, batch_size=ROWS_OF_A_BATCH, shuffle=True, shuffle_seed=1)
    )
    next(rows)
    start = time.perf_counter()
    count = sum(1 for _ in rows)
    return count / (time.perf_counter() - start)


def first_batch(folder: str, epoch_rows: float, at: float) -> float:
    """Seconds from opening a dataset to the first batch, `at` a fraction of an epoch of so many
    rows.
    """
    start = time.perf_counter()
    with rows_of(folder, num_rows=int(epoch_rows)) as loader:
        rows = loader.dataset
        row = int(epoch_rows * at) // ROWS_OF_A_BATCH * ROWS_OF_A_BATCH
        state = rows.state_dict(0, True)
        rows.load_state_dict({**state, "sample_in_epoch": row})
        next(iter(loader))
        return time.perf_counter() - start


# The whole trainer


def bare_loop(config_file: str, *overrides: str) -> None:
    """Train as the recipe does with nothing around it: print the median of tokens per second of
    a step.
    """
    from flame_composer.config.load import load
    from flame_composer.config.train import TrainConfig
    from flame_composer.loader import batches as data
    from flame_composer.loader.datasets import open_train_data
    from flame_composer.model.hf_config import build_hf_config
    from flame_composer.model.optimizer import build_optimizer
    from flame_composer.text.tokenizer import load_tokenizer

    config = load(TrainConfig, [config_file, *overrides])
    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(config.seed)
    hf_model = build_model(build_hf_config(config.model.config, tokenizer, config.context_length))
    model = CausalLM(hf_model, tokenizer, varlen=config.varlen)
    sets = open_train_data(
        config.train_data, tokenizer=tokenizer, context_length=config.context_length
    )
    loader = data.build_train_loader(
        sets, config.train_data, global_batch_size=config.global_batch_size, seed=config.seed
    )
    plan = config.plan(epoch_batches=10**9)
    batches = [batch for batch, _ in zip(loader.dataloader, range(plan.total), strict=False)]
    optimizer = build_optimizer(model, config.optimizer)
    microbatch_size = cast(int, config.microbatch_size)
    model.train()
    speeds = []
    for batch in batches:

        def train(batch: Any = batch) -> None:
            optimizer.zero_grad(set_to_none=True)
            for rows in range(0, config.global_batch_size, microbatch_size):
                part = {
                    name: values[rows : rows + microbatch_size] for name, values in batch.items()
                }
                (model(part)["loss"] * (microbatch_size / config.global_batch_size)).backward()
            if config.optimizer.grad_clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip_norm)
            optimizer.step()

        speeds.append(batch["input_ids"].numel() / seconds(train))
    print(median(speeds[2:]))
