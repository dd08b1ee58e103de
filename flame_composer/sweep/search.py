"""The choice of trials: a grid's, random ones, and those that Optuna's TPE suggests.

A trial's values are a function of the sweep's configuration, the trial's number and, for TPE, the
results of the trials it may see. So they are the same whatever was killed, and in any process.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame_composer.config.axes import Axis, grid
from flame_composer.config.sweep import SweepConfig
from flame_composer.errors import ConfigError, masked
from flame_composer.sweep.trials import Result, Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

JOURNAL = "optuna.log"

Known = Sequence[tuple[Trial, Result]]


def count(config: SweepConfig) -> int:
    """Return the number of trials of a sweep."""
    return config.trials or math.prod(len(axis.values) for axis in config.axes)


def require_optuna(search: str) -> None:
    """Raise ConfigError if the search needs Optuna and it is not installed."""
    if search == "tpe" and importlib.util.find_spec("optuna") is None:
        raise ConfigError("search=tpe: needs Optuna; pip install 'flame-composer[sweep]'")


def choose(config: SweepConfig, number: int, seen: Known) -> tuple[str, ...]:
    """Return the values of trial `number`; `seen` holds the trials that TPE may look at."""
    if config.search == "grid":
        return grid(config.axes)[number]
    if config.search == "tpe" and number >= config.random_trials:
        return _suggest(config, number, seen)
    draw = random.Random(_seed(config, number))
    return tuple(_draw(axis, draw) for axis in config.axes)


def _seed(config: SweepConfig, number: int) -> int:
    digest = hashlib.sha256(f"{config.search_seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _draw(axis: Axis, draw: random.Random) -> str:
    if axis.kind == "loguniform":
        return axis.text(math.exp(draw.uniform(math.log(axis.low), math.log(axis.high))))
    if axis.kind == "uniform":
        return axis.text(draw.uniform(axis.low, axis.high))
    if axis.kind == "int":
        return axis.text(draw.randint(int(axis.low), int(axis.high)))
    return draw.choice(axis.values)


def _suggest(config: SweepConfig, number: int, seen: Known) -> tuple[str, ...]:
    """Return what a new TPE sampler suggests after the trials in `seen`.

    A sampler that lived on would depend on what its process has done before.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The first trials were drawn here, so the sampler has no random ones of its own.
    sampler = optuna.samplers.TPESampler(seed=_seed(config, number), n_startup_trials=0)
    study = optuna.create_study(sampler=sampler)
    for trial, result in seen:
        study.add_trial(_frozen(config.axes, trial, result, failed_as=math.inf))
    found = study.ask(_distributions(config.axes)).params
    return tuple(
        axis.text(found[axis.key]) if axis.kind else str(found[axis.key]) for axis in config.axes
    )


def _distributions(axes: Sequence[Axis]) -> dict[str, BaseDistribution]:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    found: dict[str, BaseDistribution] = {}
    for axis in axes:
        if axis.kind == "int":
            found[axis.key] = IntDistribution(int(axis.low), int(axis.high))
        elif axis.kind:
            log = axis.kind == "loguniform"
            found[axis.key] = FloatDistribution(axis.low, axis.high, log=log)
        else:
            found[axis.key] = CategoricalDistribution(axis.values)
    return found


def _frozen(
    axes: Sequence[Axis], trial: Trial, result: Result, failed_as: float | None
) -> FrozenTrial:
    """Return a trial as Optuna knows it. To the sampler, a failed one is the worst there can be."""
    from optuna.trial import TrialState, create_trial

    numbers: dict[str, type] = {"int": int, "uniform": float, "loguniform": float, "": str}
    state, value, between = TrialState.COMPLETE, result.metric, dict[int, float]()
    if result.state == "pruned":
        assert result.step is not None
        assert result.metric is not None
        state, value = TrialState.PRUNED, None
        between[result.step] = result.metric
    if result.state == "failed":
        state, value = (TrialState.FAIL if failed_as is None else state), failed_as
    params: dict[str, Any] = {
        axis.key: numbers[axis.kind](text) for axis, text in zip(axes, trial.values, strict=True)
    }
    return create_trial(
        state=state,
        value=value,
        params=params,
        distributions=_distributions(axes),
        user_attrs={"name": trial.name},
        intermediate_values=between,
    )


def write_journal(config: SweepConfig, known: Known) -> None:
    """Write the trials as a journal, for Optuna's own tools to read.

    The sweep does not read it: Optuna appends to a journal, in which a kill can leave half a line,
    while a trial's result is whole or not there. So it is written anew, and appears whole.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = Path(config.sweep_folder, JOURNAL)
    new = path.with_suffix(".tmp")
    for left in (new, new.with_name(f"{new.name}.lock")):
        left.unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(new), JournalFileOpenLock(str(new))))
    study = optuna.create_study(study_name=Path(config.sweep_folder).name, storage=storage)
    axes = [replace(axis, values=tuple(map(masked, axis.values))) for axis in config.axes]
    for trial, result in known:
        shown = tuple(
            text if axis.kind else masked(text)
            for axis, text in zip(axes, trial.values, strict=True)
        )
        study.add_trial(_frozen(axes, replace(trial, values=shown), result, failed_as=None))
    new.replace(path)


def pruned_at(
    own: dict[int, float], others: Sequence[dict[int, float]], *, warmup: int, needed: int
) -> int | None:
    """Return the step of the first evaluation at which a trial is pruned, or None if there is none.

    `own` and `others` hold losses by step: the trial's, and those of the trials that it is compared
    with. It is pruned where its loss is above their median, if `needed` of them have one there.
    """
    for step in sorted(own)[warmup:]:
        losses = sorted(other[step] for other in others if step in other)
        if len(losses) < needed:
            continue
        middle = len(losses) // 2
        median = losses[middle] if len(losses) % 2 else (losses[middle - 1] + losses[middle]) / 2
        if own[step] > median:
            return step
    return None
