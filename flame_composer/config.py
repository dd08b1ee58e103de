"""Every script's configuration: dataclass defaults < YAML file < key=value arguments.

Imports neither torch nor composer, so that a mistake is answered in well under a second.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

EXIT_CONFIG = 2
EXIT_DATA = 1


class ConfigError(ValueError):
    """A mistake in what the user asked for: one line with the place, the rule and the remedy. Exit status 2."""


class DataError(ValueError):
    """Damaged or unusable data met while running: one line naming the file and the remedy. Exit status 1."""


class InvalidField(ConfigError):
    """A field that breaks a rule: its full key (in `validate()` the name within the dataclass) and the rule.

    Whoever loaded the configuration adds where the value came from, and the value.
    """

    def __init__(self, name: str, rule: str):
        super().__init__(f"{name}: {rule}")
        self.name = name
        self.rule = rule


def require(condition: bool, name: str, rule: str) -> None:
    if not condition:
        raise InvalidField(name, rule)


# ---------------------------------------------------------------------------------------------------------------------
# Durations


_DURATION = re.compile(r"(\d[\d_]*)(ba|tok|sp|ep)")
_FRACTION = re.compile(r"(0?\.\d+|0|1|1\.0)dur")


def require_duration(value: str, name: str, *, fraction: bool = False, zero: bool = False) -> None:
    """A whole number of ba (batches), tok (tokens), sp (rows) or ep (epochs); with `fraction`, also 0.05dur."""
    allowed = "a whole number followed by ba, tok, sp or ep" + (", or a fraction of the run like 0.05dur" if fraction else "")
    match = _DURATION.fullmatch(value)
    require(bool(match) or (fraction and bool(_FRACTION.fullmatch(value))), name, f"must be {allowed}, e.g. 1000ba")
    require(zero or match is None or int(match[1]) > 0, name, "must be more than 0")


def duration_in_batches(
    value: str, *, global_batch_size: int, context_length: int, epoch_batches: int | None, run_batches: int | None = None
) -> int | None:
    """`value` in whole batches, rounded up; None if it needs an epoch's or the run's length and that is unknown."""
    if match := _DURATION.fullmatch(value):
        count, unit = int(match[1]), match[2]
        if unit == "ba":
            return count
        if unit == "ep":
            return None if epoch_batches is None else count * epoch_batches
        return math.ceil(count / (global_batch_size * (context_length if unit == "tok" else 1)))
    fraction = _FRACTION.fullmatch(value)
    assert fraction, value
    return None if run_batches is None else math.ceil(float(fraction[1]) * run_batches)


# ---------------------------------------------------------------------------------------------------------------------
# What every script's configuration can do


class ScriptConfig:
    """Base of the dataclasses a script is run with, with what `load` knows beyond the values."""

    # The configuration with interpolations resolved but those of the environment, so safe to log and save.
    resolved_yaml = ""
    _origins: dict[str, tuple[str, Any]] = {}  # noqa: RUF012 (not a field: set by `load` on the instance)
    _file = "command line"

    def explain(self, problem: InvalidField) -> str:
        """One line that says where the field was set, to what, and the rule it breaks."""
        origin, value = self._origins.get(problem.name, (self._file, None))
        if problem.name not in self._origins:
            for part in problem.name.split("."):
                value = value.get(part) if isinstance(value, dict) else getattr(value or self, part, None)
        return f"{origin}: {problem.name}{'' if value is None else f'={_show(value)}'}: {problem.rule}"


@dataclass
class ModelConfig:
    config: dict[str, Any] = field(default_factory=dict)
    """Hugging Face model config: model_type (gla, transformer, llama, ...) and that model's own keys."""
    pretrained: str | None = None
    """Start from the weights of this Hugging Face folder or id; model.config may then only repeat what it says."""

    def validate(self) -> None:
        require(self.pretrained is not None or "model_type" in self.config, "config.model_type",
                "must be set (e.g. model.config.model_type=gla), or model.pretrained must name a folder")


@dataclass
class DataConfig:
    local: str | None = None
    """Folder of the dataset; with `remote`, the folder under which what is downloaded is cached."""
    remote: str | None = None
    """Where the dataset lives (s3://bucket/path, gs://..., or another folder), streamed through `local`."""
    shuffle: bool = True
    """Shuffle rows anew in every epoch."""
    shuffle_algo: Literal["py1e", "py1br", "py1b", "py1s", "py2s", "naive"] = "py1e"
    """StreamingDataset's shuffle algorithm."""
    shuffle_seed: int | None = None
    """Seed of the row order; the run's seed if not set."""
    shuffle_block_size: int | None = None
    """Rows over which the shuffle spreads a shard; larger mixes better and keeps more shards on disk."""
    num_canonical_nodes: int | None = None
    """Number of nodes the row order is laid out for; keep it when the number of nodes changes between restarts."""
    predownload: int | None = None
    """Rows to download ahead of the one being read, per worker."""
    cache_limit: str | None = None
    """Most disk the cached shards may take, e.g. 100gb; unlimited if not set."""
    num_workers: int = 2
    """Loader processes per rank; 0 reads in the training process."""
    prefetch_factor: int = 2
    """Batches each loader process keeps ready."""

    def validate(self) -> None:
        require(self.local is not None or self.remote is not None, "local",
                "must name a dataset folder made by convert/to_mds.py (or set remote)")
        require(self.num_workers >= 0, "num_workers", "must be 0 or more")
        require(self.prefetch_factor >= 1, "prefetch_factor", "must be 1 or more")
        for name in ("shuffle_block_size", "num_canonical_nodes", "predownload"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "must be more than 0")


@dataclass
class EvalDataConfig:
    local: str | None = None
    """Folder of the dataset; with `remote`, the folder under which what is downloaded is cached."""
    remote: str | None = None
    """Where the dataset lives (s3://bucket/path, gs://..., or another folder), streamed through `local`."""
    num_workers: int = 0
    """Loader processes per rank; 0 reads in the training process."""
    max_rows: int | None = None
    """Evaluate on the first so many rows; all if not set."""

    def validate(self) -> None:
        require(self.local is not None or self.remote is not None, "local",
                "must name a dataset folder made by convert/to_mds.py (or set remote)")
        require(self.num_workers >= 0, "num_workers", "must be 0 or more")
        require(self.max_rows is None or self.max_rows > 0, "max_rows", "must be a positive number of rows, or null")


@dataclass
class OptimizerConfig:
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    weight_decay: float = 0.01
    """Decay of matrices and embeddings; norms and biases are never decayed."""
    grad_clip_norm: float | None = 1.0
    """Largest global gradient norm; null for no clipping."""

    def validate(self) -> None:
        require(self.lr > 0, "lr", "must be more than 0")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", "must both be in [0, 1)")
        require(self.eps > 0, "eps", "must be more than 0")
        require(self.weight_decay >= 0, "weight_decay", "must be 0 or more")
        require(self.grad_clip_norm is None or self.grad_clip_norm > 0, "grad_clip_norm", "must be more than 0, or null")


@dataclass
class SchedulerConfig:
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warmup."""
    warmup: str = "0ba"
    """Linear warmup from 0: ba, tok, sp, ep or a fraction of the run (0.05dur)."""
    min_lr_ratio: float = 0.1
    """The floor the rate falls to at the end of the run, as a fraction of optimizer.lr."""

    def validate(self) -> None:
        require_duration(self.warmup, "warmup", fraction=True, zero=True)
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "must be in [0, 1]")


@dataclass
class FsdpConfig:
    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"] = "FULL_SHARD"
    """How parameters, gradients and optimizer state are spread over devices."""
    mixed_precision: Literal["PURE", "DEFAULT", "FULL"] = "PURE"
    """Composer's FSDP mixed-precision policy."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""


@dataclass
class ParallelismConfig:
    fsdp: FsdpConfig | None = None
    """Fully sharded data parallelism; plain data parallelism if not set."""
    cpu_fallback: bool = False
    """Train with plain data parallelism where there is no GPU, though fsdp is asked for."""


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


@dataclass
class TrainConfig(ScriptConfig):
    """Train a causal language model on a streamed dataset."""

    run_name: str = MISSING
    """Name of the run: its folder under runs/, its W&B id, and what autoresume looks for."""
    seed: int = 42
    """Seed of weights, dropout and (unless set there) the row order."""
    max_duration: str = MISSING
    """Length of the run: batches (ba), tokens (tok), rows (sp) or epochs (ep), e.g. 20480ba."""
    global_batch_size: int = MISSING
    """Rows per optimizer step over all devices."""
    microbatch_size: int = MISSING
    """Rows per forward pass on one device; global_batch_size = devices x microbatch_size x accumulation steps."""
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
    """Rows per evaluation forward pass on one device; microbatch_size if not set."""
    varlen: bool = True
    """Attention state starts anew at every document; false lets it run across the documents of a row."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """The learning rate over time."""
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    """How the model is spread over devices."""
    save_folder: str | None = "runs/${run_name}/checkpoints"
    """Folder of checkpoints; null to save none."""
    save_interval: str = "500ba"
    """How often to save (also at the end)."""
    save_num_checkpoints_to_keep: int = 3
    """Newest checkpoints to keep; -1 keeps all."""
    autoresume: bool = True
    """Go on from the newest complete checkpoint in save_folder, if there is one."""
    log_folder: str = "runs/${run_name}"
    """Receives train_log.jsonl (one row a step) and the resolved config."""
    log_batch_hash: bool = False
    """Add to every row of the log a hash of the global batch's token ids."""
    progress_bar: bool = True
    """Show a progress bar on the terminal."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases."""

    def validate(self) -> None:
        require(bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.run_name)), "run_name",
                "must be letters, digits, '.', '_' and '-' (it names folders)")
        require(0 <= self.seed < 2**32, "seed", "must be in [0, 2**32)")
        require_duration(self.max_duration, "max_duration")
        require_duration(self.eval_interval, "eval_interval", fraction=True)
        require_duration(self.save_interval, "save_interval", fraction=True)
        for name in ("global_batch_size", "microbatch_size"):
            require(getattr(self, name) > 0, name, "must be a positive number of rows")
        require(self.eval_batch_size is None or self.eval_batch_size > 0, "eval_batch_size",
                "must be a positive number of rows, or null")
        require(self.context_length > 1, "context_length", "must be 2 tokens or more")
        require(self.save_num_checkpoints_to_keep == -1 or self.save_num_checkpoints_to_keep > 0,
                "save_num_checkpoints_to_keep", "must be more than 0, or -1 for all")
        devices = int(os.environ.get("WORLD_SIZE", "1"))
        require(self.global_batch_size % (devices * self.microbatch_size) == 0, "global_batch_size",
                f"must be a multiple of devices x microbatch_size = {devices} x {self.microbatch_size} "
                f"= {devices * self.microbatch_size}")
        if self.eval_data is not None:
            require(self.eval_data.local != self.train_data.local or self.eval_data.remote != self.train_data.remote,
                    "eval_data.local", "must not be the dataset that is trained on")
        sizes = {"global_batch_size": self.global_batch_size, "context_length": self.context_length, "epoch_batches": None}
        run_batches = duration_in_batches(self.max_duration, **sizes)
        warmup = duration_in_batches(self.scheduler.warmup, **sizes, run_batches=run_batches)
        if run_batches is not None and warmup is not None:
            require(warmup <= run_batches, "scheduler.warmup",
                    f"must not be longer than the run: {warmup} batches of {run_batches} (max_duration={self.max_duration})")


@dataclass
class TokenizerTrainConfig(ScriptConfig):
    """Train a byte-level BPE tokenizer on text and save it as a Hugging Face tokenizer folder."""

    source: list[str] = MISSING
    """Files, folders or globs of JSONL, Parquet or plain text."""
    out: str = MISSING
    """Folder the tokenizer is written to."""
    vocab_size: int = 32000
    """Number of tokens, special ones included."""
    text_column: str = "text"
    """Field of JSONL and Parquet records that holds the text."""
    suffixes: list[str] = field(default_factory=list)
    """Take only files with these endings when a folder is searched, e.g. [.py,.md]; if not set, .jsonl, .json-lines,
    .ndjson, .parquet and .txt. Endings other than these are plain text, one document a file."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do with a document that cannot be read: stop, or leave it out and count it."""
    min_frequency: int = 2
    """A pair must occur this often to be merged."""
    max_bytes: int | None = None
    """Learn from a sample of this many bytes, drawn from all over the source; from all of it if not set."""
    eos_token: str = "<|endoftext|>"
    """The token that ends a document (also used as bos and pad)."""

    def validate(self) -> None:
        require(len(self.source) > 0, "source", "must name at least one file, folder or glob")
        require(self.vocab_size >= 257, "vocab_size", "must be at least 257: 256 bytes and the end-of-text token")
        require(self.min_frequency >= 1, "min_frequency", "must be 1 or more")
        require(self.max_bytes is None or self.max_bytes > 0, "max_bytes", "must be more than 0")


@dataclass
class ConvertConfig(ScriptConfig):
    """Turn text into tokenized, packed MDS shards."""

    source: list[str] = MISSING
    """Files, folders or globs of JSONL, Parquet or plain text."""
    out: str = MISSING
    """Folder the dataset is written to."""
    tokenizer: str = MISSING
    """Hugging Face tokenizer folder or id."""
    context_length: int = 2048
    """Tokens per row."""
    text_column: str = "text"
    """Field of JSONL and Parquet records that holds the text."""
    suffixes: list[str] = field(default_factory=list)
    """Take only files with these endings when a folder is searched, e.g. [.py,.md]; if not set, .jsonl, .json-lines,
    .ndjson, .parquet and .txt. Endings other than these are plain text, one document a file."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do with a document that cannot be read: stop, or leave it out and count it."""
    add_bos: bool = False
    """Put the tokenizer's bos token before every document."""
    add_eos: bool = True
    """Put the tokenizer's eos token after every document."""
    val_fraction: float = 0.0
    """Fraction of documents held out for validation, chosen by a hash of the text."""
    val_out: str | None = None
    """Folder the held-out documents' dataset is written to."""
    shard_size: int = 67108864
    """Largest size of a shard, bytes."""
    unit_size: int = 67108864
    """Input bytes per work unit, the step in which a conversion is committed and resumed."""

    def validate(self) -> None:
        require(len(self.source) > 0, "source", "must name at least one file, folder or glob")
        require(self.context_length > 1, "context_length", "must be 2 tokens or more")
        require(0 <= self.val_fraction < 1, "val_fraction", "must be in [0, 1)")
        require((self.val_fraction > 0) == (self.val_out is not None), "val_out",
                "must be set together with val_fraction")
        if self.val_out is not None:
            out, val_out = os.path.realpath(self.out), os.path.realpath(self.val_out)
            require(os.path.commonpath([out, val_out]) not in (out, val_out), "val_out",
                    f"must be a folder beside out={self.out}, neither the same nor inside the other")
        smallest = 8 * self.context_length + 1024
        require(smallest <= self.shard_size < 2**32, "shard_size",
                f"must be at least {smallest} (one row) and less than {2**32} bytes")
        require(self.unit_size > 0, "unit_size", "must be more than 0 bytes")


@dataclass
class EvaluateConfig(ScriptConfig):
    """Loss and perplexity of a Hugging Face folder or a checkpoint on a dataset."""

    model: str = MISSING
    """A Hugging Face folder or id, a checkpoint file, or a folder of checkpoints (its newest is taken)."""
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    """The dataset."""
    tokenizer: str | None = None
    """Tokenizer folder or id; the model's own if not set."""
    batch_size: int = 8
    """Rows per forward pass."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    """Arithmetic of the forward pass."""
    varlen: bool = True
    """Attention state starts anew at every document."""

    def validate(self) -> None:
        require(self.batch_size > 0, "batch_size", "must be a positive number of rows")


@dataclass
class GenerateConfig(ScriptConfig):
    """Continue a prompt."""

    model: str = MISSING
    """A Hugging Face folder or id, a checkpoint file, or a folder of checkpoints (its newest is taken)."""
    prompt: str = MISSING
    """The text to continue."""
    max_new_tokens: int = 128
    """Most tokens to generate."""
    temperature: float = 0.8
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 for no such limit."""
    seed: int = 42
    """Seed of the sampling."""

    def validate(self) -> None:
        require(self.max_new_tokens > 0, "max_new_tokens", "must be more than 0")
        require(self.temperature >= 0, "temperature", "must be 0 or more")
        require(0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        require(self.top_k >= 0, "top_k", "must be 0 or more")


@dataclass
class ToHfConfig(ScriptConfig):
    """Turn a training checkpoint into a Hugging Face folder with safetensors and the tokenizer."""

    checkpoint: str = MISSING
    """A checkpoint file, or a folder of checkpoints (its newest is taken)."""
    out: str = MISSING
    """Folder to write; must not exist or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the weights are stored in."""


# ---------------------------------------------------------------------------------------------------------------------
# Loading


C = TypeVar("C", bound=ScriptConfig)


def load(cls: type[C], argv: list[str]) -> C:
    """The configuration that `[file.yaml] [key=value ...]` asks for, checked.

    Raises ConfigError for a missing or malformed file, an unknown key, a value of the wrong type, a key that must be
    set and is not, and whatever `validate()` of any section refuses.
    """
    file, overrides = _split(argv)
    sources: list[tuple[str, DictConfig]] = []
    if file is not None:
        sources.append((file, _read_yaml(file)))
    sources += [("command line", _read_override(argument)) for argument in overrides]

    merged = OmegaConf.structured(cls)
    known = [key for key, _, _, _ in _fields(cls)]
    origins: dict[str, tuple[str, Any]] = {}
    for origin, node in sources:
        content = OmegaConf.to_container(node, resolve=False)
        assert isinstance(content, dict)
        _check_keys(cls, content, origin, known)
        for key, value in _leaves(cls, content):
            origins[key] = origin, value
            if isinstance(value, dict):
                origins.update({f"{key}.{name}": (origin, each) for name, each in value.items()})
            try:
                merged = OmegaConf.merge(merged, _nested(key, value))
            except OmegaConfBaseException as error:
                raise ConfigError(f"{origin}: {key}={_show(value)}: {_reason(cls, key, error)}") from None
    place = file or "command line"
    for key in sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(f"{place}: {key}: must be set ({_doc(cls, key)}); add it to the file or give {key}=...")
    try:
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        raise ConfigError(f"{origins.get(key, (place, None))[0]}: {key}: {_first_line(error)}") from None
    assert isinstance(config, cls)
    config.resolved_yaml, config._origins, config._file = _without_environment(merged), origins, place
    for prefix, section in _sections(config):
        try:
            getattr(section, "validate", lambda: None)()
        except InvalidField as problem:
            raise ConfigError(config.explain(InvalidField(prefix + problem.name, problem.rule))) from None
    return config


def run(main: Callable[[C], None], cls: type[C]) -> int:
    """Load the configuration from sys.argv and call `main` with it; returns the process's exit status."""
    argv = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in argv):
        print(help_text(cls, Path(sys.argv[0]).name))
        return 0
    config = None
    try:
        config = load(cls, argv)
        main(config)
    except (ConfigError, DataError) as error:
        message = config.explain(error) if config is not None and isinstance(error, InvalidField) else str(error)
        # An error in a loader process arrives with that process's traceback before it.
        message = message.strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        # Every rank meets the same mistake in the configuration, and one of them says it.
        if isinstance(error, DataError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {message}", file=sys.stderr, flush=True)
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_DATA
    return 0


def nearest(name: str, allowed: list[str]) -> str:
    """'; did you mean X?' for the allowed name closest to `name`, or '' if none is close."""
    last = name.rsplit(".", 1)[-1]
    same_leaf = [key for key in allowed if key.rsplit(".", 1)[-1] == last]
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(allowed)}
    close = same_leaf or difflib.get_close_matches(name, allowed, n=1) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(last, list(by_leaf), n=1)
    ]
    return f"; did you mean {close[0]}?" if close else ""


def help_text(cls: type[ScriptConfig], script: str) -> str:
    """Usage, then every key with its type, default and one-line doc."""
    lines = [f"usage: {script} [file.yaml] [key=value ...]", "", inspect.cleandoc(cls.__doc__ or ""), "", "keys:"]
    for key, annotation, default, doc in _fields(cls):
        lines.append(f"  {key}: {annotation}{'' if default is None else f' = {default}'}")
        lines += textwrap.wrap(doc, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _split(argv: list[str]) -> tuple[str | None, list[str]]:
    if argv and argv[0].startswith("-"):
        raise ConfigError(f"command line: {argv[0]}: unknown option; arguments are [file.yaml] [key=value ...], see --help")
    file = argv[0] if argv and "=" not in argv[0] else None
    overrides = argv[1:] if file else argv
    for argument in overrides:
        if "=" not in argument:
            raise ConfigError(f"command line: {argument}: must be key=value (only the first argument can be a file)")
    return file, overrides


def _read_yaml(file: str) -> DictConfig:
    if not Path(file).is_file():
        folder = Path(file).parent
        beside = sorted(str(path) for path in folder.glob("*.yaml")) if folder.is_dir() else []
        raise ConfigError(f"{file}: no such file{nearest(file, beside)}")
    try:
        node = OmegaConf.load(file)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{file}: must hold keys and values (a YAML mapping)")
    return node


def _read_override(argument: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([argument])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"command line: {argument}: cannot be read: {' '.join(str(error).split())}") from None


def _dataclass_of(annotation: Any) -> type | None:
    """The dataclass in `X` or `X | None`, if there is one."""
    for candidate in (annotation, *get_args(annotation)):
        if dataclasses.is_dataclass(candidate):
            return typing.cast(type, candidate)
    return None


def _check_keys(cls: type, content: dict[Any, Any], origin: str, known: list[str], prefix: str = "") -> None:
    hints = typing.get_type_hints(cls)
    for key, value in content.items():
        full = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"{origin}: {full}: unknown key{nearest(full, known) or '; see --help for all keys'}")
        section = _dataclass_of(hints[key])
        if section is not None and isinstance(value, dict):
            _check_keys(section, value, origin, known, f"{full}.")


def _leaves(cls: type, content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of `content` by full key; a single value given for a list becomes a list of one."""
    hints = typing.get_type_hints(cls)
    for key, value in content.items():
        section = _dataclass_of(hints[key])
        if section is not None and isinstance(value, dict) and value:
            yield from _leaves(section, value, f"{prefix}{key}.")
        elif get_origin(hints[key]) is list and isinstance(value, str) and "${" not in value:
            yield f"{prefix}{key}", [part.strip() for part in value.split(",")]
        else:
            yield f"{prefix}{key}", value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str | None, str]]:
    """Full key, type, default (None where a section or a key that must be set) and doc of every field."""
    hints, docs = typing.get_type_hints(cls), _docs(cls)
    for f in dataclasses.fields(cls):
        section = _dataclass_of(hints[f.name])
        annotation = str(f.type).replace("Literal[", "one of [") if section is None else "section"
        if f.default is dataclasses.MISSING:
            default = None if section else "[]" if get_origin(hints[f.name]) is list else "{}"
        else:
            default = "(must be set)" if f.default == MISSING else _show(f.default)
        yield f"{prefix}{f.name}", annotation, default, docs.get(f.name, "")
        if section is not None:
            yield from _fields(section, f"{prefix}{f.name}.")


def _docs(cls: type) -> dict[str, str]:
    """The string literal under each field, of the class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for node, following in zip(body, body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[ast.unparse(node.target)] = ast.literal_eval(following.value)
    return docs


def _doc(cls: type, key: str) -> str:
    return next((doc.rstrip(".") for name, _, _, doc in _fields(cls) if name == key), "")


def _sections(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every section under its key prefix, the innermost first: their own rules come before those across sections."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _sections(value, f"{prefix}{f.name}.")
    yield prefix, config


def _reason(cls: type, key: str, error: OmegaConfBaseException) -> str:
    annotation = next((annotation for name, annotation, _, _ in _fields(cls) if name == key), "")
    if annotation == "section":
        return f"must hold keys and values; its keys are {', '.join(_section_keys(cls, key))}"
    return f"must be {annotation}" if annotation else _first_line(error)


def _section_keys(cls: type, key: str) -> list[str]:
    prefix = f"{key}."
    return [name for name, _, _, _ in _fields(cls) if name.startswith(prefix) and "." not in name[len(prefix):]]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _without_environment(merged: DictConfig) -> str:
    """The configuration as YAML with every interpolation resolved but those of the environment, which may be secret."""
    untyped = OmegaConf.create(OmegaConf.to_container(merged, resolve=False))
    OmegaConf.register_resolver("oc.env", lambda *names: f"<environment variable {names[0]}>", replace=True)
    try:
        OmegaConf.resolve(untyped)
        return OmegaConf.to_yaml(untyped)
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)
