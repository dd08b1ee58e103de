"""Optimizer with parameter groups, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from composer.core import Algorithm, Callback, State
from composer.loggers import Logger

from flame_composer.config.extensions import spelled_alike
from flame_composer.config.sections import SchedulerConfig
from flame_composer.config.train import RunPlan, TrainConfig
from flame_composer.errors import ConfigError

"""An optimizer's name in a checkpoint, by that of the configuration."""


def rate_factor(config: SchedulerConfig, batch: int, plan: RunPlan) -> float:
    """The learning rate of the batch after `batch` earlier ones, as a fraction of the peak.

    Linear warmup from 0, then the named shape, which falls to `min_lr_ratio` at the end of the run;
    constant stays at 1.
    """
    if batch < plan.warmup:
        return batch / plan.warmup
    is_wsd = config.name == "wsd"
    name = config.decay_shape if is_wsd else config.name
    start = max(plan.warmup, plan.total - plan.decay) if is_wsd else plan.warmup
    progress = max(0, batch - start) / max(1, plan.total - start)
    shape = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "1-sqrt": 1 - math.sqrt(progress),
        "constant": 1.0,
    }[name]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class Schedule(Callback):
    """Sets every batch's learning rate from its place in the run, so a restart needs no state to go
    on exactly.

    Composer's schedulers step before the clock does, so that a batch trains at the rate meant for
    the one before it.

    What the rates came from is in the checkpoint. A run goes on with another configuration if every
    step it has taken had the rate that it would have with that one: a constant rate, or wsd before
    its decay, can be made longer; a cosine cannot, whose every rate depends on the run's length.
    The same holds of `going_by_length`: algorithms by their key.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        peak: float,
        plan: RunPlan,
        *,
        allow_change: bool = False,
        going_by_length: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.config = config
        self.peak = peak
        self.plan = plan
        self.allow_change = allow_change
        self.going_by_length = going_by_length
        self.num_used = 0  # rates of the first so many batches

    def batch_start(self, state: State, logger: Logger) -> None:
        rate = self.peak * rate_factor(self.config, state.timestamp.batch.value, self.plan)
        self.num_used = state.timestamp.batch.value + 1
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate

    def _made_from(self) -> dict[str, Any]:
        """What decides the rates, by the keys that say it; durations in batches."""
        return {
            "optimizer.lr": self.peak,
            "scheduler.name": self.config.name,
            "max_duration": self.plan.total,
            "scheduler.warmup": self.plan.warmup,
            "scheduler.decay": self.plan.decay,
            "scheduler.decay_shape": self.config.decay_shape,
            "scheduler.min_lr_ratio": self.config.min_lr_ratio,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"made_from": self._made_from(), "num_used": self.num_used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if a step that was taken would have had another rate, or been
        otherwise, or not been at all.
        """
        before, now, self.num_used = state["made_from"], self._made_from(), state["num_used"]
        if self.num_used > self.plan.total:
            raise ConfigError(
                f"max_duration: comes to {self.plan.total}ba, and the checkpoint has"
                f" {self.num_used} steps behind it; set it to more, or move the checkpoints after"
                " that step away to end there"
            )
        self._check_algorithms(before["max_duration"])
        uses_decay = "wsd" in (before["scheduler.name"], now["scheduler.name"])
        changed = [
            key
            for key in now
            if now[key] != before[key] and (uses_decay or not key.startswith("scheduler.decay"))
        ]
        if not changed or self.allow_change:
            return
        config = SchedulerConfig(
            name=before["scheduler.name"],
            decay_shape=before["scheduler.decay_shape"],
            min_lr_ratio=before["scheduler.min_lr_ratio"],
        )
        plan = self.plan._replace(
            total=before["max_duration"],
            warmup=before["scheduler.warmup"],
            decay=before["scheduler.decay"],
        )
        for batch in range(self.num_used):
            was = before["optimizer.lr"] * rate_factor(config, batch, plan)
            would_be = self.peak * rate_factor(self.config, batch, self.plan)
            if was != would_be:
                listed = ", ".join(
                    f"{key} ({_in_words(key, before[key])} before, {_in_words(key, now[key])} now)"
                    for key in changed
                )
                raise ConfigError(
                    f"the checkpoint was trained at other learning rates: step {batch + 1} of the"
                    f" {self.num_used} taken had {was:.6g}, and would have {would_be:.6g}:"
                    f" {listed}; set back what changed, start a new run_name, or set"
                    " allow_schedule_change=true to go on all the same"
                )

    def _check_algorithms(self, total_before: int) -> None:
        if self.allow_change or total_before == self.plan.total:
            return
        for key, algorithm in self.going_by_length.items():
            for batch in range(self.num_used):
                was, would_be = (
                    algorithm.at(batch, total) for total in (total_before, self.plan.total)
                )
                if was != would_be:
                    raise ConfigError(
                        f"{key}: goes by the length of the run: step {batch + 1} of the"
                        f" {self.num_used} taken had {was}, and would have {would_be}: max_duration"
                        f" ({total_before}ba before, {self.plan.total}ba now); set it back, start a"
                        " new run_name, or set allow_schedule_change=true to go on all the same"
                    )


def build_schedule(config: TrainConfig, plan: RunPlan, algorithms: Sequence[Algorithm]) -> Schedule:
    keys = {spelled_alike(name): f"algorithms.{name}" for name in config.algorithms}
    by_length = {
        keys[type(each).__name__.lower()]: each for each in algorithms if hasattr(each, "at")
    }
    return Schedule(
        config.scheduler,
        config.optimizer.lr,
        plan,
        allow_change=config.allow_schedule_change,
        going_by_length=by_length,
    )


def _in_words(key: str, value: Any) -> str:
    return (
        f"{value}ba"
        if key in ("max_duration", "scheduler.warmup", "scheduler.decay")
        else str(value)
    )
