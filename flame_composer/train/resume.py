"""Callbacks for resumed runs: they restore random state, and insist on the same data and loss."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, cast

from composer.core import Algorithm, Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility

from flame_composer.checkpoint.optimizer_state import in_short
from flame_composer.checkpoint.read import Checkpoint, order_of
from flame_composer.config.data import DataConfig
from flame_composer.config.sections import RepetitionConfig
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError
from flame_composer.loader.batches import SHUFFLE_ALGO
from flame_composer.loader.layout import ALGOS
from flame_composer.text.ends import Ends, ends_of, parse_ends, warn
from flame_composer.text.ends import describe as describe_ends
from flame_composer.train.algorithms import LabelSmoothing

# The packages by which results are computed, and their modules. There is no Triton on a Mac.
PACKAGES = {"torch": "torch", "triton": "triton", "transformers": "transformers", "fla-core": "fla"}


class RandomState(Callback):
    """A callback that restores every rank's random state just before the first resumed batch.

    Composer restores it only at the start of an epoch. Our dataset resumes in the middle of one,
    where dropout would otherwise continue from a fresh seed. A run restarted on another number of
    devices has no state to restore, so each rank continues from its seed.
    """

    def __init__(self) -> None:
        self._pending: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"rng": reproducibility.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending = state["rng"]

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if self._pending is not None and len(self._pending) == dist.get_world_size():
            reproducibility.load_rng_state(self._pending)
        self._pending = None


class SameData(Callback):
    """A callback that refuses a checkpoint whose rows came in another order than this run's.

    A checkpoint holds only a position in the order of rows. In another order, some rows would be
    repeated and others never used.
    """

    def __init__(self, order: dict[str, Any], *, allow_change: bool):
        self.order = order
        self.allow_change = allow_change
        self.ends: Ends | None = None  # tokens that documents begin and end with

    def init(self, state: State, logger: Logger) -> None:
        self.ends = ends_of(cast(Any, state.model).tokenizer)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order} | ({} if self.ends is None else {"ends": self.ends._asdict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = state["order"]
        ends = parse_ends(state.get("ends"))  # None in checkpoints up to 2026-11-28
        changed = [
            f"{key} ({before.get(key)} before, {self.order.get(key)} now)"
            for key in {**self.order, **before}
            if before.get(key) != self.order.get(key)
        ]
        if changed and not self.allow_change:
            raise ConfigError(
                f"the checkpoint was trained on rows in another order: {', '.join(changed)}; set"
                " back what changed, start a new run_name, or set allow_data_change=true to"
                " continue anyway"
            )
        if ends is not None and self.ends not in (None, ends):
            warn(
                f"the checkpoint was trained on documents that {describe_ends(ends)}; "
                f"now they {describe_ends(self.ends)}"
            )


def as_begun(config: DataConfig, start: Checkpoint) -> DataConfig:
    """Return `config` with the order of rows that the run began with, unless it names one.

    Raise ConfigError if this version does not have that order.
    """
    if config.shuffle_algo is not None:
        return config
    algo = order_of(start).get(SHUFFLE_ALGO)
    if algo not in ALGOS:
        raise ConfigError(
            f"{start.place}: was trained on rows in the order {in_short(algo)}, which is not one of"
            f" {', '.join(ALGOS)}; continue with the version that saved it, or start a new run_name"
        )
    return dataclasses.replace(config, shuffle_algo=algo)


log = logging.getLogger(__name__)


class SameLoss(Callback):
    """A callback that refuses a checkpoint that was trained on another loss than this run's.

    `settings` are those that decide the loss of a row, by configuration key. Another precision and
    other versions of the packages that compute are said and not refused: losses agree to rounding,
    and a GPU's run may go on on a CPU.
    """

    def __init__(self, settings: dict[str, Any], *, precision: str = "fp32", allow_change: bool):
        self.settings = settings
        self.precision = precision
        self.allow_change = allow_change
        installed = [name for name in PACKAGES if importlib.util.find_spec(PACKAGES[name])]
        self.packages = {name: importlib.metadata.version(name) for name in installed}
        self.is_compared = False

    def state_dict(self) -> dict[str, Any]:
        own = {"precision": self.precision, "packages": self.packages}
        return {"settings": self.settings, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ConfigError if a setting is another than in the checkpoint, if that has it."""
        self._compare(state["settings"])
        before = state.get("precision", self.precision)
        if before != self.precision and dist.get_global_rank() == 0:
            log.warning(
                "warning: precision: the steps so far were taken with %s, and this run continues"
                " with %s: its losses agree with theirs to rounding, and not bit for bit",
                in_short(before),
                self.precision,
            )
        packages = state.get("packages", self.packages)  # none in checkpoints up to 2026-11-30
        changed = [
            f"{name} {in_short(packages[name])} before, {version} now"
            for name, version in self.packages.items()
            if isinstance(packages, dict) and packages.get(name, version) != version
        ]
        if changed and dist.get_global_rank() == 0:
            log.warning(
                "warning: this run continues with other packages (%s): on the same rows, with"
                " results that agree to rounding, and not bit for bit",
                "; ".join(changed),
            )

    def after_load(self, state: State, logger: Logger) -> None:
        """Raise ConfigError if a checkpoint that records no loss was trained without ours.

        Checkpoints up to 2026-11-29 record none, and know neither a z_loss nor a filter.
        """
        if state.timestamp.batch.value > 0 and not self.is_compared:
            filters = [key for key in self.settings if key.startswith("repetition_filter.")]
            self._compare({**dict.fromkeys(filters), "z_loss": 0.0})

    def _compare(self, before: dict[str, Any]) -> None:
        self.is_compared = True
        changed = [
            f"{key} ({before[key]} before, {value} now)"
            for key, value in self.settings.items()
            if key in before and before[key] != value
        ]
        if changed and not self.allow_change:
            raise ConfigError(
                f"the checkpoint was trained on another loss: {', '.join(changed)}; set back what"
                " changed, start a new run_name, or set allow_schedule_change=true to continue"
                " anyway"
            )


def build_same_loss(config: TrainConfig, algorithms: Sequence[Algorithm]) -> SameLoss:
    """Return the callback that keeps in a run what decides the loss of a row."""
    repetition = config.repetition_filter
    smoothings = (each.smoothing for each in algorithms if isinstance(each, LabelSmoothing))
    settings: dict[str, Any] = {
        "z_loss": config.z_loss,
        "varlen": config.varlen,
        "train_data.loss_across_documents": config.train_data.loss_across_documents,
        "algorithms.label_smoothing.smoothing": next(smoothings, None),
    }
    for field in dataclasses.fields(RepetitionConfig):
        key = f"repetition_filter.{field.name}"
        settings[key] = None if repetition is None else getattr(repetition, field.name)
    return SameLoss(settings, precision=config.precision, allow_change=config.allow_schedule_change)
