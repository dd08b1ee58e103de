"""The sections of what recipes/train.py is run with: their defaults, and the rules within each
of them.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from flame_composer.config.rules import require, require_duration, require_text

MAX_SECONDS = 1e8  # three years; torch's timeouts end at some hundreds of them


@dataclass
class ModelConfig:
    paths = ("pretrained",)

    config: dict[str, Any] = field(default_factory=dict)
    """Hugging Face model config: model_type (gla, transformer, llama, ...) and that model's own
    keys.
    """
    pretrained: str | None = None
    """Start from the weights of this Hugging Face folder or id; model.config may then only
    repeat what it says.
    """

    def validate(self) -> None:
        require(
            self.pretrained is not None or "model_type" in self.config,
            "config.model_type",
            "must be set (e.g. model.config.model_type=gla), or model.pretrained must name a"
            " folder",
        )
        require_text(self, "pretrained")


def require_tasks(config: EvalTasksConfig | Any) -> None:
    """Of those who take `tasks`, `task_path` and `num_fewshot`."""
    require_text(config, "task_path")
    require(len(set(config.tasks)) == len(config.tasks), "tasks", "must not name a task twice")
    require(
        not config.task_code or config.task_path is not None,
        "task_path",
        "must be set together with task_code",
    )
    require(
        config.num_fewshot is None or config.num_fewshot >= 0,
        "num_fewshot",
        "must be 0 or more, or null",
    )
    require(
        not config.tasks or importlib.util.find_spec("lm_eval") is not None,
        "tasks",
        "lm-evaluation-harness is not installed; pip install 'flame-composer[eval]'",
    )


@dataclass
class EvalTasksConfig:
    paths = ("task_path",)

    tasks: list[str] = MISSING
    """Tasks, groups or tags of lm-evaluation-harness (extra eval), e.g. [piqa,lambada_openai]."""
    task_path: str | None = None
    """Folder of tasks of your own (YAML files in the harness's form), which come before the
    harness's.
    """
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
    """AdamW; Composer's DecoupledAdamW, whose weight decay is not multiplied by lr (then 1e-5 is
    a usual value); or LAMB.
    """
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
        require(
            self.grad_clip_norm is None or 0 < self.grad_clip_norm < math.inf,
            "grad_clip_norm",
            "must be more than 0 and finite, or null",
        )


@dataclass
class SchedulerConfig:
    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after the warmup; wsd (warmup, stable, decay) stays at the peak
    until the decay.
    """
    warmup: str = "0ba"
    """Linear warmup from 0: ba, tok, sp, ep or a fraction of the run (0.05dur)."""
    decay: str = "0.1dur"
    """Of wsd: how long before the end of the run the rate begins to fall; as warmup."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Of wsd: how the rate falls."""
    min_lr_ratio: float = 0.1
    """The floor the rate falls to at the end of the run, as a fraction of optimizer.lr; constant
    has none.
    """

    def validate(self) -> None:
        require_duration(self.decay, "decay", fraction=True, zero=True)
        require_duration(self.warmup, "warmup", fraction=True, zero=True)
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "must be in [0, 1]")


@dataclass
class FsdpConfig:
    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"] = "FULL_SHARD"
    """What is spread over devices: parameters, gradients and optimizer state; the same, but a
    block's parameters stay gathered from its forward to its backward pass; or as the first
    within each replica of the model.
    """
    replicas: int | None = None
    """Of HYBRID_SHARD: copies of the model, each sharded over devices / replicas; one per
    machine if not set.
    """
    mixed_precision: Literal["PURE", "DEFAULT", "FULL"] = "PURE"
    """With precision amp_bf16: compute and reduce gradients in bf16; reduce them in fp32; or
    neither. Weights stay fp32.
    """
    state_dict_type: Literal["full", "sharded"] = "full"
    """Checkpoints: one file that the first rank gathers and writes, or a folder with a piece
    from every rank (which takes a save_folder that all machines share, or an object store).
    Either is read by any number of devices, with or without fsdp.
    """

    def validate(self) -> None:
        require(
            self.replicas is None or self.sharding_strategy == "HYBRID_SHARD",
            "replicas",
            "must be null unless sharding_strategy=HYBRID_SHARD",
        )
        require(self.replicas is None or self.replicas > 0, "replicas", "must be more than 0")


@dataclass
class ParallelismConfig:
    fsdp: FsdpConfig | None = None
    """Fully sharded data parallelism (torch's FSDP2); plain data parallelism if not set."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: less memory,
    about a third more work.
    """
    activation_cpu_offload: bool = False
    """Keep what is kept for the backward pass in the machine's memory instead of the GPU's."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cpu_fallback: bool = False
    """Train with plain data parallelism where there is no GPU, though fsdp is asked for."""
    cpu_fsdp: bool = False
    """Shard over processes (gloo) where there is no GPU: to try out what GPUs will do; saves no
    time.
    """

    def validate(self) -> None:
        require(
            not (self.cpu_fallback and self.cpu_fsdp),
            "cpu_fsdp",
            "must not be set together with cpu_fallback",
        )


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
