"""Shards that stay open while they are read: as many as may be, and none that has to make room."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from flame_composer.config import DataError
from flame_composer.data import build_train_loader, open_dataset
from flame_composer.fetch import Shards
from flame_composer.reader import OpenShards
from flame_composer.train_config import DataConfig
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


def rows_of(folder: Path, **options: Any) -> Any:
    found = open_dataset(str(folder), None, tokenizer=byte_tokenizer())
    config = DataConfig(num_workers=0, shuffle_block_size=20, **options)
    return build_train_loader({"": found}, config, global_batch_size=4, seed=7).dataloader


def test_shards_stay_open_and_no_more_than_may_be(dataset, copy_of):
    folder = copy_of(dataset)
    loader = rows_of(folder)
    stream: Shards = loader.dataset.streams[0]
    stream.opened.limit = 2
    num_shards = len(stream.files)
    assert num_shards > 3
    first = [row["input_ids"].tolist() for row in loader]
    assert len(open_under(folder)) == 2
    stream.opened.limit = num_shards
    assert len([row["input_ids"].tolist() for row in loader]) == len(first)
    assert len(open_under(folder)) == num_shards
    again = copy.deepcopy(stream)  # as a loader process that is not forked gets it
    assert (again.opened.limit, len(again.opened.files)) == (num_shards, 0)
    stream.opened.close()
    assert open_under(folder) == set()


def test_none_stays_open_where_shards_are_deleted_to_make_room(dataset, copy_of):
    """Its room on disk would not be free before the last one closes it."""
    folder = copy_of(dataset)
    loader = rows_of(folder, cache_limit="1gb")
    for _ in loader:
        assert open_under(folder) == set()


def test_a_shard_cut_short_after_it_was_checked(dataset, copy_of):
    folder = copy_of(dataset)
    loader = rows_of(folder)
    rows = loader.dataset
    rows.get_item(0)
    (shard,) = open_under(folder)
    os.truncate(shard, os.path.getsize(shard) - 1)
    with pytest.raises(DataError, match=f"^{shard}: was cut short while it was read; restore it from a copy, or convert"):
        rows.get_item(rows.streams[0].dataset.files[0].rows - 1)


def test_a_shard_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        OpenShards().read(str(tmp_path / "shard.00000.mds"), 3, 0)
