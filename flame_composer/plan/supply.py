"""The data of a run, worked out from manifests and indexes without reading shards.

These are the tokens and batches of an epoch, the bytes that each machine reads, and the cache that
it needs.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming.base.world import World

from flame_composer.config.data import StreamConfig
from flame_composer.config.plan import PlanConfig
from flame_composer.dataset.ledger import Ledger
from flame_composer.dataset.manifest import VERSIONS, Manifest
from flame_composer.dataset.mds import ShardFile, index_entry, index_json, shard_form
from flame_composer.dataset.open import Dataset, open_dataset
from flame_composer.errors import ConfigError, DataError, InvalidField
from flame_composer.loader.cache import fetch_index
from flame_composer.loader.fetch import Shards
from flame_composer.loader.rows import Rows
from flame_composer.text.tokenizer import TokenizerFingerprint, token_dtype

# The row order of an epoch is laid out as in training for up to this many rows. Of a larger dataset
# only that many are laid out, and the figures are scaled up.
MAX_ROWS = 16_000_000
# Of an imagined dataset, as convert/to_mds.py writes them unless told otherwise: the largest size
# of a shard, and the tokens of a work unit, 64 MiB of text. No shard goes beyond its unit.
SHARD_BYTES, UNIT_TOKENS = 64 << 20, 16 << 20
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


def find_supply(config: PlanConfig) -> Supply | str:
    """Return the data of a run, or the reason why its datasets cannot be read.

    Only manifests and indexes are read. If `dataset_tokens` is set, nothing is read, and an
    imaginary dataset of that size is used. Raise ConfigError if it is less than one global batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        if config.dataset_tokens is not None:
            datasets = {"": _imagine(config, Path(folder))}
        else:
            try:
                datasets = _read(config, Path(folder))
            except (ConfigError, DataError) as error:
                return str(error)
        num_rows = sum(dataset.manifest.totals.rows for dataset in datasets.values())
        share = min(1.0, _most_rows(config) / num_rows) if num_rows else 1.0
        if share < 1 and config.dataset_tokens is None:
            datasets = {
                name: _begin(dataset, share, Path(folder, f"part-{name}"))
                for name, dataset in datasets.items()
            }
        return _lay_out(config, datasets, share)


def _most_rows(config: PlanConfig) -> int:
    return max(MAX_ROWS, 2 * config.global_batch_size)


def _lay_out(config: PlanConfig, datasets: dict[str, Dataset], share: float) -> Supply:
    data = config.train_data
    rows = Rows(
        [_shards(dataset, data.streams.get(name), share) for name, dataset in datasets.items()],
        batch_size=config.global_batch_size,
        shuffle=data.shuffle,
        shuffle_algo=data.shuffle_algo,
        shuffle_seed=config.seed if data.shuffle_seed is None else data.shuffle_seed,
        shuffle_block_size=data.shuffle_block_size,
        num_canonical_nodes=data.num_canonical_nodes,
        batching_method=data.batching_method,
    )
    if rows.batches_per_epoch == 0:
        raise ConfigError(
            f"{', '.join(dataset.place for dataset in datasets.values())}: holds {rows.epoch_size}"
            f" rows, fewer than one global batch (global_batch_size={config.global_batch_size});"
            " set a smaller global_batch_size, or give more data"
        )
    rank_batch = max(1, config.global_batch_size // (config.devices * config.nodes))
    rows.predownload = data.predownload or 8 * rank_batch  # as StreamingDataset has it
    world = World(config.nodes, config.devices, 1, 0)
    workers, ahead = data.num_workers, data.prefetch_factor
    _, read = rows.bytes_in_use(world, num_workers=workers, prefetch_factor=ahead)
    manifests = [dataset.manifest for dataset in datasets.values()]
    return Supply(
        tokens=sum(manifest.totals.tokens_out for manifest in manifests),
        bytes=sum(manifest.totals.bytes for manifest in manifests),
        batches_per_epoch=(
            rows.batches_per_epoch if share == 1 else round(rows.batches_per_epoch / share)
        ),
        is_remote=any(dataset.remote is not None for dataset in datasets.values()),
        context_length=manifests[0].context_length,
        vocab_size=None if config.dataset_tokens is not None else manifests[0].tokenizer.vocab_size,
        read_by_a_node=round(read / share),
        smallest_cache=rows.smallest_cache(world, num_workers=workers, prefetch_factor=ahead),
    )


def _shards(dataset: Dataset, stream: StreamConfig | None, share: float) -> Shards:
    """Return the shards of a dataset, weighted if it is a stream.

    `share` is the part of all rows that is laid out.
    """
    weight: dict[str, Any] = {} if stream is None else stream.weight()
    if "choose" in weight:
        weight["choose"] = max(1, round(share * weight["choose"]))
    return Shards(dataset, **weight)


def _read(config: PlanConfig, folder: Path) -> dict[str, Dataset]:
    data = config.train_data
    sources = {name: (stream.local, stream.remote) for name, stream in data.streams.items()}
    datasets = {}
    for name, (local, remote) in (sources or {"": (data.local, data.remote)}).items():
        if remote is not None:
            place = fetch_index(remote, folder / name, exclusive=False)
        else:
            assert local is not None
            place = local
        datasets[name] = open_dataset(place, remote)
    return datasets


def _imagine(config: PlanConfig, folder: Path) -> Dataset:
    """Return a dataset of `dataset_tokens` tokens that has an index in `folder` but no shards.

    Its shards are as large as convert/to_mds.py writes them. Of a dataset with more than MAX_ROWS
    rows only the first shards are listed, enough to hold as many. Raise InvalidField if there is
    less than one global batch.
    """
    assert config.dataset_tokens is not None
    if config.dataset_tokens < config.global_batch_size * config.context_length:
        raise InvalidField(
            "dataset_tokens",
            f"must be a global batch of {config.global_batch_size} x {config.context_length} "
            "tokens or more",
        )
    model = config.model.config
    vocab_size = model.get("vocab_size", 1 << 15)
    dtype = token_dtype(vocab_size)
    num_rows = config.dataset_tokens // config.context_length
    row_bytes = config.context_length * dtype().itemsize + ROW_OVERHEAD
    rows_each = max(1, min(SHARD_BYTES // row_bytes, UNIT_TOKENS // config.context_length))
    num_shards = -(-num_rows // rows_each)
    laid_out = max(1, round(min(1.0, _most_rows(config) / num_rows) * num_shards))
    counts = [min(rows_each, num_rows - number * rows_each) for number in range(laid_out)]
    files = [
        ShardFile(f"units/0/shard.{i:05}.mds", count * row_bytes, "", count)
        for i, count in enumerate(counts)
    ]
    totals = Ledger(
        tokens_in=config.dataset_tokens,
        tokens_out=num_rows * config.context_length,
        rows=num_rows,
        shards=num_shards,
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
    _write_index(folder, manifest, files)
    has_remote = config.train_data.remote or any(
        stream.remote for stream in config.train_data.streams.values()
    )
    return Dataset(str(folder), "dataset_tokens" if has_remote else None, manifest, files)


def _begin(dataset: Dataset, share: float, folder: Path) -> Dataset:
    """Return a dataset with only the first shards of another, a `share` of them."""
    files = dataset.files[: max(1, round(share * len(dataset.files)))]
    folder.mkdir()
    _write_index(folder, dataset.manifest, files)
    return Dataset(str(folder), dataset.remote, dataset.manifest, files)


def _write_index(folder: Path, manifest: Manifest, files: list[ShardFile]) -> None:
    """Write the index.json of a dataset of these shards, whose size counts in a cache."""
    form = shard_form(manifest.token_dtype, manifest.context_length, SHARD_BYTES)
    entries = [index_entry(file, form) for file in files]
    (folder / "index.json").write_bytes(index_json(entries))
