"""Sections of the configuration of recipes/train.py: their keys, defaults and rules."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from flame_composer.config.fields import nearest
from flame_composer.config.rules import require, require_duration, require_text

MOST_RANK = 65536  # no layer has more inputs or outputs that a rank could be of use for
KINDS = ("matrices", "embeddings", "vectors")  # of parameters; see model/optimizer.py
MOST_WIDTH = 2**20  # of a model, in channels
MAX_SECONDS = 1e8  # three years; torch takes no timeout of some hundred years


@dataclass
class ModelConfig:
    """The model that is trained."""

    paths = ("pretrained",)

    config: dict[str, Any] = field(default_factory=dict)
    """Hugging Face config of the model: model_type (gla, transformer, llama, ...) and the keys of
    that type.
    """
    pretrained: str | None = None
    """Hugging Face folder or id whose weights training starts from; model.config may then only
    repeat values of that model's config.
    """
    mup_base_width: int | None = None
    """Width (hidden_size) of the model for which optimizer.lr and initializer_range were tuned; a
    new model of another width is initialised and trained by muP, so that they suit it as well
    (docs/mup.md). null for neither.
    """

    def validate(self) -> None:
        require(
            self.pretrained is not None or "model_type" in self.config,
            "config.model_type",
            "must be set (e.g. model.config.model_type=gla), or model.pretrained must name a"
            " folder",
        )
        require_text(self, "pretrained")
        if self.mup_base_width is not None:
            is_width = 0 < self.mup_base_width <= MOST_WIDTH
            require(is_width, "mup_base_width", f"must be in [1, {MOST_WIDTH}], or null")
            rule = "must be null with model.pretrained (and lora): it is about initial weights"
            require(self.pretrained is None, "mup_base_width", rule)


@dataclass
class LoraConfig:
    """Low-rank adapters that are trained instead of the model's own weights (extra tune)."""

    rank: int = 8
    """Rank of each adapter: the product of two matrices that is added to a projection's weights."""
    alpha: float = 16.0
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is set to 0 in training."""
    targets: list[str] = field(default_factory=lambda: ["default"])
    """Projections that get an adapter. default: those of attention, or of whatever mixes tokens.
    all: every projection but the output layer. Or endings of their names, e.g. [q_proj,v_proj].
    """
    train_embeddings: bool = False
    """Train the input embeddings and the output layer as well, as a whole."""

    def validate(self) -> None:
        require(1 <= self.rank <= MOST_RANK, "rank", f"must be in [1, {MOST_RANK}]")
        require(0 < self.alpha < math.inf, "alpha", "must be more than 0, and finite")
        require(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")
        require_text(self, "targets")
        require(len(self.targets) > 0, "targets", "must name a projection, or be default or all")
        is_once = len(set(self.targets)) == len(self.targets)
        require(is_once, "targets", "must not name one of them twice")
        require(
            len(self.targets) == 1 or not {"default", "all"} & set(self.targets),
            "targets",
            "must be default or all alone, or names only",
        )
        require(
            importlib.util.find_spec("peft") is not None,
            "targets",
            "peft, which makes the adapters, is not installed; pip install 'flame-composer[tune]'",
        )


def require_tasks(config: EvalTasksConfig | Any, suite: str | None = None) -> None:
    """Raise InvalidField for bad `tasks`, `task_path`, `task_code` or `num_fewshot`.

    A `suite` needs the harness, too.
    """
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
        not (config.tasks or suite) or importlib.util.find_spec("lm_eval") is not None,
        "tasks" if config.tasks else "suite",
        "lm-evaluation-harness is not installed; pip install 'flame-composer[eval]'",
    )


@dataclass
class EvalTasksConfig:
    """Tasks of lm-evaluation-harness that a run is scored in while it trains."""

    paths = ("task_path",)

    tasks: list[str] = MISSING
    """Tasks, groups or tags of lm-evaluation-harness (extra eval), e.g. [piqa,lambada_openai]."""
    task_path: str | None = None
    """Folder of your own tasks, YAML files in the harness's form; they take precedence over the
    harness's tasks of the same name.
    """
    task_code: bool = False
    """Run the Python functions that task files in task_path name with !function."""
    interval: str = "0.1dur"
    """Interval between evaluations, as eval_interval; scores are also taken at the end."""
    num_fewshot: int | None = None
    """Number of examples shown before each question; each task's own number if not set."""
    limit: int | None = None
    """Number of documents to take from the beginning of each task; all if not set."""
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
    """The optimizer, and how gradients are clipped."""

    name: Literal["adamw", "decoupled_adamw", "lamb", "muon"] = "adamw"
    """Optimizer: AdamW; Composer's DecoupledAdamW, whose weight decay is not multiplied by lr, so
    that 1e-5 is a usual value; LAMB; or Muon, for the matrices of linear layers inside the blocks,
    with AdamW for all else.
    """
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moments; not Muon's."""
    eps: float = 1e-8
    """Term added to the denominator of an update, for numerical stability; not Muon's."""
    momentum: float | None = None
    """Momentum of Muon; 0.95 if not set."""
    update_scale: Literal["adamw_rms", "original"] | None = None
    """Size of Muon's updates. adamw_rms: that of AdamW's, so that AdamW's lr and weight_decay suit
    (Liu et al. 2025). original: that of Jordan et al. (2024), where lr=0.02 is usual. adamw_rms if
    not set.
    """
    adamw_lr_ratio: float | None = None
    """Learning rate of what AdamW trains beside Muon, as a multiple of lr; 1 if not set."""
    weight_decay: float = 0.01
    """Weight decay of the kinds of parameters in `decay`; all others have none."""
    decay: list[str] = field(default_factory=lambda: ["matrices", "embeddings"])
    """Kinds of parameters that are decayed. embeddings: those of the input, also where the output
    layer shares them. matrices: all else of two or more dimensions. vectors: norms, biases and the
    like. OLMo 2 decays [matrices,vectors].
    """
    grad_clip_norm: float | None = 1.0
    """Largest global norm of the gradient, to which it is clipped; null for no clipping."""

    def validate(self) -> None:
        require(0 < self.lr < math.inf, "lr", "must be more than 0, and finite")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", "must both be in [0, 1)")
        require(0 < self.eps < math.inf, "eps", "must be more than 0, and finite")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "must be 0 or more, and finite")
        self._check_decay()
        self._check_muon()
        require(
            self.grad_clip_norm is None or 0 < self.grad_clip_norm < math.inf,
            "grad_clip_norm",
            "must be more than 0 and finite, or null",
        )

    def _check_muon(self) -> None:
        for key in ("momentum", "update_scale", "adamw_lr_ratio"):
            is_its_own = self.name == "muon" or getattr(self, key) is None
            rule = f"must be null with optimizer.name={self.name}; only muon has it"
            require(is_its_own, key, rule)
        is_share = self.momentum is None or 0 < self.momentum < 1
        require(is_share, "momentum", "must be more than 0 and less than 1")
        is_factor = self.adamw_lr_ratio is None or 0 < self.adamw_lr_ratio < math.inf
        require(is_factor, "adamw_lr_ratio", "must be more than 0, and finite")

    def _check_decay(self) -> None:
        allowed = ", ".join(KINDS)
        for kind in self.decay:
            close = nearest(kind, list(KINDS))
            require(kind in KINDS, "decay", f"must name only {allowed}, not {kind!r}{close}")
        rule = f"must name one of {allowed}; to decay nothing, set optimizer.weight_decay=0"
        require(len(self.decay) > 0, "decay", rule)
        require(len(set(self.decay)) == len(self.decay), "decay", "must not name a kind twice")


@dataclass
class SchedulerConfig:
    """The learning rate over the run."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after the warmup; wsd (warmup, stable, decay) stays at the peak
    until the decay begins.
    """
    warmup: str = "0ba"
    """Length of the linear warmup from 0, in ba, tok, sp or ep, or as a fraction of the run
    (0.05dur).
    """
    decay: str = "0.1dur"
    """Length of the decay of wsd, which ends with the run; in the same units as warmup."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Shape of the decay of wsd."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the run (or at t_max), as a fraction of optimizer.lr; it does not
    apply to constant.
    """
    t_max: str | None = None
    """Length at which cosine or linear would reach min_lr_ratio, in ba, tok, sp or ep, if the run
    is to end earlier on the way; max_duration if not set. OLMo 2 trains on 4T tokens of a cosine
    of 5T.
    """

    def validate(self) -> None:
        require_duration(self.decay, "decay", fraction=True, zero=True)
        require_duration(self.warmup, "warmup", fraction=True, zero=True)
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "must be in [0, 1]")
        if self.t_max is not None:
            has_end = self.name in ("cosine", "linear")
            rule = "must be null with constant and wsd; only cosine and linear can end beyond a run"
            require(has_end, "t_max", rule)
            require_duration(self.t_max, "t_max")

    def check_lengths(
        self, max_duration: str, total: int, warmup: int, decay: int | None, t_max: int | None
    ) -> None:
        """Raise InvalidField unless the parts of the schedule fit a run of `total` batches.

        All lengths are in global batches; `decay` and `t_max` may be unknown. `max_duration` is the
        length of the run as it was given.
        """
        require(
            warmup <= total,
            "scheduler.warmup",
            f"must not be longer than the run: {warmup} batches, of {total} in all"
            f" (max_duration={max_duration})",
        )
        require(
            self.name != "wsd" or decay is None or warmup + decay <= total,
            "scheduler.decay",
            f"must leave room for the warmup: {decay} and {warmup} batches of {total}",
        )
        require(
            t_max is None or t_max >= total,
            "scheduler.t_max",
            f"must not end before the run: {t_max} batches of {total}"
            f" (max_duration={max_duration})",
        )


@dataclass
class RepetitionConfig:
    """The rule by which rows that repeat themselves are left out of the loss."""

    min_period: int = 1
    """Smallest number of tokens in a sequence that is repeated."""
    max_period: int = 13
    """Largest number of tokens in a sequence that is repeated."""
    max_count: int = 32
    """Number of times in a row at which a sequence is too much: a row that has one so often, or
    more often, is left out.
    """

    def validate(self) -> None:
        require(self.min_period > 0, "min_period", "must be 1 token or more")
        rule = f"must be min_period ({self.min_period}) or more"
        require(self.max_period >= self.min_period, "max_period", rule)
        rule = "must be 2 or more: a sequence that occurs once is not repeated"
        require(self.max_count > 1, "max_count", rule)


@dataclass
class WandbConfig:
    """A run's place on Weights & Biases."""

    project: str = MISSING
    """Weights & Biases project; the run's name and id are run_name."""
    entity: str | None = None
    """Team or user that the run belongs to."""
    group: str | None = None
    """Group that the run is shown in."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""

    def validate(self) -> None:
        require_text(self, "project", "entity", "group")


@dataclass
class SpikeConfig:
    """The rules by which a lasting leap of the loss ends a run."""

    window: int = 100
    """Number of steps whose median loss is taken as the usual loss."""
    factor: float = 2.0
    """Multiple of the usual loss above which a loss is too high."""
    patience: int = 10
    """Number of consecutive steps with too high a loss after which the run ends."""

    def validate(self) -> None:
        require(self.window > 0, "window", "must be 1 step or more")
        require(1 < self.factor < math.inf, "factor", "must be more than 1, and finite")
        require(self.patience > 0, "patience", "must be 1 step or more")
