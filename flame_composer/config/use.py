"""What the recipes beside train.py are run with: every field, its default and its rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from flame_composer.config import other_names
from flame_composer.config.rules import BYTES, ScriptConfig, require, require_seed, require_text
from flame_composer.config.sections import EvalDataConfig, require_tasks
from flame_composer.config.train import TrainConfig


@dataclass
class EvaluateConfig(ScriptConfig):
    """Loss and perplexity of a Hugging Face folder or a checkpoint on datasets, and its scores
    in tasks.
    """

    paths = ("model", "tokenizer", "plot", "task_path")

    model: str = MISSING
    """A Hugging Face folder or id, or a checkpoint file or folder of them (its newest is taken),
    also in an object store.
    """
    data: EvalDataConfig | None = None
    """The dataset to take loss and perplexity on."""
    datasets: dict[str, EvalDataConfig] = field(default_factory=dict)
    """Several datasets instead of one, by names of your own: datasets.web.local=...
    datasets.code.remote=...
    """
    tokenizer: str | None = None
    """Tokenizer folder or id; the model's own if not set."""
    batch_size: int = 8
    """Rows per forward pass."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    """Arithmetic of the forward pass."""
    varlen: bool = True
    """On datasets, attention state starts anew at every document."""
    block_size: int | None = None
    """Show perplexity by the length of the context, so many tokens of it together; not if not
    set.
    """
    plot: str | None = None
    """PNG file to draw perplexity over the length of the context to."""
    tasks: list[str] = field(default_factory=list)
    """Tasks, groups or tags of lm-evaluation-harness (extra eval), e.g. [piqa,lambada_openai]."""
    task_path: str | None = None
    """Folder of tasks of your own (YAML files in the harness's form), which come before the
    harness's.
    """
    task_code: bool = False
    """Run the Python functions that task files in task_path name (!function)."""
    num_fewshot: int | None = None
    """Examples shown before each question; each task's own number if not set."""
    task_limit: int | None = None
    """Take the first so many documents of each task; all if not set."""
    max_length: int | None = None
    """Most tokens of a task's question and answer; the model's max_position_embeddings if not
    set.
    """
    add_bos: bool | None = None
    """Begin the texts of tasks with the tokenizer's bos token, or not; if not set, as documents
    began in training."""

    def validate(self) -> None:
        require_text(self, "model", "tokenizer", "plot")
        require(self.batch_size > 0, "batch_size", "must be a positive number of rows")
        require(
            self.data is not None or bool(self.datasets or self.tasks),
            "data",
            "must be set (data.local=...), or tasks",
        )
        require(
            self.data is None or not self.datasets,
            "data",
            "must be null with datasets, which each have their own",
        )
        places = [(data.local, data.remote) for data in self.datasets.values()]
        require(len(set(places)) == len(places), "datasets", "must all be different ones")
        require(
            self.block_size is None or self.block_size > 0,
            "block_size",
            "must be a positive number of tokens, or null",
        )
        require(
            self.block_size is None or bool(self.data or self.datasets),
            "block_size",
            "needs data.local=... or datasets",
        )
        require(
            self.plot is None or self.plot.lower().endswith(".png"),
            "plot",
            "must be a file name ending in .png",
        )
        require(
            self.plot is None or self.block_size is not None,
            "block_size",
            "must be set together with plot",
        )
        require_tasks(self)
        require(
            self.task_path is None or bool(self.tasks),
            "tasks",
            "must be set together with task_path",
        )
        require(self.add_bos is None or bool(self.tasks), "tasks", "must be set with add_bos")
        require(
            self.task_limit is None or self.task_limit > 0,
            "task_limit",
            "must be a positive number, or null",
        )
        require(
            self.max_length is None or self.max_length > 1,
            "max_length",
            "must be 2 tokens or more, or null",
        )


@dataclass
class GenerateConfig(ScriptConfig):
    """Continue a prompt, every prompt of a file, or what is typed."""

    paths = ("model", "prompts")

    model: str = MISSING
    """A Hugging Face folder or id, or a checkpoint file or folder of them (its newest is taken),
    also in an object store.
    """
    prompt: str | None = None
    """The text to continue. Without it and prompts, what is typed (or piped in) is continued
    line by line, to Ctrl-D.
    """
    prompts: str | None = None
    """File of prompts: a line each, empty ones left out, or .jsonl with a key prompt; written as
    JSON lines.
    """
    batch_size: int = 8
    """Prompts of the file that are continued together."""
    max_new_tokens: int = 128
    """Most tokens to generate."""
    temperature: float = 0.8
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 for no such limit."""
    repetition_penalty: float = 1.0
    """Make tokens less likely that are there already, in the prompt too: 1.2, say; 1 for no
    difference.
    """
    stop: list[str] = field(default_factory=list)
    """Stop after the token that completes one of these texts."""
    seed: int = 42
    """Seed of the sampling."""
    add_bos: bool | None = None
    """Begin each prompt with the tokenizer's bos token, or not; if not set, as documents began in
    training."""

    def validate(self) -> None:
        require_text(self, "model", "prompts")
        require_seed(self.seed, "seed")
        require(
            self.prompt is None or self.prompts is None,
            "prompts",
            "must not be set together with prompt",
        )
        require(self.batch_size > 0, "batch_size", "must be a positive number of prompts")
        require(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            "must be more than 0, and finite",
        )
        require("" not in self.stop, "stop", "must not hold an empty text")
        require(self.max_new_tokens > 0, "max_new_tokens", "must be more than 0")
        require(0 <= self.temperature < math.inf, "temperature", "must be 0 or more, and finite")
        require(0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        require(self.top_k >= 0, "top_k", "must be 0 or more")


@dataclass
class BenchmarkConfig(ScriptConfig):
    """Time a training step of GLA against a Llama of the same size."""

    context_lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192])
    """Tokens per row, one measurement each."""
    batch_tokens: int = 4096
    """Tokens per step."""
    hidden_size: int = 512
    """Width of both models."""
    num_layers: int = 8
    """Depth of both models."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    repeats: int = 2
    """Steps of each model that count, after one that does not; the two take turns."""

    def validate(self) -> None:
        for name in ("batch_tokens", "hidden_size", "num_layers", "vocab_size", "repeats"):
            require(getattr(self, name) > 0, name, "must be more than 0")
        require(
            bool(self.context_lengths) and min(self.context_lengths) > 1,
            "context_lengths",
            "must be 2 tokens or more",
        )


@dataclass
class ConversionBenchmarkConfig(ScriptConfig):
    """Time convert/to_mds.py against one process that calls encode_batch_fast and MDSWriter."""

    paths = ("source", "tokenizer", "folder")

    source: list[str] = field(default_factory=list)
    """Files, folders or globs of text to draw the corpus from; if not set, the Python files of
    the installed packages.
    """
    suffixes: list[str] = field(default_factory=list)
    """Take only files with these endings when a folder is searched."""
    megabytes: float = 160
    """Size of the corpus, as JSONL of distinct documents; less if the source holds less."""
    tokenizer: str | None = None
    """Tokenizer folder or id; if not set, Mistral-7B's from the package mistral-common."""
    context_length: int = 2048
    """Tokens per row."""
    unit_size: int = 8388608
    """Input bytes per work unit."""
    num_workers: int = 2
    """Processes that are compared with one."""
    repeats: int = 2
    """Conversions by each, which take turns; if more than one, after a small one that does not
    count.
    """
    folder: str | None = None
    """Where the corpus and the datasets are put, and removed in the end; the system's temporary
    folder if not set.
    """

    def validate(self) -> None:
        require_text(self, "tokenizer", "folder")
        for name in ("megabytes", "unit_size", "repeats"):
            require(0 < getattr(self, name) < math.inf, name, "must be more than 0")
        require(self.context_length > 1, "context_length", "must be 2 tokens or more")
        require(self.num_workers > 1, "num_workers", "must be 2 or more")


@dataclass
class DecodeBenchmarkConfig(ScriptConfig):
    """Time decoding with GLA against a Llama of the same size."""

    context_lengths: list[int] = field(default_factory=lambda: [256, 8192])
    """Tokens read before decoding is timed."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    """Sequences decoded at a time."""
    new_tokens: int = 8
    """Tokens decoded in a turn."""
    hidden_size: int = 512
    """Width of both models."""
    num_layers: int = 8
    """Depth of both models."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    repeats: int = 2
    """Turns that count."""

    def validate(self) -> None:
        for name in ("new_tokens", "hidden_size", "num_layers", "vocab_size", "repeats"):
            require(getattr(self, name) > 0, name, "must be more than 0")
        for name in ("context_lengths", "batch_sizes"):
            require(
                bool(getattr(self, name)) and min(getattr(self, name)) > 0,
                name,
                "must be 1 or more",
            )


@dataclass
class CheckpointBenchmarkConfig(ScriptConfig):
    """Time saving and reading a checkpoint against torch.save and torch.load."""

    paths = ("folder",)

    hidden_size: int = 512
    """Width of the model that is saved."""
    num_layers: int = 8
    """Its depth."""
    vocab_size: int = 4096
    """Tokens of its vocabulary."""
    repeats: int = 3
    """Turns that count."""
    folder: str | None = None
    """Where the checkpoints are put, and removed in the end; the system's temporary folder if
    not set.
    """

    def validate(self) -> None:
        require_text(self, "folder")
        for name in ("hidden_size", "num_layers", "vocab_size", "repeats"):
            require(getattr(self, name) > 0, name, "must be more than 0")


@dataclass
class StartBenchmarkConfig(ScriptConfig):
    """Time a run's first step, from the command on, against importing the libraries."""

    paths = ("folder",)

    megabytes: float = 8
    """Size of the corpus, drawn from the Python files of the installed packages."""
    repeats: int = 2
    """Turns that count."""
    folder: str | None = None
    """Where the corpus and the runs are put, and removed in the end; the system's temporary
    folder if not set.
    """

    def validate(self) -> None:
        require_text(self, "folder")
        for name in ("megabytes", "repeats"):
            require(0 < getattr(self, name) < math.inf, name, "must be more than 0")


@dataclass
class TrainerBenchmarkConfig(StartBenchmarkConfig):
    """Time recipes/train.py against a bare loop over the same batches."""

    steps: int = 16
    """Optimizer steps of a timed run."""

    def validate(self) -> None:
        super().validate()
        require(self.steps > 3, "steps", "must be more than 3")


@dataclass
class DataBenchmarkConfig(StartBenchmarkConfig):
    """Time shards to batches against StreamingDataset, and the first batch of a resumed epoch."""

    epoch_rows: int = 10000000
    """Rows of the epoch whose last hundredth a run starts in."""

    def validate(self) -> None:
        super().validate()
        require(self.epoch_rows > 0, "epoch_rows", "must be more than 0")


BENCHMARKS = ("train", "growth", "decode", "trainer", "data", "start", "checkpoint", "convert")


@dataclass
class AllBenchmarksConfig(ScriptConfig):
    """Every benchmark in turn, a table of the figures, and status 1 if one misses what is stated
    of it by more than a tenth.
    """

    paths = ("plot",)

    names: list[str] = field(default_factory=list)
    """Only these."""
    plot: str | None = None
    """A PNG of how cost grows with context, rows, layers and workers."""

    def validate(self) -> None:
        require_text(self, "plot")
        require(
            set(self.names) <= set(BENCHMARKS), "names", f"must be among {', '.join(BENCHMARKS)}"
        )


@dataclass
class PlanConfig(TrainConfig):
    """What a run of recipes/train.py comes to, before anyone pays for it. The file and all keys
    but the last are the run's.
    """

    elsewhere = other_names.PLANNING

    devices: int = MISSING
    """GPUs of a node, or processes on CPUs."""
    device: Literal[
        "a100", "a100_40gb", "h100", "h100_pcie", "h200", "b200", "l40s", "l4", "rtx4090", "cpu"
    ] = MISSING
    """Kind of the devices; h100 and h200 are SXM modules, a100 has 80 GB."""
    nodes: int = 1
    """Machines with as many devices each."""
    mfu: float = 0.4
    """Share of the devices' peak that the model's own FLOPs come to: an assumption, until it was
    measured.
    """
    tokens_per_second: float | None = None
    """Of the whole run, where it was measured; in place of mfu."""
    price_per_hour: float | None = None
    """Price of a device for an hour."""
    dataset_tokens: int | None = None
    """Tokens the training data holds; if not set, its manifest is read, where it is."""
    save_seconds: float | None = None
    """Seconds that training waits for a checkpoint, where it was measured; in place of
    save_bandwidth.
    """
    save_bandwidth: str = "1gb"
    """Bytes a second at which a checkpoint is written: an assumption."""
    preemption_hours: float | None = None
    """Mean time between the moments at which machines are taken away, in hours."""
    restart_minutes: float = 10.0
    """From then to the first step after it: waiting for machines, starting, loading the
    checkpoint.
    """

    def validate(self) -> None:
        for name, most in (("devices", 1000), ("nodes", 100_000)):
            require(0 < getattr(self, name) <= most, name, f"must be in [1, {most}]")
        # Bounds beyond all that there is, within which no figure becomes infinite.
        require(1e-6 <= self.mfu <= 1, "mfu", "must be in [1e-06, 1]")
        for name in ("tokens_per_second", "save_seconds", "preemption_hours"):
            value = getattr(self, name)
            require(
                value is None or 1e-6 <= value <= 1e12, name, "must be in [1e-06, 1e+12], or null"
            )
        require(
            self.price_per_hour is None or 0 <= self.price_per_hour <= 1e12,
            "price_per_hour",
            "must be in [0, 1e+12], or null",
        )
        require(0 <= self.restart_minutes <= 1e12, "restart_minutes", "must be in [0, 1e+12]")
        require(
            self.dataset_tokens is None or 0 < self.dataset_tokens <= 10**18,
            "dataset_tokens",
            "must be in [1, 10**18], or null",
        )
        require(
            bool(BYTES.fullmatch(self.save_bandwidth))
            and bool(self.save_bandwidth.strip("0.bBkKmMgGtTpP")),
            "save_bandwidth",
            "must be a number of bytes more than 0, or one with kb, mb, gb, tb or pb, e.g. 500mb",
        )
        super().validate()

    def world_size(self) -> str:
        return str(self.devices * self.nodes)


@dataclass
class ReportConfig(ScriptConfig):
    """Charts of one or more runs as an HTML page, self-contained, and as PNGs."""

    paths = ("runs", "out")
    positional = "runs"
    runs: list[str] = field(default_factory=list)
    """Log folders, as in runs/NAME, or the logs in them."""
    out: str | None = None
    """Folder for report.html and the PNGs; if not set, report/ in the first run's folder."""
    smooth: int = 1
    """Steps over which loss, perplexity, gradient norm and throughput are averaged; 1 shows
    every step.
    """

    def validate(self) -> None:
        require(bool(self.runs), "runs", "must name at least one run's folder, e.g. runs/gla_tiny")
        require_text(self, "runs", "out")
        require(self.smooth > 0, "smooth", "must be 1 step or more")
