"""The data of a run, worked out from manifests and indexes without reading shards.

These are the tokens and batches of an epoch, the bytes that each machine reads, and the cache that
it needs.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from flame_composer.config.plan import PlanConfig
from flame_composer.dataset.ledger import Ledger
from flame_composer.dataset.manifest import VERSIONS, Manifest
from flame_composer.dataset.mds import ShardFile
from flame_composer.dataset.open import Dataset, open_dataset
from flame_composer.dataset.table import ShardTable
from flame_composer.errors import ConfigError, DataError, InvalidField
from flame_composer.loader.cache import fetch_index
from flame_composer.loader.footprint import cache_needs, index_bytes, sizes_of
from flame_composer.loader.layout import SPREAD, build_order
from flame_composer.loader.machine import Machine
from flame_composer.text.tokenizer import TokenizerFingerprint, token_dtype

# StreamingDataset's orders are laid out row by row, which is too much for more than this.
MAX_ROWS = 16_000_000
# Of an imagined dataset, as convert/to_mds.py writes them unless told otherwise: the largest size
# of a shard, and the tokens of a work unit, 64 MiB of text. No shard goes beyond its unit.
SHARD_BYTES, UNIT_TOKENS = 64 << 20, 16 << 20
ENTRY_BYTES = 420  # of a shard in index.json
# Bytes of a row beside its tokens: its offset in the shard and the lengths of a few documents.
ROW_OVERHEAD = 24


@dataclass(frozen=True)
class Supply:
    """The datasets of a run together, and an epoch of them; bytes are bytes of shards."""

    tokens: int
    bytes: int
    batches_per_epoch: int
    is_remote: bool
    context_length: int
    vocab_size: int | None  # of the tokenizer they were made with; None for imagined ones
    read_by_a_node: int  # bytes, in an epoch
    smallest_cache: int  # bytes with which no shard is deleted while it is in use
    rows: int
    shards: int
    mixed_rows: int  # rows that are mixed with one another, of each canonical node


def find_supply(config: PlanConfig) -> Supply | str:
    """Return the data of a run, or the reason why its datasets cannot be read.

    Only manifests and indexes are read. If `dataset_tokens` is set, nothing is read, and an
    imaginary dataset of that size is used. Raise ConfigError if it is less than one global batch,
    or is more than can be laid out in the order that `shuffle_algo` names.
    """
    if config.dataset_tokens is not None:
        imagined = _imagine(config)
        indexes = len(imagined.files) * ENTRY_BYTES
        return _lay_out(config, {"": imagined}, indexes)
    with tempfile.TemporaryDirectory() as folder:
        try:
            datasets = _read(config, Path(folder))
        except (ConfigError, DataError) as error:
            return str(error)
        return _lay_out(config, datasets, index_bytes(datasets.values()))


def _lay_out(config: PlanConfig, datasets: dict[str, Dataset], indexes: int) -> Supply:
    data = config.train_data
    manifests = [dataset.manifest for dataset in datasets.values()]
    num_rows = sum(manifest.totals.rows for manifest in manifests)
    if num_rows > MAX_ROWS and data.shuffle_algo not in (None, SPREAD):
        raise InvalidField(
            "train_data.shuffle_algo",
            f"must be null or {SPREAD} to plan for {num_rows:,} rows: the others are laid out row"
            f" by row, which is done for {MAX_ROWS:,} rows at most",
        )
    order = build_order(
        datasets, data, global_batch_size=config.global_batch_size, seed=config.seed
    )
    together = config.parallelism.tensor * config.parallelism.context
    machine = Machine(0, config.nodes, config.devices, together)
    needs = cache_needs(order, sizes_of(datasets.values()), data, machine, indexes=indexes)
    return Supply(
        tokens=sum(manifest.totals.tokens_out for manifest in manifests),
        bytes=sum(manifest.totals.bytes for manifest in manifests),
        batches_per_epoch=order.num_batches,
        is_remote=any(dataset.remote is not None for dataset in datasets.values()),
        context_length=manifests[0].context_length,
        vocab_size=None if config.dataset_tokens is not None else manifests[0].tokenizer.vocab_size,
        read_by_a_node=needs.read,
        smallest_cache=needs.smallest,
        rows=num_rows,
        shards=sum(manifest.totals.shards for manifest in manifests),
        mixed_rows=min(needs.window, num_rows),
    )


def _read(config: PlanConfig, folder: Path) -> dict[str, Dataset]:
    data = config.train_data
    sources = {name: (stream.local, stream.remote) for name, stream in data.streams.items()}
    datasets = {}
    for name, (local, remote) in (sources or {"": (data.local, data.remote)}).items():
        if remote is not None:
            datasets[name] = fetch_index(remote, folder / name, exclusive=False)
        else:
            assert local is not None
            datasets[name] = open_dataset(local, with_units=False)
    return datasets


def _imagine(config: PlanConfig) -> Dataset:
    """Return a dataset of `dataset_tokens` tokens without a folder.

    Its shards are as large as convert/to_mds.py writes them. Raise InvalidField if there is less
    than one global batch.
    """
    assert config.dataset_tokens is not None
    num_tokens = int(config.dataset_tokens)
    if num_tokens < config.global_batch_size * config.context_length:
        raise InvalidField(
            "dataset_tokens",
            f"must be a global batch of {config.global_batch_size} x {config.context_length} "
            "tokens or more",
        )
    model = config.model.config
    vocab_size = model.get("vocab_size", 1 << 15)
    dtype = token_dtype(vocab_size)
    num_rows = num_tokens // config.context_length
    row_bytes = config.context_length * dtype().itemsize + ROW_OVERHEAD
    rows_each = max(1, min(SHARD_BYTES // row_bytes, UNIT_TOKENS // config.context_length))
    files = ShardTable.of(
        ShardFile(f"units/0/shard.{number:05}.mds", rows * row_bytes, "", rows)
        for number, first in enumerate(range(0, num_rows, rows_each))
        for rows in [min(rows_each, num_rows - first)]
    )
    totals = Ledger(
        tokens_in=num_tokens,
        tokens_out=num_rows * config.context_length,
        rows=num_rows,
        shards=len(files),
        bytes=num_rows * row_bytes,
    )
    manifest = Manifest(
        VERSIONS["text"],
        "train",
        TokenizerFingerprint("", vocab_size, None, None),
        config.context_length,
        dtype.__name__,
        {},
        (),
        totals,
        "",
    )
    has_remote = config.train_data.remote or any(
        stream.remote for stream in config.train_data.streams.values()
    )
    return Dataset("", "dataset_tokens" if has_remote else None, manifest, files)
