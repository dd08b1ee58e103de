"""What the scripts of convert/ are run with: every field, its default and its rules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from flame_composer.config import other_names
from flame_composer.config.rules import (
    ScriptConfig,
    require,
    require_png,
    require_seed,
    require_text,
)
from flame_composer.config.source import HubSourceConfig, SourceConfig, require_apart
from flame_composer.storage.filesystems import is_url

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")  # of an attention layer


@dataclass
class TokenizerTrainConfig(SourceConfig):
    """Train a byte-level BPE tokenizer on text and save it as a Hugging Face tokenizer folder."""

    paths = ("source", "out")

    out: str = MISSING
    """Folder the tokenizer is written to."""
    vocab_size: int = 32000
    """Number of tokens, special ones included."""
    min_frequency: int = 2
    """A pair must occur this often to be merged."""
    max_bytes: int | None = None
    """Learn from a sample of this many bytes, drawn from all over the source; from all of it if
    not set.
    """
    eos_token: str = "<|endoftext|>"
    """The token that ends a document (also used as bos and pad)."""

    def validate(self) -> None:
        super().validate()
        require_text(self, "out", "eos_token")
        require(not is_url(self.out), "out", "must be a local folder")
        require(
            self.vocab_size >= 257,
            "vocab_size",
            "must be at least 257: 256 bytes and the end-of-text token",
        )
        require(self.min_frequency >= 1, "min_frequency", "must be 1 or more")
        require(self.max_bytes is None or self.max_bytes > 0, "max_bytes", "must be more than 0")


# What the files written depend on, apart from the tokenizer, the encoder, the context length and
# the inputs themselves.
CONVERSION_SETTINGS = (
    "source name split suffixes text_column add_bos add_eos "
    "max_document_bytes max_doc_length min_doc_length seed val_fraction shard_size unit_size"
).split()


@dataclass
class ConvertConfig(HubSourceConfig):
    """Turn text into tokenized, packed MDS shards."""

    paths = ("source", "out", "val_out", "tokenizer")
    elsewhere = other_names.CONVERSION
    goes_on = True

    out: str = MISSING
    """Folder the dataset is written to, local or as a URL (s3://bucket/folder); then each work
    unit is made in TMPDIR first.
    """
    tokenizer: str = MISSING
    """Hugging Face tokenizer folder or id."""
    context_length: int = 2048
    """Tokens per row."""
    add_bos: bool = False
    """Put the tokenizer's bos token before every document."""
    add_eos: bool = True
    """Put the tokenizer's eos token after every document."""
    val_fraction: float = 0.0
    """Fraction of documents held out for validation, chosen by a hash of the text."""
    val_out: str | None = None
    """Folder the held-out documents' dataset is written to, local or as a URL."""
    shard_size: int = 67108864
    """Largest size of a shard, bytes."""
    unit_size: int = 67108864
    """Input bytes per work unit, the step in which a conversion is committed and resumed."""
    max_doc_length: int | None = None
    """Cut documents into pieces of at most so many tokens (bos and eos included), each a
    document to the model.
    """
    min_doc_length: int | None = None
    """Leave out documents of fewer tokens (bos and eos included), and count them."""
    seed: int | None = None
    """Shuffle the documents of each work unit, and the units; if not set, the order is that of
    the source.
    """
    encoder: Literal["auto", "gigatoken", "hf"] = "auto"
    """What turns text into tokens: gigatoken, checked against hf on a sample of every work unit;
    hf is the tokenizer itself; auto is gigatoken where it is installed and agrees, hf otherwise.
    """
    num_workers: int | None = None
    """Processes that convert; one per core if not set. The dataset does not depend on it."""
    cluster: str | None = None
    """Address of a Dask scheduler (tcp://host:8786) whose workers convert instead; they must see
    the same files under the same paths.
    """

    def settings(self) -> dict[str, Any]:
        """Return what is written down of the conversion: its bytes depend on nothing else here."""
        return {name: getattr(self, name) for name in CONVERSION_SETTINGS}

    def validate(self) -> None:
        super().validate()
        require_text(self, "out", "val_out", "tokenizer", "cluster")
        require(self.context_length > 1, "context_length", "must be 2 tokens or more")
        require(0 <= self.val_fraction < 1, "val_fraction", "must be in [0, 1)")
        require(
            (self.val_fraction > 0) == (self.val_out is not None),
            "val_out",
            "must be set together with val_fraction",
        )
        if self.val_out is not None:
            require_apart(self.out, self.val_out, "val_out")
        smallest = 8 * self.context_length + 1024
        require(
            smallest <= self.shard_size < 2**32,
            "shard_size",
            f"must be at least {smallest} (one row) and less than {2**32} bytes",
        )
        require(self.unit_size > 0, "unit_size", "must be more than 0 bytes")
        for name in ("max_doc_length", "min_doc_length"):
            length = getattr(self, name)
            require(
                length is None or length > 0, name, "must be a positive number of tokens, or null"
            )
        require_seed(self.seed, "seed")
        require(
            self.num_workers is None or self.num_workers > 0,
            "num_workers",
            "must be 1 or more, or null",
        )
        if self.cluster is not None:
            self._check_cluster(self.cluster)

    def _check_cluster(self, address: str) -> None:
        require(self.num_workers is None, "num_workers", "must not be set together with cluster")
        require(
            bool(re.fullmatch(r"\w+://[^\s:]\S*:\d+", address)),
            "cluster",
            "must be like tcp://host:8786",
        )
        self.require_absolute("out", "val_out", urls=True)


@dataclass
class InspectConfig(ScriptConfig):
    """Show what a dataset made by convert/to_mds.py holds, and check that it is whole."""

    paths = ("data", "tokenizer", "plot")

    data: str = MISSING
    """Folder of the dataset, or where it lives in an object store (s3://bucket/path, gs://...)."""
    tokenizer: str | None = None
    """Tokenizer folder or id, which must be the dataset's own; needed to show rows as text."""
    rows: int = 2
    """Number of sample rows to show, evenly spread over the dataset."""
    row_numbers: list[int] = field(default_factory=list)
    """Show these rows instead, e.g. [0,17]; the first is 0."""
    whole_rows: bool = False
    """Show sample rows whole; if not set, the middle of long documents and of long rows is left
    out.
    """
    max_bytes: int | None = 1073741824
    """Take the histograms from evenly spread shards of about so many bytes; from all shards if
    null, or with verify.
    """
    verify: bool = False
    """Hash every shard and name the bad ones; the exit status is 1 if there are any. If not set,
    sizes are checked, and of a dataset in an object store only the shards that are read.
    """
    plot: str | None = None
    """PNG file to draw the histogram of the lengths of document pieces to."""

    def validate(self) -> None:
        require_text(self, "data", "tokenizer", "plot")
        require(self.rows >= 0, "rows", "must be 0 or more")
        require(
            all(number >= 0 for number in self.row_numbers), "row_numbers", "must all be 0 or more"
        )
        require(
            self.max_bytes is None or self.max_bytes > 0,
            "max_bytes",
            "must be more than 0 bytes, or null",
        )
        require_png(self.plot, "plot")


@dataclass
class ToHfConfig(ScriptConfig):
    """Turn a training checkpoint into a Hugging Face folder with safetensors and the tokenizer."""

    paths = ("checkpoint", "out")

    checkpoint: str = MISSING
    """A checkpoint file, or a folder of checkpoints (its newest is taken), local or in an object
    store.
    """
    out: str = MISSING
    """Folder to write; must not exist or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the weights are stored in."""
    weights: Literal["auto", "model", "ema"] = "auto"
    """The weights that training goes on with, or their exponential moving average; auto: the
    average, if the run has one.
    """
    max_shard_size: int = 5000000000
    """Largest size of a weights file, bytes; a larger model is stored in several."""
    push_to_hub: str | None = None
    """Upload the folder to this Hugging Face repository (USER/NAME), too, with the token of `hf
    auth login` or HF_TOKEN.
    """
    add_bos: bool | None = None
    """Have the exported tokenizer begin a text with its bos token, or not; if not set, as documents
    began in training."""
    hub_private: bool = True
    """Make the repository one that only you can see; with true, one that is there and public is
    refused.
    """

    def validate(self) -> None:
        require_text(self, "checkpoint", "out", "push_to_hub")
        require("://" not in self.out, "out", "must be a local folder")
        require(self.max_shard_size > 0, "max_shard_size", "must be more than 0 bytes")


@dataclass
class FromLlamaConfig(ScriptConfig):
    """Turn a Llama or Mistral checkpoint into a GLA model's Hugging Face folder, to go on
    training from.
    """

    paths = ("model", "config", "out", "tokenizer")

    model: str = MISSING
    """Hugging Face folder or id of the checkpoint; its weights must be safetensors."""
    config: str = MISSING
    """The GLA model to make: a recipe (.yaml; its model.config is taken) or a Hugging Face
    config (.json). What follows from the checkpoint can be left out.
    """
    out: str = MISSING
    """Folder to write; must not exist or be empty."""
    tokenizer: str | None = None
    """Tokenizer folder or id; the checkpoint's own if not set."""
    fresh: list[str] = field(default_factory=list)
    """Attention projections to make anew though the checkpoint has them, e.g. [q_proj,k_proj]
    for another expand_k.
    """
    seed: int = 42
    """Seed of the tensors that are made anew."""
    max_shard_size: int = 2000000000
    """Largest size of a weights file, bytes; so much is in memory at a time."""

    def validate(self) -> None:
        require_text(self, "model", "config", "out", "tokenizer")
        require("://" not in self.out, "out", "must be a local folder")
        require(
            set(self.fresh) <= set(PROJECTIONS), "fresh", f"must be among {', '.join(PROJECTIONS)}"
        )
        require_seed(self.seed, "seed")
        require(self.max_shard_size > 0, "max_shard_size", "must be more than 0 bytes")
