"""Configurations of the scripts in convert/: their keys, defaults and rules."""

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
    """Folder that the tokenizer is written to."""
    vocab_size: int = 32000
    """Number of tokens in the vocabulary, special tokens included."""
    min_frequency: int = 2
    """Number of times that a pair of tokens must occur to be merged into one."""
    max_bytes: int | None = None
    """Size of the sample to learn from, bytes, drawn from all over the source; the whole source if
    not set.
    """
    eos_token: str = "<|endoftext|>"
    """Token that ends a document, also used as bos and pad token."""

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


# The keys that decide the bytes of the dataset, besides the tokenizer, the encoder, the context
# length and the content of the inputs.
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
    """Folder that the dataset is written to, local or a URL (s3://bucket/folder). Work units for a
    URL are made in TMPDIR first.
    """
    tokenizer: str = MISSING
    """Hugging Face tokenizer folder or id."""
    token_dtype: Literal["uint8", "uint16", "int32", "uint32"] | None = None
    """Type of the tokens in `source`, if it names files of tokens that others have made with this
    tokenizer: .npy, in which each document ends with eos (OLMo's have no header), or Megatron's
    .bin with its .idx beside it.
    """
    token_borders: Literal["eos", "csv"] = "eos"
    """What ends documents in .npy files of tokens. eos: every eos. csv: the rows of the .csv.gz
    beside each file, as Dolma's tokenizer writes it.
    """
    context_length: int = 2048
    """Tokens per row."""
    add_bos: bool = False
    """Put the bos token of the tokenizer before every document."""
    add_eos: bool = True
    """Put the eos token of the tokenizer after every document."""
    val_fraction: float = 0.0
    """Fraction of the documents to hold out for validation, chosen by a hash of their text."""
    val_out: str | None = None
    """Folder that the dataset of held-out documents is written to, local or a URL."""
    shard_size: int = 67108864
    """Largest size of a shard, bytes. No shard goes beyond its work unit: 64 MiB of text are about
    16 M tokens, and so a shard of 32 MB if the vocabulary has at most 65,536 tokens.
    """
    unit_size: int = 67108864
    """Size of a work unit, bytes of input. A conversion is committed and resumed unit by unit. For
    shards of 64 MB of two-byte tokens, set this and shard_size to 134217728: there are half as many
    units, each of one shard.
    """
    max_doc_length: int | None = None
    """Largest number of tokens per document, bos and eos included; a longer document is cut into
    pieces, each of which is a document to the model.
    """
    min_doc_length: int | None = None
    """Smallest number of tokens per document, bos and eos included; shorter documents are left out
    and counted.
    """
    seed: int | None = None
    """Seed for shuffling the work units and the documents in each; if not set, the order of the
    source is kept.
    """
    encoder: Literal["auto", "gigatoken", "hf"] = "auto"
    """Program that turns text into tokens. hf: the tokenizer itself. gigatoken: a faster one,
    compared with hf on a sample of every work unit. auto: gigatoken where it is installed and
    agrees, hf otherwise.
    """
    num_workers: int | None = None
    """Number of processes that convert; one per core if not set. The dataset does not depend on
    it.
    """
    cluster: str | None = None
    """Address of a Dask scheduler (tcp://host:8786) whose workers convert instead of local
    processes; they must see the same files under the same paths.
    """

    def settings(self) -> dict[str, Any]:
        """Return the keys and values to record: all those that decide the bytes of the dataset."""
        settings = {name: getattr(self, name) for name in CONVERSION_SETTINGS}
        if self.token_dtype is not None:
            del settings["text_column"]  # without a meaning here
            settings["token_dtype"] = self.token_dtype
        if self.token_borders != "eos":
            settings["token_borders"] = self.token_borders
        return settings

    def validate(self) -> None:
        super().validate()
        require_text(self, "out", "val_out", "tokenizer", "cluster")
        is_csv = self.token_borders == "csv"
        rule = "must be set together with token_dtype"
        require(not is_csv or self.token_dtype is not None, "token_borders", rule)
        if self.token_dtype is not None:
            require(self.split is None, "token_dtype", "must not be set together with split")
            rule = "must not be set together with token_dtype"
            require(self.encoder == "auto", "encoder", rule)
            require(self.text_column == "text", "text_column", rule)
        require(0 <= self.val_fraction < 1, "val_fraction", "must be in [0, 1)")
        require(
            (self.val_fraction > 0) == (self.val_out is not None),
            "val_out",
            "must be set together with val_fraction",
        )
        if self.val_out is not None:
            require_apart(self.out, self.val_out, "val_out")
        require_shards(self, smallest=8 * self.context_length + 1024)
        for name in ("max_doc_length", "min_doc_length"):
            length = getattr(self, name)
            require(
                length is None or length > 0, name, "must be a positive number of tokens, or null"
            )
        require_seed(self.seed, "seed")
        if self.cluster is not None:
            self.require_absolute("out", "val_out")


def require_shards(config: Any, *, smallest: int) -> None:
    """Raise InvalidField for the sizes and workers of a conversion unless they are possible.

    A shard of `smallest` bytes holds one row.
    """
    require(config.context_length > 1, "context_length", "must be 2 tokens or more")
    require(
        smallest <= config.shard_size < 2**32,
        "shard_size",
        f"must be at least {smallest} (one row) and less than {2**32} bytes",
    )
    require(config.unit_size > 0, "unit_size", "must be more than 0 bytes")
    is_number = config.num_workers is None or config.num_workers > 0
    require(is_number, "num_workers", "must be 1 or more, or null")
    if config.cluster is None:
        return
    require(config.num_workers is None, "num_workers", "must not be set together with cluster")
    is_address = re.fullmatch(r"\w+://[^\s:]\S*:\d+", config.cluster) is not None
    require(is_address, "cluster", "must be like tcp://host:8786")


@dataclass
class InspectConfig(ScriptConfig):
    """Show the content of a dataset made by to_mds.py or to_sft.py, and check that it is whole."""

    paths = ("data", "tokenizer", "plot")

    data: str = MISSING
    """Folder of the dataset, local or in an object store (s3://bucket/path, gs://...)."""
    tokenizer: str | None = None
    """Tokenizer folder or id; it must be the tokenizer of the dataset, and is needed to show rows
    as text.
    """
    rows: int = 2
    """Number of sample rows to show, spread evenly over the dataset."""
    row_numbers: list[int] = field(default_factory=list)
    """Numbers of rows to show instead, e.g. [0,17]; the first row is 0."""
    whole_rows: bool = False
    """Show sample rows whole; otherwise the middle of long documents and of long rows is left out.
    """
    max_bytes: int | None = 1073741824
    """Approximate size of the sample of shards that histograms are made from, bytes; null, or
    verify=true, takes all shards.
    """
    verify: bool = False
    """Hash every shard and name the damaged ones; the exit status is 1 if there are any. If false,
    only sizes are checked, and in an object store only those of the shards that are read.
    """
    plot: str | None = None
    """PNG file for a histogram of the lengths of document pieces."""

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

    paths = ("checkpoint", "base", "out")

    checkpoint: str = MISSING
    """Checkpoint file, or folder of checkpoints, of which the newest is taken; local or in an
    object store.
    """
    base: str | None = None
    """Hugging Face folder or id of the model that the checkpoint's adapter (lora) was trained on,
    if it is not where it was in training.
    """
    merge: bool | None = None
    """Form of a checkpoint with an adapter. true, or not set: the whole model, in which the adapter
    is merged. false: the adapter alone, in peft's layout. Must not be set for other checkpoints.
    """
    out: str = MISSING
    """Folder to write; must not exist or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the weights are stored in."""
    weights: Literal["auto", "model", "ema"] = "auto"
    """Weights to export. model: the weights that training goes on with. ema: their exponential
    moving average. auto: the average if the run has one, the weights otherwise.
    """
    max_shard_size: int = 5000000000
    """Largest size of a file of weights, bytes; a larger model is stored in several files."""
    push_to_hub: str | None = None
    """Hugging Face repository (USER/NAME) to upload the folder to as well, with the token of `hf
    auth login` or HF_TOKEN.
    """
    add_bos: bool | None = None
    """Have the exported tokenizer begin a text with its bos token; if not set, it does as documents
    did in training.
    """
    hub_private: bool = True
    """Make the repository private; an existing public repository is then refused."""

    def validate(self) -> None:
        require_text(self, "checkpoint", "base", "out", "push_to_hub")
        require("://" not in self.out, "out", "must be a local folder")
        require(self.max_shard_size > 0, "max_shard_size", "must be more than 0 bytes")


@dataclass
class FromLlamaConfig(ScriptConfig):
    """Turn a Llama or Mistral checkpoint into a Hugging Face folder of a GLA model, to train on."""

    paths = ("model", "config", "out", "tokenizer")

    model: str = MISSING
    """Hugging Face folder or id of the checkpoint; its weights must be safetensors."""
    config: str = MISSING
    """Config of the GLA model to make: a recipe (.yaml), whose model.config is taken, or a Hugging
    Face config (.json). Keys that follow from the checkpoint can be left out.
    """
    out: str = MISSING
    """Folder to write; must not exist or be empty."""
    tokenizer: str | None = None
    """Tokenizer folder or id; the checkpoint's own if not set."""
    fresh: list[str] = field(default_factory=list)
    """Attention projections to initialize anew although the checkpoint has them, e.g.
    [q_proj,k_proj] for another expand_k.
    """
    seed: int = 42
    """Seed of the tensors that are initialized anew."""
    max_shard_size: int = 2000000000
    """Largest size of a file of weights, bytes; so much of them is in memory at a time."""

    def validate(self) -> None:
        require_text(self, "model", "config", "out", "tokenizer")
        require("://" not in self.out, "out", "must be a local folder")
        require(
            set(self.fresh) <= set(PROJECTIONS), "fresh", f"must be among {', '.join(PROJECTIONS)}"
        )
        require_seed(self.seed, "seed")
        require(self.max_shard_size > 0, "max_shard_size", "must be more than 0 bytes")


@dataclass
class PruneConfig(ScriptConfig):
    """Set the smallest weights of a model's linear layers to zero, as an experiment."""

    paths = ("model", "base", "out")

    model: str = MISSING
    """Hugging Face folder or id, a folder of an adapter in peft's layout, or a checkpoint file or a
    folder of checkpoints, of which the newest is taken; local or in an object store. An adapter is
    merged.
    """
    base: str | None = None
    """Hugging Face folder or id of the model that an adapter was trained on, if it is not where it
    was in training.
    """
    out: str = MISSING
    """Folder to write; must not exist or be empty."""
    sparsity: float | None = None
    """Fraction of the weights of each linear layer that become zero, those of the smallest
    magnitude.
    """
    pattern: Literal["2:4"] | None = None
    """Instead of sparsity: the smallest two of each four neighbours in a row become zero."""

    def validate(self) -> None:
        require_text(self, "model", "base", "out")
        require("://" not in self.out, "out", "must be a local folder")
        is_one = (self.sparsity is None) != (self.pattern is None)
        require(is_one, "sparsity", "must be set (e.g. 0.5), or pattern=2:4, and not both")
        is_fraction = self.sparsity is None or 0 < self.sparsity < 1
        require(is_fraction, "sparsity", "must be more than 0 and less than 1")


@dataclass
class QuantizeConfig(ScriptConfig):
    """Write a model as a Hugging Face folder with smaller weights, for use on a CPU."""

    paths = ("model", "base", "out")

    model: str = MISSING
    """Hugging Face folder or id, a folder of an adapter in peft's layout, or a checkpoint file or a
    folder of checkpoints, of which the newest is taken; local or in an object store.
    """
    base: str | None = None
    """Hugging Face folder or id of the model that an adapter was trained on, if it is not where it
    was in training.
    """
    dtype: Literal["int8", "bf16"] = MISSING
    """Type of the weights. int8: 8 bits, with a scale for each output channel, for the scripts of
    this package only. bf16: a folder that any program loads.
    """
    out: str = MISSING
    """Folder to write; must not exist or be empty."""

    def validate(self) -> None:
        require_text(self, "model", "base", "out")
        require("://" not in self.out, "out", "must be a local folder")
