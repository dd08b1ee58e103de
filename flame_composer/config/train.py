"""The configuration of recipes/train.py, and the rules across its sections."""

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
from flame_composer.config.parallelism import ParallelismConfig
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
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RepetitionConfig,
    SchedulerConfig,
    SpikeConfig,
    WandbConfig,
)
from flame_composer.errors import ConfigError
from flame_composer.storage.files import MAX_NAME_BYTES

MAX_WANDB_ID_BYTES = 200  # W&B's folder names are longer than the ids of their runs


class RunPlan(NamedTuple):
    """The durations of a run in global batches; saving may go by seconds instead.

    `t_max` is where the learning rate would end, None if that is the end of the run.
    """

    total: int
    per_epoch: int
    warmup: int
    decay: int
    eval_interval: int
    save_batches: int | None
    save_seconds: int | None
    t_max: int | None = None


@dataclass
class TrainConfig(ScriptConfig):
    """Train a causal language model on a streamed dataset."""

    paths = ("tokenizer", "save_folder", "log_folder")
    elsewhere = other_names.TRAINING
    goes_on = True
    run_name: str = MISSING
    """Name of the run: its folder under runs/, its id on Weights & Biases, and the checkpoints
    that autoresume looks for.
    """
    seed: int = 42
    """Seed of the weights, of dropout and, unless train_data.shuffle_seed is set, of the row
    order.
    """
    max_duration: str = MISSING
    """Length of the run in batches (ba), tokens (tok), rows (sp) or epochs (ep), e.g. 20480ba."""
    global_batch_size: int = MISSING
    """Rows per optimizer step over all devices."""
    microbatch_size: int | str = MISSING
    """Rows per forward pass on one device; global_batch_size = devices x microbatch_size x
    accumulation steps. Results do not depend on it. With auto, on GPUs, a device begins with its
    whole share of the global batch and halves it until it fits into memory.
    """
    context_length: int = 2048
    """Tokens per row; must be the context length of the dataset."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    """Arithmetic of the forward and backward passes. On CPUs fp32 or, if they have AVX512_BF16 or
    AMX, amp_bf16, which multiplies in bf16 in linear layers and computes all else in fp32.
    """
    tokenizer: str = MISSING
    """Hugging Face tokenizer folder or id; must be the tokenizer that the dataset was made with."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    lora: LoraConfig | None = None
    """Low-rank adapters to train instead of the weights of model.pretrained (extra tune); all
    weights are trained if not set.
    """
    train_data: DataConfig = field(default_factory=DataConfig)
    """The dataset to train on."""
    eval_data: EvalDataConfig | None = None
    """The dataset to evaluate on; no evaluation if not set."""
    eval_interval: str = "500ba"
    """Interval between evaluations; there is also one before the first batch and one at the end."""
    eval_batch_size: int | None = None
    """Rows per forward pass of an evaluation on one device; microbatch_size if not set. It must be
    set with microbatch_size=auto.
    """
    eval_tasks: EvalTasksConfig | None = None
    """Tasks of lm-evaluation-harness (extra eval) to take scores in; none if not set."""
    varlen: bool = True
    """Start attention state anew at every document; false lets it run across the documents of a
    row.
    """
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the training loss, where Z normalizes the softmax, which keeps logits
    from drifting; OLMo 2 has 1e-5. It is part of the loss that is logged, except in evaluation.
    """
    repetition_filter: RepetitionConfig | None = None
    """Leave rows that repeat themselves out of the loss, as OLMo 2 does ({} for its numbers); none
    are if not set. Evaluation counts them.
    """
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """The learning rate over the run."""
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    """Distribution of the model over devices."""
    algorithms: dict[str, Any] = field(default_factory=dict)
    """Algorithms that change training, by name with their arguments, e.g.
    algorithms.ema.half_life=500ba; docs/configuration.md lists them.
    """
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Callbacks that watch a run and act on it, by name with their arguments; null for the default
    arguments, false to leave one out.
    """
    loggers: dict[str, Any] = field(default_factory=dict)
    """Loggers that metrics also go to, by name with their arguments, e.g. loggers.file_logger={}.
    """
    save_folder: str | None = "runs/${run_name}/checkpoints"
    """Folder for checkpoints, local or in an object store (s3://bucket/path); null to save none."""
    save_interval: str = "500ba"
    """Interval between checkpoints, in the units of eval_interval or by the clock (30min, 2h,
    600s); one is also saved at the end.
    """
    save_num_checkpoints_to_keep: int = 3
    """Number of newest checkpoints to keep; -1 keeps all."""
    save_async: bool = True
    """Train on while a checkpoint is written and uploaded: training waits only until the state is
    copied to host memory, which must hold it once more. false waits until the checkpoint is whole.
    """
    autoresume: bool = True
    """Resume from the newest complete checkpoint in save_folder, if there is one."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Answer to a step whose gradient is infinite or not a number: stop ends the run before the
    step is taken, skip leaves the step out.
    """
    loss_spike: SpikeConfig | None = None
    """Limits beyond which a loss that leaps up and stays there ends the run; none if not set."""
    stall_timeout: float | None = 1800
    """Time without progress after which the run is ended, seconds; the error names the rank and
    what it was doing. null for never. Waiting for a checkpoint, with its upload, counts as one step
    of progress.
    """
    deterministic: bool = True
    """On GPUs, compute what repeats to the last bit: keep the choices of Triton's kernels with the
    run, and use the deterministic forms of cuBLAS and torch. false lets every start choose anew.
    """
    allow_data_change: bool = False
    """Resume from a checkpoint even if the data or its order has changed since the run began."""
    allow_schedule_change: bool = False
    """Resume from a checkpoint even if, with this configuration, steps already taken would have had
    another learning rate or another loss (z_loss, repetition_filter), or an algorithm that depends
    on the length of the run would be at another point.
    """
    log_folder: str = "runs/${run_name}"
    """Folder for train_log.jsonl, which has a row for every step, and for the resolved config."""
    log_batch_hash: bool = False
    """Add a hash of the global batch's token ids to every row of the log."""
    progress_bar: bool = True
    """Show a progress bar on a terminal; elsewhere a line is printed now and then."""
    wandb: WandbConfig | None = None
    """Project on Weights & Biases to log to; none if not set."""
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
        self._check_lora()
        run_batches = self.in_batches(self.max_duration, None)
        warmup = self.in_batches(self.scheduler.warmup, None, run_batches)
        if run_batches is not None and warmup is not None:
            decay = self.in_batches(self.scheduler.decay, None, run_batches)
            t_max = self.in_batches(self.scheduler.t_max, None)
            self.scheduler.check_lengths(self.max_duration, run_batches, warmup, decay, t_max)

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
        has_rules = self.model.mup_base_width is None or "adamw" in self.optimizer.name
        rule = "must be adamw or decoupled_adamw with model.mup_base_width: there are no rules for"
        scale = "the weight" if self.optimizer.name == "lamb" else "its shape"
        what = f"{self.optimizer.name}, which scales each update by {scale}"
        require(has_rules, "optimizer.name", f"{rule} {what}")
        is_weight = 0 <= self.z_loss < math.inf
        require(is_weight, "z_loss", "must be 0 or more, and finite; OLMo 2 has 1e-5")
        if self.repetition_filter is not None:
            least = self.repetition_filter.min_period * self.repetition_filter.max_count
            rule = f"leaves nothing out: {least} tokens or more that repeat do not fit into a row"
            fits = least <= self.context_length
            require(fits, "repetition_filter", f"{rule} of context_length={self.context_length}")
        rule = "must be a local folder (save_folder and data can be remote)"
        require("://" not in self.log_folder, "log_folder", rule)
        keep = self.save_num_checkpoints_to_keep
        rule = "must be more than 0, or -1 for all"
        require(keep == -1 or keep > 0, "save_num_checkpoints_to_keep", rule)

    def _num_devices(self) -> int:
        """Return the number of processes that train, or raise ConfigError if it is not known."""
        world_size = self.world_size()
        if not re.fullmatch(r"[1-9][0-9]{0,8}", world_size):
            raise ConfigError(
                f"environment: WORLD_SIZE={world_size}: must be the number of processes; start with"
                " composer, or unset it"
            )
        return int(world_size)

    def _check_devices(self, devices: int) -> None:
        size, fsdp = self.microbatch_size, self.parallelism.fsdp
        self.parallelism.check_rows(
            devices,
            global_batch_size=self.global_batch_size,
            microbatch_size=size,
            context_length=self.context_length,
        )
        self.parallelism.check_division(
            self.eval_batch_size, in_use(self.algorithms), has_tasks=self.eval_tasks is not None
        )
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

    def _check_lora(self) -> None:
        if self.lora is None:
            return
        rule = "must be set with lora: adapters are added to weights that were trained before"
        require(self.model.pretrained is not None, "model.pretrained", rule)
        is_frozen = "layer_freezing" in in_use(self.algorithms)
        rule = "must not be set together with lora, which freezes all layers but adapters"
        require(not is_frozen, "algorithms.layer_freezing", rule)
        rule = "must not be muon with lora: it is defined for whole matrices, adapters are products"
        require(self.optimizer.name != "muon", "optimizer.name", rule)

    def plan(self, epoch_batches: int) -> RunPlan:
        """Return the durations of the run, for epochs of `epoch_batches` global batches.

        Raises InvalidField if durations in epochs do not fit one another.
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
        t_max = self.in_batches(self.scheduler.t_max, epoch_batches)
        self.scheduler.check_lengths(self.max_duration, total, warmup, decay, t_max)
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
            t_max=t_max,
        )

    def world_size(self) -> str:
        """Return the number of processes of this run, as the launcher gives it."""
        return os.environ.get("WORLD_SIZE", "1")

    def in_batches(
        self, duration: str | None, epoch_batches: int | None, run_batches: int | None = None
    ) -> int | None:
        """Return `duration` in global batches, rounded up.

        Return None if `duration` is None, in epochs and `epoch_batches` is None, or a fraction of
        the run and `run_batches` is None.
        """
        if duration is None:
            return None
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
