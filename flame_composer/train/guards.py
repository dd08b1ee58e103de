"""Guards that end a run gone wrong: a loss spike, a batch that never finishes, lack of memory."""

from __future__ import annotations

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from flame_composer.config.sections import SpikeConfig
from flame_composer.config.train import TrainConfig
from flame_composer.errors import TrainingError

POLL_SECONDS = 0.5


class SpikeGuard(Callback):
    """A callback that ends a run whose loss has risen and stays high.

    It ends when the loss has been more than `factor` times its median for `patience` steps in a
    row. The median is that of the last `window` steps with a normal loss.
    """

    def __init__(self, config: SpikeConfig):
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.high = 0  # consecutive steps with a high loss

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "high": self.high}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.high = state["high"]

    def batch_end(self, state: State, logger: Logger) -> None:
        loss = state.total_loss_dict["loss/train/total"]
        if len(self.losses) == self.losses.maxlen:
            usual = statistics.median(self.losses)
            self.high = self.high + 1 if loss > self.config.factor * usual else 0
            if self.high >= self.config.patience:
                raise TrainingError(
                    f"step {state.timestamp.batch.value}: loss {loss:.4f}; for {self.high} steps it"
                    f" has been more than {self.config.factor:g} times {usual:.4f}, the median of"
                    f" the {self.config.window} steps before; go on from an earlier checkpoint with"
                    " a lower optimizer.lr (allow_schedule_change=true), or set loss_spike=null"
                )
        # A loss that is too high, or not finite, must not raise the median.
        if not self.high and math.isfinite(loss):
            self.losses.append(loss)


class StallWatchdog(Callback):
    """A callback that ends the process after `seconds` without progress.

    It prints which rank is stuck, in what, and the stack of each of its threads. A hang is
    otherwise silent: one rank waits for data, the others wait for that rank, and the machines are
    still paid for.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._phase, self._step = "", 0
        self._since = time.monotonic()
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None

    def _enter(self, phase: str, state: State) -> None:
        self._phase, self._step, self._since = (
            phase,
            state.timestamp.batch.value + 1,
            time.monotonic(),
        )

    def _watch(self) -> None:
        while not self._over.wait(min(POLL_SECONDS, self.seconds / 4)):
            if time.monotonic() - self._since > self.seconds:
                print(
                    f"error: rank {dist.get_global_rank()} has been {self._phase} at step"
                    f" {self._step} for more than stall_timeout={self.seconds:g} s; the stacks of"
                    " its threads:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback()
                os._exit(1)

    def _start(self, phase: str, state: State) -> None:
        self._enter(phase, state)
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        self._start("evaluating", state)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._start("starting", state)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._enter("waiting for data", state)

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._enter("computing", state)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._enter("evaluating or saving", state)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self._enter("evaluating", state)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._over.set()

    def close(self, state: State, logger: Logger) -> None:
        self._over.set()


def build_watchers(config: TrainConfig) -> list[Callback]:
    """Return the guards that `config` asks for: against loss spikes, stalls, both or neither."""
    watchers: list[Callback] = []
    if config.loss_spike is not None:
        watchers.append(SpikeGuard(config.loss_spike))
    if config.stall_timeout is not None:
        watchers.append(StallWatchdog(config.stall_timeout))
    return watchers


@contextmanager
def explained_memory(config: TrainConfig) -> Iterator[None]:
    """Turn running out of memory into a TrainingError that names the keys to change."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):
            raise
        advice = []
        if isinstance(config.microbatch_size, int) and config.microbatch_size > 1:
            advice.append(
                f"lower microbatch_size ({config.microbatch_size}; the result does not change)"
            )
        if not config.parallelism.activation_checkpointing:
            advice.append("set parallelism.activation_checkpointing=true")
        if config.parallelism.fsdp is None and dist.get_world_size() > 1:
            advice.append("spread the model over devices with parallelism.fsdp={}")
        advice.append(f"lower context_length ({config.context_length}) or the model's size")
        raise TrainingError(
            f"out of memory on rank {dist.get_global_rank()}: {', or '.join(advice)}"
        ) from None
