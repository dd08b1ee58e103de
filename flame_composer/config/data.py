"""The sections of a configuration that name datasets: their defaults and rules."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from flame_composer.config.rules import BYTES, require, require_seed, require_text

# Loader processes per rank; more would bring a machine down before they read anything.
MAX_WORKERS = 1000


@dataclass
class PlaceConfig:
    """The place of a dataset, on this machine or elsewhere."""

    paths = ("local", "remote")

    local: str | None = None
    """Folder of the dataset; if `remote` is set, the folder under which downloaded shards are
    cached.
    """
    remote: str | None = None
    """Address of a dataset to stream through `local`: s3://bucket/path, gs://..., or another
    folder.
    """

    @property
    def address(self) -> tuple[str | None, str | None]:
        """`local` and `remote`, which together tell two datasets apart."""
        return self.local, self.remote

    def validate(self) -> None:
        require(
            self.address != (None, None),
            "local",
            "must name a dataset folder made by convert/to_mds.py or to_sft.py (or set remote)",
        )
        require_text(self, "local", "remote")


@dataclass
class StreamConfig(PlaceConfig):
    """One of several datasets, and how much of it an epoch has."""

    proportion: float | None = None
    """This stream's share of an epoch's rows, relative to the other streams. An epoch has as many
    rows as all datasets together.
    """
    repeat: float | None = None
    """Number of times that an epoch has each row of this stream; 0.5 takes every other row."""
    choose: int | None = None
    """Number of rows that an epoch takes from this stream."""

    def weight(self) -> dict[str, float]:
        """Return those of `proportion`, `repeat` and `choose` that are set."""
        weights = {"proportion": self.proportion, "repeat": self.repeat, "choose": self.choose}
        return {kind: value for kind, value in weights.items() if value is not None}

    def validate(self) -> None:
        super().validate()
        for name, value in self.weight().items():
            most = 10**12 if name == "choose" else 10**6
            require(0 < value <= most, name, f"must be more than 0, and no more than {most}")
        require(
            len(self.weight()) <= 1, "proportion", "must not be set together with repeat or choose"
        )


@dataclass
class DataConfig(PlaceConfig):
    """The training data, its order, and how it is loaded."""

    streams: dict[str, StreamConfig] = field(default_factory=dict)
    """Several datasets instead of one, under names that you choose: streams.web.remote=...,
    streams.web.proportion=0.7.
    """
    batching_method: Literal["random", "stratified", "per_stream"] = "random"
    """Streams that the rows of a global batch come from: random mixes all of them, stratified
    takes the exact share of each, per_stream takes one stream at a time.
    """
    shuffle: bool = True
    """Shuffle the rows, in another order in every epoch."""
    shuffle_algo: Literal["spread", "py1e", "py1br", "py1s", "py2s", "naive"] | None = None
    """Order of the rows: spread, whose cost does not depend on their number, or one of
    StreamingDataset's, which lay out every epoch row by row. If not set, a run has the one it
    began with, and a new run spread.
    """
    shuffle_seed: int | None = None
    """Seed of the row order; the seed of the run if not set."""
    shuffle_block_size: int | None = None
    """Number of rows over which the shuffle spreads a shard, for each of num_canonical_nodes. A
    larger block mixes better and keeps more shards on disk: about as many bytes as so many rows
    have. If not set, 16 GiB of rows over all nodes, and 4 GiB or more for each; spread has at
    least four times the rows of the largest shard, and at most 134,217,728.
    """
    num_canonical_nodes: int = 1
    """Number of parts that the row order is made of; batches take rows from each in turn. Set it
    to the number of machines, and no machine downloads the shards of another.
    """
    predownload: int | None = None
    """Number of rows that a loader process downloads ahead of the one it is reading."""
    cache_limit: str | None = None
    """Largest disk space that cached shards may take on a machine, e.g. 100gb; unlimited if not
    set.
    """
    download_retries: int = 3
    """Number of times that a shard which did not arrive whole is fetched again, after 1, 2, 4, ...
    seconds, before the run stops.
    """
    download_timeout: float = 60.0
    """Time that a shard may take to arrive before it is fetched again, seconds."""
    loss_across_documents: bool = True
    """Count the loss of a document's first token, predicted from the end of the document before
    it; false leaves that token out of the loss.
    """
    num_workers: int = 2
    """Loader processes per rank; 0 reads in the training process."""
    prefetch_factor: int = 2
    """Number of batches that each loader process keeps ready."""

    def validate(self) -> None:
        require(
            bool(self.streams) or self.address != (None, None),
            "local",
            "must name a dataset folder made by convert/to_mds.py or to_sft.py (or set remote, or"
            " streams)",
        )
        for name in ("local", "remote"):
            require(
                not self.streams or getattr(self, name) is None,
                name,
                "must be null with streams, which each have their own",
            )
        for name in self.streams:
            require(
                bool(re.fullmatch(r"[A-Za-z0-9_-]+", name)),
                "streams",
                "must have names of letters, digits, '_' and '-'",
            )
        kinds = {name: next(iter(stream.weight()), "none") for name, stream in self.streams.items()}
        require(
            len(set(kinds.values())) <= 1,
            "streams",
            "must all have proportion, or all repeat, or all choose, or none: "
            + ", ".join(f"{name} has {kind}" for name, kind in kinds.items()),
        )
        require(
            self.batching_method == "random" or bool(self.streams),
            "batching_method",
            "must be random without streams",
        )
        require(self.download_retries >= 0, "download_retries", "must be 0 or more")
        require(
            0 < self.download_timeout < math.inf,
            "download_timeout",
            "must be more than 0, and finite",
        )
        require_text(self, "local", "remote")
        require_seed(self.shuffle_seed, "shuffle_seed")
        require(
            self.cache_limit is None or bool(BYTES.fullmatch(self.cache_limit)),
            "cache_limit",
            "must be a number of bytes, or one with kb, mb, gb, tb or pb, e.g. 100gb",
        )
        require(
            0 <= self.num_workers <= MAX_WORKERS, "num_workers", f"must be in [0, {MAX_WORKERS}]"
        )
        require(self.prefetch_factor >= 1, "prefetch_factor", "must be 1 or more")
        for name, most in (
            ("shuffle_block_size", 10**12),
            ("num_canonical_nodes", 65536),
            ("predownload", 10**12),
        ):
            value = getattr(self, name)
            require(value is None or 0 < value <= most, name, f"must be in [1, {most}]")


@dataclass
class EvalDataConfig(PlaceConfig):
    """A dataset to evaluate on."""

    loss_across_documents: bool = True
    """Count the loss of a document's first token, too, predicted from the end of the document
    before it; false leaves that token out of the loss.
    """
    num_workers: int = 0
    """Loader processes per rank; 0 reads in the training process."""
    max_rows: int | None = None
    """Number of rows to evaluate on, from the beginning of the dataset; all if not set."""

    def validate(self) -> None:
        super().validate()
        require(
            0 <= self.num_workers <= MAX_WORKERS, "num_workers", f"must be in [0, {MAX_WORKERS}]"
        )
        require(
            self.max_rows is None or self.max_rows > 0,
            "max_rows",
            "must be a positive number of rows, or null",
        )
