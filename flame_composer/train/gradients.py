"""What is done with a step's gradient before the optimizer takes it: its norm is taken, looked
at, and clipped.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist

from flame_composer.config.train import TrainConfig
from flame_composer.errors import TrainingError

MAX_SKIPPED = 10  # steps in a row that may be skipped


class Gradients(Callback):
    """Takes the norm of every step's gradient, over all parameters and devices, for the log, and
    clips it to `max_norm`.

    A gradient that is not a number, or infinite, is not taken: with `stop` the run ends there, its
    weights as they were; with `skip` it goes on with the next batch, and ends after MAX_SKIPPED
    such steps in a row. (With amp_fp16 such gradients are the loss scaler's everyday business: left
    to it.)
    """

    def __init__(self, max_norm: float | None, on_nan: Literal["stop", "skip"]):
        self.max_norm = max_norm
        self.on_nan = on_nan
        self.norm = math.nan  # of this step
        self.skipped = 0  # in a row
        # Whether some weight has had no gradient in some step of the run, as one of a frozen layer
        # or of an expert that no token went to: the optimizer has then taken fewer steps of it.
        self.passed_over = False

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "passed_over": self.passed_over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        self.passed_over = state.get("passed_over", True)  # earlier versions do not say

    def after_train_batch(self, state: State, logger: Logger) -> None:
        everything = list(state.model.parameters())
        parameters = [parameter for parameter in everything if parameter.grad is not None]
        self.passed_over |= sum(each.requires_grad for each in parameters) < len(everything)
        norm = total_norm(parameters, state)
        self.norm = value = norm.item()
        logger.log_metrics({"grad_norm": value})
        if state.precision != Precision.AMP_FP16 and self._is_bad(value, state):
            for parameter in parameters:
                parameter.grad = None  # what an optimizer passes over
        elif self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)

    def part_of_row(self) -> dict[str, Any]:
        """Return the norm before clipping, or None if it is not finite."""
        return {"grad_norm": self.norm if math.isfinite(self.norm) else None}

    def _is_bad(self, norm: float, state: State) -> bool:
        """Raises TrainingError where the run is to end."""
        # The ranks have the same norm, but each computed it: none goes on where another stops.
        is_bad = state.device.tensor_to_device(
            torch.tensor([not math.isfinite(norm)], dtype=torch.int64)
        )
        dist.all_reduce(is_bad, reduce_operation="MAX")
        if not is_bad.item():
            self.skipped = 0
            return False
        step = state.timestamp.batch.value + 1
        self.skipped += 1
        if self.on_nan == "stop" or self.skipped > MAX_SKIPPED:
            again = f", as in the {self.skipped - 1} steps before it" if self.skipped > 1 else ""
            remedy = "lower optimizer.lr (and set allow_schedule_change=true)"
            remedy += "" if self.on_nan == "skip" else ", or leave such steps out with on_nan=skip"
            raise TrainingError(
                f"step {step}: the gradient is not finite{again}; the step was not taken and"
                f" nothing was saved after it; {remedy}"
            )
        if dist.get_global_rank() == 0:
            print(f"step {step}: the gradient is not finite; skipped", file=sys.stderr, flush=True)
        return True


def total_norm(parameters: list[torch.nn.Parameter], state: State) -> torch.Tensor:
    """Of all gradients as one vector, the same on every rank; a scalar."""
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in parameters if parameter.grad is not None]
    )
    if hasattr(norm, "full_tensor"):  # of sharded gradients: each rank has a part
        norm = norm.full_tensor()
    return state.device.tensor_to_device(norm)  # without a gradient it was made on the CPU


def build_gradients(config: TrainConfig) -> Gradients:
    return Gradients(config.optimizer.grad_clip_norm, config.on_nan)
