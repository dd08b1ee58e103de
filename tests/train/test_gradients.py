"""A step's gradient before the optimizer takes it: what its norm is, that it is clipped, and not
taken if it is no number.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from flame_composer.errors import TrainingError
from flame_composer.train.gradients import MAX_SKIPPED
from tests.conftest import make_run
from tests.runs import Corpus, read_log, run_script


class Norms(Callback):
    """The norm of each step's gradient before `Gradients` has seen it and when the step was
    taken, added up in fp64.
    """

    def __init__(self) -> None:
        self.before: list[float] = []
        self.after: list[float] = []

    @staticmethod
    def of(state: State) -> float:
        gradients = [
            parameter.grad for parameter in state.model.parameters() if parameter.grad is not None
        ]
        return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.before.append(self.of(state))

    def batch_end(self, state: State, logger: Logger) -> None:
        self.after.append(self.of(state))


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_the_norm_before_clipping_is_logged_and_no_step_is_larger(
    dataset, eval_dataset, tmp_path, max_norm
):
    norms = Norms()
    run = make_run(
        tmp_path,
        dataset,
        eval_dataset,
        watchers=(norms,),
        max_norm=max_norm,
        microbatch_size=1,
        eval_interval=9,
    )
    run.trainer.fit()
    run.trainer.close()
    assert [row["grad_norm"] for row in rows_of(run)] == pytest.approx(norms.before, rel=1e-6)
    assert min(norms.before) > 0.5
    expected = norms.before if max_norm != 0.5 else [0.5] * 3
    assert norms.after == pytest.approx(expected, rel=1e-5)


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
    return [
        json.loads(line) for line in (run.log_folder / "train_log.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_stops_the_run_before_the_step_is_taken(
    dataset, eval_dataset, tmp_path, value
):
    run = make_run(tmp_path, dataset, eval_dataset, watchers=(Spoil(2, value=value),))
    with pytest.raises(
        TrainingError, match=r"^step 2: the gradient is not finite; the step was not taken"
    ):
        run.trainer.fit()
    run.trainer.close()
    assert [path.name for path in run.checkpoints.iterdir()] == ["ba1.pt"]
    saved = torch.load(run.checkpoints / "ba1.pt", weights_only=False)["state"]["model"]
    for name, tensor in run.weights.items():
        assert torch.equal(tensor, saved[f"model.{name}"]), name


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(
    dataset, eval_dataset, tmp_path, capfd
):
    run = make_run(
        tmp_path, dataset, eval_dataset, watchers=(Spoil(2),), on_nan="skip", max_norm=1.0
    )
    run.trainer.fit()
    run.trainer.close()
    assert capfd.readouterr().err == "step 2: the gradient is not finite; skipped\n"
    rows = rows_of(run)
    assert [row["current_steps"] for row in rows] == [1, 2, 3]
    assert rows[1]["grad_norm"] is None
    assert all(rows[step]["grad_norm"] > 0 for step in (0, 2))
    first, second, third = (
        torch.load(run.checkpoints / f"ba{step}.pt", weights_only=False)["state"]
        for step in (1, 2, 3)
    )
    for name, tensor in second["model"].items():
        assert torch.equal(tensor, first["model"][name]), name
        assert not torch.equal(tensor, third["model"][name]), name
    moments = [
        state["optimizers"][
            "DecoupledAdamW" if "DecoupledAdamW" in state["optimizers"] else "AdamW"
        ]["state"]
        for state in (first, second, third)
    ]
    for name, moment in moments[1].items():
        for key, value in moment.items():
            assert torch.equal(value, moments[0][name][key]), (name, key)
    assert moments[2] is not None


def test_skipping_has_an_end(dataset, eval_dataset, tmp_path):
    total = MAX_SKIPPED + 3
    run = make_run(
        tmp_path,
        dataset,
        eval_dataset,
        total=total,
        watchers=(Spoil(*range(2, total + 1)),),
        on_nan="skip",
    )
    with pytest.raises(
        TrainingError,
        match=rf"^step {MAX_SKIPPED + 2}: .* not finite, as in the {MAX_SKIPPED} steps",
    ):
        run.trainer.fit()
    run.trainer.close()


@pytest.mark.parametrize(("on_nan", "last"), [("stop", 1), ("skip", MAX_SKIPPED + 1)])
def test_a_rate_far_too_high_ends_the_run_with_one_line(
    corpus: Corpus, tmp_path: Path, on_nan: str, last: int
) -> None:
    keys = ("optimizer.lr=1e30", "scheduler.warmup=0ba", f"on_nan={on_nan}")
    process = run_script("recipes/train.py", *corpus.keys(tmp_path / "run", *keys))
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(
        f"error: step {last + 1}: the gradient is not finite"
    )
    assert len(read_log(tmp_path / "run")) == last
