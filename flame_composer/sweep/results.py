"""The outcome of a sweep: its table, results.json, and the command of the best trial."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flame_composer.config.axes import Axis, arguments_of, value_of
from flame_composer.config.sweep import SweepConfig, run_name
from flame_composer.errors import masked, without_secrets
from flame_composer.quantities import align
from flame_composer.sweep.trials import STATES, Result, Trial


@dataclass(frozen=True)
class Outcome:
    """What came of a sweep: trials with their results, best first, and the same as JSON."""

    ranked: list[tuple[Trial, Result]]
    content: dict[str, Any]

    @property
    def best(self) -> Trial | None:
        """The trial with the least metric, or None if none has finished."""
        return next((trial for trial, result in self.ranked if result.state == "finished"), None)

    def failed(self) -> list[Trial]:
        return [trial for trial, result in self.ranked if result.state == "failed"]


def summarize(config: SweepConfig, known: Sequence[tuple[Trial, Result]]) -> Outcome:
    """Return the outcome of the trials that are known. It holds nothing that depends on time."""
    ranked = sorted(known, key=_rank)
    outcome = Outcome(ranked, {})
    best = outcome.best
    content = {
        "metric": config.result(),
        "num_trials": len(known),
        **{state: sum(result.state == state for _, result in known) for state in STATES},
        "best": None if best is None else best.name,
        "command": None if best is None else command(config, best),
        "trials": [
            {
                "number": trial.number,
                "name": trial.name,
                "values": {
                    axis.key: without_secrets(value_of(axis.key, text))
                    for axis, text in zip(config.axes, trial.values, strict=True)
                },
                **without_secrets(asdict(result)),
            }
            for trial, result in sorted(known, key=lambda each: each[0].number)
        ],
    }
    return Outcome(ranked, content)


def _rank(known: tuple[Trial, Result]) -> tuple[int, float, int]:
    """Sort finished trials before pruned ones, those before failed ones, and each by its metric."""
    trial, result = known
    metric = float("inf") if result.metric is None else result.metric
    return STATES.index(result.state), metric, trial.number


def keys(axes: Sequence[Axis]) -> list[str]:
    return [axis.key for axis in axes]


def command(config: SweepConfig, trial: Trial) -> str:
    """Return the command that trains with a trial's values, to be copied to a shell.

    The run has a name of its own, so that it goes to another folder than one with the name in the
    sweep's file, which may be there already. Passwords and tokens in it are replaced, as in all
    output.
    """
    first = ["python"] if config.devices is None else ["composer", "-n", str(config.devices)]
    name = f"run_name=best-{run_name(config, trial.name)}"
    values = (*arguments_of(config.axes, trial.values), name)
    return shlex.join(map(masked, [*first, "recipes/train.py", *config.shared, *values]))


def table(config: SweepConfig, outcome: Outcome) -> list[list[str]]:
    """Return the head and the rows of the table of all trials, best first."""
    lasts = [key.rpartition(".")[2] for key in keys(config.axes)]
    heads = [
        key if lasts.count(last) > 1 else last
        for key, last in zip(keys(config.axes), lasts, strict=True)
    ]
    rows = [["trial", *heads, config.result(), "step", "state"]]
    for trial, result in outcome.ranked:
        metric = "" if result.metric is None else f"{result.metric:.4f}"
        step = "" if result.step is None else f"{result.step:,}"
        said = result.state if result.reason is None else f"{result.state}: {result.reason}"
        same = f", as {result.same_as}" if result.same_as else ""
        rows.append([f"{trial.number + 1}", *trial.values, metric, step, f"{said}{same}"])
    return [list(map(masked, row)) for row in rows]


def lines(config: SweepConfig, outcome: Outcome) -> list[str]:
    """Return the table as lines for a terminal."""
    rows = table(config, outcome)
    states = [row.pop() for row in rows]
    return [f"{line}  {state}" for line, state in zip(align(rows), states, strict=True)]
