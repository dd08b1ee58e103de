"""The learning rate over a run, and the check that a resumed run had the same rates so far."""

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


def rate_factor(config: SchedulerConfig, batch: int, plan: RunPlan) -> float:
    """Return the learning rate of the batch after `batch` earlier ones, as a fraction of the peak.

    It rises linearly from 0 during warmup, then follows the named shape and reaches `min_lr_ratio`
    at the end of the run, or at `t_max`, which may lie beyond it; `constant` stays at 1.
    """
    if batch < plan.warmup:
        return batch / plan.warmup
    is_wsd = config.name == "wsd"
    name = config.decay_shape if is_wsd else config.name
    start = max(plan.warmup, plan.total - plan.decay) if is_wsd else plan.warmup
    end = plan.total if plan.t_max is None else plan.t_max
    progress = max(0, batch - start) / max(1, end - start)
    shape = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "1-sqrt": 1 - math.sqrt(progress),
        "constant": 1.0,
    }[name]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class Schedule(Callback):
    """A callback that sets each batch's learning rate from its place in the run.

    A restart therefore needs no saved state to continue at the right rates. (Composer's schedulers
    step before the batch count does, so each batch trains at the rate meant for the one before.)

    Checkpoints nevertheless record the settings that the rates came from, to compare them on
    resume. A run may continue with other settings only if every step already taken would have had
    the same rate. So a run with a constant rate, or with wsd before its decay, can be made longer.
    One with a cosine cannot, because each of its rates depends on the length of the run, unless
    `scheduler.t_max` gives the cosine a length of its own.
    `going_by_length` holds, by configuration key, the algorithms that depend on that length; their
    effects are compared in the same way.
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
        self.num_used = 0  # batches that have trained so far

    def batch_start(self, state: State, logger: Logger) -> None:
        rate = self.peak * rate_factor(self.config, state.timestamp.batch.value, self.plan)
        self.num_used = state.timestamp.batch.value + 1
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate

    def _made_from(self) -> dict[str, Any]:
        """Return the settings that determine the rates, by key; durations are in batches."""
        return {
            "optimizer.lr": self.peak,
            "scheduler.name": self.config.name,
            "max_duration": self.plan.total,
            "scheduler.warmup": self.plan.warmup,
            "scheduler.decay": self.plan.decay,
            "scheduler.decay_shape": self.config.decay_shape,
            "scheduler.min_lr_ratio": self.config.min_lr_ratio,
            "scheduler.t_max": self.plan.t_max,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"made_from": self._made_from(), "num_used": self.num_used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ConfigError if this configuration would have changed a step already taken.

        It would if a step had had another learning rate, if an algorithm had acted differently on
        it, or if it lay beyond the end of the run.
        """
        # Checkpoints up to 2026-11-29 have no t_max.
        before = {"scheduler.t_max": None, **state["made_from"]}
        now, self.num_used = self._made_from(), state["num_used"]
        if self.num_used > self.plan.total:
            raise ConfigError(
                f"max_duration: comes to {self.plan.total}ba, but the checkpoint has already taken"
                f" {self.num_used} steps; set it to more, or move the checkpoints after that step"
                " away to end there"
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
            t_max=before["scheduler.t_max"],
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
                    " allow_schedule_change=true to continue anyway"
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
                        f"{key}: depends on the length of the run: step {batch + 1} of the"
                        f" {self.num_used} taken had {was}, and would have {would_be}: max_duration"
                        f" ({total_before}ba before, {self.plan.total}ba now); set it back, start a"
                        " new run_name, or set allow_schedule_change=true to continue anyway"
                    )


def build_schedule(config: TrainConfig, plan: RunPlan, algorithms: Sequence[Algorithm]) -> Schedule:
    """Return the learning rate schedule of a run.

    On resume it also checks those of the `algorithms` that depend on the run's length: those with a
    method `at` (see `train.algorithms`).
    """
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
    durations = ("max_duration", "scheduler.warmup", "scheduler.decay", "scheduler.t_max")
    return f"{value}ba" if key in durations and value is not None else str(value)
