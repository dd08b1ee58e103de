"""What recipes/train.py is run with: every section, its defaults and its rules."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from omegaconf import MISSING

from flame_composer.config import (
    BYTES,
    DURATION,
    FRACTION,
    SECONDS,
    TIME,
    ConfigError,
    ScriptConfig,
    require,
    require_duration,
    require_seed,
    require_text,
)
from flame_composer.extensions_config import NEEDS_WHOLE_PARAMETERS, ONLY_LOGS, check_names, in_use

MAX_WORKERS = 1000  # loader processes of a rank: more bring a machine down before they read anything
MAX_SECONDS = 1e8  # three years; torch's timeouts end at some hundreds of them


@dataclass
class ModelConfig:
    config: dict[str, Any] = field(default_factory=dict)
    """Hugging Face model config: model_type (gla, transformer, llama, ...) and that model's own keys."""
    pretrained: str | None = None
    """Start from the weights of this Hugging Face folder or id; model.config may then only repeat what it says."""

    def validate(self) -> None:
        require(self.pretrained is not None or "model_type" in self.config, "config.model_type",
                "must be set (e.g. model.config.model_type=gla), or model.pretrained must name a folder")
        require_text(self, "pretrained")


@dataclass
class StreamConfig:
    local: str | None = None
    """Folder of the dataset; with `remote`, the folder under which what is downloaded is cached."""
    remote: str | None = None
    """Where the dataset lives (s3://bucket/path, gs://..., or another folder), streamed through `local`."""
    proportion: float | None = None
    """Its share of an epoch's rows, relative to the other streams' (an epoch has as many rows as all datasets together)."""
    repeat: float | None = None
    """How often each of its rows comes in an epoch; 0.5 takes every other one."""
    choose: int | None = None
    """How many rows of it an epoch has."""

    def weight(self) -> dict[str, float]:
        """What is set of proportion, repeat and choose."""
        weights = {"proportion": self.proportion, "repeat": self.repeat, "choose": self.choose}
        return {kind: value for kind, value in weights.items() if value is not None}

    def validate(self) -> None:
        require(self.local is not None or self.remote is not None, "local",
                "must name a dataset folder made by convert/to_mds.py (or set remote)")
        require_text(self, "local", "remote")
        for name, value in self.weight().items():
            most = 10**12 if name == "choose" else 10**6
            require(0 < value <= most, name, f"must be more than 0, and no more than {most}")
        require(len(self.weight()) <= 1, "proportion", "must not be set together with repeat or choose")


@dataclass
class DataConfig:
    local: str | None = None
    """Folder of the dataset; with `remote`, the folder under which what is downloaded is cached."""
    remote: str | None = None
    """Where the dataset lives (s3://bucket/path, gs://..., or another folder), streamed through `local`."""
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    """Several datasets instead of one, by names of your own: streams.web.remote=..., streams.web.proportion=0.7."""
    batching_method: Literal["random", "stratified", "per_stream"] = "random"
    """Where a global batch's rows come from: all streams at random, each in its exact share, or one stream at a time."""
    shuffle: bool = True
    """Shuffle rows anew in every epoch."""
    shuffle_algo: Literal["py1e", "py1br", "py1b", "py1s", "py2s", "naive"] = "py1e"
    """StreamingDataset's shuffle algorithm."""
    shuffle_seed: int | None = None
    """Seed of the row order; the run's seed if not set."""
    shuffle_block_size: int | None = None
    """Rows over which the shuffle spreads a shard; larger mixes better and keeps more shards on disk."""
    num_canonical_nodes: int = 1
    """Number of parts the row order is made of, taking turns; that of the machines spares them one another's shards."""
    predownload: int | None = None
    """Rows to download ahead of the one being read, per worker."""
    cache_limit: str | None = None
    """Most disk the cached shards may take on a machine, e.g. 100gb; unlimited if not set."""
    download_retries: int = 3
    """How often a shard that did not arrive whole is fetched again, after 1, 2, 4, ... seconds, before the run stops."""
    download_timeout: float = 60.0
    """Seconds that a shard may take to arrive before it is fetched again."""
    loss_across_documents: bool = True
    """A document's first token is to be predicted, too, from the end of the one before it; false leaves it out of the loss."""
    num_workers: int = 2
    """Loader processes per rank; 0 reads in the training process."""
    prefetch_factor: int = 2
    """Batches each loader process keeps ready."""

    def validate(self) -> None:
        require(bool(self.streams) or self.local is not None or self.remote is not None, "local",
                "must name a dataset folder made by convert/to_mds.py (or set remote, or streams)")
        for name in ("local", "remote"):
            require(not self.streams or getattr(self, name) is None, name,
                    "must be null with streams, which each have their own")
        for name in self.streams:
            require(bool(re.fullmatch(r"[A-Za-z0-9_-]+", name)), "streams", "must have names of letters, digits, '_' and '-'")
        kinds = {name: next(iter(stream.weight()), "none") for name, stream in self.streams.items()}
        require(len(set(kinds.values())) <= 1, "streams", "must all have proportion, or all repeat, or all choose, or none: "
                + ", ".join(f"{name} has {kind}" for name, kind in kinds.items()))
        require(self.batching_method == "random" or bool(self.streams), "batching_method", "must be random without streams")
        require(self.download_retries >= 0, "download_retries", "must be 0 or more")
        require(0 < self.download_timeout < math.inf, "download_timeout", "must be more than 0, and finite")
        require_text(self, "local", "remote")
        require_seed(self.shuffle_seed, "shuffle_seed")
        require(self.cache_limit is None or bool(BYTES.fullmatch(self.cache_limit)), "cache_limit",
                "must be a number of bytes, or one with kb, mb, gb, tb or pb, e.g. 100gb")
        require(0 <= self.num_workers <= MAX_WORKERS, "num_workers", f"must be in [0, {MAX_WORKERS}]")
        require(self.prefetch_factor >= 1, "prefetch_factor", "must be 1 or more")
        for name, most in (("shuffle_block_size", 10**12), ("num_canonical_nodes", 65536), ("predownload", 10**12)):
            value = getattr(self, name)
            require(value is None or 0 < value <= most, name, f"must be in [1, {most}]")


@dataclass
class EvalDataConfig:
    local: str | None = None
    """Folder of the dataset; with `remote`, the folder under which what is downloaded is cached."""
    remote: str | None = None
    """Where the dataset lives (s3://bucket/path, gs://..., or another folder), streamed through `local`."""
    loss_across_documents: bool = True
    """As that of the training data: false leaves the first token of every document out of the loss."""
    num_workers: int = 0
    """Loader processes per rank; 0 reads in the training process."""
    max_rows: int | None = None
    """Evaluate on the first so many rows; all if not set."""

    def validate(self) -> None:
        require(self.local is not None or self.remote is not None, "local",
                "must name a dataset folder made by convert/to_mds.py (or set remote)")
        require_text(self, "local", "remote")
        require(0 <= self.num_workers <= MAX_WORKERS, "num_workers", f"must be in [0, {MAX_WORKERS}]")
        require(self.max_rows is None or self.max_rows > 0, "max_rows", "must be a positive number of rows, or null")


def require_tasks(config: EvalTasksConfig | Any) -> None:
    """Of those who take `tasks`, `task_path` and `num_fewshot`."""
    require_text(config, "task_path")
    require(len(set(config.tasks)) == len(config.tasks), "tasks", "must not name a task twice")
    require(not config.task_code or config.task_path is not None, "task_path", "must be set together with task_code")
    require(config.num_fewshot is None or config.num_fewshot >= 0, "num_fewshot", "must be 0 or more, or null")
    require(not config.tasks or importlib.util.find_spec("lm_eval") is not None, "tasks",
            "lm-evaluation-harness is not installed; pip install 'flame-composer[eval]'")


@dataclass
class EvalTasksConfig:
    tasks: list[str] = MISSING
    """Tasks, groups or tags of lm-evaluation-harness (extra eval), e.g. [piqa,lambada_openai]."""
    task_path: str | None = None
    """Folder of tasks of your own (YAML files in the harness's form), which come before the harness's."""
    task_code: bool = False
    """Run the Python functions that task files in task_path name (!function)."""
    interval: str = "0.1dur"
    """How often to take the scores (also at the end)."""
    num_fewshot: int | None = None
    """Examples shown before each question; each task's own number if not set."""
    limit: int | None = None
    """Take the first so many documents of each task; all if not set."""
    batch_size: int | None = None
    """Requests per forward pass on one device; microbatch_size if not set."""

    def validate(self) -> None:
        require(len(self.tasks) > 0, "tasks", "must name at least one task")
        require_tasks(self)
        require_duration(self.interval, "interval", fraction=True)
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "must be more than 0, or null")


@dataclass
class OptimizerConfig:
    name: Literal["adamw", "decoupled_adamw", "lamb"] = "adamw"
    """AdamW; Composer's DecoupledAdamW, whose weight decay is not multiplied by lr (then 1e-5 is a usual value); or LAMB."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Floor of the denominator."""
    weight_decay: float = 0.01
    """Decay of matrices and embeddings; norms and biases are never decayed."""
    grad_clip_norm: float | None = 1.0
    """Largest global gradient norm; null for no clipping."""

    def validate(self) -> None:
        require(0 < self.lr < math.inf, "lr", "must be more than 0, and finite")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", "must both be in [0, 1)")
        require(0 < self.eps < math.inf, "eps", "must be more than 0, and finite")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "must be 0 or more, and finite")
        require(self.grad_clip_norm is None or 0 < self.grad_clip_norm < math.inf, "grad_clip_norm",
                "must be more than 0 and finite, or null")


@dataclass
class SchedulerConfig:
    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after the warmup; wsd (warmup, stable, decay) stays at the peak until the decay."""
    warmup: str = "0ba"
    """Linear warmup from 0: ba, tok, sp, ep or a fraction of the run (0.05dur)."""
    decay: str = "0.1dur"
    """Of wsd: how long before the end of the run the rate begins to fall; as warmup."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Of wsd: how the rate falls."""
    min_lr_ratio: float = 0.1
    """The floor the rate falls to at the end of the run, as a fraction of optimizer.lr; constant has none."""

    def validate(self) -> None:
        require_duration(self.decay, "decay", fraction=True, zero=True)
        require_duration(self.warmup, "warmup", fraction=True, zero=True)
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "must be in [0, 1]")


@dataclass
class FsdpConfig:
    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"] = "FULL_SHARD"
    """What is spread over devices: parameters, gradients and optimizer state; the same, but a block's parameters stay gathered
    from its forward to its backward pass; or as the first within each replica of the model."""
    replicas: int | None = None
    """Of HYBRID_SHARD: copies of the model, each sharded over devices / replicas; one per machine if not set."""
    mixed_precision: Literal["PURE", "DEFAULT", "FULL"] = "PURE"
    """With precision amp_bf16: compute and reduce gradients in bf16; reduce them in fp32; or neither. Weights stay fp32."""
    state_dict_type: Literal["full", "sharded"] = "full"
    """Checkpoints: one file that the first rank gathers and writes, or a folder with a piece from every rank (which takes a
    save_folder that all machines share, or an object store). Either is read by any number of devices, with or without fsdp."""

    def validate(self) -> None:
        require(self.replicas is None or self.sharding_strategy == "HYBRID_SHARD", "replicas",
                "must be null unless sharding_strategy=HYBRID_SHARD")
        require(self.replicas is None or self.replicas > 0, "replicas", "must be more than 0")


@dataclass
class ParallelismConfig:
    fsdp: FsdpConfig | None = None
    """Fully sharded data parallelism (torch's FSDP2); plain data parallelism if not set."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: less memory, about a third more work."""
    activation_cpu_offload: bool = False
    """Keep what is kept for the backward pass in the machine's memory instead of the GPU's."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cpu_fallback: bool = False
    """Train with plain data parallelism where there is no GPU, though fsdp is asked for."""
    cpu_fsdp: bool = False
    """Shard over processes (gloo) where there is no GPU: to try out what GPUs will do; saves no time."""

    def validate(self) -> None:
        require(not (self.cpu_fallback and self.cpu_fsdp), "cpu_fsdp", "must not be set together with cpu_fallback")


@dataclass
class WandbConfig:
    project: str = MISSING
    """Weights & Biases project; the run's name and id are run_name."""
    entity: str | None = None
    """Team or user the run belongs to."""
    group: str | None = None
    """Group the run is shown in."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""

    def validate(self) -> None:
        require_text(self, "project", "entity", "group")


@dataclass
class SpikeConfig:
    window: int = 100
    """Steps whose median loss is taken for the usual one."""
    factor: float = 2.0
    """How many times the usual loss is too much."""
    patience: int = 10
    """Steps in a row that have to be too high."""

    def validate(self) -> None:
        require(self.window > 0, "window", "must be 1 step or more")
        require(1 < self.factor < math.inf, "factor", "must be more than 1, and finite")
        require(self.patience > 0, "patience", "must be 1 step or more")


class RunPlan(NamedTuple):
    """How long a run is and how often it does what, in global batches; saving may go by seconds instead."""

    total: int
    per_epoch: int
    warmup: int
    decay: int
    eval_interval: int
    save_batches: int | None
    save_seconds: int | None


# Of flame, torchtitan, LLM Foundry and Hugging Face's trainer.
_ELSEWHERE = MappingProxyType({
    "learning_rate": "optimizer.lr", "max_norm": "optimizer.grad_clip_norm", "grad_clip": "optimizer.grad_clip_norm",
    "warmup_steps": "scheduler.warmup", "batch_size": "global_batch_size",
    "data": "train_data.local", "dataset": "train_data.local",
    **dict.fromkeys(("steps", "max_steps", "num_steps", "epochs", "num_epochs", "num_train_epochs"), "max_duration"),
    **dict.fromkeys(("context", "seq_len", "max_seq_len", "ctx_len"), "context_length"),
    **dict.fromkeys(("batch", "device_train_microbatch_size", "per_device_train_batch_size"), "microbatch_size"),
})


@dataclass
class TrainConfig(ScriptConfig):
    """Train a causal language model on a streamed dataset."""

    elsewhere = _ELSEWHERE
    run_name: str = MISSING
    """Name of the run: its folder under runs/, its W&B id, and what autoresume looks for."""
    seed: int = 42
    """Seed of weights, dropout and (unless set there) the row order."""
    max_duration: str = MISSING
    """Length of the run: batches (ba), tokens (tok), rows (sp) or epochs (ep), e.g. 20480ba."""
    global_batch_size: int = MISSING
    """Rows per optimizer step over all devices."""
    microbatch_size: int | str = MISSING
    """Rows per forward pass on one device; global_batch_size = devices x microbatch_size x accumulation steps. The result does
    not depend on it. auto (GPUs) halves a device's share until it fits into memory."""
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
    """Rows per evaluation forward pass on one device; microbatch_size if not set, but needed with microbatch_size=auto."""
    eval_tasks: EvalTasksConfig | None = None
    """Scores in tasks of lm-evaluation-harness (extra eval); none if not set."""
    varlen: bool = True
    """Attention state starts anew at every document; false lets it run across the documents of a row."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """What takes the steps."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """The learning rate over time."""
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    """How the model is spread over devices."""
    algorithms: dict[str, Any] = field(default_factory=dict)
    """What changes training, by name with its arguments: algorithms.ema.half_life=500ba. See docs/configuration.md."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """What watches a run and acts on it, by name with its arguments; null for the defaults, false to leave one out."""
    loggers: dict[str, Any] = field(default_factory=dict)
    """Where else metrics go, by name with its arguments: loggers.file_logger={}."""
    save_folder: str | None = "runs/${run_name}/checkpoints"
    """Folder of checkpoints, local or in an object store (s3://bucket/path); null to save none."""
    save_interval: str = "500ba"
    """How often to save (also at the end): as the other durations, or by the clock (30min, 2h, 600s)."""
    save_num_checkpoints_to_keep: int = 3
    """Newest checkpoints to keep; -1 keeps all."""
    autoresume: bool = True
    """Go on from the newest complete checkpoint in save_folder, if there is one."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do with a step whose gradient is not a number or infinite: end the run before it is taken, or leave it out."""
    loss_spike: SpikeConfig | None = None
    """End the run when its loss leaps up and stays there; never if not set."""
    stall_timeout: float | None = 1800
    """End the run when nothing has moved for so many seconds, naming the rank and what it was doing; null for never. Saving a
    checkpoint, with its upload, is one move."""
    allow_data_change: bool = False
    """Go on from a checkpoint although the data or its order is not what the run began with."""
    allow_schedule_change: bool = False
    """Go on from a checkpoint although steps already taken would have had another learning rate with this configuration, or
    an algorithm that goes by the length of the run would have been further, or less far, by then."""
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
        require(bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.run_name)), "run_name",
                "must be letters, digits, '.', '_' and '-' (it names folders)")
        require_seed(self.seed, "seed")
        require_text(self, "tokenizer", "save_folder", "log_folder")
        require_duration(self.max_duration, "max_duration")
        require_duration(self.eval_interval, "eval_interval", fraction=True)
        require_duration(self.save_interval, "save_interval", fraction=True, time=True)
        require(self.global_batch_size > 0, "global_batch_size", "must be a positive number of rows")
        size = self.microbatch_size
        require(size == "auto" or (isinstance(size, int) and size > 0), "microbatch_size",
                "must be a positive number of rows, or auto")
        require(self.eval_batch_size is None or self.eval_batch_size > 0, "eval_batch_size",
                "must be a positive number of rows, or null")
        require(self.stall_timeout is None or 0 < self.stall_timeout <= MAX_SECONDS, "stall_timeout",
                f"must be a number of seconds more than 0 and no more than {MAX_SECONDS:.0f}, or null")
        require(self.context_length > 1, "context_length", "must be 2 tokens or more")
        require("://" not in self.log_folder, "log_folder", "must be a local folder (save_folder and data can be remote)")
        require(self.save_num_checkpoints_to_keep == -1 or self.save_num_checkpoints_to_keep > 0,
                "save_num_checkpoints_to_keep", "must be more than 0, or -1 for all")
        world_size = self.world_size()
        if not re.fullmatch(r"[1-9][0-9]{0,8}", world_size):
            raise ConfigError(f"environment: WORLD_SIZE={world_size}: must be the number of processes; start with composer, "
                              "or unset it")
        devices = int(world_size)
        if isinstance(size, int):
            require(self.global_batch_size % (devices * size) == 0, "global_batch_size",
                    f"must be a multiple of devices x microbatch_size = {devices} x {size} = {devices * size}")
        require(self.global_batch_size % devices == 0, "global_batch_size", f"must be a multiple of the {devices} devices")
        fsdp, tasks = self.parallelism.fsdp, self.eval_tasks
        require(tasks is None or size != "auto" or tasks.batch_size is not None, "eval_tasks.batch_size",
                "must be set with microbatch_size=auto, which is about training")
        require(tasks is None or fsdp is None, "eval_tasks", "must be null with parallelism.fsdp: evaluate checkpoints with "
                "recipes/evaluate.py")
        require(fsdp is None or size != "auto", "microbatch_size", "must be a number with parallelism.fsdp, which cannot try")
        require(fsdp is None or fsdp.replicas is None or devices % fsdp.replicas == 0, "parallelism.fsdp.replicas",
                f"must divide the {devices} devices")
        if self.eval_data is not None:
            require(size != "auto" or self.eval_batch_size is not None, "eval_batch_size",
                    "must be set with microbatch_size=auto, which is about training")
            trained_on = [(self.train_data.local, self.train_data.remote)]
            trained_on += [(stream.local, stream.remote) for stream in self.train_data.streams.values()]
            require((self.eval_data.local, self.eval_data.remote) not in trained_on, "eval_data.local",
                    "must not be a dataset that is trained on")
        self._check_extensions()
        run_batches = self.in_batches(self.max_duration, None)
        warmup = self.in_batches(self.scheduler.warmup, None, run_batches)
        if run_batches is not None and warmup is not None:
            self._check_schedule(run_batches, warmup, self.in_batches(self.scheduler.decay, None, run_batches))

    def _check_schedule(self, total: int, warmup: int, decay: int | None) -> None:
        require(warmup <= total, "scheduler.warmup",
                f"must not be longer than the run: {warmup} batches of {total} (max_duration={self.max_duration})")
        require(self.scheduler.name != "wsd" or decay is None or warmup + decay <= total, "scheduler.decay",
                f"must leave room for the warmup: {decay} and {warmup} batches of {total}")

    def _check_extensions(self) -> None:
        for section, given in (("algorithms", self.algorithms), ("callbacks", self.callbacks), ("loggers", self.loggers)):
            check_names(section, given)
        named = {f"{section}.{name}" for section, given in (("algorithms", self.algorithms), ("callbacks", self.callbacks))
                 for name in in_use(given)}
        require("callbacks.early_stopper" not in named or self.eval_data is not None, "callbacks.early_stopper",
                "needs an evaluation to go by; set eval_data")
        has_logger = bool(in_use(self.loggers)) or self.wandb is not None or self.tensorboard
        for key in sorted(named):
            name = key.partition(".")[2]
            require(has_logger or name not in ONLY_LOGS, key,
                    "hands metrics to loggers, and there is none; set loggers.file_logger={}, wandb.project=... or "
                    "tensorboard=true")
            require(self.parallelism.fsdp is None or name not in NEEDS_WHOLE_PARAMETERS, key,
                    "must not be set together with parallelism.fsdp, which spreads parameters over devices")
        require("callbacks.optimizer_monitor" not in named or self.parallelism.fsdp is None
                or self.optimizer.name != "decoupled_adamw"
                or (self.callbacks["optimizer_monitor"] or {}).get("log_optimizer_metrics") is False,
                "callbacks.optimizer_monitor", "cannot gather what decoupled_adamw adds to it with parallelism.fsdp; set "
                "callbacks.optimizer_monitor.log_optimizer_metrics=false, or optimizer.name=adamw")

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
            total, epoch_batches, warmup, decay, eval_interval,
            save_batches=None if by_clock else self.in_batches(self.save_interval, epoch_batches, total),
            save_seconds=int(by_clock[1]) * SECONDS[by_clock[2]] if by_clock else None,
        )

    def world_size(self) -> str:
        """The number of processes of this run, as whoever started it says."""
        return os.environ.get("WORLD_SIZE", "1")

    def in_batches(self, duration: str, epoch_batches: int | None, run_batches: int | None = None) -> int | None:
        """`duration` in global batches, rounded up; None where it needs an epoch's or the run's length and that is None."""
        if match := DURATION.fullmatch(duration):
            count, unit = int(match[1]), match[2]
            if unit == "ep":
                return None if epoch_batches is None else count * epoch_batches
            tokens_per_row = self.context_length if unit == "tok" else 1
            return count if unit == "ba" else -(-count // (self.global_batch_size * tokens_per_row))
        fraction = FRACTION.fullmatch(duration)
        assert fraction, duration
        return None if run_batches is None else math.ceil(float(fraction[1]) * run_batches)
