"""How good a model is on text it has not seen: loss, perplexity by the length of the context,
bits per byte, and its scores in tasks while it trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from composer.core import Callback, Evaluator, Event, Precision, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist, get_device, reproducibility
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.config.rules import DataError
from flame_composer.config.train import TrainConfig
from flame_composer.model.causal_lm import CausalLM, positions
from flame_composer.train.algorithms import as_evaluated
from flame_composer.train.guards import StallWatchdog
from flame_composer.train.log import JsonlLog, every, keep_rows
from flame_composer.train.preemption import Preemption

if TYPE_CHECKING:
    from flame_composer.use.harness import HarnessModel


class Scores(NamedTuple):
    """Over some of a dataset's predicted tokens: how many there are, how many bytes of text they
    stand for, and their mean loss (nats). `bytes` is None for a tokenizer whose tokens are no
    bytes.
    """

    tokens: int
    bytes: int | None
    loss: float

    def describe(self) -> dict[str, Any]:
        # Infinite where math.exp would raise
        perplexity = torch.tensor(self.loss, dtype=torch.float64).exp().item()
        bits = self.loss * self.tokens / math.log(2)
        return {
            "loss": self.loss,
            "perplexity": perplexity,
            "bits_per_byte": bits / self.bytes if self.bytes else None,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def evaluate(
    model: CausalLM,
    evaluator: Evaluator,
    *,
    precision: str,
    token_bytes: NDArray[np.int64] | None,
    block_size: int | None = None,
) -> dict[str, Any]:
    """`Scores` over all predicted tokens and all ranks, and under `by_context` those of each
    `block_size` lengths of context.

    A token's context is what the model had read when it predicted it: at least one token, and with
    `varlen` no more than the document had before (a document's first token is predicted from the
    one before it, after that one's context). A row's first token is predicted from nothing, so it
    is not counted. `token_bytes` are those of `tokenizer.token_bytes`.
    """
    device = get_device()
    model = device.module_to_device(model).eval()
    sizes = None if token_bytes is None else device.tensor_to_device(torch.from_numpy(token_bytes))
    batches = evaluator.dataloader.dataloader
    sums = None  # loss, tokens and bytes by block
    with torch.no_grad():
        for batch in tqdm(
            batches, unit="batch", disable=None if dist.get_global_rank() == 0 else True
        ):
            batch = device.batch_to_device(batch)
            with get_precision_context(Precision(precision)):
                logits_BTV = model(
                    {name: batch[name] for name in ("input_ids", "sequence_id")}
                ).logits
            targets, length = batch["labels"][:, 1:].flatten(), batch["labels"].shape[1]
            # 0 where ignored
            losses = F.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1).float(), targets, reduction="none"
            )
            document = (
                batch["sequence_id"] if model.varlen else torch.zeros_like(batch["sequence_id"])
            )
            block = positions(document)[:, :-1].flatten() // (block_size or length)
            counted = targets >= 0
            values = [
                losses,
                counted,
                (
                    torch.zeros_like(losses)
                    if sizes is None
                    else sizes[targets.clamp(min=0)] * counted
                ),
            ]
            if sums is None:
                num_blocks = math.ceil((length - 1) / (block_size or length))
                sums = torch.zeros(3, num_blocks, dtype=torch.float64, device=losses.device)
            for total, value in zip(sums, values, strict=True):
                total.index_add_(0, block, value.double())
    assert sums is not None
    dist.all_reduce(sums)

    def describe(total: torch.Tensor) -> dict[str, Any]:
        loss, tokens, num_bytes = total.tolist()
        return Scores(
            int(tokens), None if sizes is None else int(num_bytes), loss / tokens
        ).describe()

    result = describe(sums.sum(1))
    if block_size is not None:
        result["by_context"] = [
            {
                "from": 1 + number * block_size,
                "to": min((number + 1) * block_size, length - 1),
                **describe(total),
            }
            for number, total in enumerate(sums.T)
            if total[1] > 0
        ]
    return result


def plot_by_context(results: dict[str, dict[str, Any]], path: str) -> None:
    """A PNG of the perplexity over the length of the context, a line for each dataset."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens of context", ylabel="perplexity")
    for name, result in results.items():
        ends, perplexities = zip(
            *((block["to"], block["perplexity"]) for block in result["by_context"]), strict=True
        )
        axes.plot(ends, perplexities, marker=".", label=name)
    axes.grid(alpha=0.3)
    if len(results) > 1:
        axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise DataError(f"plot={path}: cannot be written: {error.strerror}") from None


class Asked(Exception):
    """Ends the harness's work in the middle of it."""


class TaskScores(Callback):
    """Takes a model's scores in tasks of lm-evaluation-harness while it trains, for the log and
    every logger.

    Training goes on as if nothing had happened: random state and the model's mode are put back.
    What a signal prevented is made up for at the restart.
    """

    def __init__(
        self,
        model: HarnessModel,
        tasks: dict[str, Any],
        log: JsonlLog,
        stop: Preemption,
        *,
        due: Callable[[State, Event], bool],
        limit: int | None,
    ):
        """Must come before `log` in the trainer's callbacks, whose row of the step gets the
        scores.
        """
        self.model, self.tasks, self.log, self.stop = model, tasks, log, stop
        self.due, self.limit = due, limit
        self.missing = False  # of the last step
        self.last: dict[str, dict[str, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"missing": self.missing, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.missing, self.last = state["missing"], state["last"]

    def after_load(self, state: State, logger: Logger) -> None:
        if not self.missing:
            return
        scores = self.take(state, logger)
        if scores is None:
            self.stop.eval_standalone_end(state, logger)  # ends the run
        self.missing = False
        if dist.get_global_rank() == 0:
            keep_rows(
                self.log.path, last_step=state.timestamp.batch.value, evaluation={"tasks": scores}
            )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.due(state, Event.BATCH_END):
            self.log.tasks = None if self.stop.status else self.take(state, logger)
            self.missing = self.log.tasks is None
        else:
            self.missing = False

    def take(self, state: State, logger: Logger) -> dict[str, dict[str, float]] | None:
        """The scores of the model as it is, on every rank; None if a signal came. Several ranks
        finish all the same: each would have to know that the others stop.
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

        module = cast(CausalLM, state.model.module if state.is_model_ddp else state.model)
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    log: JsonlLog,
    stop: Preemption,
) -> list[Callback]:
    """Nothing where no tasks are asked for. Raises ConfigError for tasks that cannot be had,
    before any training.
    """
    wanted, plan = config.eval_tasks, log.plan
    if wanted is None:
        return []
    # The extra need not be installed otherwise
    from flame_composer.use.harness import HarnessModel, check_fits, load_tasks

    tasks = load_tasks(
        wanted.tasks, wanted.task_path, num_fewshot=wanted.num_fewshot, task_code=wanted.task_code
    )
    interval = config.in_batches(wanted.interval, plan.per_epoch, plan.total)
    assert interval is not None
    batch_size = wanted.batch_size or config.microbatch_size
    assert isinstance(batch_size, int)  # a rule
    adapter = HarnessModel(model, tokenizer, batch_size=batch_size, precision=config.precision)
    check_fits(adapter, tasks)
    return [
        TaskScores(adapter, tasks, log, stop, due=every(interval, plan.total), limit=wanted.limit)
    ]
