"""The configuration of convert/to_sft.py: its keys, defaults and rules."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from flame_composer.config import other_names
from flame_composer.config.convert import require_shards
from flame_composer.config.rules import ScriptConfig, require, require_text
from flame_composer.config.source import require_absolute, require_apart
from flame_composer.storage.filesystems import is_url

# The keys that decide the bytes of the dataset, besides what is found in the inputs.
SFT_SETTINGS = (
    "train_on too_long duplicates max_document_bytes val_fraction shard_size unit_size"
).split()


@dataclass
class SftConfig(ScriptConfig):
    """Turn examples of questions and answers into rows to tune a model on."""

    paths = ("source", "val_source", "registry", "out", "val_out", "tokenizer", "template")
    elsewhere = other_names.TUNING_DATA
    goes_on = True

    source: list[str] = field(default_factory=list)
    """Files, folders or globs of examples: JSON lines or JSON arrays, compressed or not, or
    Parquet; URLs (s3://bucket/folder) are taken, too. With `split`, Hugging Face datasets by id or
    folder.
    """
    format: Literal["alpaca", "sharegpt", "messages", "prompt_completion"] | None = None
    """Form of the examples. alpaca: instruction, input, output, system, history. sharegpt:
    conversations of {from, value}. messages: messages of {role, content}. prompt_completion:
    prompt, completion.
    """
    columns: dict[str, Any] = field(default_factory=dict)
    """Names that columns have in the examples, by LLaMA-Factory's names for them (prompt, query,
    response, system, history, messages), e.g. {prompt: content, response: summary}. Optional
    columns that are not named are then not read.
    """
    tags: dict[str, Any] = field(default_factory=dict)
    """Names that keys and roles of messages have in the examples, by our names for them (role,
    content, user, assistant, system), e.g. {user: human, assistant: bot}.
    """
    split: str | None = None
    """Split of the Hugging Face dataset to read, e.g. train."""
    name: str | None = None
    """Configuration of the Hugging Face dataset; its default configuration if not set."""
    suffixes: list[str] = field(default_factory=list)
    """Endings of the files to take from a folder; if not set, .jsonl, .json-lines, .ndjson, .json
    and .parquet, compressed or not.
    """
    registry: str | None = None
    """LLaMA-Factory's dataset_info.json, or its folder, to take `datasets` from instead of
    `source`.
    """
    datasets: list[str] = field(default_factory=list)
    """Names of the registry's datasets, e.g. [adgen_local]."""
    out: str = MISSING
    """Folder that the dataset is written to, local or a URL (s3://bucket/folder)."""
    tokenizer: str = MISSING
    """Hugging Face tokenizer folder or id; must be the tokenizer of the model to tune."""
    template: str = "tokenizer"
    """Chat template: tokenizer for the tokenizer's own, chatml, alpaca, or a .jinja file. Answers
    are what it marks with {% generation %}, or else what follows its generation prompt.
    """
    default_system: str | None = None
    """System prompt of examples without one, with template=chatml or alpaca; "" for none. If not
    set, chatml has none, and alpaca the one it is known for.
    """
    add_bos: bool | None = None
    """Begin every example with the tokenizer's bos token, with template=chatml or alpaca; if not
    set, examples begin as documents did in training, or as the tokenizer's template has it.
    """
    context_length: int = 2048
    """Tokens per row."""
    train_on: Literal["all", "last", "prompt_too"] = "all"
    """Tokens that carry loss: those of all answers, of the last answer of a conversation, or all
    tokens. Messages with `loss: false` carry none.
    """
    too_long: Literal["fail", "drop", "cut_prompt"] = "fail"
    """Answer to an example that is longer than a row: fail stops, drop leaves it out and counts it,
    cut_prompt cuts prompts at their ends. Answers are never cut.
    """
    duplicates: Literal["drop", "keep"] = "drop"
    """Answer to an example with the same messages as an earlier one: drop leaves it out."""
    val_fraction: float = 0.0
    """Fraction of the examples to hold out for validation, chosen by a hash of their prompts, so
    that no prompt is in both splits.
    """
    val_source: list[str] = field(default_factory=list)
    """Files, folders, globs or datasets of examples to hold out instead, in the same form; training
    examples with the same prompts are left out.
    """
    val_datasets: list[str] = field(default_factory=list)
    """Names of the registry's datasets to hold out instead."""
    val_out: str | None = None
    """Folder that the dataset of held-out examples is written to, local or a URL."""
    on_error: Literal["fail", "skip"] = "fail"
    """Answer to a record that cannot be read: fail stops, skip leaves it out and counts it."""
    max_document_bytes: int = 67108864
    """Size of the longest record of JSON, bytes of UTF-8; a longer one cannot be read."""
    shard_size: int = 67108864
    """Largest size of a shard, bytes. No shard goes beyond its work unit."""
    unit_size: int = 67108864
    """Size of a work unit, bytes of input. A conversion is committed and resumed unit by unit, and
    rows are packed within one.
    """
    encoder: Literal["auto", "gigatoken", "hf"] = "auto"
    """Program that turns text into tokens, as in convert/to_mds.py."""
    num_workers: int | None = None
    """Number of processes that convert; one per core if not set. The dataset does not depend on
    it.
    """
    cluster: str | None = None
    """Address of a Dask scheduler (tcp://host:8786) whose workers convert instead of local
    processes; they must see the same files under the same paths.
    """

    def settings(self) -> dict[str, Any]:
        """Return the keys and values to record: those that decide the bytes of the dataset."""
        return {name: getattr(self, name) for name in SFT_SETTINGS}

    @property
    def has_val_source(self) -> bool:
        return bool(self.val_source or self.val_datasets)

    def validate(self) -> None:
        require_text(self, "out", "val_out", "tokenizer", "template", "registry", "cluster")
        self._check_sources()
        is_built_in = self.template in ("chatml", "alpaca")
        rule = "only goes with template=chatml or alpaca; another template says it itself"
        require(self.default_system is None or is_built_in, "default_system", rule)
        require(self.add_bos is None or is_built_in, "add_bos", rule)
        require(0 <= self.val_fraction < 1, "val_fraction", "must be in [0, 1)")
        require(
            self.val_fraction == 0 or not self.has_val_source,
            "val_fraction",
            "must be 0 with val_source or val_datasets",
        )
        holds_out = self.val_fraction > 0 or self.has_val_source
        rule = "must be set together with val_fraction, val_source or val_datasets"
        require(holds_out == (self.val_out is not None), "val_out", rule)
        if self.val_out is not None:
            require_apart(self.out, self.val_out, "val_out")
        require(self.max_document_bytes > 0, "max_document_bytes", "must be more than 0 bytes")
        # A row has a mask of a bit for each token besides its tokens.
        require_shards(self, smallest=9 * self.context_length + 1024)
        if self.cluster is not None:
            sources = () if self.split is not None else ("source", "val_source")
            require_absolute(self, *sources, "registry", "out", "val_out")

    def _check_sources(self) -> None:
        require_text(self, "source", "val_source", "datasets", "val_datasets", "split", "name")
        rule = "must name at least one file, folder or glob (or set registry and datasets)"
        require(bool(self.source or self.registry), "source", rule)
        rule = "must not be set together with registry, which names the files"
        require(not (self.source and self.registry), "source", rule)
        rule = "must name at least one dataset of the registry"
        require(bool(self.datasets) or self.registry is None, "datasets", rule)
        rule = "must be set together with registry"
        require(not self.datasets or self.registry is not None, "datasets", rule)
        require(not self.val_datasets or self.registry is not None, "val_datasets", rule)
        rule = "must not be set together with registry; name val_datasets"
        require(not (self.val_source and self.registry), "val_source", rule)
        rule = "must say what form the examples have: alpaca, sharegpt, messages, prompt_completion"
        require(self.registry is not None or self.format is not None, "format", rule)
        rule = "must not be set together with registry, which says it"
        for name in ("format", "columns", "tags", "split", "name", "suffixes"):
            require(self.registry is None or not getattr(self, name), name, rule)
        rule = "must be set together with name, e.g. split=train"
        require(self.name is None or self.split is not None, "split", rule)
        rule = "must not be set together with split"
        require(self.split is None or not self.suffixes, "suffixes", rule)
        for name, val_name in (("source", "val_source"), ("datasets", "val_datasets")):
            trained_on, held_out = ([*map(_place, getattr(self, key))] for key in (name, val_name))
            both = [each for each in held_out if each in trained_on]
            require(not both, val_name, f"must not name what is trained on: {', '.join(both)}")
            for key, given in ((name, trained_on), (val_name, held_out)):
                twice = [each for number, each in enumerate(given) if each in given[:number]]
                require(not twice, key, f"must name nothing twice: {', '.join(twice)}")


def _place(source: str) -> str:
    """Return one spelling of a path."""
    return source if is_url(source) else os.path.normpath(source)
