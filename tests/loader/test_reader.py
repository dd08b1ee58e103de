"""Shards that stay open while they are read: as many as may be, and none that has to make room."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_composer.config.data import DataConfig, StreamConfig
from flame_composer.errors import DataError
from flame_composer.loader.batches import build_train_loader
from flame_composer.loader.datasets import open_for_model
from flame_composer.loader.reader import FIELDS, OpenShards
from tests.data_fixtures import byte_tokenizer


def open_under(folder: Path) -> set[str]:
    """The files in a folder that this process has open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue  # it was that of the list itself
    return {path for path in found if path.startswith(str(folder))}


def rows_of(*folders: Path, **options: Any) -> Any:
    found = {
        f"s{number}": open_for_model(str(folder), None, tokenizer=byte_tokenizer())
        for number, folder in enumerate(folders)
    }
    streams = (
        {name: StreamConfig(local=dataset.folder) for name, dataset in found.items()}
        if len(folders) > 1
        else {}
    )
    config = DataConfig(num_workers=0, shuffle_block_size=20, streams=streams, **options)
    return build_train_loader(
        found if streams else {"": found["s0"]}, config, global_batch_size=4, seed=7
    ).dataloader


def test_shards_stay_open_and_no_more_than_may_be(dataset, eval_dataset, copy_of, tmp_path):
    """Of all streams together."""
    folders = copy_of(dataset), copy_of(eval_dataset)
    loader = rows_of(*folders)
    opened = loader.dataset.shards.opened
    opened.limit = 2
    num_shards = len(loader.dataset.shards.bytes)
    assert num_shards > 3
    first = [row["input_ids"].tolist() for row in loader]
    assert sum(len(open_under(folder)) for folder in folders) == 2
    opened.limit = num_shards
    assert len([row["input_ids"].tolist() for row in loader]) == len(first)
    assert all(open_under(folder) for folder in folders)
    assert sum(len(open_under(folder)) for folder in folders) == num_shards
    again = copy.deepcopy(opened)  # as a loader process that is not forked gets it
    assert (again.limit, len(again.files)) == (num_shards, 0)
    opened.close()
    assert not any(open_under(folder) for folder in folders)


def test_none_stays_open_where_shards_are_deleted_to_make_room(dataset, copy_of):
    """Its room on disk would not be free before the last one closes it."""
    folder = copy_of(dataset)
    loader = rows_of(folder, cache_limit="1gb")
    for _ in loader:
        assert open_under(folder) == set()


def test_a_shard_cut_short_after_it_was_checked(dataset, copy_of):
    folder = copy_of(dataset)
    loader = rows_of(folder)
    shards = loader.dataset.shards
    shards.row(0)
    (shard,) = open_under(folder)
    os.truncate(shard, size := os.path.getsize(shard) - 1)
    message = (
        f"^{shard}: damaged shard: {size:,} bytes long, must be {size + 1:,}; restore it from a"
        " copy, or convert again"
    )
    with pytest.raises(DataError, match=message):
        shards.row(shards.file_of(0).rows - 1)


def test_a_shard_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        OpenShards().read(str(tmp_path / "shard.00000.mds"), 3, 0, np.zeros(FIELDS, np.uint64))
