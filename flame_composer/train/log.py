"""The JSONL log of a run, one row per step, and the lines about it on the terminal."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from composer.core import Callback, Event, State
from composer.loggers import (
    Logger,
)
from composer.utils import dist

from flame_composer.config.train import TRAIN_LOG, RunPlan, TrainConfig
from flame_composer.train.rows import appending, keep_rows, ranges, writing
from flame_composer.train.sums import StepSums

log = logging.getLogger(__name__)


# The keys of a row, in the order in which they are written.
ROW = (
    *("current_steps", "total_steps", "loss", "grad_norm", "learning_rate", "epoch", "percentage"),
    *("num_tokens", "throughput", "eval_loss", "eval_perplexity", "tasks", "batch_hash", "streams"),
    "left_out",
)


class Contributor(Protocol):
    """A callback that adds values to every row of the log."""

    def part_of_row(self) -> dict[str, Any]:
        """Return the values to add to the row of the step just taken, by keys of ROW."""
        ...


class JsonlLog(Callback):
    """A callback that writes one JSON row per step to `train_log.jsonl`.

    Every step has one row, in order, however often the run is restarted.

    Keys: current_steps, total_steps, loss (mean over the global batch's tokens; null if not
    finite), grad_norm (of the whole gradient, before clipping; null if not finite), learning_rate
    (of this step), epoch, percentage, num_tokens (seen so far), throughput (tokens per second over
    all devices in this step; null if the clock was set back). Some rows have more: eval_loss and
    eval_perplexity on steps that evaluate, tasks on steps that take scores, batch_hash if asked
    for, streams (rows, tokens and share of each) if there are several, and left_out (rows, tokens
    and share so far) with a repetition_filter.

    A row is written before the checkpoint of its step. A restart therefore finds every row up to
    its checkpoint, and drops the later ones, whose steps it takes again.
    """

    def __init__(
        self,
        log_folder: Path,
        plan: RunPlan,
        *,
        print_lines: bool,
        hash_sums: StepSums | None = None,
        eval_due: Callable[[State, Event], bool] | None = None,
        contributors: Sequence[Contributor] = (),
    ):
        """Log to `log_folder`, which gets `train_log.jsonl`.

        `print_lines`: whether to print progress, about fifty times in a run and at evaluations.
        `hash_sums`: what adds up the hashes of all ranks' rows, or None to log no batch_hash.
        `eval_due`: a function that returns whether a step's row must have an evaluation, or None if
        the run has no evaluations. One that a signal prevented is made up for after the restart.
        `contributors`: callbacks that each add a part to every row.
        """
        self.contributors = contributors
        self.path = log_folder / TRAIN_LOG
        self.eval_due = eval_due
        self.eval_missing = False
        self.plan = plan
        self.print_every = max(1, plan.total // 50) if print_lines else 0
        self.hash_sums = hash_sums
        if hash_sums is not None:
            hash_sums.add_of_rows("row_hashes", lambda state: in_halves(self._row_hashes))
        self._row_hashes = 0
        self._learning_rate = 0.0
        self._evaluation: dict[str, float] | None = None
        self.initial_evaluation: dict[str, float] = {}
        self.last_evaluation: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "initial_evaluation": self.initial_evaluation,
            "last_evaluation": self.last_evaluation,
            "eval_missing": self.eval_missing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.initial_evaluation = state["initial_evaluation"]
        self.last_evaluation = state["last_evaluation"]
        # Absent from checkpoints made up to 2026-11-21
        self.eval_missing = state.get("eval_missing", False)

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            last_step = state.timestamp.batch.value
            with writing(self.path):
                missing = keep_rows(self.path, last_step=last_step)
            if missing:
                log.warning(
                    "warning: %s: has no row for %s, although the checkpoint of step %d is past it;"
                    " the lost rows stay missing, and the run goes on",
                    self.path,
                    ranges(missing),
                    last_step,
                )

    def batch_start(self, state: State, logger: Logger) -> None:
        # Read now: Composer's scheduler has stepped by the time the step is logged.
        self._learning_rate = state.optimizers[0].param_groups[0]["lr"]
        if self.hash_sums is not None:
            self._row_hashes = sum(map(hash_row, state.batch["input_ids"]))

    def eval_end(self, state: State, logger: Logger) -> None:
        if state.eval_timestamp.batch < state.dataloader_len:
            return  # a signal cut it short
        values = state.eval_metric_values
        self.last_evaluation = {
            "eval_loss": float(values["LanguageCrossEntropy"]),
            "eval_perplexity": float(values["LanguagePerplexity"]),
        }
        if self.eval_missing:
            self.eval_missing = False
            if dist.get_global_rank() == 0:
                with writing(self.path):
                    keep_rows(
                        self.path,
                        last_step=state.timestamp.batch.value,
                        evaluation=self.last_evaluation,
                    )
        elif state.timestamp.batch.value > 0:
            self._evaluation = self.last_evaluation
        else:
            self.initial_evaluation = self.last_evaluation
            if self.print_every and dist.get_global_rank() == 0:
                print(
                    f"before training: eval loss {self.last_evaluation['eval_loss']:.4f}, "
                    f"perplexity {self.last_evaluation['eval_perplexity']:.1f}",
                    flush=True,
                )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        due = self.eval_due is not None and self.eval_due(state, Event.BATCH_END)
        self.eval_missing = due and self._evaluation is None
        if dist.get_global_rank() != 0:
            return
        time = state.timestamp
        assert time.batch_wct is not None
        assert state.previous_timestamp is not None
        step_tokens = time.token.value - state.previous_timestamp.token.value
        loss, seconds = state.total_loss_dict["loss/train/total"], time.batch_wct.total_seconds()
        row: dict[str, Any] = {
            "current_steps": time.batch.value,
            "total_steps": self.plan.total,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": None,
            "learning_rate": self._learning_rate,
            "epoch": round(time.batch.value / self.plan.per_epoch, 6),
            "percentage": round(100 * time.batch.value / self.plan.total, 4),
            "num_tokens": time.token.value,
            "throughput": round(step_tokens / seconds, 1) if seconds > 0 else None,
        }
        if self._evaluation is not None:
            row |= self._evaluation
            self._evaluation = None
        if self.hash_sums is not None:
            row["batch_hash"] = f"{from_halves(self.hash_sums['row_hashes']):016x}"
        for contributor in self.contributors:
            row |= contributor.part_of_row()
        row = {key: row[key] for key in ROW if key in row}
        with writing(self.path), appending(self.path) as file:
            file.write(json.dumps(row) + "\n")
        if self.print_every and (
            row["current_steps"] % self.print_every == 0 or {"eval_loss", "tasks"} & set(row)
        ):
            print(describe(row), flush=True)

    def summary(self, state: State) -> dict[str, Any]:
        """Return the results of the run: its steps, tokens, average speed and evaluations.

        The evaluations are the one before training (`*_initial`) and the last; the speed is in
        tokens per second.
        """
        seconds = state.timestamp.total_wct.total_seconds() if state.timestamp.total_wct else 0.0
        return {
            "steps": state.timestamp.batch.value,
            "train_tokens": state.timestamp.token.value,
            "tokens_per_second": (
                round(state.timestamp.token.value / seconds, 1) if seconds > 0 else None
            ),
            **{f"{name}_initial": value for name, value in self.initial_evaluation.items()},
            **self.last_evaluation,
        }


def build_log(
    config: TrainConfig,
    plan: RunPlan,
    contributors: Sequence[Contributor],
    sums: StepSums,
    *,
    print_lines: bool,
    eval_due: Callable[[State, Event], bool] | None,
) -> JsonlLog:
    """Return the callback that writes the log of a run into its log_folder."""
    return JsonlLog(
        Path(config.log_folder),
        plan,
        print_lines=print_lines,
        hash_sums=sums if config.log_batch_hash else None,
        eval_due=eval_due,
        contributors=contributors,
    )


def describe(row: dict[str, Any]) -> str:
    """Return a row of the log as a line of text."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    speed = "unknown" if row["throughput"] is None else f"{row['throughput']:,.0f}"
    line = (
        f"step {row['current_steps']}/{row['total_steps']}  loss {loss}  lr"
        f" {row['learning_rate']:.2e}  {speed} tokens/s  {row['num_tokens']:,} tokens"
    )
    if "eval_loss" in row:
        line += f"  eval loss {row['eval_loss']:.4f}, perplexity {row['eval_perplexity']:.1f}"
    for task, scores in row.get("tasks", {}).items():
        line += f"  {task}: " + ", ".join(
            f"{metric} {value:.4f}" for metric, value in scores.items()
        )
    return line


def every(interval: int, total: int) -> Callable[[State, Event], bool]:
    """Return a predicate for Composer that is true every `interval` batches and after the last."""

    def due(state: State, event: Event) -> bool:
        batch = state.timestamp.batch.value
        return event == Event.BATCH_END and (batch % interval == 0 or batch == total)

    return due


def hash_row(input_ids: torch.Tensor) -> int:
    """Return a 64-bit hash of a row's token ids.

    The sum of the hashes of a global batch depends on its rows, but not on their order or ranks.
    """
    content = input_ids.to(torch.int64).cpu().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def in_halves(number: int) -> tuple[int, int]:
    """Return the upper and the lower 32 bits of `number` modulo 2**64.

    Their sums over ranks fit into 64 bits, as the sum of the numbers need not.
    """
    return divmod(number % 2**64, 2**32)


def from_halves(sums: Sequence[int]) -> int:
    """Return, modulo 2**64, the sum of the numbers whose `in_halves` add up to `sums`."""
    upper, lower = sums
    return ((upper << 32) + lower) % 2**64
