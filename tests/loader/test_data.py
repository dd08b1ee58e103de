"""Datasets to batches: every row once, in an order that a restart goes on with, and nothing
damaged ever served.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from streaming.base.shuffle import algos

from flame_composer.batch import IGNORE, collate, count_tokens
from flame_composer.config.data import DataConfig, EvalDataConfig, StreamConfig
from flame_composer.dataset.manifest import read_manifest
from flame_composer.errors import ConfigError, DataError
from flame_composer.loader import fetch
from flame_composer.loader.batches import EvalBatches, build_evaluator, build_train_loader
from flame_composer.loader.datasets import open_for_model
from flame_composer.loader.fetch import Shards
from flame_composer.loader.layout import ALGOS, SPREAD
from flame_composer.loader.machine import Machine
from flame_composer.text.tokenizer import load_tokenizer
from tests.conftest import CONTEXT_LENGTH
from tests.data_fixtures import WRONG, altered, byte_tokenizer, places

Row = tuple[int, ...]
Copy = Callable[[Path], Path]


def opened(folder: Path, **options: Any) -> Any:
    return open_for_model(
        str(folder), None, tokenizer=byte_tokenizer(), context_length=CONTEXT_LENGTH, **options
    )


def loader_of(folder: Path, *, global_batch_size: int = 4, seed: int = 7, **options: Any) -> Any:
    config = DataConfig(**{"num_workers": 0, **options})
    return build_train_loader(
        {"": opened(folder)}, config, global_batch_size=global_batch_size, seed=seed
    ).dataloader


def rows_of(batch: dict[str, torch.Tensor]) -> list[Row]:
    return [tuple(row) for row in batch["input_ids"].tolist()]


def epoch_of(loader: Any) -> list[list[Row]]:
    return [rows_of(batch) for batch in loader]


@pytest.fixture(scope="session")
def all_rows(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Every row in the order on disk."""
    folder = shutil.copytree(dataset, tmp_path_factory.mktemp("all") / "copy")
    shards = Shards([opened(folder)])
    found = [tuple(shards.row(i)["input_ids"].tolist()) for i in range(shards.num_rows)]
    assert len(found) == len(set(found)) == read_manifest(str(dataset)).totals.rows > 100, (
        "rows can be told apart"
    )
    assert len(shards.bytes) > 5, "several shards"
    return found


# Collation


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@given(data=st.data(), context_length=st.integers(2, 24), num_rows=st.integers(1, 4))
def test_collate(data, context_length, num_rows, dtype):
    rows = []
    for _ in range(num_rows):
        borders = data.draw(st.sets(st.integers(1, context_length - 1)))
        doc_lengths = np.diff([0, *sorted(borders), context_length]).astype(np.uint32)
        ids = data.draw(
            st.lists(
                st.integers(0, np.iinfo(dtype).max),
                min_size=context_length,
                max_size=context_length,
            )
        )
        rows.append({"input_ids": np.array(ids, dtype), "doc_lengths": doc_lengths})
    batch = collate(rows)
    assert batch.keys() == {"input_ids", "labels", "sequence_id"}
    for tensor in batch.values():
        assert (tensor.shape, tensor.dtype) == ((num_rows, context_length), torch.int64)
    for r, row in enumerate(rows):
        assert batch["input_ids"][r].tolist() == row["input_ids"].tolist()
        assert batch["labels"][r].tolist() == [IGNORE, *row["input_ids"].tolist()[1:]]
        expected = [
            number
            for number, length in enumerate(row["doc_lengths"].tolist())
            for _ in range(length)
        ]
        assert batch["sequence_id"][r].tolist() == expected
    assert count_tokens(batch) == {
        "total": num_rows * context_length,
        "loss_generating": num_rows * (context_length - 1),
    }
    within = collate(rows, loss_across_documents=False)
    for r, row in enumerate(rows):
        starts = np.cumsum([0, *row["doc_lengths"]])[:-1].tolist()
        expected = [IGNORE if i in starts else id for i, id in enumerate(row["input_ids"].tolist())]
        assert within["labels"][r].tolist() == expected, "no document's first token is a label"
    assert torch.equal(within["input_ids"], batch["input_ids"])
    batch["labels"].fill_(0)
    assert batch["input_ids"][0].tolist() == rows[0]["input_ids"].tolist(), (
        "labels are a copy: evaluation shifts them in place"
    )


# Training rows


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_every_row_once_per_epoch_in_an_order_of_its_own(dataset, copy_of, all_rows, num_workers):
    loader = loader_of(copy_of(dataset), num_workers=num_workers)
    first, second = epoch_of(loader), epoch_of(loader)
    for epoch in (first, second):
        served = [row for batch in epoch for row in batch]
        assert len(epoch) == len(all_rows) // 4 == loader.dataset.batches_per_epoch
        assert all(len(batch) == 4 for batch in epoch)
        assert len(set(served)) == len(served), "no row twice"
        assert set(served) <= set(all_rows)
    assert first != second
    assert sorted(first[0]) != sorted(all_rows[:4]), "shuffled"


def test_every_shuffle_that_is_offered_is_there():
    """Of those that streaming 0.13 has; it gave up py1b, which ended a run with a traceback."""
    offered = typing.get_args(typing.get_args(typing.get_type_hints(DataConfig)["shuffle_algo"])[0])
    assert offered == ALGOS
    assert set(offered) - {SPREAD} == set(algos)


def test_order_depends_on_the_seed_alone(dataset, copy_of):
    base = epoch_of(loader_of(copy_of(dataset)))
    assert len(dataset.parents) > 1
    assert epoch_of(loader_of(copy_of(dataset))) == base
    assert epoch_of(loader_of(copy_of(dataset), num_workers=1)) == base
    loader = loader_of(copy_of(dataset), num_workers=2, prefetch_factor=1, predownload=8)
    assert epoch_of(loader) == base
    assert (loader.prefetch_factor, loader.dataset.batches_ahead) == (1, 2)
    assert epoch_of(loader_of(copy_of(dataset), seed=8)) != base
    assert epoch_of(loader_of(copy_of(dataset), seed=8, shuffle_seed=7)) == base
    torch.manual_seed(1234)
    np.random.seed(1234)
    assert epoch_of(loader_of(copy_of(dataset))) == base, "the global random state plays no part"


@pytest.mark.filterwarnings("ignore:Shuffle block size was smaller")
def test_rows_are_mixed_as_the_keys_say(dataset, copy_of, all_rows):
    def mixed(**options: Any) -> float:
        """Shards that eight rows in a row come from, on average; a shard has about eight."""
        rows = [row for batch in epoch_of(loader_of(copy_of(dataset), **options)) for row in batch]
        assert set(rows) <= set(all_rows)
        orders.append(rows)
        shards = [all_rows.index(row) // 8 for row in rows]
        return float(np.mean([len(set(shards[i : i + 8])) for i in range(len(shards) - 8)]))

    orders: list[list[Row]] = []
    # A shard is spread over four times its rows at least, of which there are more than 13 shards.
    assert 5 < mixed(shuffle_block_size=4) < 6 < mixed()
    assert mixed(shuffle_algo="py1e", shuffle_block_size=4) < 4
    assert mixed(shuffle_algo="naive") > 5
    assert len({tuple(order) for order in orders}) == 4


def test_loading_leaves_the_global_random_state_alone(dataset, copy_of):
    loader = loader_of(copy_of(dataset))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    epoch_of(loader)
    assert torch.equal(torch.rand(3), expected)


def test_without_shuffling_rows_come_as_they_lie(dataset, copy_of, all_rows):
    served = [
        row
        for batch in epoch_of(loader_of(copy_of(dataset), shuffle=False, num_canonical_nodes=1))
        for row in batch
    ]
    assert served == all_rows[: len(served)]


@pytest.mark.parametrize(("num_workers", "global_batch_size"), [(0, 4), (2, 20)])
def test_resuming_at_every_batch_goes_on_with_the_rows_that_were_to_come(
    dataset, copy_of, num_workers, global_batch_size
):
    """At every batch of the first epoch and at the middle and the end of the second, the very
    last ones included.
    """
    options: Any = {"num_workers": num_workers, "global_batch_size": global_batch_size}
    loader = loader_of(copy_of(dataset), **options)
    epochs: list[list[list[Row]]] = []
    states: list[tuple[int, int, Any]] = []
    for epoch in range(3):
        epochs.append([])
        for batch in loader:
            epochs[-1].append(rows_of(batch))
            served = len(epochs[-1])
            # As Composer does: rows over all ranks since the beginning of the epoch.
            states.append(
                (epoch, served, loader.dataset.state_dict(served * global_batch_size, True))
            )
    per_epoch = len(epochs[0])
    assert per_epoch >= 5
    chosen = [
        state
        for state in states
        if state[0] == 0 or (state[0] == 1 and state[1] in (1, per_epoch // 2, per_epoch))
    ]
    assert len(chosen) == per_epoch + 3
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch, served, state in chosen:
        resumed = loader_of(copy_of(dataset), **options)
        resumed.dataset.load_state_dict(json.loads(json.dumps(state)))
        assert epoch_of(resumed) == epochs[epoch][served:], f"after batch {served} of epoch {epoch}"
        assert epoch_of(resumed) == epochs[epoch + 1], (
            f"the epoch after batch {served} of epoch {epoch}"
        )


def test_another_order_and_fewer_rows_than_were_taken(dataset, copy_of):
    """A run that is told to go on with other data has the order it asks for from there on, and the
    next epoch where this one has no more rows.
    """
    state = loader_of(copy_of(dataset)).dataset.state_dict(8, True)
    state["epoch"] = 0
    other = loader_of(copy_of(dataset), seed=8)
    expected = epoch_of(other)
    assert expected != epoch_of(loader_of(copy_of(dataset)))
    for place in (state, {**state, "shuffle_seed": 7, "num_canonical_nodes": 10**7}):
        resumed = loader_of(copy_of(dataset), seed=8)
        resumed.dataset.load_state_dict(place)
        assert epoch_of(resumed) == expected[2:]
        assert resumed.dataset.state_dict(0, True)["shuffle_seed"] == 8
    resumed = loader_of(copy_of(dataset), seed=8)
    resumed.dataset.load_state_dict({**state, "sample_in_epoch": 10**6})
    assert epoch_of(resumed) == []
    assert epoch_of(resumed) == epoch_of(other), "the second epoch"


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_share_out_a_global_batch(dataset, copy_of, nodes, ranks_per_node):
    """Each row is one rank's; with as many canonical nodes as machines, each machine reads a
    part of the shards only.
    """
    folder = copy_of(dataset)
    rows = loader_of(folder, global_batch_size=8, shuffle=False, num_canonical_nodes=nodes).dataset
    order = np.array(list(rows.order.batches(0)))
    ranks = [
        (machine, rank)
        for machine in (Machine(number, nodes, ranks_per_node) for number in range(nodes))
        for rank in range(ranks_per_node)
    ]
    parts = [
        np.array(list(rows.order.batches(0, place=machine.place_of(rank), places=len(ranks))))
        for machine, rank in ranks
    ]
    assert np.array_equal(np.sort(np.concatenate(parts, axis=1)), np.sort(order))
    assert len({part.shape for part in parts}) == 1
    for node in range(nodes):
        own = {
            row
            for (machine, _), part in zip(ranks, parts, strict=True)
            if machine.number == node
            for row in part.ravel()
        }
        assert max(own) - min(own) <= rows.shards.num_rows / nodes


def test_too_few_rows_for_a_batch(dataset, copy_of, all_rows):
    folder = copy_of(dataset)
    message = (
        f"{folder}: holds {len(all_rows)} rows, fewer than one global batch"
        f" (global_batch_size={len(all_rows) + 1}); set a smaller global_batch_size, or give more"
        " data"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        loader_of(folder, global_batch_size=len(all_rows) + 1)
    assert len(epoch_of(loader_of(copy_of(dataset), global_batch_size=len(all_rows)))) == 1, (
        "exactly one fits"
    )


# Evaluation rows


@pytest.mark.parametrize("max_rows", [None, 1, 7, 12, 10**6])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_every_row_once(dataset, copy_of, all_rows, world_size, max_rows):
    shards = Shards([opened(copy_of(dataset))])
    wanted = all_rows[:max_rows]
    seen: list[Row] = []
    num_batches = set()
    for rank in range(world_size):
        batches = EvalBatches(shards, batch_size=4, max_rows=max_rows)
        batches.place, batches.places = rank, world_size
        own = list(batches)
        assert len(own) == len(batches)
        num_batches.add(len(own))
        for batch in own:
            assert batch["input_ids"].shape == (4, CONTEXT_LENGTH)
            for row, labels in zip(rows_of(batch), batch["labels"], strict=True):
                if (labels != IGNORE).any():
                    assert labels.tolist() == [IGNORE, *row[1:]]
                    seen.append(row)
    assert sorted(seen) == sorted(wanted), "every row once, and what fills up carries no label"
    assert num_batches == {-(-len(wanted) // (4 * world_size))}, "as many batches on every rank"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluator_reads_every_row(dataset, copy_of, all_rows, num_workers):
    evaluator = build_evaluator(
        opened(copy_of(dataset)), EvalDataConfig(num_workers=num_workers), batch_size=7
    )
    assert evaluator.dataloader.dataloader.num_workers == num_workers  # pyright: ignore
    for _ in range(2):
        counts = [
            count_tokens(batch)["loss_generating"] for batch in evaluator.dataloader.dataloader
        ]  # pyright: ignore
        assert sum(counts) == len(all_rows) * (CONTEXT_LENGTH - 1)


def test_evaluation_without_loss_across_documents(dataset, copy_of):
    config = EvalDataConfig(loss_across_documents=False)
    evaluator = build_evaluator(opened(copy_of(dataset)), config, batch_size=7)
    for batch in evaluator.dataloader.dataloader:  # pyright: ignore
        starts = torch.diff(batch["sequence_id"], dim=1) != 0
        assert starts.any()
        assert (batch["labels"][:, 1:][starts] == IGNORE).all()


# What is refused


def refused(folder: Path, error: type[Exception], message: str, **options: Any) -> None:
    options = {"tokenizer": byte_tokenizer(), "context_length": CONTEXT_LENGTH, **options}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        open_for_model(str(folder), None, **options)


def test_another_context_length(dataset):
    refused(
        dataset,
        ConfigError,
        f"{dataset}: its rows are 32 tokens long, but context_length is 64; set context_length=32"
        " or convert the text again",
        context_length=64,
    )
    assert (
        open_for_model(str(dataset), None, tokenizer=byte_tokenizer()).manifest.context_length == 32
    )


def test_another_tokenizer(dataset, tmp_path):
    byte_tokenizer(401).save_pretrained(tmp_path / "larger")
    larger = load_tokenizer(str(tmp_path / "larger"))
    remedy = "set tokenizer to the one it was converted with, or convert the text again"
    refused(
        dataset,
        ConfigError,
        f"{dataset}: was made with another tokenizer than {tmp_path / 'larger'} (vocab_size: 400 "
        f"there, 401 here); {remedy}",
        tokenizer=larger,
    )

    byte_tokenizer().save_pretrained(tmp_path / "swapped")
    path = tmp_path / "swapped" / "tokenizer.json"
    content = json.loads(path.read_bytes())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    path.write_text(json.dumps(content))
    swapped = load_tokenizer(str(tmp_path / "swapped"))
    differs = rf"swapped \(sha256: [0-9a-f]{{64}} there, [0-9a-f]{{64}} here\); {remedy}$"
    with pytest.raises(ConfigError, match=differs):
        open_for_model(str(dataset), None, tokenizer=swapped)


def last_shard(folder: Path) -> Path:
    return (
        folder
        / json.loads((folder / "index.json").read_bytes())["shards"][-1]["raw_data"]["basename"]
    )


def test_a_truncated_shard_is_found_at_once(dataset, copy_of):
    folder = copy_of(dataset)
    shard = last_shard(folder)
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(
        folder,
        DataError,
        f"{shard}: shard is {size - 1} bytes long, must be {size}; restore it from a copy, or"
        f" delete {folder} and convert again",
    )


def flip_a_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)


def damaged(shard: Path) -> str:
    return (
        rf"{re.escape(str(shard))}: damaged shard: its xxh64 hash is [0-9a-f]{{16}}, must be"
        r" [0-9a-f]{16}: the content has "
        "changed; restore it from a copy, or convert again"
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_bit_is_found_before_a_row_is_used(dataset, copy_of, num_workers):
    folder = copy_of(dataset)
    shard = last_shard(folder)
    loader = loader_of(folder, num_workers=num_workers)
    flip_a_bit(shard)
    with pytest.raises(DataError) as caught:
        epoch_of(loader)
    lines = str(caught.value).strip().splitlines()
    assert re.fullmatch(
        (r"flame_composer\.errors\.DataError: " if num_workers else "") + damaged(shard), lines[-1]
    )
    assert num_workers or len(lines) == 1


def test_a_shard_that_vanishes_while_running(dataset, copy_of):
    folder = copy_of(dataset)
    shard = last_shard(folder)
    shards = Shards([opened(folder)])
    shard.unlink()
    assert len(shards.row(0)["input_ids"]) == CONTEXT_LENGTH
    with pytest.raises(DataError, match=f"^{re.escape(str(shard))}: "):
        shards.row(shards.num_rows - 1)


def overwrite(shard: Path) -> None:
    """Another content of the same size in the very same file, as a program does that opens it
    for writing.
    """
    with shard.open("r+b") as file:
        file.seek(-40, 2)
        file.write(bytes(40))


def change(shard: Path, how: str) -> None:
    if how == "overwritten":
        overwrite(shard)
    else:
        shutil.copy(shard, copy := shard.with_name("copy"))
        overwrite(copy)
        copy.replace(shard)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("how", ["overwritten", "replaced"])
def test_a_shard_that_changes_after_it_was_checked_is_never_trained_on(
    dataset, copy_of, all_rows, num_workers, how
):
    """In the middle of an epoch and between two: no row is served that the dataset does not
    hold.
    """
    folder = copy_of(dataset)
    loader = (
        loader_of(folder, num_workers=num_workers, prefetch_factor=1)
        if num_workers
        else loader_of(folder)
    )
    served: list[Row] = []

    def train() -> None:
        for epoch in range(3):
            for number, batch in enumerate(loader):
                served.extend(rows_of(batch))
                if epoch == 0 and number == len(loader) // 2:
                    change(last_shard(folder), how)

    with pytest.raises(DataError, match=damaged(last_shard(folder))):
        train()
    assert set(served) <= set(all_rows)
    assert len(served) < 2 * len(all_rows), "found at the latest in the epoch after"


def test_a_file_that_is_open_is_looked_at_for_every_row(dataset, copy_of):
    folder = copy_of(dataset)
    shards = Shards([opened(folder)])
    last = shards.num_rows - 1
    assert len(shards.row(last)["input_ids"]) == CONTEXT_LENGTH
    overwrite(last_shard(folder))
    with pytest.raises(DataError, match=damaged(last_shard(folder))):
        shards.row(last)


def test_a_shard_that_is_merely_touched_or_restored_goes_on(dataset, copy_of, all_rows):
    folder = copy_of(dataset)
    shards = Shards([opened(folder)])
    last = shards.num_rows - 1
    content = last_shard(folder).read_bytes()
    for change in (
        lambda: last_shard(folder).touch(),
        lambda: last_shard(folder).chmod(0o600),
        lambda: last_shard(folder).write_bytes(content),
    ):
        shards.row(last)
        change()
        assert tuple(shards.row(last)["input_ids"].tolist()) == all_rows[last]


def test_a_shard_that_cannot_be_opened(dataset, copy_of):
    folder = copy_of(dataset)
    shards = Shards([opened(folder)])
    last_shard(folder).unlink()
    last_shard(folder).symlink_to(last_shard(folder))
    message = (
        f"^{re.escape(str(last_shard(folder)))}: cannot be read: Too many levels of symbolic links;"
        " run the same command"
    )
    with pytest.raises(DataError, match=message):
        shards.row(shards.num_rows - 1)


def test_each_shard_is_hashed_once_by_all_processes_of_a_machine(
    dataset, copy_of, monkeypatch, tmp_path
):
    log = tmp_path / "hashed"
    log.touch()
    check_hash = fetch.check_hash

    def counted(path: Path, file: Any) -> None:
        with log.open("a") as lines:
            lines.write(f"{file.basename}\n")
        check_hash(path, file)

    monkeypatch.setattr(fetch, "check_hash", counted)
    loader = loader_of(copy_of(dataset))
    epoch_of(loader)
    epoch_of(loader)
    hashed = log.read_text().split()
    (found,) = loader.dataset.shards.datasets
    assert sorted(hashed) == sorted({file.basename for file in found.files})


# What an index or a manifest may hold


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
def test_whatever_an_index_or_manifest_holds_is_refused_in_one_line_or_makes_no_difference(
    dataset, copy_of, all_rows, name
):
    """Every key left out, and replaced by every kind of value, the hash of the index made to
    agree.
    """
    folder = copy_of(dataset)
    manifest, index = (
        json.loads((folder / each).read_bytes()) for each in ("manifest.json", "index.json")
    )
    content = index if name == "index.json" else manifest
    outcomes = {"refused": 0, "same": 0}
    for path in places(content):
        for value in (..., *WRONG):
            changed = altered(content, path, value)
            (folder / name).write_text(json.dumps(changed))
            if name == "index.json":
                digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
                (folder / "manifest.json").write_text(
                    json.dumps({**manifest, "index_sha256": digest})
                )
            try:
                shards = Shards([opened(folder)])
                found: Any = [
                    tuple(shards.row(i)["input_ids"].tolist()) for i in (0, shards.num_rows - 1)
                ]
            except (ConfigError, DataError) as error:
                found = str(error)
            if isinstance(found, str):
                assert "\n" not in found, (path, value)
            else:
                assert found == [all_rows[0], all_rows[-1]], (path, value)
            outcomes["refused" if isinstance(found, str) else "same"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["same"] > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": []}, "it lists no shards"),
        ({"version": 3}, "'version' must be 2"),
        ({"version": ...}, "'version' must be a whole number, 0 or more"),
    ],
)
def test_an_index_without_what_it_needs(dataset, copy_of, change, message):
    folder = copy_of(dataset)
    index = json.loads((folder / "index.json").read_bytes()) | change
    (folder / "index.json").write_text(
        json.dumps({key: value for key, value in index.items() if value is not ...})
    )
    refused(
        folder,
        DataError,
        f"{folder}/index.json: damaged: {message}; restore it from a copy, or delete its dataset"
        " and convert again",
    )


def test_a_size_limit_that_is_text(dataset, copy_of):
    folder = copy_of(dataset)
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][0]["size_limit"] = "much"
    (folder / "index.json").write_text(json.dumps(index))
    refused(
        folder,
        DataError,
        f"{folder}/index.json: damaged: 'size_limit' must be a whole number, 0 or more; restore it "
        "from a copy, or delete its dataset and convert again",
    )


def test_rows_that_are_nonsense_under_a_hash_that_agrees(dataset, copy_of):
    """Whoever made the index made the shard."""
    folder = copy_of(dataset)
    index = json.loads((folder / "index.json").read_bytes())
    raw = index["shards"][-1]["raw_data"]
    shard = folder / raw["basename"]
    content = bytearray(shard.read_bytes())
    content[4:12] = b"\xff" * 8
    shard.write_bytes(content)
    raw["hashes"]["xxh64"] = xxhash.xxh64(bytes(content)).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["index_sha256"] = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shards = Shards([opened(folder)])
    with pytest.raises(
        DataError,
        match=f"^{re.escape(str(shard))}: damaged shard: its row offsets are damaged; restore it",
    ):
        shards.row(shards.num_rows - 1)


# Little or no shared memory


CLONE_NEWNS, MS_RDONLY, MS_REC, MS_PRIVATE = 0x20000, 1, 0x4000, 1 << 18


def with_shared_memory(size: str, flags: int, do: Callable[[], Any]) -> Any:
    """What `do` returns in a process whose /dev/shm is of that size."""

    def work(connection: Any) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        assert libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        assert libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", flags, f"size={size}".encode()) == 0
        try:
            connection.send(do())
        except BaseException as error:
            connection.send(error)

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=work, args=(theirs,))
    process.start()
    found = ours.recv()
    process.join()
    if isinstance(found, BaseException):
        raise found
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts another /dev/shm, which takes root")
@pytest.mark.parametrize(("size", "flags", "processes"), [("64k", 0, 2), ("4k", MS_RDONLY, 0)])
def test_little_or_no_shared_memory(dataset, copy_of, all_rows, size, flags, processes):
    """Batches of more than all of it arrive from loader processes; where there can be none, rows
    are loaded without.
    """
    folder = copy_of(dataset)
    size_of_batch = 96 * CONTEXT_LENGTH * 8 * 3
    assert size_of_batch > 64 << 10

    def epoch() -> tuple[int, list[Row]]:
        loader = loader_of(folder, global_batch_size=96, num_workers=2)
        return loader.num_workers, [row for batch in epoch_of(loader) for row in batch]

    num_workers, rows = with_shared_memory(size, flags, epoch)
    assert num_workers == processes
    assert rows == [
        row
        for batch in epoch_of(loader_of(copy_of(dataset), global_batch_size=96))
        for row in batch
    ]
    assert set(rows) <= set(all_rows)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts another /dev/shm, which takes root")
@pytest.mark.parametrize(("size", "flags"), [("64m", 0), ("4k", MS_RDONLY)])
def test_seven_thousand_million_rows_take_little_of_a_machine(
    dataset, copy_of, all_rows, size, flags
):
    """A batch at 99 % of an epoch, with few open files, and 64 MB of shared memory or none."""
    folder, num_rows = copy_of(dataset), 7_300_000_000

    def far() -> list[Row]:
        files = 256 + len(os.listdir("/proc/self/fd"))  # besides those of this test's parent
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        streams = {"all": StreamConfig(local=str(folder), choose=num_rows)}
        loader = build_train_loader(
            {"all": opened(folder)},
            DataConfig(streams=streams, num_workers=2),
            global_batch_size=8,
            seed=7,
        ).dataloader
        place = num_rows // 8 * 99 // 100 * 8
        loader.dataset.load_state_dict({"epoch": 0, "sample_in_epoch": place})  # type: ignore
        return rows_of(next(iter(loader)))

    found = with_shared_memory(size, flags, far)
    assert len(set(found)) == 8
    assert set(found) <= set(all_rows)
