"""Every script's configuration, its defaults and its rules; the string under a field is what `--help` says of it.

Imports neither torch nor composer, so that a mistake is answered in well under a second.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from omegaconf import MISSING


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


_DURATION = re.compile(r"([0-9](?:_?[0-9]){0,17})(ba|tok|sp|ep)")
_FRACTION = re.compile(r"(0?\.[0-9]+|0|1|1\.0)dur")
_BYTES = re.compile(r"[0-9]+b?|[0-9]+(\.[0-9]+)?[kmgtp]b", re.IGNORECASE)


def require_duration(value: str, name: str, *, fraction: bool = False, zero: bool = False) -> None:
    """A whole number of ba (batches), tok (tokens), sp (rows) or ep (epochs); with `fraction`, also 0.05dur."""
    allowed = "a whole number followed by ba, tok, sp or ep" + (", or a fraction of the run like 0.05dur" if fraction else "")
    match = _DURATION.fullmatch(value) or (_FRACTION.fullmatch(value) if fraction else None)
    require(bool(match), name, f"must be {allowed}, e.g. 1000ba")
    assert match is not None
    require(zero or float(match[1]) > 0, name, "must be more than 0")


def require_text(config: object, *names: str) -> None:
    """An empty path or name is a variable of the shell that was not set; what may be left out is null."""
    for name in names:
        require(getattr(config, name) != "", name, "must not be empty")


def require_seed(value: int | None, name: str) -> None:
    require(value is None or 0 <= value < 2**32, name, "must be in [0, 2**32)")


class ScriptConfig:
    """Base of the dataclasses a script is run with, and what `cli.load` knows about one beyond its values."""

    # As YAML, with interpolations resolved but those of the environment: safe to log and save.
    resolved_yaml: str = ""
    # Where each key that was given was given, and its value there; where to look for one that was not.
    origins: Mapping[str, tuple[str, Any]] = MappingProxyType({})
    place: str = "command line"


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
        require_text(self, "local", "remote")
        require_seed(self.shuffle_seed, "shuffle_seed")
        require(self.cache_limit is None or bool(_BYTES.fullmatch(self.cache_limit)), "cache_limit",
                "must be a number of bytes, or one with kb, mb, gb, tb or pb, e.g. 100gb")
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
        require_text(self, "local", "remote")
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
        require(0 < self.lr < math.inf, "lr", "must be more than 0, and finite")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", "must both be in [0, 1)")
        require(0 < self.eps < math.inf, "eps", "must be more than 0, and finite")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "must be 0 or more, and finite")
        require(self.grad_clip_norm is None or 0 < self.grad_clip_norm < math.inf, "grad_clip_norm",
                "must be more than 0 and finite, or null")


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
    allow_data_change: bool = False
    """Go on from a checkpoint although the data or its order is not what the run began with."""
    log_folder: str = "runs/${run_name}"
    """Receives train_log.jsonl (one row a step) and the resolved config."""
    log_batch_hash: bool = False
    """Add to every row of the log a hash of the global batch's token ids."""
    progress_bar: bool = True
    """Show a progress bar where there is a terminal; a line now and then otherwise."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases."""

    def validate(self) -> None:
        require(bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.run_name)), "run_name",
                "must be letters, digits, '.', '_' and '-' (it names folders)")
        require_seed(self.seed, "seed")
        require_text(self, "tokenizer", "save_folder", "log_folder")
        require_duration(self.max_duration, "max_duration")
        require_duration(self.eval_interval, "eval_interval", fraction=True)
        require_duration(self.save_interval, "save_interval", fraction=True)
        for name in ("global_batch_size", "microbatch_size"):
            require(getattr(self, name) > 0, name, "must be a positive number of rows")
        require(self.eval_batch_size is None or self.eval_batch_size > 0, "eval_batch_size",
                "must be a positive number of rows, or null")
        require(self.context_length > 1, "context_length", "must be 2 tokens or more")
        for name in ("save_folder", "log_folder"):
            require("://" not in (getattr(self, name) or ""), name, "must be a local folder (data can be remote)")
        require(self.save_num_checkpoints_to_keep == -1 or self.save_num_checkpoints_to_keep > 0,
                "save_num_checkpoints_to_keep", "must be more than 0, or -1 for all")
        world_size = os.environ.get("WORLD_SIZE", "1")
        if not re.fullmatch(r"[1-9][0-9]{0,8}", world_size):
            raise ConfigError(f"environment: WORLD_SIZE={world_size}: must be the number of processes; start with composer, "
                              "or unset it")
        devices = int(world_size)
        require(self.global_batch_size % (devices * self.microbatch_size) == 0, "global_batch_size",
                f"must be a multiple of devices x microbatch_size = {devices} x {self.microbatch_size} "
                f"= {devices * self.microbatch_size}")
        if self.eval_data is not None:
            require(self.eval_data.local != self.train_data.local or self.eval_data.remote != self.train_data.remote,
                    "eval_data.local", "must not be the dataset that is trained on")
        run_batches = self.in_batches(self.max_duration, None)
        warmup = self.in_batches(self.scheduler.warmup, None, run_batches)
        if run_batches is not None and warmup is not None:
            require(warmup <= run_batches, "scheduler.warmup",
                    f"must not be longer than the run: {warmup} batches of {run_batches} (max_duration={self.max_duration})")

    def in_batches(self, duration: str, epoch_batches: int | None, run_batches: int | None = None) -> int | None:
        """`duration` in global batches, rounded up; None where it needs an epoch's or the run's length and that is None."""
        if match := _DURATION.fullmatch(duration):
            count, unit = int(match[1]), match[2]
            if unit == "ep":
                return None if epoch_batches is None else count * epoch_batches
            tokens_per_row = self.context_length if unit == "tok" else 1
            return count if unit == "ba" else -(-count // (self.global_batch_size * tokens_per_row))
        fraction = _FRACTION.fullmatch(duration)
        assert fraction, duration
        return None if run_batches is None else math.ceil(float(fraction[1]) * run_batches)


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
    .ndjson, .parquet and .txt, and those compressed. Other endings are plain text, one document a file."""
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
        require_text(self, "out", "text_column", "eos_token")
        require(self.vocab_size >= 257, "vocab_size", "must be at least 257: 256 bytes and the end-of-text token")
        require(self.min_frequency >= 1, "min_frequency", "must be 1 or more")
        require(self.max_bytes is None or self.max_bytes > 0, "max_bytes", "must be more than 0")


@dataclass
class ConvertConfig(ScriptConfig):
    """Turn text into tokenized, packed MDS shards."""

    source: list[str] = MISSING
    """Files, folders or globs of JSONL or plain text, also as .gz .zst .bz2 .xz, or of Parquet; with `split`, Hugging Face
    datasets by id or folder."""
    split: str | None = None
    """Split of the Hugging Face dataset to read, e.g. train."""
    name: str | None = None
    """Configuration of the Hugging Face dataset, e.g. sample-10BT; its default if not set."""
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
    .ndjson, .parquet and .txt, and those compressed. Other endings are plain text, one document a file."""
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
    max_doc_length: int | None = None
    """Cut documents into pieces of at most so many tokens (bos and eos included), each a document to the model."""
    min_doc_length: int | None = None
    """Leave out documents of fewer tokens (bos and eos included), and count them."""
    seed: int | None = None
    """Shuffle the documents of each work unit, and the units; if not set, the order is that of the source."""
    encoder: Literal["auto", "gigatoken", "hf"] = "auto"
    """What turns text into tokens: gigatoken, checked against hf on a sample of every work unit; hf is the tokenizer itself;
    auto is gigatoken where it is installed and agrees, hf otherwise."""
    num_workers: int | None = None
    """Processes that convert; one per core if not set. The dataset does not depend on it."""
    cluster: str | None = None
    """Address of a Dask scheduler (tcp://host:8786) whose workers convert instead; they must see the same files under the
    same paths."""

    def validate(self) -> None:
        require(len(self.source) > 0, "source", "must name at least one file, folder or glob")
        require_text(self, "out", "val_out", "tokenizer", "text_column", "split", "name", "cluster")
        require(self.name is None or self.split is not None, "split", "must be set together with name, e.g. split=train")
        require(self.split is None or not self.suffixes, "suffixes", "must not be set together with split")
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
        for name in ("max_doc_length", "min_doc_length"):
            length = getattr(self, name)
            require(length is None or length > 0, name, "must be a positive number of tokens, or null")
        require_seed(self.seed, "seed")
        require(self.num_workers is None or self.num_workers > 0, "num_workers", "must be 1 or more, or null")
        if self.cluster is not None:
            require(self.num_workers is None, "num_workers", "must not be set together with cluster")
            for name in ("source", "out", "val_out") if self.split is None else ("out", "val_out"):
                value = getattr(self, name) or []
                paths = [value] if isinstance(value, str) else value
                require(all(os.path.isabs(path) for path in paths), name,
                        "must be absolute where there is a cluster, whose workers have working folders of their own")


@dataclass
class InspectConfig(ScriptConfig):
    """Show what a dataset made by convert/to_mds.py holds, and check that it is whole."""

    data: str = MISSING
    """Folder of the dataset, or where it lives in an object store (s3://bucket/path, gs://...)."""
    tokenizer: str | None = None
    """Tokenizer folder or id, which must be the dataset's own; needed to show rows as text."""
    rows: int = 2
    """Number of sample rows to show, evenly spread over the dataset."""
    row_numbers: list[int] = field(default_factory=list)
    """Show these rows instead, e.g. [0,17]; the first is 0."""
    whole_rows: bool = False
    """Show sample rows whole; if not set, the middle of long documents and of long rows is left out."""
    max_bytes: int | None = 1073741824
    """Take the histograms from evenly spread shards of about so many bytes; from all shards if null, or with verify."""
    verify: bool = False
    """Hash every shard and name the bad ones; the exit status is 1 if there are any. If not set, sizes are checked, and
    of a dataset in an object store only the shards that are read."""
    plot: str | None = None
    """PNG file to draw the histogram of the lengths of document pieces to."""

    def validate(self) -> None:
        require_text(self, "data", "tokenizer", "plot")
        require(self.rows >= 0, "rows", "must be 0 or more")
        require(all(number >= 0 for number in self.row_numbers), "row_numbers", "must all be 0 or more")
        require(self.max_bytes is None or self.max_bytes > 0, "max_bytes", "must be more than 0 bytes, or null")
        require(self.plot is None or self.plot.lower().endswith(".png"), "plot", "must be a file name ending in .png")


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
        require_text(self, "model", "tokenizer")
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
        require_text(self, "model")
        require_seed(self.seed, "seed")
        require(self.max_new_tokens > 0, "max_new_tokens", "must be more than 0")
        require(0 <= self.temperature < math.inf, "temperature", "must be 0 or more, and finite")
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

    def validate(self) -> None:
        require_text(self, "checkpoint", "out")


@dataclass
class BenchmarkConfig(ScriptConfig):
    """Time a training step of GLA against a Llama of the same size."""

    context_lengths: list[int] = field(default_factory=lambda: [512, 2048])
    """Tokens per row, one measurement each."""
    batch_tokens: int = 4096
    """Tokens per step."""
    hidden_size: int = 512
    """Width of both models."""
    num_layers: int = 8
    """Depth of both models."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    repeats: int = 5
    """Steps of each model that count, after one that does not; the two take turns."""

    def validate(self) -> None:
        for name in ("batch_tokens", "hidden_size", "num_layers", "vocab_size", "repeats"):
            require(getattr(self, name) > 0, name, "must be more than 0")
        require(bool(self.context_lengths) and min(self.context_lengths) > 1, "context_lengths", "must be 2 tokens or more")
