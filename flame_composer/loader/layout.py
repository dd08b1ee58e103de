"""The order of rows that a run's settings ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flame_composer.config.data import DataConfig
from flame_composer.dataset.manifest import Manifest
from flame_composer.dataset.open import Dataset
from flame_composer.errors import ConfigError, InvalidField, one_line
from flame_composer.loader.mixture import Mixture
from flame_composer.loader.order import StreamOrder
from flame_composer.upstream.streaming import StreamingOrder, weigh

Order = Mixture | StreamingOrder

ALGOS = ("spread", "py1e", "py1br", "py1s", "py2s", "naive")  # of train_data.shuffle_algo
SPREAD = "spread"  # the shuffle of loader/order.py; the others are StreamingDataset's

# What the rows that are mixed with one another take on disk, unless shuffle_block_size says how
# many these are: all canonical nodes' together, but one's at least
WINDOW_BYTES, LEAST_WINDOW_BYTES = 16 << 30, 4 << 30
MOST_WINDOW = 1 << 27  # rows, for 1 GB of a loader process's memory


def default_window(manifest: Manifest, nodes: int) -> int:
    """Return the number of rows over which a shard is spread if shuffle_block_size is not set."""
    row = manifest.context_length * np.dtype(manifest.token_dtype).itemsize
    return min(MOST_WINDOW, max(1, max(WINDOW_BYTES // nodes, LEAST_WINDOW_BYTES) // row))


def window_of(datasets: Sequence[Dataset], config: DataConfig) -> int | None:
    """Return the number of rows over which shards are spread, as set or by default.

    It is None if that is StreamingDataset's default.
    """
    if config.shuffle_block_size is not None or config.shuffle_algo not in (None, SPREAD):
        return config.shuffle_block_size
    nodes = config.num_canonical_nodes
    return min(default_window(dataset.manifest, nodes) for dataset in datasets)


def build_order(
    datasets: Mapping[str, Dataset], config: DataConfig, *, global_batch_size: int, seed: int
) -> Order:
    """Return the global batches of every epoch. `seed` is that of the run.

    Raises ConfigError if the datasets do not hold one global batch, or not one that
    `batching_method` asks for.
    """
    weights = [config.streams[name].weight() if name in config.streams else {} for name in datasets]
    seed = seed if config.shuffle_seed is None else config.shuffle_seed
    rows = [np.array(dataset.files.rows) for dataset in datasets.values()]
    try:
        order = (
            _spread(rows, weights, list(datasets.values()), config, global_batch_size, seed)
            if config.shuffle_algo in (None, SPREAD)
            else StreamingOrder(
                rows,
                weights,
                global_batch_size=global_batch_size,
                batching_method=config.batching_method,
                algo=str(config.shuffle_algo),
                seed=seed,
                block_size=config.shuffle_block_size,
                nodes=config.num_canonical_nodes,
                shuffle=config.shuffle,
            )
        )
    except ValueError as error:
        if isinstance(error, ConfigError | InvalidField):
            raise
        raise InvalidField(
            "train_data.batching_method",
            f"{one_line(error)} (global_batch_size={global_batch_size})",
        ) from None
    if order.num_batches == 0:
        what = "; ".join(dataset.place for dataset in datasets.values())
        raise ConfigError(
            f"{what}: holds {sum(order.choose)} rows, fewer than one global batch "
            f"(global_batch_size={global_batch_size}); set a smaller global_batch_size, or give"
            " more data"
        )
    return order


def _spread(
    rows: Sequence[np.ndarray],
    weights: Sequence[Mapping[str, float]],
    datasets: Sequence[Dataset],
    config: DataConfig,
    global_batch_size: int,
    seed: int,
) -> Mixture:
    """Return the order of loader/order.py."""
    window = window_of(datasets, config)
    assert window is not None
    if window > MOST_WINDOW:
        raise InvalidField(
            "train_data.shuffle_block_size",
            f"must be in [1, {MOST_WINDOW}]: each loader process keeps 8 bytes a row of it",
        )
    nodes = config.num_canonical_nodes
    choose, shares = weigh([int(each.sum()) for each in rows], weights, seed)
    streams = [
        StreamOrder(
            each,
            seed=seed,
            stream=number,
            # As much of all rows is then mixed as of a single stream's.
            window=max(1, int(window * share)),
            nodes=nodes,
            shuffle=config.shuffle,
        )
        for number, (each, share) in enumerate(zip(rows, shares, strict=True))
    ]
    if sum(choose) < global_batch_size:  # said by `build_order`, whatever the method
        return Mixture(streams, choose, global_batch_size=global_batch_size, seed=seed)
    return Mixture(
        streams,
        choose,
        global_batch_size=global_batch_size,
        batching_method=config.batching_method,
        seed=seed,
    )
