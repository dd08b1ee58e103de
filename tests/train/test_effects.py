"""What keys of recipes/train.py do to a run, where no other test sees it: on real runs of a few
steps.
"""

from __future__ import annotations

import contextlib
import math
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import composer
import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger, ProgressBarLogger, WandBLogger

from flame_composer.config.load import load
from flame_composer.config.sections import SpikeConfig, WandbConfig
from flame_composer.config.train import TrainConfig
from flame_composer.train import assemble
from flame_composer.train.guards import SpikeGuard, build_watchers
from flame_composer.train.loggers import build_loggers
from tests.runs import ROOT, Corpus, read_log


class Seen(Callback):
    """The sizes of the batches that go through the model, the norms of the steps' gradients, and
    the trainer of it all.
    """

    trainer: composer.Trainer

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.evaluated: list[int] = []
        self.norms: list[float] = []

    def before_forward(self, state: State, logger: Logger) -> None:
        self.forward.append(len(state.batch["input_ids"]))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        gradients = [
            parameter.grad for parameter in state.model.parameters() if parameter.grad is not None
        ]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        self.evaluated.append(len(state.batch["input_ids"]))


@pytest.fixture
def train(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs recipes/train.py in this process, and looks into its trainer."""

    def run(folder: Path, *keys: str) -> Seen:
        seen = Seen()

        class Watched(composer.Trainer):
            def __init__(self, **given: Any) -> None:
                seen.trainer = self
                super().__init__(**{**given, "callbacks": [*given["callbacks"], seen]})

        with monkeypatch.context() as patch:
            patch.setattr(assemble, "Trainer", Watched)
            patch.chdir(ROOT)
            main = runpy.run_path("recipes/train.py")["main"]
            main(load(TrainConfig, corpus.keys(folder, *keys)))
        return seen

    return run


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """In the place of stderr."""
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stderr, contextlib.redirect_stderr(stderr):
        yield
    os.close(master)


def test_a_run_is_what_its_keys_say(
    train, corpus: Corpus, undisturbed: Path, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    with terminal():
        seen = train(
            run,
            "seed=43",
            "train_data.shuffle_seed=42",
            "max_duration=6ba",
            "microbatch_size=4",
            "scheduler.name=wsd",
            "scheduler.warmup=2ba",
            "scheduler.decay=2ba",
            "scheduler.min_lr_ratio=0.5",
            "optimizer.lr=0.001",
            "save_interval=2ba",
            "save_num_checkpoints_to_keep=2",
            "eval_interval=3ba",
            "eval_batch_size=3",
            "optimizer.grad_clip_norm=0.01",
            "progress_bar=false",
        )
    rows, others = read_log(run), read_log(undisturbed)[:6]
    assert [row["batch_hash"] for row in rows] == [row["batch_hash"] for row in others], (
        "the rows have a seed of their own"
    )
    assert rows[0]["loss"] != others[0]["loss"], "other weights"
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [0, 0.0005, 0.001, 0.001, 0.001, 0.00075]
    )
    assert [row["current_steps"] for row in rows if "eval_loss" in row] == [3, 6]
    assert seen.norms == pytest.approx([0.01] * 6, rel=1e-3)
    assert seen.forward == [4] * 6
    assert seen.evaluated == [3] * 9, "the last is filled up"
    assert sorted(path.name for path in (run / "checkpoints").glob("*.pt")) == ["ba4.pt", "ba6.pt"]
    assert seen.trainer.state.run_name == "run"
    assert not any(isinstance(each, ProgressBarLogger) for each in seen.trainer.logger.destinations)
    assert "step 6" in capsys.readouterr().out

    # The same run goes on with other data and another schedule, which it is told to.
    seen = train(
        run,
        "max_duration=7ba",
        "train_data.shuffle_algo=naive",
        "allow_data_change=true",
        "allow_schedule_change=true",
        "varlen=false",
        "eval_data=null",
    )
    assert [row["current_steps"] for row in read_log(run)] == [*range(1, 8)]
    assert not seen.trainer.state.model.varlen


def config_with(**given: Any) -> TrainConfig:
    return TrainConfig(
        "run", max_duration="1ba", global_batch_size=1, microbatch_size=1, tokenizer="t", **given
    )


def test_w_and_b_is_told_whose_a_run_is(tmp_path: Path) -> None:
    """What arrives there: test_recipes.py."""
    (logger,) = build_loggers(
        config_with(log_folder=str(tmp_path), wandb=WandbConfig("ours", "team", "group", ["still"]))
    )
    assert isinstance(logger, WandBLogger)
    expected = {
        "project": "ours",
        "entity": "team",
        "group": "group",
        "tags": ["still"],
        "id": "run",
        "name": "run",
    }
    assert {name: logger._init_kwargs[name] for name in expected} == expected


def test_a_spike_is_what_its_keys_say() -> None:
    config = config_with(loss_spike=SpikeConfig(window=7, factor=3.0, patience=2))
    guard = next(each for each in build_watchers(config) if isinstance(each, SpikeGuard))
    assert (guard.losses.maxlen, guard.config.factor, guard.config.patience) == (7, 3.0, 2)


def test_z_loss_is_part_of_what_is_trained_on(corpus: Corpus, tmp_path: Path) -> None:
    """At first a model gives each of 400 tokens the same chance, so that Z is about 400."""
    keys = ("max_duration=1ba", "scheduler.warmup=0ba", "eval_data=null")
    losses = {}
    for weight in (0, 0.5):
        run = tmp_path / f"{weight}"
        corpus.train_run(run, *keys, f"z_loss={weight}")
        losses[weight] = read_log(run)[0]["loss"]
    log_z = math.log(400)
    assert losses[0] == pytest.approx(log_z, rel=0.1)
    assert losses[0.5] - losses[0] == pytest.approx(0.5 * log_z**2, rel=0.1)
