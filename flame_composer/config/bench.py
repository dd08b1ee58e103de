"""What recipes/benchmark.py is run with: every field, its default and its rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flame_composer.config.rules import ScriptConfig, require, require_text


def require_positive(config: object, *names: str) -> None:
    """Raise InvalidField for a number that is not more than 0, or not finite."""
    for name in names:
        require(0 < getattr(config, name) < math.inf, name, "must be more than 0")


@dataclass
class SizesConfig(ScriptConfig):
    """Models of a given size."""

    hidden_size: int = 512
    """Width of the models."""
    num_layers: int = 8
    """Number of layers."""
    vocab_size: int = 4096
    """Tokens in the vocabulary."""

    def validate(self) -> None:
        require_positive(self, "hidden_size", "num_layers", "vocab_size")


@dataclass
class BenchmarkConfig(SizesConfig):
    """Time a training step of GLA against a Llama of the same size."""

    context_lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192])
    """Tokens per row, one measurement each."""
    batch_tokens: int = 4096
    """Tokens per step."""
    repeats: int = 2
    """Steps of each model that count, after one that does not; the two take turns."""

    def validate(self) -> None:
        super().validate()
        require_positive(self, "batch_tokens", "repeats")
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
        require_positive(self, "megabytes", "unit_size", "repeats")
        require(self.context_length > 1, "context_length", "must be 2 tokens or more")
        require(self.num_workers > 1, "num_workers", "must be 2 or more")


@dataclass
class DecodeBenchmarkConfig(SizesConfig):
    """Time decoding with GLA against a Llama of the same size."""

    context_lengths: list[int] = field(default_factory=lambda: [256, 8192])
    """Tokens read before decoding is timed."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    """Sequences decoded at a time."""
    new_tokens: int = 8
    """Tokens decoded in a turn."""
    repeats: int = 2
    """Turns that count."""

    def validate(self) -> None:
        super().validate()
        require_positive(self, "new_tokens", "repeats")
        for name in ("context_lengths", "batch_sizes"):
            values = getattr(self, name)
            require(bool(values) and min(values) > 0, name, "must be 1 or more")


@dataclass
class CheckpointBenchmarkConfig(SizesConfig):
    """Time saving and reading a checkpoint against torch.save and torch.load."""

    paths = ("folder",)

    repeats: int = 3
    """Turns that count."""
    folder: str | None = None
    """Where the checkpoints are put, and removed in the end; the system's temporary folder if
    not set.
    """

    def validate(self) -> None:
        super().validate()
        require_text(self, "folder")
        require_positive(self, "repeats")


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
        require_positive(self, "megabytes", "repeats")


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
        require_positive(self, "epoch_rows")


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
