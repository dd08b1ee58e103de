"""What recipes/train.py is run with, and the rules across its sections."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from omegaconf import MISSING

from flame_composer.config import other_names
from flame_composer.config.data import DataConfig, EvalDataConfig
from flame_composer.config.extensions import NEEDS_WHOLE_PARAMETERS, ONLY_LOGS, check_names, in_use
from flame_composer.config.rules import (
    DURATION,
    FRACTION,
    SECONDS,
    TIME,
    ScriptConfig,
    require,
    require_duration,
    require_no_braces,
    require_seed,
    require_text,
)
from flame_composer.config.sections import (
    MAX_SECONDS,
    EvalTasksConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
    SchedulerConfig,
    SpikeConfig,
    WandbConfig,
)
from flame_composer.errors import ConfigError
from flame_composer.storage.files import MAX_NAME_BYTES

MAX_WANDB_ID_BYTES = 200  # W&B's own folders have longer names than their runs


class RunPlan(NamedTuple):
    """How long a run is and how often it does what, in global batches; saving may go by seconds
    instead.
    """

    total: int
    per_epoch: int
    warmup: int
    decay: int
    eval_interval: int
    save_batches: int | None
    save_seconds: int | None


@dataclass
class TrainConfig(ScriptConfig):
    """Train a causal language model on a streamed dataset."""

    paths = ("tokenizer", "save_folder", "log_folder")
    elsewhere = other_names.TRAINING
    goes_on = True
    run_name: str = MISSING
    """Name of the run: its folder under runs/, its W&B id, and what autoresume looks for."""
    seed: int = 42
    """Seed of weights, dropout and (unless set there) the row order."""
    max_duration: str = MISSING
    """Length of the run: batches (ba), tokens (tok), rows (sp) or epochs (ep), e.g. 20480ba."""
    global_batch_size: int = MISSING
    """Rows per optimizer step over all devices."""
    microbatch_size: int | str = MISSING
    """Rows per forward pass on one device; global_batch_size = devices x microbatch_size x
    accumulation steps. The result does not depend on it. auto (GPUs) halves a device's share
    until it fits into memory.
    """
    context_length: int = 2048
    """Tokens per row; must be the dataset's."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; CPUs take fp32."""
    tokenizer: str = MISSING
    """Hugging Face tokenizer folder or id; must be the one the dataset was made with."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    train_data: DataConfig = field(default_factory=DataConfig)
    """The dataset to train on."""
    eval_data: EvalDataConfig | None = None
    """The dataset to evaluate on; no evaluation if not set."""
    eval_interval: str = "500ba"
    """How often to evaluate (also once before the first batch and at the end)."""
    eval_batch_size: int | None = None
    """Rows per evaluation forward pass on one device; microbatch_size if not set, but needed
    with microbatch_size=auto.
    """
    eval_tasks: EvalTasksConfig | None = None
    """Scores in tasks of lm-evaluation-harness (extra eval); none if not set."""
    varlen: bool = True
    """Attention state starts anew at every document; false lets it run across the documents of a
    row.
    """
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """What takes the steps."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """The learning rate over time."""
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    """How the model is spread over devices."""
    algorithms: dict[str, Any] = field(default_factory=dict)
    """What changes training, by name with its arguments: algorithms.ema.half_life=500ba. See
    docs/configuration.md.
    """
    callbacks: dict[str, Any] = field(default_factory=dict)
    """What watches a run and acts on it, by name with its arguments; null for the defaults,
    false to leave one out.
    """
    loggers: dict[str, Any] = field(default_factory=dict)
    """Where else metrics go, by name with its arguments: loggers.file_logger={}."""
    save_folder: str | None = "runs/${run_name}/checkpoints"
    """Folder of checkpoints, local or in an object store (s3://bucket/path); null to save none."""
    save_interval: str = "500ba"
    """How often to save (also at the end): as the other durations, or by the clock (30min, 2h,
    600s).
    """
    save_num_checkpoints_to_keep: int = 3
    """Newest checkpoints to keep; -1 keeps all."""
    autoresume: bool = True
    """Go on from the newest complete checkpoint in save_folder, if there is one."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do with a step whose gradient is not a number or infinite: end the run before it
    is taken, or leave it out.
    """
    loss_spike: SpikeConfig | None = None
    """End the run when its loss leaps up and stays there; never if not set."""
    stall_timeout: float | None = 1800
    """End the run when nothing has moved for so many seconds, naming the rank and what it was
    doing; null for never. Saving a checkpoint, with its upload, is one move.
    """
    allow_data_change: bool = False
    """Go on from a checkpoint although the data or its order is not what the run began with."""
    allow_schedule_change: bool = False
    """Go on from a checkpoint although steps already taken would have had another learning rate
    with this configuration, or an algorithm that goes by the length of the run would have been
    further, or less far, by then.
    """
    log_folder: str = "runs/${run_name}"
    """Receives train_log.jsonl (one row a step) and the resolved config."""
    log_batch_hash: bool = False
    """Add to every row of the log a hash of the global batch's token ids."""
    progress_bar: bool = True
    """Show a progress bar where there is a terminal; a line now and then otherwise."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases."""
    tensorboard: bool = False
    """Log to TensorBoard, in log_folder/tensorboard (extra tensorboard)."""

    def validate(self) -> None:
        self._check_names()
        require_duration(self.max_duration, "max_duration")
        require_duration(self.eval_interval, "eval_interval", fraction=True)
        require_duration(self.save_interval, "save_interval", fraction=True, time=True)
        self._check_numbers()
        devices = self._num_devices()
        self._check_devices(devices)
        self._check_evaluation()
        self._check_extensions()
        run_batches = self.in_batches(self.max_duration, None)
        warmup = self.in_batches(self.scheduler.warmup, None, run_batches)
        if run_batches is not None and warmup is not None:
            decay = self.in_batches(self.scheduler.decay, None, run_batches)
            self._check_schedule(run_batches, warmup, decay)

    def _check_names(self) -> None:
        is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.run_name) is not None
        rule = "must be letters, digits, '.', '_' and '-' (it names folders)"
        require(is_name, "run_name", rule)
        most = MAX_NAME_BYTES if self.wandb is None else MAX_WANDB_ID_BYTES
        rule = f"must be {most} bytes at most (it names folders)"
        require(len(self.run_name.encode()) <= most, "run_name", rule)
        require_seed(self.seed, "seed")
        require_text(self, "tokenizer", "save_folder", "log_folder")
        require_no_braces(self, "save_folder", "log_folder")

    def _check_numbers(self) -> None:
        rule = "must be a positive number of rows"
        require(self.global_batch_size > 0, "global_batch_size", rule)
        size = self.microbatch_size
        is_size = size == "auto" or (isinstance(size, int) and size > 0)
        require(is_size, "microbatch_size", f"{rule}, or auto")
        if self.eval_batch_size is not None:
            require(self.eval_batch_size > 0, "eval_batch_size", f"{rule}, or null")
        if self.stall_timeout is not None:
            is_time = 0 < self.stall_timeout <= MAX_SECONDS
            rule = f"must be a number of seconds more than 0 and no more than {MAX_SECONDS:.0f}"
            require(is_time, "stall_timeout", f"{rule}, or null")
        require(self.context_length > 1, "context_length", "must be 2 tokens or more")
        rule = "must be a local folder (save_folder and data can be remote)"
        require("://" not in self.log_folder, "log_folder", rule)
        keep = self.save_num_checkpoints_to_keep
        rule = "must be more than 0, or -1 for all"
        require(keep == -1 or keep > 0, "save_num_checkpoints_to_keep", rule)

    def _num_devices(self) -> int:
        """Return how many processes train. Raise ConfigError if the environment does not say."""
        world_size = self.world_size()
        if not re.fullmatch(r"[1-9][0-9]{0,8}", world_size):
            raise ConfigError(
                f"environment: WORLD_SIZE={world_size}: must be the number of processes; start with"
                " composer, or unset it"
            )
        return int(world_size)

    def _check_devices(self, devices: int) -> None:
        size, fsdp = self.microbatch_size, self.parallelism.fsdp
        if isinstance(size, int):
            rows = devices * size
            rule = f"must be a multiple of devices x microbatch_size = {devices} x {size} = {rows}"
            require(self.global_batch_size % rows == 0, "global_batch_size", rule)
        rule = f"must be a multiple of the {devices} devices"
        require(self.global_batch_size % devices == 0, "global_batch_size", rule)
        if fsdp is not None:
            rule = "must be a number with parallelism.fsdp, which cannot try"
            require(size != "auto", "microbatch_size", rule)
            divides = fsdp.replicas is None or devices % fsdp.replicas == 0
            rule = f"must divide the {devices} devices"
            require(divides, "parallelism.fsdp.replicas", rule)

    def _check_evaluation(self) -> None:
        is_auto = self.microbatch_size == "auto"
        needed = "must be set with microbatch_size=auto, which is about training"
        if self.eval_tasks is not None:
            has_size = not is_auto or self.eval_tasks.batch_size is not None
            require(has_size, "eval_tasks.batch_size", needed)
            rule = "must be null with parallelism.fsdp: evaluate checkpoints with"
            is_whole = self.parallelism.fsdp is None
            require(is_whole, "eval_tasks", f"{rule} recipes/evaluate.py")
        if self.eval_data is not None:
            has_size = not is_auto or self.eval_batch_size is not None
            require(has_size, "eval_batch_size", needed)
            trained_on = [self.train_data, *self.train_data.streams.values()]
            is_other = self.eval_data.address not in [data.address for data in trained_on]
            require(is_other, "eval_data.local", "must not be a dataset that is trained on")

    def _check_schedule(self, total: int, warmup: int, decay: int | None) -> None:
        require(
            warmup <= total,
            "scheduler.warmup",
            f"must not be longer than the run: {warmup} batches of {total}"
            f" (max_duration={self.max_duration})",
        )
        require(
            self.scheduler.name != "wsd" or decay is None or warmup + decay <= total,
            "scheduler.decay",
            f"must leave room for the warmup: {decay} and {warmup} batches of {total}",
        )

    def _check_extensions(self) -> None:
        for section, given in (
            ("algorithms", self.algorithms),
            ("callbacks", self.callbacks),
            ("loggers", self.loggers),
        ):
            check_names(section, given)
        named = {
            f"{section}.{name}"
            for section, given in (("algorithms", self.algorithms), ("callbacks", self.callbacks))
            for name in in_use(given)
        }
        if "callbacks.early_stopper" in named:
            rule = "needs an evaluation to go by; set eval_data"
            require(self.eval_data is not None, "callbacks.early_stopper", rule)
        has_logger = bool(in_use(self.loggers)) or self.wandb is not None or self.tensorboard
        for key in sorted(named):
            name = key.partition(".")[2]
            require(
                has_logger or name not in ONLY_LOGS,
                key,
                "hands metrics to loggers, and there is none; set loggers.file_logger={},"
                " wandb.project=... or tensorboard=true",
            )
            require(
                self.parallelism.fsdp is None or name not in NEEDS_WHOLE_PARAMETERS,
                key,
                "must not be set together with parallelism.fsdp, which spreads parameters over"
                " devices",
            )
        is_sharded = self.parallelism.fsdp is not None
        if "callbacks.optimizer_monitor" in named and is_sharded:
            arguments = self.callbacks["optimizer_monitor"] or {}
            gathers = arguments.get("log_optimizer_metrics") is not False
            require(
                self.optimizer.name != "decoupled_adamw" or not gathers,
                "callbacks.optimizer_monitor",
                "cannot gather what decoupled_adamw adds to it with parallelism.fsdp; set "
                "callbacks.optimizer_monitor.log_optimizer_metrics=false, or optimizer.name=adamw",
            )

    def plan(self, epoch_batches: int) -> RunPlan:
        """The run's durations, for a dataset that has so many global batches an epoch.

        Raises InvalidField for those in epochs that do not fit one another.
        """
        total = self.in_batches(self.max_duration, epoch_batches)
        assert total is not None
        warmup, decay, eval_interval = (
            self.in_batches(duration, epoch_batches, total)
            for duration in (self.scheduler.warmup, self.scheduler.decay, self.eval_interval)
        )
        assert warmup is not None
        assert decay is not None
        assert eval_interval is not None
        self._check_schedule(total, warmup, decay)
        by_clock = TIME.fullmatch(self.save_interval)
        return RunPlan(
            total,
            epoch_batches,
            warmup,
            decay,
            eval_interval,
            save_batches=(
                None if by_clock else self.in_batches(self.save_interval, epoch_batches, total)
            ),
            save_seconds=int(by_clock[1]) * SECONDS[by_clock[2]] if by_clock else None,
        )

    def world_size(self) -> str:
        """The number of processes of this run, as whoever started it says."""
        return os.environ.get("WORLD_SIZE", "1")

    def in_batches(
        self, duration: str, epoch_batches: int | None, run_batches: int | None = None
    ) -> int | None:
        """`duration` in global batches, rounded up; None where it needs an epoch's or the run's
        length and that is None.
        """
        if match := DURATION.fullmatch(duration):
            count, unit = int(match[1]), match[2]
            if unit == "ep":
                return None if epoch_batches is None else count * epoch_batches
            tokens_per_row = self.context_length if unit == "tok" else 1
            return count if unit == "ba" else -(-count // (self.global_batch_size * tokens_per_row))
        fraction = FRACTION.fullmatch(duration)
        assert fraction, duration
        return None if run_batches is None else math.ceil(float(fraction[1]) * run_batches)


TRAIN_LOG = "train_log.jsonl"
