"""Scores in lm-evaluation-harness tasks, taken while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.config.train import TRAIN_LOG, RunPlan, TrainConfig
from flame_composer.model.causal_lm import causal_lm_of
from flame_composer.train.algorithms import as_evaluated
from flame_composer.train.guards import StallWatchdog
from flame_composer.train.log import every
from flame_composer.train.preemption import Preemption
from flame_composer.train.rows import keep_rows

if TYPE_CHECKING:
    from flame_composer.use.harness import HarnessModel


class Asked(Exception):
    """The exception that abandons the harness's evaluation after a signal."""


class TaskScores(Callback):
    """A callback that scores the model in lm-evaluation-harness tasks while it trains.

    The scores go into the log and to every logger. The random state and the model's mode are
    restored afterwards, so that training is not affected. Scores that a signal prevented are taken
    after the restart.
    """

    def __init__(
        self,
        model: HarnessModel,
        tasks: dict[str, Any],
        log_path: Path,
        stop: Preemption,
        *,
        due: Callable[[State, Event], bool],
        limit: int | None,
    ):
        """Score `model` when `due`, each task on its first `limit` documents (None: all).

        `log_path` is the log whose last row receives scores that are taken only after a restart.
        """
        self.model, self.tasks, self.log_path, self.stop = model, tasks, log_path, stop
        self.due, self.limit = due, limit
        self.missing = False  # whether the last step's scores are still to be taken
        self.last: dict[str, dict[str, float]] = {}
        self._taken: dict[str, dict[str, float]] | None = None  # at the current step

    def state_dict(self) -> dict[str, Any]:
        return {"missing": self.missing, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.missing, self.last = state["missing"], state["last"]

    def after_load(self, state: State, logger: Logger) -> None:
        if not self.missing:
            return
        scores = self.take(state, logger)
        if scores is None:
            self.stop.eval_standalone_end(state, logger)  # raises Preempted
        self.missing = False
        if dist.get_global_rank() == 0:
            keep_rows(
                self.log_path, last_step=state.timestamp.batch.value, evaluation={"tasks": scores}
            )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.due(state, Event.BATCH_END):
            self._taken = None if self.stop.status else self.take(state, logger)
            self.missing = self._taken is None
        else:
            self.missing = False

    def part_of_row(self) -> dict[str, Any]:
        """Return `tasks`: the scores, or nothing on a step that took none."""
        taken, self._taken = self._taken, None
        return {} if taken is None else {"tasks": taken}

    def take(self, state: State, logger: Logger) -> dict[str, dict[str, float]] | None:
        """Score the model as it is now; return the scores on every rank, or None after a signal.

        Only a run of one rank stops for a signal. With several ranks the scoring is finished, since
        no rank knows whether the others have been told to stop.
        """
        from flame_composer.use.harness import score, scores

        watchdogs = [
            callback for callback in state.callbacks if isinstance(callback, StallWatchdog)
        ]

        def before_batch() -> None:
            for watchdog in watchdogs:
                watchdog.eval_batch_end(state, logger)
            if self.stop.asked and dist.get_world_size() == 1:
                raise Asked

        self.stop.has_paused = True  # afterwards the ranks ask one another for signals again
        module = causal_lm_of(state.model)
        was_training, random_state = module.training, reproducibility.get_rng_state()
        self.model.take(module.eval().model, before_batch)
        try:
            with as_evaluated(state, logger):
                results = score(self.model, self.tasks, limit=self.limit, bootstraps=0)
        except Asked:
            return None
        finally:
            module.train(was_training)
            reproducibility.load_rng_state(random_state)
        found = [scores(results) if results else {}]
        dist.broadcast_object_list(found, src=0)
        self.last = found[0]
        logger.log_metrics(
            {
                f"metrics/eval/{task}/{metric}": value
                for task, values in self.last.items()
                for metric, value in values.items()
            }
        )
        return self.last


def build_tasks(
    config: TrainConfig,
    plan: RunPlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    stop: Preemption,
) -> list[TaskScores]:
    """Return a list of the callback that scores `eval_tasks`; empty if the config has none.

    Raise ConfigError, before any training, if a task cannot be loaded or run.
    """
    wanted = config.eval_tasks
    if wanted is None:
        return []
    # Imported only here: lm-evaluation-harness is an optional extra.
    from flame_composer.use.harness import HarnessModel, check_fits
    from flame_composer.use.tasks import load_tasks

    tasks = load_tasks(
        wanted.tasks, wanted.task_path, num_fewshot=wanted.num_fewshot, task_code=wanted.task_code
    )
    interval = config.in_batches(wanted.interval, plan.per_epoch, plan.total)
    assert interval is not None
    batch_size = wanted.batch_size or config.microbatch_size
    assert isinstance(batch_size, int)  # the configuration requires it
    adapter = HarnessModel(model, tokenizer, batch_size=batch_size, precision=config.precision)
    check_fits(adapter, tasks)
    log_path = Path(config.log_folder, TRAIN_LOG)
    due = every(interval, plan.total)
    return [TaskScores(adapter, tasks, log_path, stop, due=due, limit=wanted.limit)]
