"""Optional training algorithms: averages of the weights, label smoothing and others.

They replace Composer's classes of the same names. Composer's have no effect here (LabelSmoothing:
the loss is computed in the model), divide by zero or shorten rows for good (SeqLengthWarmup), or
cannot resume from a checkpoint, be it on one rank or on another number of them (EMA, SWA,
LayerFreezing). These resume bit for bit.

Algorithms that depend on the length of the run have a method `at(batch, total)`. It returns, as
text, the effect on the step after `batch` earlier ones in a run of `total`. `optim.Schedule`
compares these texts, so that a run of another length is not resumed as if it were the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from composer import algorithms
from composer.algorithms.seq_length_warmup import set_batch_sequence_length
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from flame_composer.config.extensions import whole_batches
from flame_composer.config.rules import DURATION, FRACTION
from flame_composer.model.causal_lm import causal_lm_of

Weights = dict[str, torch.Tensor]


def weights_of(state: State) -> Weights:
    """Return the model's floating-point parameters and buffers by name, not as copies.

    The names are the same on any number of ranks.
    """
    return {
        name: value.detach()
        for name, value in causal_lm_of(state.model).state_dict(keep_vars=True).items()
        if value.is_floating_point()
    }


def _copy(weights: Weights) -> Weights:
    """Return clones of the weights."""
    return {name: value.clone() for name, value in weights.items()}


def _put(weights: Weights, state: State) -> None:
    """Copy the weights into the model."""
    for name, value in weights_of(state).items():
        value.copy_(weights[name])


class Instant(NamedTuple):
    """A point in a run: after a number of batches, or after a fraction of the run's batches."""

    batches: int | None
    fraction: float | None

    @classmethod
    def read(cls, name: str, text: str) -> Instant:
        """Return the point that `text` gives, e.g. `100ba` or `0.5dur`; raise ValueError if none.

        The error names the argument as `name`.
        """
        if match := FRACTION.fullmatch(text):
            return cls(None, float(match[1]))
        match = DURATION.fullmatch(text)
        if match is None or match[2] != "ba":
            raise ValueError(
                f"{name}={text}: must be batches, e.g. 100ba, or a fraction of the run, e.g. 0.5dur"
            )
        return cls(int(match[1]), None)

    def is_reached(self, state: State) -> bool:
        """Return whether the run has reached this point."""
        assert state.max_duration is not None
        return self.is_past(state.timestamp.batch.value, state.max_duration.value)

    def is_past(self, batch: int, total: int) -> bool:
        """Return whether this point is reached once `batch` of `total` batches are done."""
        point = self.batches if self.fraction is None else self.fraction * total
        assert point is not None
        return batch >= point


class EMA(Algorithm):
    """An exponential moving average of the weights, which evaluation uses in their place."""

    def __init__(
        self, half_life: str = "1000ba", ema_start: str = "0ba", update_interval: str = "1ba"
    ):
        self.start = Instant.read("ema_start", ema_start)
        self.interval = whole_batches("update_interval", update_interval)
        self.smoothing = 2 ** (-self.interval / whole_batches("half_life", half_life))
        self.average: Weights | None = None
        self._trained: Weights | None = None  # kept while evaluation uses the average

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BATCH_END, Event.EVAL_START, Event.EVAL_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BATCH_END:
            self._update(state)
        elif event == Event.EVAL_START and self.average is not None:
            self._trained = _copy(weights_of(state))
            _put(self.average, state)
        elif event == Event.EVAL_END and self._trained is not None:
            _put(self._trained, state)
            self._trained = None

    def at(self, batch: int, total: int) -> str:
        return "an average" if self.start.is_past(batch + 1, total) else "no average"

    def _update(self, state: State) -> None:
        weights = weights_of(state)
        if self.average is None:
            if self.start.is_reached(state):
                self.average = _copy(weights)
        elif state.timestamp.batch.value % self.interval == 0:
            # After a resume the average is on the CPU, where checkpoints are loaded.
            self.average = {
                name: value.to(weights[name].device) for name, value in self.average.items()
            }
            for name, value in self.average.items():
                value.lerp_(weights[name], 1 - self.smoothing)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]


@contextmanager
def as_evaluated(state: State, logger: Logger) -> Iterator[None]:
    """Give the model, in the body of this context, the weights that evaluation uses.

    That is their average if an algorithm keeps one, and otherwise the weights themselves.
    """
    _tell(Event.EVAL_START, state, logger)
    try:
        yield
    finally:
        _tell(Event.EVAL_END, state, logger)


def _tell(event: Event, state: State, logger: Logger) -> None:
    """Run the algorithms that respond to `event`."""
    for algorithm in state.algorithms:
        if algorithm.match(event, state):
            algorithm.apply(event, state, logger)


class SWA(Algorithm):
    """Stochastic weight averaging (Izmailov et al. 2018).

    At `swa_end` the weights are replaced by their mean over the run since `swa_start`, to which
    they are added every `update_interval`.
    """

    def __init__(
        self, swa_start: str = "0.7dur", swa_end: str = "0.97dur", update_interval: str = "100ba"
    ):
        self.start, self.end = (
            Instant.read("swa_start", swa_start),
            Instant.read("swa_end", swa_end),
        )
        self.interval = whole_batches("update_interval", update_interval)
        if (self.start.fraction is None) != (self.end.fraction is None) or self.start >= self.end:
            raise ValueError(
                f"swa_end={swa_end}: must be after swa_start={swa_start}, both in ba or both in dur"
            )
        self.average: Weights | None = None
        self.count = 0  # how many times weights were added to the average
        self.done = False

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_END and not self.done and self.start.is_reached(state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        ends = self.end.is_reached(state)
        if self.average is None or ends or state.timestamp.batch.value % self.interval == 0:
            weights = weights_of(state)
            average = self.average or _copy(weights)
            self.average = {name: value.to(weights[name].device) for name, value in average.items()}
            self.count += 1
            for name, value in self.average.items():
                value.lerp_(weights[name], 1 / self.count)
        if ends:
            _put(self.average, state)
            self.done, self.average = True, None

    def at(self, batch: int, total: int) -> str:
        ended = self.end.is_past(batch + 1, total)
        return (
            "its end"
            if ended
            else "an average"
            if self.start.is_past(batch + 1, total)
            else "no average"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "count": self.count, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.count, self.done = state["average"], state["count"], state["done"]


class LabelSmoothing(Algorithm):
    """Label smoothing: `smoothing` of each label is spread evenly over the vocabulary.

    From Szegedy et al. 2016. It needs the logits of a whole microbatch in memory, which fla's fused
    loss otherwise avoids.
    """

    def __init__(self, smoothing: float = 0.1):
        if not 0 < smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: must be more than 0 and less than 1")
        self.smoothing = smoothing

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.model.label_smoothing = self.smoothing  # type: ignore[assignment]


class SeqLengthWarmup(algorithms.SeqLengthWarmup):
    """Sequence length warmup: rows are cut short at first, and grow to their full length.

    They begin at `min_seq_length` tokens and grow by `step_size` tokens at a time over a fraction
    `duration` of the run. As in Composer's class, one pass at full length precedes the first step,
    so that a lack of memory shows at once.
    """

    def __init__(
        self,
        context_length: int,
        duration: float = 0.3,
        min_seq_length: int = 8,
        step_size: int = 8,
    ):
        if not 0 < duration <= 1:
            raise ValueError(f"duration={duration}: must be more than 0, and no more than 1")
        if not 2 <= min_seq_length < context_length:
            raise ValueError(
                f"min_seq_length={min_seq_length}: must be in [2, context_length={context_length})"
            )
        if step_size < 1:
            raise ValueError(f"step_size={step_size}: must be 1 or more")
        super().__init__(duration, min_seq_length, context_length, step_size)

    def at(self, batch: int, total: int) -> str:
        return f"rows of {self.length(batch, total)} tokens"

    def length(self, batch: int, num_batches: int) -> int:
        """Return the number of tokens per row in the batch after `batch` earlier ones."""
        progress = min(1.0, batch / (self.duration * num_batches))
        steps = int(progress * (self.max_seq_length - self.min_seq_length) / self.step_size)
        return (
            self.max_seq_length if progress == 1 else self.min_seq_length + steps * self.step_size
        )

    def apply(self, event: Event, state: State, logger: Logger) -> int | None:
        if event == Event.INIT:
            return super().apply(event, state, logger)
        assert state.max_duration is not None
        of_rows = {  # one number per row, which cannot be cut
            key: state.batch.pop(key)
            for key, value in [*state.batch.items()]
            if isinstance(value, torch.Tensor) and value.ndim == 1
        }
        if not self._activated:
            self._activate_model(state, logger)
        length = self.length(state.timestamp.batch.value, state.max_duration.value)
        state.batch = set_batch_sequence_length(state.batch, length)
        state.batch.update(of_rows)
        logger.log_metrics({"seq_length_warmup/curr_seq_len": length})
        return None


class LayerFreezing(algorithms.LayerFreezing):
    """Layer freezing: layers stop training one after another, from the first on.

    None is frozen until the fraction `freeze_start` of the run; at its end the share `freeze_level`
    of them is. The step alone decides how many. The optimizer skips weights without a gradient and
    keeps their moments.
    """

    def __init__(self, freeze_start: float = 0.5, freeze_level: float = 1.0):
        if not (0 <= freeze_start < 1 and 0 < freeze_level <= 1):
            raise ValueError(
                f"freeze_start={freeze_start}, freeze_level={freeze_level}: must be in [0, 1) and"
                " (0, 1]"
            )
        super().__init__(freeze_start, freeze_level)

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_START

    def share(self, batch: int, total: int) -> float:
        """Return the share of layers that is frozen in the batch after `batch` earlier ones."""
        return (
            self.freeze_level
            * max(0.0, batch / total - self.freeze_start)
            / (1 - self.freeze_start)
        )

    def at(self, batch: int, total: int) -> str:
        return f"{self.share(batch, total):.4g} of the layers frozen"

    def apply(self, event: Event, state: State, logger: Logger) -> int | None:
        assert state.max_duration is not None
        layers = [
            module
            for module in state.model.modules()
            if not list(module.children()) and next(module.parameters(), None) is not None
        ]
        num_frozen = int(
            self.share(state.timestamp.batch.value, state.max_duration.value) * (len(layers) - 1)
        )
        for layer in layers[:num_frozen]:
            layer.requires_grad_(False)
        logger.log_metrics({"layer_freezing/layers_frozen": num_frozen})
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
