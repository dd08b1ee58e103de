"""Runs that have gone wrong end with the right line: on a real Trainer, with real bad gradients and a real stall."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Callback, State, Timestamp
from composer.loggers import Logger
from composer.utils import dist

from flame_composer.config import TrainingError
from flame_composer.train_config import ParallelismConfig, SpikeConfig
from flame_composer.watch import MAX_SKIPPED, NanGuard, SpikeGuard, StallWatchdog, explained_memory
from tests.conftest import make_run
from tests.runs import Corpus, Script, read_log, run_script


class Spoil(Callback):
    """Makes one entry of one gradient bad at given steps."""

    def __init__(self, *steps: int, value: float = math.nan):
        self.steps = steps
        self.value = value

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value + 1 in self.steps:
            parameter = next(iter(state.model.parameters()))
            assert parameter.grad is not None
            parameter.grad.view(-1)[-1] = self.value


def rows_of(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.log_folder / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_stops_the_run_before_the_step_is_taken(dataset, eval_dataset, tmp_path, value):
    run = make_run(tmp_path, dataset, eval_dataset, watchers=(Spoil(2, value=value), NanGuard("stop")))
    with pytest.raises(TrainingError, match=r"^step 2: the gradient is not finite; the step was not taken"):
        run.trainer.fit()
    run.trainer.close()
    assert [path.name for path in run.checkpoints.iterdir()] == ["ba1.pt"]
    saved = torch.load(run.checkpoints / "ba1.pt", weights_only=False)["state"]["model"]
    for name, tensor in run.weights.items():
        assert torch.equal(tensor, saved[f"model.{name}"]), name


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(dataset, eval_dataset, tmp_path, capfd):
    run = make_run(tmp_path, dataset, eval_dataset, watchers=(Spoil(2), NanGuard("skip")))
    run.trainer.fit()
    run.trainer.close()
    assert capfd.readouterr().err == "step 2: the gradient is not finite; skipped\n"
    assert [row["current_steps"] for row in rows_of(run)] == [1, 2, 3]
    first, second, third = (
        torch.load(run.checkpoints / f"ba{step}.pt", weights_only=False)["state"] for step in (1, 2, 3)
    )
    for name, tensor in second["model"].items():
        assert torch.equal(tensor, first["model"][name]), name
        assert not torch.equal(tensor, third["model"][name]), name
    moments = [state["optimizers"]["DecoupledAdamW" if "DecoupledAdamW" in state["optimizers"] else "AdamW"]["state"]
               for state in (first, second, third)]
    for name, moment in moments[1].items():
        for key, value in moment.items():
            assert torch.equal(value, moments[0][name][key]), (name, key)
    assert moments[2] is not None


def test_skipping_has_an_end(dataset, eval_dataset, tmp_path):
    total = MAX_SKIPPED + 3
    run = make_run(tmp_path, dataset, eval_dataset, total=total, watchers=(Spoil(*range(2, total + 1)), NanGuard("skip")))
    with pytest.raises(TrainingError, match=rf"^step {MAX_SKIPPED + 2}: .* not finite, as in the {MAX_SKIPPED} steps"):
        run.trainer.fit()
    run.trainer.close()


def test_a_rate_far_too_high_ends_the_run_with_one_line(corpus: Corpus, tmp_path: Path) -> None:
    process = run_script("recipes/train.py", *corpus.keys(tmp_path / "run", "optimizer.lr=1e30", "scheduler.warmup=0ba"))
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("error: step 2: the gradient is not finite; the step was not taken")
    assert len(read_log(tmp_path / "run")) == 1
    keys = ("optimizer.lr=1e30", "scheduler.warmup=0ba", "on_nan=skip", "autoresume=false", "eval_data=null")
    process = run_script("recipes/train.py", *corpus.keys(tmp_path / "on", *keys))
    assert process.stderr.splitlines()[-1].startswith(f"error: step {MAX_SKIPPED + 2}: the gradient is not finite, as in the ")


def spike(step: int, loss: float) -> Any:
    return SimpleNamespace(timestamp=Timestamp(batch=step), total_loss_dict={"loss/train/total": loss})


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
    assert feed(SpikeGuard(config), [*usual, 9.0, 9.0, 3.0, 9.0, 9.0, 3.0]) == 0, "it came down again"
    assert feed(SpikeGuard(config), [9.0, 9.0, 9.0, 9.0, 3.0, 3.0]) == 0, "no usual loss yet"
    assert feed(SpikeGuard(config), [*usual, *[6.0] * 20]) == 0, "less than twice"
    assert feed(SpikeGuard(SpikeConfig(window=4, factor=4.0, patience=3)), [*usual, *[9.0] * 20]) == 0, "less than four times"
    assert feed(SpikeGuard(config), [*usual, math.nan, math.nan, math.nan, *usual]) == 0, "that is NanGuard's business"
    guard = SpikeGuard(config)
    assert feed(guard, [*usual, 9.0, 9.0]) == 0
    with pytest.raises(TrainingError, match=r"^step 8: loss 9[.]0000, for 3 steps more than 2 times the median 3[.]1500"):
        guard.batch_end(spike(8, 9.0), None)  # pyright: ignore[reportArgumentType]
    first, second = SpikeGuard(config), SpikeGuard(config)
    assert feed(first, [*usual, 9.0]) == 0
    second.load_state_dict(first.state_dict())
    assert feed(second, [9.0, 9.0]) == 2, "a restart remembers"


def test_a_stall_names_the_rank_and_the_phase(corpus: Corpus, tmp_path: Path) -> None:
    """Once the run is going its shard becomes a pipe that nobody writes to."""
    run = tmp_path / "stalled"
    script = Script("recipes/train.py", *corpus.keys(run, "stall_timeout=3"))
    corpus.wait_for_step(script, run, 1)
    shard = next(corpus.train.rglob("*.mds"))
    kept = shard.rename(shard.with_suffix(".kept"))
    os.mkfifo(shard)
    try:
        process = script.wait()
    finally:
        shard.unlink()
        kept.rename(shard)
    assert process.returncode == 1
    step = len(read_log(run)) + 1
    line = f"error: rank 0 has been waiting for data at step {step} for more than stall_timeout=3 s; where its threads stand:"
    assert line in process.stderr
    assert "get_item" in process.stderr.split(line)[1]


def test_an_evaluation_before_the_first_step_is_watched(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    watchdog, state = StallWatchdog(0.2), SimpleNamespace(timestamp=Timestamp())
    watchdog.eval_standalone_start(state, None)  # pyright: ignore[reportArgumentType]
    assert ended.wait(30)
    watchdog.close(state, None)  # pyright: ignore[reportArgumentType]
    assert "error: rank 0 has been evaluating at step 1 for more than stall_timeout=0.2 s" in capfd.readouterr().err


def test_too_little_memory_names_the_keys_to_change(monkeypatch):
    config: Any = SimpleNamespace(microbatch_size=4, context_length=2048, parallelism=ParallelismConfig())
    with pytest.raises(TrainingError) as error, explained_memory(config):
        torch.empty(1 << 55)
    assert str(error.value) == (
        "out of memory on rank 0: lower microbatch_size (4; the result does not change), or set "
        "parallelism.activation_checkpointing=true, or lower context_length (2048) or the model's size"
    )
    recomputed = ParallelismConfig(activation_checkpointing=True)
    config = SimpleNamespace(microbatch_size=1, context_length=2048, parallelism=recomputed)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    advice = r"rank 0: spread the model over devices with parallelism[.]fsdp={}, or lower context_length"
    with pytest.raises(TrainingError, match=advice), explained_memory(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError, match=r"^something else$"), explained_memory(config):
        raise RuntimeError("something else")
