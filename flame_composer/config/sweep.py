"""The configuration of recipes/sweep.py: the keys of a run, and those of the search among runs."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from flame_composer.config.axes import (
    ITS_OWN,
    Axis,
    arguments_of,
    name_of,
    read_axis,
    to_check,
)
from flame_composer.config.given import read_yaml, split_arguments
from flame_composer.config.load import load
from flame_composer.config.rules import require, require_no_braces, require_seed, require_text
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError

S = TypeVar("S", bound="SweepConfig")
MOST_TRIALS = 1000
# Keys that change what the losses are of: the tokens or targets, or a further term of the loss.
CHANGE_EVAL_LOSS = ("tokenizer", "context_length", "eval_data")
CHANGE_LOSS = (
    "tokenizer",
    "context_length",
    "train_data",
    "z_loss",
    "repetition_filter",
    "algorithms.label_smoothing",
)
CHANGE_NO_LOSS = (
    "num_workers",
    "prefetch_factor",
    "predownload",
    "cache_limit",
    "download_retries",
    "download_timeout",
    "shuffle_seed",
    "shuffle_block_size",
)


@dataclass
class SweepConfig(TrainConfig):
    """Train once for each of several configurations, and compare the results.

    Give the run's own file and keys, with a list for each key whose values are to be tried:
    'optimizer.lr=[1e-3,2e-3]'. With search=random or tpe, ranges can be given, too:
    'optimizer.lr=loguniform(1e-4,1e-2)', uniform(0,0.2) or int(1,8). The keys from `search` on are
    the sweep's. The same command goes on with a sweep that was stopped, and shares one that runs.
    """

    paths = (*TrainConfig.paths, "sweep_folder")  # type: ignore[assignment]

    search: Literal["grid", "random", "tpe"] = "grid"
    """Choice of the trials: all combinations, random ones, or those that a model of the earlier
    results (Optuna's TPE; extra sweep) expects most of.
    """
    trials: int | None = None
    """Number of trials of search=random and tpe, to be set there; a grid's follows from its lists.
    """
    search_seed: int = 0
    """Seed of search=random and tpe."""
    random_trials: int = 10
    """Number of first trials that search=tpe takes at random."""
    metric: Literal["eval_loss", "loss"] | None = None
    """Result of a trial, of which less is better: the loss of its last evaluation, or the mean
    training loss of its last steps; the evaluation's with eval_data if not set, and otherwise the
    training loss.
    """
    metric_steps: int = 20
    """Number of last steps whose mean training loss is the result with metric=loss."""
    prune: Literal["median"] | None = None
    """Rule that ends bad trials early: median ends one whose loss at an evaluation is above the
    median of the earlier trials' losses at the same step; none if not set.
    """
    prune_warmup: int = 1
    """Number of first evaluations of a trial at which it is not pruned."""
    prune_trials: int = 4
    """Number of earlier trials needed, with a loss at the same step, to prune one."""
    parallel: int = 1
    """Number of trials that may run at once, in as many processes with the same command. With
    search=tpe or prune, trial n sees the results of trials 0 to n - parallel only, so that results
    do not depend on who was first; without, any number may run.
    """
    devices: int | None = None
    """Number of processes, and GPUs, of a trial, which is then started by the composer launcher; it
    is one process if not set.
    """
    on_failure: Literal["go_on", "stop"] = "go_on"
    """What happens after a trial that failed: the sweep goes on with the others, or stops."""
    retry_failed: bool = False
    """Run trials again that failed earlier; not with search=tpe or prune, where later trials depend
    on them.
    """
    sweep_folder: str = "runs/sweeps/${run_name}"
    """Folder for the trials' folders, results.json and report.html; its name begins the names of
    the runs.
    """

    def __post_init__(self) -> None:
        # What `read_sweep` adds: the axes, the file and arguments that all trials share, and the
        # configurations that are checked before the sweep starts, with the trials' names.
        self.axes: tuple[Axis, ...] = ()
        self.shared: tuple[str, ...] = ()
        self.to_check: dict[str, SweepConfig] = {}

    def validate(self) -> None:
        require_seed(self.search_seed, "search_seed")
        require_text(self, "sweep_folder")
        require_no_braces(self, "sweep_folder")
        require("://" not in self.sweep_folder, "sweep_folder", "must be a local folder")
        is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*", Path(self.sweep_folder).name, re.ASCII)
        rule = "must end in letters, digits, '.', '_' and '-' (its name begins the runs' names)"
        require(is_name is not None, "sweep_folder", rule)
        for name, least in (
            ("random_trials", 1),
            ("metric_steps", 1),
            ("prune_warmup", 0),
            ("prune_trials", 1),
            ("parallel", 1),
        ):
            require(getattr(self, name) >= least, name, f"must be {least} or more")
        is_number = self.devices is None or 0 < self.devices <= MOST_TRIALS
        require(is_number, "devices", f"must be in [1, {MOST_TRIALS}], or null")
        self._check_search()
        super().validate()

    def _check_search(self) -> None:
        if self.search == "grid":
            rule = "must be left out with search=grid, whose trials are all combinations"
            require(self.trials is None, "trials", rule)
        else:
            rule = f"must be a number in [1, {MOST_TRIALS}] with search={self.search}"
            is_number = self.trials is not None and 0 < self.trials <= MOST_TRIALS
            require(is_number, "trials", rule)
        evaluates = self.eval_data is not None
        rule = "needs an evaluation; set eval_data"
        require(evaluates or self.metric != "eval_loss", "metric", rule)
        require(evaluates or self.prune is None, "prune", rule)
        rule = "must be true: a trial goes on from its checkpoint when the sweep is started again"
        require(self.autoresume, "autoresume", rule)
        rule = "must be false with search=tpe or prune, where later trials depend on earlier ones"
        require(not (self.retry_failed and self.is_ordered()), "retry_failed", rule)

    def is_ordered(self) -> bool:
        """Return whether trials depend on the results of earlier ones."""
        return self.search == "tpe" or self.prune is not None

    def world_size(self) -> str:
        return str(self.devices or 1)

    def result(self) -> str:
        """Return the metric that is compared, "eval_loss" or "loss"."""
        return self.metric or ("loss" if self.eval_data is None else "eval_loss")

    def incomparable(self) -> list[str]:
        """Return the axes by which the metric itself changes, and not only how good a model is."""
        changing = CHANGE_LOSS if self.result() == "loss" else CHANGE_EVAL_LOSS
        return [
            axis.key
            for axis in self.axes
            if axis.key.rpartition(".")[2] not in CHANGE_NO_LOSS
            and any(
                f"{covered}.".startswith(f"{key}.")
                for covered in (axis.key, *axis.covers)
                for key in changing
            )
        ]


def sweep_keys() -> list[str]:
    """Return the keys of a sweep that are not the run's."""
    runs = {field.name for field in dataclasses.fields(TrainConfig)}
    return [field.name for field in dataclasses.fields(SweepConfig) if field.name not in runs]


def read_sweep(cls: type[S], argv: list[str]) -> S:
    """Return the configuration of a sweep, with every trial's checked by the rules of a run.

    Raise ConfigError for the first mistake, which names the trial if it is one trial's.
    """
    if "LOCAL_RANK" in os.environ:
        raise ConfigError(
            "environment: LOCAL_RANK: a sweep starts the launcher itself; run it with python, and"
            " give devices=N for trials of N processes"
        )
    file, arguments = split_arguments(argv)
    given = [(argument.partition("=")[0], read_axis(argument)) for argument in arguments]
    _check_places(file, given)
    axes = tuple(axis for _, axis in given if axis is not None)
    tried = {axis.key for axis in axes}
    first = [file] if file else []
    fixed = [
        (each, key) for each, (key, _) in zip(arguments, given, strict=True) if key not in tried
    ]
    of_all = [*first, *(each for each, _ in fixed)]
    config = load(cls, [*of_all, *arguments_of(axes, [axis.extremes()[0] for axis in axes])])
    own = sweep_keys()
    config.axes = axes
    config.shared = (*first, *(each for each, key in fixed if key not in own))
    _check_axes(config)
    combinations = to_check(axes, config.search == "grid")
    for number, values in enumerate(combinations, 1):
        name = name_of(axes, values)
        named = f"run_name={run_name(config, name)}"
        folder = f"sweep_folder={config.sweep_folder}"
        try:
            config.to_check[name] = load(cls, [*of_all, *arguments_of(axes, values), named, folder])
        except ConfigError as error:
            raise ConfigError(f"trial {number} of {len(combinations)} ({name}): {error}") from None
    assert len(config.to_check) == len(combinations), "two trials of one name"
    return config


def run_name(config: SweepConfig, name: str) -> str:
    """Return the name of a trial's run: the sweep's name, then the trial's."""
    return f"{Path(config.sweep_folder).name}-{name}"


def _check_places(file: str | None, given: list[tuple[str, Axis | None]]) -> None:
    """Raise ConfigError for keys that are given where they cannot be."""
    own = sweep_keys()
    for key in read_yaml(file) if file else ():
        if key in own:
            raise ConfigError(
                f"{file}: {key}: is a key of the sweep, not of the run: give it as an argument"
            )
    for number, (key, axis) in enumerate(given):
        if axis is None:
            continue
        top, shown = key.partition(".")[0], f"command line: {key}={axis.shown()}"
        if top in own or key in ITS_OWN:
            whose = "the sweep's own" if top in own else "set by the sweep for each trial"
            raise ConfigError(f"{shown}: must have one value, as it is {whose}")
        # A value before the axis is replaced by it, as arguments replace one another.
        for later, _ in given[number + 1 :]:
            if f"{later}.".startswith(f"{key}.") or f"{key}.".startswith(f"{later}."):
                raise ConfigError(
                    f"{shown}: {later} is given after it; give values to try in one place"
                )
    if any(key == "log_folder" for key, _ in given):
        raise ConfigError(
            "command line: log_folder: each trial's is in the sweep's folder; give sweep_folder=..."
        )


def _check_axes(config: SweepConfig) -> None:
    """Raise ConfigError for axes that the search cannot take."""
    shown = "'optimizer.lr=[1e-3,2e-3]'"
    if not config.axes:
        raise ConfigError(f"command line: a sweep needs values to try; give a list, e.g. {shown}")
    ranges = [axis for axis in config.axes if axis.kind]
    if config.search == "grid" and ranges:
        raise ConfigError(
            f"command line: {ranges[0].key}={ranges[0].shown()}: a grid takes lists; give"
            " search=tpe or search=random with trials=N for ranges"
        )
    longest = max(config.axes, key=lambda axis: len(axis.values))
    if config.search != "grid" and len(longest.values) > MOST_TRIALS:
        raise ConfigError(
            f"command line: {longest.key}: has {len(longest.values):,} values to try, and may have"
            f" {MOST_TRIALS:,}; give a shorter list, or a range"
        )
    # Counted without being made: ten lists of 100 values are more than any memory holds.
    sizes = [len(axis.values) for axis in config.axes]
    number = math.prod(sizes) if config.search == "grid" else 0
    if number > MOST_TRIALS:
        raise ConfigError(
            f"command line: the grid has {number:,} trials, and may have {MOST_TRIALS:,}; give"
            " shorter lists, or search=random trials=N"
        )
