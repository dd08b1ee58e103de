"""The gradient of a step, measured, checked and clipped before the optimizer uses it."""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from flame_composer.config.train import TrainConfig
from flame_composer.errors import TrainingError
from flame_composer.train.sums import StepSums
from flame_composer.upstream.ranks import settle_buckets

MAX_SKIPPED = 10  # consecutive steps that may be skipped


class Gradients(Callback):
    """A callback that logs the norm of every step's gradient and clips it to `max_norm`.

    The norm is over all parameters and devices.

    A gradient that is NaN or infinite is never applied. With `stop` the run ends before that step,
    its weights unchanged. With `skip` it goes on with the next batch, and ends if more than
    MAX_SKIPPED steps in a row are skipped. Under amp_fp16 such gradients are routine and are left
    to the loss scaler.
    """

    def __init__(
        self,
        max_norm: float | None,
        on_nan: Literal["stop", "skip"],
        sums: StepSums,
        compression: Literal["bf16"] | None = None,
    ):
        """Check gradients on all ranks by `sums`, which this callback takes at every step.

        With a `compression` the replicas of plain data parallelism send one another bf16 numbers.
        """
        self.sums = sums
        self.compression = compression
        # Each rank computes the norm for itself, but all must take the step, or none.
        sums.add("not_finite", lambda state: [int(not math.isfinite(self.norm))])
        self.max_norm = max_norm
        self.on_nan = on_nan
        self.norm = math.nan  # of the current step
        self.skipped = 0  # consecutive steps
        # True once any weight has gone without a gradient in a step, e.g. in a frozen layer or in
        # an expert that no token was routed to: the optimizer has updated that weight less often.
        self.passed_over = False

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "passed_over": self.passed_over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        self.passed_over = state.get("passed_over", True)  # earlier versions did not save it

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.compression == "bf16" and isinstance(state.model, DistributedDataParallel):
            state.model.register_comm_hook(None, bf16_compress_hook)
        settle_buckets(state.model)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        parameters = [each for each in state.model.parameters() if each.grad is not None]
        # Those that adapters leave frozen from the start are not the optimizer's.
        to_train = sum(len(group["params"]) for group in state.optimizers[0].param_groups)
        self.passed_over |= sum(each.requires_grad for each in parameters) < to_train
        scale_gradients(state.optimizers[0])
        norm = total_norm(parameters, state)
        self.norm = value = norm.item()
        logger.log_metrics({"grad_norm": value})
        self.sums.take(state)
        if state.precision != Precision.AMP_FP16 and self._is_bad(state):
            for parameter in parameters:
                parameter.grad = None  # so that the optimizer skips it
        elif self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)

    def part_of_row(self) -> dict[str, Any]:
        """Return `grad_norm`: the norm before clipping, or None if it is not finite."""
        return {"grad_norm": self.norm if math.isfinite(self.norm) else None}

    def _is_bad(self, state: State) -> bool:
        """Return whether the step must be skipped. Raise TrainingError if the run must end."""
        if self.sums["not_finite"] == [0]:
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


def scale_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Multiply gradients by the `gradient_factor` of their group, which muP sets, if it has one."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("gradient_factor", 1.0) != 1.0 else ():
            if parameter.grad is not None:
                parameter.grad.mul_(group["gradient_factor"])


def total_norm(parameters: list[torch.nn.Parameter], state: State) -> torch.Tensor:
    """Return the norm of all gradients taken as one vector: a scalar, the same on every rank."""
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in parameters if parameter.grad is not None]
    )
    if hasattr(norm, "full_tensor"):  # sharded gradients: each rank holds a part
        norm = norm.full_tensor()
    return state.device.tensor_to_device(norm)  # on the CPU if there were no gradients


def build_gradients(config: TrainConfig, sums: StepSums) -> Gradients:
    """Return the callback that logs, checks and clips the gradients of a run, and takes `sums`."""
    compression = config.parallelism.gradient_compression
    return Gradients(config.optimizer.grad_clip_norm, config.on_nan, sums, compression)
