"""Configurations of recipes/benchmark.py: their keys, defaults and rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flame_composer.config.rules import ScriptConfig, require, require_png, require_text


def require_positive(config: object, *names: str) -> None:
    """Raise InvalidField for a number that is not more than 0, or not finite."""
    for name in names:
        require(0 < getattr(config, name) < math.inf, name, "must be more than 0")


def require_contexts(lengths: list[int]) -> None:
    """Raise InvalidField unless these are context lengths to measure at."""
    rule = "must be 2 tokens or more"
    require(bool(lengths) and min(lengths) > 1, "context_lengths", rule)


@dataclass
class SizesConfig(ScriptConfig):
    """The size of the models that are measured."""

    hidden_size: int = 512
    """Width of the models."""
    num_layers: int = 8
    """Number of layers of the models."""
    vocab_size: int = 4096
    """Number of tokens in the vocabulary."""

    def validate(self) -> None:
        require_positive(self, "hidden_size", "num_layers", "vocab_size")


@dataclass
class BenchmarkConfig(SizesConfig):
    """Time a training step of GLA against a Llama of the same size.

    The benchmark growth does so at the first context length only, with more and more rows, and with
    few and many layers.
    """

    context_lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192])
    """Tokens per row, each a measurement of its own."""
    batch_tokens: int = 4096
    """Tokens per step."""
    repeats: int = 1
    """Number of steps of each model that count, after one that does not; the models take turns."""

    def validate(self) -> None:
        super().validate()
        require_positive(self, "batch_tokens", "repeats")
        require_contexts(self.context_lengths)


@dataclass
class ModelsBenchmarkConfig(SizesConfig):
    """Time a training step of fla's models, each against a Llama of the same size.

    Also what a step keeps in memory for each token and layer, and decoding after 256 and after
    8192 tokens.
    """

    context_lengths: list[int] = field(default_factory=lambda: [512, 2048])
    """Tokens per row, each a measurement of its own."""
    batch_tokens: int = 2048
    """Tokens per step."""
    repeats: int = 1
    """Number of steps of each model that count, after one that does not; the models take turns."""
    names: list[str] = field(default_factory=list)
    """Models to time, e.g. [kda, mamba2]; all if not set."""

    def validate(self) -> None:
        super().validate()
        require_positive(self, "batch_tokens", "repeats")
        require_contexts(self.context_lengths)
        known = (
            "gla hgrn2 gsa retnet linear_attn lightnet rwkv6 mamba2 delta_net gated_deltanet"
            " kda gated_deltaproduct comba rwkv7"
        ).split()
        require(set(self.names) <= set(known), "names", f"must be among {', '.join(known)}")


@dataclass
class ContextBenchmarkConfig(SizesConfig):
    """Train on a long row on one rank, and divided over several ranks of one thread each."""

    hidden_size: int = 64
    """Width of the model."""
    num_layers: int = 2
    """Number of layers of the model."""
    vocab_size: int = 256
    """Number of tokens in the vocabulary."""
    model_type: str = "gla"
    """Model of fla: one whose rows parallelism.context divides."""
    context_length: int = 65536
    """Tokens of the long row."""
    short_context_length: int = 2048
    """Tokens of the short row."""
    short_steps: int = 8
    """Steps on the short row, whose median time counts."""
    ranks: int = 2
    """Number of processes that the rows are divided over."""

    def validate(self) -> None:
        super().validate()
        require_positive(self, "short_steps")
        require_contexts([self.context_length, self.short_context_length])
        require(self.ranks > 1, "ranks", "must be 2 or more")
        known = ("delta_net", "gated_deltanet", "gla", "hgrn2", "kda")
        is_known = self.model_type in known
        require(is_known, "model_type", f"must be among {', '.join(known)}")
        for name in ("context_length", "short_context_length"):
            tokens, rest = divmod(getattr(self, name), self.ranks)
            rule = "must leave each of the ranks as many tokens, 16 or more"
            require(rest == 0 and tokens >= 16, name, rule)


@dataclass
class ConversionBenchmarkConfig(ScriptConfig):
    """Time convert/to_mds.py against one process that calls encode_batch_fast and MDSWriter."""

    paths = ("source", "tokenizer", "folder")

    source: list[str] = field(default_factory=list)
    """Files, folders or globs of text to draw the corpus from; the Python files of the installed
    packages if not set.
    """
    suffixes: list[str] = field(default_factory=list)
    """Endings of the files to take from a folder."""
    megabytes: float = 160
    """Size of the corpus, MB of JSONL with distinct documents; smaller if the source holds less."""
    tokenizer: str | None = None
    """Tokenizer folder or id; the tokenizer of Mistral-7B, from the package mistral-common, if not
    set.
    """
    context_length: int = 2048
    """Tokens per row."""
    unit_size: int = 8388608
    """Size of a work unit, bytes of input."""
    num_workers: int = 2
    """Number of processes in the conversion that is compared with one by a single process."""
    repeats: int = 1
    """Number of conversions by each side; the two take turns. If it is more than one, a small
    conversion that does not count comes first.
    """
    folder: str | None = None
    """Folder for the corpus and the datasets, which are removed at the end; the system's temporary
    folder if not set.
    """

    def validate(self) -> None:
        require_text(self, "tokenizer", "folder")
        require_positive(self, "megabytes", "unit_size", "repeats")
        require(self.context_length > 1, "context_length", "must be 2 tokens or more")
        require(self.num_workers > 1, "num_workers", "must be 2 or more")


@dataclass
class ExamplesBenchmarkConfig(ScriptConfig):
    """Time convert/to_sft.py against apply_chat_template and Dataset.map."""

    paths = ("folder",)

    megabytes: float = 40
    """Size of the corpus that the examples are made of, MB, drawn from the Python files of the
    installed packages.
    """
    repeats: int = 1
    """Number of turns, in each of which either side converts a tenth of the examples and all."""
    folder: str | None = None
    """Folder for the examples and the datasets, which are removed at the end; the system's
    temporary folder if not set.
    """

    def validate(self) -> None:
        require_text(self, "folder")
        require_positive(self, "megabytes", "repeats")


@dataclass
class DecodeBenchmarkConfig(SizesConfig):
    """Time decoding with GLA against a Llama of the same size."""

    context_lengths: list[int] = field(default_factory=lambda: [256, 8192])
    """Numbers of tokens that are read before decoding is timed."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    """Numbers of sequences that are decoded together."""
    new_tokens: int = 8
    """Number of tokens that are decoded in a turn."""
    repeats: int = 2
    """Number of turns that count."""

    def validate(self) -> None:
        super().validate()
        require_positive(self, "new_tokens", "repeats")
        for name in ("context_lengths", "batch_sizes"):
            values = getattr(self, name)
            require(bool(values) and min(values) > 0, name, "must be 1 or more")


@dataclass
class QuantizeBenchmarkConfig(SizesConfig):
    """Time decoding with weights of int8 and bf16 against fp32, of a GLA with random weights."""

    paths = ("model", "data")

    hidden_size: int = 768
    """Width of the model."""
    num_layers: int = 12
    """Number of layers of the model."""
    vocab_size: int = 32000
    """Number of tokens in the vocabulary."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    """Numbers of sequences that are decoded together."""
    new_tokens: int = 8
    """Number of tokens that are decoded in a turn."""
    repeats: int = 5
    """Number of turns that count."""
    model: str | None = None
    """Hugging Face folder of a trained model, whose loss is taken with each type of weights."""
    data: str | None = None
    """Local dataset that the loss is taken on; must be set together with model."""

    def validate(self) -> None:
        super().validate()
        require_positive(self, "new_tokens", "repeats")
        rule = "must be 1 or more"
        require(bool(self.batch_sizes) and min(self.batch_sizes) > 0, "batch_sizes", rule)
        require_text(self, "model", "data")
        rule = "must be set together with model"
        require((self.model is None) == (self.data is None), "data", rule)


@dataclass
class ServingBenchmarkConfig(SizesConfig):
    """Time recipes/serve.py against requests one after another, and against static batches.

    Also time tokens after long contexts, and what clients wait.
    """

    paths = ("folder",)

    hidden_size: int = 768
    """Width of the model."""
    num_layers: int = 12
    """Number of layers of the model."""
    vocab_size: int = 8192
    """Number of tokens in the vocabulary of the tokenizer, which is trained for it."""
    num_together: int = 16
    """Number of requests at a time, and of rows in a static batch."""
    new_tokens: int = 64
    """Number of tokens of each answer; half of it is the median of mixed lengths."""
    num_mixed: int = 32
    """Number of requests of mixed lengths."""
    clients: list[int] = field(default_factory=lambda: [16])
    """Numbers of clients whose waiting times are measured."""
    context_lengths: list[int] = field(default_factory=lambda: [1024, 8192, 32768])
    """Numbers of tokens that are read before the time per token is measured."""
    repeats: int = 2
    """Number of turns that count."""
    folder: str | None = None
    """Folder for the model and the server's log, which are removed at the end; the system's
    temporary folder if not set.
    """

    def validate(self) -> None:
        super().validate()
        require_text(self, "folder")
        require(self.vocab_size >= 512, "vocab_size", "must be 512 or more")
        require_positive(self, "num_together", "new_tokens", "num_mixed", "repeats")
        for name in ("clients", "context_lengths"):
            values = getattr(self, name)
            require(bool(values) and min(values) > 0, name, "must be 1 or more")


@dataclass
class CheckpointBenchmarkConfig(SizesConfig):
    """Time saving and reading a checkpoint against torch.save and torch.load."""

    paths = ("folder",)

    repeats: int = 3
    """Number of turns that count."""
    folder: str | None = None
    """Folder for the checkpoints, which are removed at the end; the system's temporary folder if
    not set.
    """

    def validate(self) -> None:
        super().validate()
        require_text(self, "folder")
        require_positive(self, "repeats")


@dataclass
class StartBenchmarkConfig(ScriptConfig):
    """Time from the command to a run's first step, against the time to import the libraries."""

    paths = ("folder",)

    megabytes: float = 8
    """Size of the corpus, MB, drawn from the Python files of the installed packages."""
    repeats: int = 2
    """Number of turns that count."""
    folder: str | None = None
    """Folder for the corpus and the runs, which are removed at the end; the system's temporary
    folder if not set.
    """

    def validate(self) -> None:
        require_text(self, "folder")
        require_positive(self, "megabytes", "repeats")


@dataclass
class TrainerBenchmarkConfig(StartBenchmarkConfig):
    """Time recipes/train.py against a bare loop over the same batches."""

    steps: int = 16
    """Number of optimizer steps in a timed run."""

    def validate(self) -> None:
        super().validate()
        require(self.steps > 3, "steps", "must be more than 3")


@dataclass
class DataBenchmarkConfig(StartBenchmarkConfig):
    """Time the way from shards to batches against StreamingDataset, and resuming mid-epoch."""

    repeats: int = 1
    """Number of turns that count."""
    epoch_rows: int = 7_300_000_000
    """Number of rows in the epoch whose last hundredth a run starts in. It is compared with the
    beginning of one of 10,000,000 rows, or as many.
    """

    def validate(self) -> None:
        super().validate()
        require_positive(self, "epoch_rows")


BENCHMARKS = (
    "train",
    "models",
    "growth",
    "context",
    "decode",
    "quantize",
    "serve",
    "trainer",
    "data",
    "start",
    "checkpoint",
    "convert",
    "examples",
)


@dataclass
class AllBenchmarksConfig(ScriptConfig):
    """Run every benchmark in turn and show a table of the figures.

    The exit status is 1 if a figure misses its stated limit by more than a tenth.
    """

    paths = ("plot",)

    names: list[str] = field(default_factory=list)
    """Names of the benchmarks to run; all if not set."""
    plot: str | None = None
    """PNG file for a chart of how cost grows with context, rows, layers and workers."""

    def validate(self) -> None:
        require_text(self, "plot")
        require_png(self.plot, "plot")
        require(
            set(self.names) <= set(BENCHMARKS), "names", f"must be among {', '.join(BENCHMARKS)}"
        )
