"""Runs that have gone wrong end with the right line: on a real Trainer, with a real stall."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from composer.core import Timestamp
from composer.utils import dist

from flame_composer.config.parallelism import ParallelismConfig
from flame_composer.config.sections import SpikeConfig
from flame_composer.errors import TrainingError
from flame_composer.train.guards import SpikeGuard, StallWatchdog, explained_memory
from tests.runs import Corpus, Script, read_log


def spike(step: int, loss: float) -> Any:
    return SimpleNamespace(
        timestamp=Timestamp(batch=step), total_loss_dict={"loss/train/total": loss}
    )


def feed(guard: SpikeGuard, losses: list[float]) -> int:
    """The step at which the guard ended the run; 0 if it did not."""
    for step, loss in enumerate(losses, 1):
        try:
            guard.batch_end(spike(step, loss), None)  # pyright: ignore[reportArgumentType]
        except TrainingError:
            return step
    return 0


def test_a_loss_that_leaps_and_stays_there():
    config = SpikeConfig(window=4, factor=2.0, patience=3)
    usual = [4.0, 3.0, 3.5, 3.2, 3.1]
    assert feed(SpikeGuard(config), [*usual, 9.0, 9.0, 9.0, 9.0]) == 8
    assert feed(SpikeGuard(config), [*usual, 9.0, 9.0, 3.0, 9.0, 9.0, 3.0]) == 0, (
        "it came down again"
    )
    assert feed(SpikeGuard(config), [9.0, 9.0, 9.0, 9.0, 3.0, 3.0]) == 0, "no usual loss yet"
    assert feed(SpikeGuard(config), [*usual, *[6.0] * 20]) == 0, "less than twice"
    assert (
        feed(SpikeGuard(SpikeConfig(window=4, factor=4.0, patience=3)), [*usual, *[9.0] * 20]) == 0
    ), "less than four times"
    assert feed(SpikeGuard(config), [*usual, math.nan, math.nan, math.nan, *usual]) == 0, (
        "another's business"
    )
    guard = SpikeGuard(config)
    assert feed(guard, [*usual, 9.0, 9.0]) == 0
    with pytest.raises(
        TrainingError,
        match=r"^step 8: loss 9[.]0000; for 3 steps it has been more than 2 times 3[.]1500, the"
        r" median of the 4 steps before",
    ):
        guard.batch_end(spike(8, 9.0), None)  # pyright: ignore[reportArgumentType]
    first, second = SpikeGuard(config), SpikeGuard(config)
    assert feed(first, [*usual, 9.0]) == 0
    second.load_state_dict(first.state_dict())
    assert feed(second, [9.0, 9.0]) == 2, "a restart remembers"


def test_a_stall_names_the_rank_and_the_phase(corpus: Corpus, tmp_path: Path) -> None:
    """Once the run is going its loader process is stopped, as one that waits for a file system
    that does not answer.
    """
    run = tmp_path / "stalled"
    script = Script(
        "recipes/train.py", *corpus.keys(run, "stall_timeout=3", "train_data.num_workers=1")
    )
    corpus.wait_for_step(script, run, 1)
    loaders = psutil.Process(script.process.pid).children(recursive=True)
    for loader in loaders:
        loader.suspend()
    try:
        process = script.wait()
    finally:
        for loader in loaders:
            with contextlib.suppress(psutil.NoSuchProcess):
                loader.kill()
    assert process.returncode == 1
    step = len(read_log(run)) + 1
    line = (
        f"error: rank 0 has been waiting for data at step {step} for more than stall_timeout=3 s;"
        " the stacks of its threads:"
    )
    assert line in process.stderr
    assert "dataloader.py" in process.stderr.split(line)[1]


def test_an_evaluation_before_the_first_step_is_watched(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    watchdog, state = StallWatchdog(0.2), SimpleNamespace(timestamp=Timestamp())
    watchdog.eval_standalone_start(state, None)  # pyright: ignore[reportArgumentType]
    assert ended.wait(30)
    watchdog.close(state, None)  # pyright: ignore[reportArgumentType]
    assert (
        "error: rank 0 has been evaluating at step 1 for more than stall_timeout=0.2 s"
        in capfd.readouterr().err
    )


def test_too_little_memory_names_the_keys_to_change(monkeypatch):
    config: Any = SimpleNamespace(
        microbatch_size=4, context_length=2048, parallelism=ParallelismConfig()
    )
    with pytest.raises(TrainingError) as error, explained_memory(config):
        torch.empty(1 << 55)
    assert (
        str(error.value)
        == "out of memory on rank 0: lower microbatch_size (4; the result does not change), or set"
        " parallelism.activation_checkpointing=true, or lower context_length (2048) or the"
        " model's size"
    )
    recomputed = ParallelismConfig(activation_checkpointing=True)
    config = SimpleNamespace(microbatch_size=1, context_length=2048, parallelism=recomputed)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    advice = (
        r"rank 0: spread the model over devices with parallelism[.]fsdp={}, or lower context_length"
    )
    with pytest.raises(TrainingError, match=advice), explained_memory(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError, match=r"^something else$"), explained_memory(config):
        raise RuntimeError("something else")
