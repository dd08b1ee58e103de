"""What watches a run: the JSONL log, and random state that survives a restart in the middle of
an epoch.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

import torch
import yaml
from composer import Trainer
from composer.core import Callback, Event, State
from composer.loggers import (
    Logger,
    LoggerDestination,
    ProgressBarLogger,
    TensorboardLogger,
    WandBLogger,
)
from composer.utils import dist, reproducibility

from flame_composer.config.sections import WandbConfig
from flame_composer.config.train import TRAIN_LOG, RunPlan, TrainConfig
from flame_composer.errors import (
    GOES_ON,
    ConfigError,
    InvalidField,
    TrainingError,
    masked,
    one_line,
    without_secrets,
)
from flame_composer.lines import Lines
from flame_composer.storage import files as storage
from flame_composer.storage.folders import flush
from flame_composer.text.ends import Ends, ends_of, parse_ends, warn
from flame_composer.text.ends import describe as describe_ends

STARTS = "starts.jsonl"
log = logging.getLogger(__name__)


# The keys of a row, in their order.
ROW = (
    *("current_steps", "total_steps", "loss", "grad_norm", "learning_rate", "epoch", "percentage"),
    *("num_tokens", "throughput", "eval_loss", "eval_perplexity", "tasks", "batch_hash", "streams"),
)


class Contributor(Protocol):
    """A callback that has something to say of every step."""

    def part_of_row(self) -> dict[str, Any]:
        """Return what is added to the row of the step that has been taken, by keys of ROW."""
        ...


class JsonlLog(Callback):
    """One JSON row per step in `train_log.jsonl`, every step once and in order however often the
    run is restarted.

    Keys: current_steps, total_steps, loss (mean over the global batch's tokens; null if not
    finite), grad_norm (of the whole gradient, before it is clipped; null if not finite),
    learning_rate (of this step), epoch, percentage, num_tokens (seen so far), throughput (tokens
    per second of this step over all devices; null if the clock was set back), with eval_loss and
    eval_perplexity on the steps that evaluate, tasks on those that take scores, batch_hash if asked
    for, and with several streams what has come of each.

    A row is written before the checkpoint of its step, so a restart finds every row up to its
    checkpoint and drops those after it, which it computes again.
    """

    def __init__(
        self,
        log_folder: Path,
        plan: RunPlan,
        *,
        log_batch_hash: bool,
        print_lines: bool,
        eval_due: Callable[[State, Event], bool] | None = None,
        contributors: Sequence[Contributor] = (),
    ):
        """`print_lines`: say on the terminal, fifty times in a run and at every evaluation, how it
        is going.

        `eval_due`: when an evaluation belongs to a step's row, if ever. One that a signal prevented
        is done on the restart.

        `contributors`: who is asked for a part of every row.
        """
        self.contributors = contributors
        self.path = log_folder / TRAIN_LOG
        self.eval_due = eval_due
        self.eval_missing = False
        self.plan = plan
        self.print_every = max(1, plan.total // 50) if print_lines else 0
        self.log_batch_hash = log_batch_hash
        self._row_hashes = 0
        self._learning_rate = 0.0
        self._evaluation: dict[str, float] | None = None
        self.initial_evaluation: dict[str, float] = {}
        self.last_evaluation: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "initial_evaluation": self.initial_evaluation,
            "last_evaluation": self.last_evaluation,
            "eval_missing": self.eval_missing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.initial_evaluation = state["initial_evaluation"]
        self.last_evaluation = state["last_evaluation"]
        # Not in checkpoints of 2026-11-21 and before
        self.eval_missing = state.get("eval_missing", False)

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            last_step = state.timestamp.batch.value
            with _writing(self.path):
                missing = keep_rows(self.path, last_step=last_step)
            if missing:
                log.warning(
                    "warning: %s: has no row of %s, which the checkpoint of step %d has behind it;"
                    " what was lost stays missing, and the run goes on",
                    self.path,
                    _ranges(missing),
                    last_step,
                )

    def batch_start(self, state: State, logger: Logger) -> None:
        # The scheduler has moved on by the time the step is logged.
        self._learning_rate = state.optimizers[0].param_groups[0]["lr"]
        if self.log_batch_hash:
            self._row_hashes = sum(map(hash_row, state.batch["input_ids"]))

    def eval_end(self, state: State, logger: Logger) -> None:
        if state.eval_timestamp.batch < state.dataloader_len:
            return  # a signal cut it short
        values = state.eval_metric_values
        self.last_evaluation = {
            "eval_loss": float(values["LanguageCrossEntropy"]),
            "eval_perplexity": float(values["LanguagePerplexity"]),
        }
        if self.eval_missing:
            self.eval_missing = False
            if dist.get_global_rank() == 0:
                with _writing(self.path):
                    keep_rows(
                        self.path,
                        last_step=state.timestamp.batch.value,
                        evaluation=self.last_evaluation,
                    )
        elif state.timestamp.batch.value > 0:
            self._evaluation = self.last_evaluation
        else:
            self.initial_evaluation = self.last_evaluation
            if self.print_every and dist.get_global_rank() == 0:
                print(
                    f"before training: eval loss {self.last_evaluation['eval_loss']:.4f}, "
                    f"perplexity {self.last_evaluation['eval_perplexity']:.1f}",
                    flush=True,
                )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        due = self.eval_due is not None and self.eval_due(state, Event.BATCH_END)
        self.eval_missing = due and self._evaluation is None
        hashes = dist.all_gather_object(self._row_hashes) if self.log_batch_hash else []
        if dist.get_global_rank() != 0:
            return
        time = state.timestamp
        assert time.batch_wct is not None
        assert state.previous_timestamp is not None
        step_tokens = time.token.value - state.previous_timestamp.token.value
        loss, seconds = state.total_loss_dict["loss/train/total"], time.batch_wct.total_seconds()
        row: dict[str, Any] = {
            "current_steps": time.batch.value,
            "total_steps": self.plan.total,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": None,
            "learning_rate": self._learning_rate,
            "epoch": round(time.batch.value / self.plan.per_epoch, 6),
            "percentage": round(100 * time.batch.value / self.plan.total, 4),
            "num_tokens": time.token.value,
            "throughput": round(step_tokens / seconds, 1) if seconds > 0 else None,
        }
        if self._evaluation is not None:
            row |= self._evaluation
            self._evaluation = None
        if self.log_batch_hash:
            row["batch_hash"] = f"{sum(hashes) % 2**64:016x}"
        for contributor in self.contributors:
            row |= contributor.part_of_row()
        row = {key: row[key] for key in ROW if key in row}
        with _writing(self.path), appending(self.path) as file:
            file.write(json.dumps(row) + "\n")
        if self.print_every and (
            row["current_steps"] % self.print_every == 0 or {"eval_loss", "tasks"} & set(row)
        ):
            print(describe(row), flush=True)

    def summary(self, state: State) -> dict[str, Any]:
        """What the run has come to: steps, tokens, evaluation at the start and last, and tokens
        per second on average.
        """
        seconds = state.timestamp.total_wct.total_seconds() if state.timestamp.total_wct else 0.0
        return {
            "steps": state.timestamp.batch.value,
            "train_tokens": state.timestamp.token.value,
            "tokens_per_second": (
                round(state.timestamp.token.value / seconds, 1) if seconds > 0 else None
            ),
            **{f"{name}_initial": value for name, value in self.initial_evaluation.items()},
            **self.last_evaluation,
        }


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise TrainingError, with the file's name, if it cannot be written. The next start drops a
    row that was cut short.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written: {error.strerror}; when that is mended, {GOES_ON}"
        ) from None


def appending(path: Path) -> TextIO:
    """Open a log to be written to at its end, made if need be. Raise OSError for what is no
    file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.fdopen(storage.open_own(path, flags), "a", encoding="utf-8")


def build_log(
    config: TrainConfig,
    plan: RunPlan,
    contributors: Sequence[Contributor],
    *,
    print_lines: bool,
    eval_due: Callable[[State, Event], bool] | None,
) -> JsonlLog:
    """Return the log of a run in its log_folder."""
    return JsonlLog(
        Path(config.log_folder),
        plan,
        log_batch_hash=config.log_batch_hash,
        print_lines=print_lines,
        eval_due=eval_due,
        contributors=contributors,
    )


def describe(row: dict[str, Any]) -> str:
    """A row of the log as a line for people."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    speed = "unknown" if row["throughput"] is None else f"{row['throughput']:,.0f}"
    line = (
        f"step {row['current_steps']}/{row['total_steps']}  loss {loss}  lr"
        f" {row['learning_rate']:.2e}  {speed} tokens/s  {row['num_tokens']:,} tokens"
    )
    if "eval_loss" in row:
        line += f"  eval loss {row['eval_loss']:.4f}, perplexity {row['eval_perplexity']:.1f}"
    for task, scores in row.get("tasks", {}).items():
        line += f"  {task}: " + ", ".join(
            f"{metric} {value:.4f}" for metric, value in scores.items()
        )
    return line


def every(interval: int, total: int) -> Callable[[State, Event], bool]:
    """Composer's form of "after every `interval` batches, and after the last"."""

    def due(state: State, event: Event) -> bool:
        batch = state.timestamp.batch.value
        return event == Event.BATCH_END and (batch % interval == 0 or batch == total)

    return due


class Discreet(LoggerDestination):
    """Logs settings, those that Composer logs by itself included, without secrets."""

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        super().log_hyperparameters(without_secrets(hyperparameters))


class WandB(Discreet, WandBLogger):
    """Composer's, which answers in one line where W&B cannot be logged to, and sends it no secrets.

    W&B 0.18 keeps the command line as it is, and all that is written to stdout and stderr as it was
    before it was cleaned.
    """

    def init(self, state: State, logger: Logger) -> None:
        from wandb.errors import Error

        arguments, sys.argv[1:] = sys.argv[1:], without_secrets(sys.argv[1:])
        try:
            super().init(state, logger)
        except Error as error:
            raise ConfigError(
                f"wandb: cannot be logged to: {one_line(error)}; run `wandb login`, set"
                " WANDB_MODE=offline, or wandb=null"
            ) from None
        finally:
            sys.argv[1:] = arguments
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Lines):
                stream.clean_first()


def build_wandb_logger(config: WandbConfig, run_name: str, folder: Path) -> WandBLogger:
    """A restart goes on with the same W&B run, whose id is the run's name. WANDB_MODE=offline
    needs no account.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return WandB(
        project=config.project,
        group=config.group,
        name=run_name,
        entity=config.entity,
        tags=config.tags,
        init_kwargs={"id": run_name, "resume": "allow", "dir": str(folder)},
    )


class TensorBoard(Discreet, TensorboardLogger):
    """Composer's, with every step shown once however often the run is restarted.

    What the run before a restart logged after its checkpoint is logged again, so it is marked as
    void. The evaluation of the checkpoint's own step, which comes under the number that the next
    step's loss has, is written anew.
    """

    def __init__(self, folder: Path):
        super().__init__(log_dir=str(folder))
        self.evaluation: tuple[int, dict[str, float]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"evaluation": self.evaluation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluation = state["evaluation"]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        values = {
            name: float(value)
            for name, value in metrics.items()
            if name.startswith("metrics/eval/")
        }
        if values and step is not None:
            same_step = self.evaluation is not None and self.evaluation[0] == step
            self.evaluation = (
                step,
                {**(self.evaluation[1] if same_step and self.evaluation else {}), **values},
            )

    def fit_start(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if dist.get_global_rank() == 0 and step > 0:
            from torch.utils.tensorboard import SummaryWriter

            assert self.log_dir is not None
            self.writer = SummaryWriter(str(Path(self.log_dir, state.run_name)), purge_step=step)
            if self.evaluation is not None and self.evaluation[0] == step:
                super().log_metrics(self.evaluation[1], step)

    def eval_end(self, state: State, logger: Logger) -> None:
        # And no table of hyperparameters, which would be a run of its own at every evaluation
        self._flush(logger)


def build_loggers(config: TrainConfig) -> list[LoggerDestination]:
    """Raises ConfigError for what is not installed."""
    folder = Path(config.log_folder)
    loggers: list[LoggerDestination] = []
    if config.wandb is not None:
        loggers.append(build_wandb_logger(config.wandb, config.run_name, folder))
    if config.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise InvalidField(
                "tensorboard",
                "tensorboard is not installed; pip install 'flame-composer[tensorboard]'",
            )
        loggers.append(TensorBoard(folder / "tensorboard"))
    return loggers


def announce(
    trainer: Trainer,
    resolved_yaml: str,
    log_folder: Path,
    save_folder: str | None,
    *,
    resumed_from: str | None,
) -> None:
    """Say what is about to run, and keep the configuration, in both folders and with every logger;
    note the start in the log's.

    Where the checkpoints are to go cannot be written to, that is found out here and not when hours
    are to be saved.
    """
    for destination in trainer.logger.destinations:
        if isinstance(destination, ProgressBarLogger):
            # Sixty lines between a person and the progress bar
            destination.hparams_already_logged_to_console = True
    trainer.logger.log_hyperparameters(yaml.safe_load(resolved_yaml))
    if dist.get_global_rank() != 0:
        return
    for folder in filter(None, (str(log_folder), save_folder)):
        try:
            if not storage.is_url(folder):
                Path(folder).mkdir(parents=True, exist_ok=True)
            storage.write(storage.join(folder, "config.yaml"), resolved_yaml.encode())
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot be written to: {error.strerror}; set log_folder and save_folder"
                " to folders that can"
            ) from None
    state = trainer.state
    assert state.max_duration is not None
    if state.timestamp < state.max_duration:
        shown = resumed_from and masked(resumed_from)
        start = {
            "step": state.timestamp.batch.value,
            "resumed_from": shown,
            "devices": dist.get_world_size(),
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        path = log_folder / STARTS
        with _writing(path), appending(path) as starts:
            starts.write(("\n" if _is_cut_short(path) else "") + json.dumps(start) + "\n")
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    print(
        f"{state.run_name}: {parameters / 1e6:.1f} M parameters on {dist.get_world_size()} x"
        f" {state.device.name}, {state.max_duration.value:,} steps; logs in {log_folder}",
        flush=True,
    )
    if resumed_from is not None:
        time = state.timestamp
        print(
            f"resuming from {resumed_from}: step {time.batch.value:,}, epoch {time.epoch.value},"
            f" row {time.sample_in_epoch.value:,} of it, {time.token.value:,} tokens seen",
            flush=True,
        )


def _is_cut_short(path: Path) -> bool:
    """Whether the last line has no end, as a kill or a full disk leaves it: what is written next
    would be part of it.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def hash_row(input_ids: torch.Tensor) -> int:
    """64 bits of a row's token ids; the sum over a global batch depends on its rows but not on
    their order or ranks.
    """
    content = input_ids.to(torch.int64).cpu().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def keep_rows(
    path: Path, *, last_step: int, evaluation: dict[str, Any] | None = None, several: bool = False
) -> list[range]:
    """Drop the rows after `last_step`, and what is no row, such as one that a kill cut short.

    Replaces the file in one step. `evaluation` goes into the row of `last_step`, where it would
    have been. What is dropped from the middle is named in a warning. Of several rows of a step the
    last stays, and rows are put in order; a file that has `several` rows a step keeps them all.
    Returns which of the steps up to `last_step` have no row.
    """
    kept: dict[int, bytes] = {}
    moved: set[int] = set()  # steps with several rows, or rows that come after one of a later step
    max_step = 0
    lines: list[bytes] = []
    if os.path.lexists(path):
        with os.fdopen(storage.open_own(path, os.O_RDONLY), "rb") as file:
            lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            if number < len(lines):  # the last one has no end: it is empty, or was cut short
                log.warning(
                    "warning: %s: line %d is no row of the log and is left out", path, number
                )
            continue
        if row["current_steps"] > last_step:
            continue
        if evaluation is not None and row["current_steps"] == last_step:
            after = {key: row.pop(key) for key in ("batch_hash", "streams") if key in row}
            line = json.dumps(row | evaluation | after).encode()
        step = row["current_steps"]
        if step < max_step or (step == max_step and not several):
            moved.add(step)
        kept[step] = (kept.get(step, b"") if several else b"") + line + b"\n"
        max_step = max(max_step, step)
    if moved:
        log.warning(
            "warning: %s: several rows, or rows out of order, of %s: put in order, and the last of"
            " each step is kept",
            path,
            _ranges([range(step, step + 1) for step in sorted(moved)]),
        )
    if path.exists():
        temporary = path.with_suffix(".tmp")
        with storage.create(temporary) as whole:
            whole.write(b"".join(kept[step] for step in sorted(kept)))
        flush(temporary)
        os.replace(temporary, path)
    borders = [0, *sorted(kept), last_step + 1]
    return [
        range(before + 1, after)
        for before, after in itertools.pairwise(borders)
        if after > before + 1
    ]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a line of the log; None if it is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # of damaged UTF-8, too
        return None
    step = row.get("current_steps") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and step > 0 else None


def _ranges(missing: list[range]) -> str:
    """For people: `step 3`, `steps 3, 7-9`; of very many gaps the first ten."""
    parts = [str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in missing]
    more = f" and more: {sum(map(len, missing)):,} in all" if len(parts) > 10 else ""
    word = "step" if len(missing) == 1 and len(missing[0]) == 1 else "steps"
    return f"{word} {', '.join(parts[:10])}{more}"


class RandomState(Callback):
    """Restores every rank's random state just before the first batch after a restart, wherever in
    an epoch that is.

    Composer restores it at the start of an epoch only: with a dataset that resumes by itself,
    dropout in the middle of an epoch would go on from a fresh seed. Restarted on another number of
    devices there is no state to restore, and each rank goes on from its seed.
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
    """Refuses to go on from a checkpoint whose rows came in another order than this run's would.

    StreamingDataset remembers a position only, and would serve rows that were seen before, or never
    serve some.
    """

    def __init__(self, order: dict[str, Any], *, allow_change: bool):
        self.order = order
        self.allow_change = allow_change
        self.ends: Ends | None = None  # of the documents

    def init(self, state: State, logger: Logger) -> None:
        self.ends = ends_of(cast(Any, state.model).tokenizer)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order} | ({} if self.ends is None else {"ends": self.ends._asdict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = state["order"]
        ends = parse_ends(state.get("ends"))  # not in those of 2026-11-28 and before
        changed = [
            f"{key} ({before.get(key)} before, {self.order.get(key)} now)"
            for key in {**self.order, **before}
            if before.get(key) != self.order.get(key)
        ]
        if changed and not self.allow_change:
            raise ConfigError(
                f"the checkpoint was trained on rows in another order: {', '.join(changed)}; set"
                " back what changed, start a new run_name, or set allow_data_change=true to go on"
                " all the same"
            )
        if ends is not None and self.ends not in (None, ends):
            warn(
                f"the checkpoint was trained on documents that {describe_ends(ends)}; "
                f"now they {describe_ends(self.ends)}"
            )
