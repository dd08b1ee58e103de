"""Mixtures: every stream's share is what was asked for, is logged, and is the same after a
restart.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flame_composer.config.data import DataConfig, StreamConfig
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.loader import layout
from flame_composer.loader.batches import build_train_loader, describe_order
from flame_composer.loader.datasets import open_train_data
from flame_composer.train.mixture import build_mixture
from flame_composer.train.resume import SameData
from flame_composer.train.sums import StepSums
from tests.conftest import CONTEXT_LENGTH, make_dataset
from tests.data_fixtures import byte_tokenizer
from tests.runs import Corpus, Script, check, last_json, read_log, run_script

Row = tuple[int, ...]
MIX: dict[str, dict[str, Any]] = {"web": {"proportion": 0.75}, "code": {"proportion": 0.25}}
METHODS = ("random", "stratified", "per_stream")


@pytest.fixture
def config_of(dataset, eval_dataset, copy_of) -> Any:
    """A DataConfig of a large stream, web, and a small one, code."""
    folders = {"web": dataset, "code": eval_dataset}

    def make(weights: dict[str, dict[str, Any]], **options: Any) -> DataConfig:
        streams = {
            name: StreamConfig(local=str(copy_of(folders[name])), **weight)
            for name, weight in weights.items()
        }
        return DataConfig(streams=streams, **{"num_workers": 0, **options})

    return make


def opened(config: DataConfig) -> Any:
    return open_train_data(config, tokenizer=byte_tokenizer(), context_length=CONTEXT_LENGTH)


def loader_of(config: DataConfig) -> Any:
    return build_train_loader(opened(config), config, global_batch_size=8, seed=7).dataloader


def read(loader: Any) -> list[list[tuple[int, Row]]]:
    """Every batch's rows, each with the number of its stream."""
    return [
        list(zip(batch["stream"].tolist(), map(tuple, batch["input_ids"].tolist()), strict=True))
        for batch in loader
    ]


def shares(epoch: list[list[tuple[int, Row]]]) -> Counter[int]:
    return Counter(stream for batch in epoch for stream, _ in batch)


@pytest.fixture(scope="session")
def rows_of(dataset, eval_dataset, tmp_path_factory) -> dict[int, set[Row]]:
    """All rows of each dataset, by the number of its stream."""
    import shutil

    found = {}
    for number, folder in enumerate((dataset, eval_dataset)):
        copy = shutil.copytree(folder, tmp_path_factory.mktemp("rows") / "copy")
        config = DataConfig(local=str(copy), num_workers=0)
        loader = build_train_loader(opened(config), config, global_batch_size=1, seed=7).dataloader
        found[number] = {tuple(row) for batch in loader for row in batch["input_ids"].tolist()}
    assert not found[0] & found[1]
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_shares_of_an_epoch(config_of, rows_of, method, num_workers):
    loader = loader_of(config_of(MIX, batching_method=method, num_workers=num_workers))
    total = sum(map(len, rows_of.values()))
    first, second = read(loader), read(loader)
    for epoch in (first, second):
        assert all(len(batch) == 8 for batch in epoch)
        assert len(epoch) == loader.dataset.batches_per_epoch >= total // 8 - 2
        assert all(row in rows_of[stream] for batch in epoch for stream, row in batch), (
            "each row says which stream it is of"
        )
        counts = shares(epoch)
        assert counts[0] == pytest.approx(0.75 * 8 * len(epoch), abs=8)
        for batch in epoch:
            mine = sum(stream == 0 for stream, _ in batch)
            assert method == "random" or mine in {"stratified": {6}, "per_stream": {0, 8}}[method]
    assert first != second
    if method == "random":
        assert len({tuple(sorted(stream for stream, _ in batch)) for batch in first}) > 2


@pytest.mark.parametrize(
    ("weights", "times"),
    [
        ({"web": {"repeat": 1}, "code": {"repeat": 2}}, {0: 1.0, 1: 2.0}),
        ({"web": {"repeat": 0.5}, "code": {"repeat": 1.5}}, {0: 0.5, 1: 1.5}),
        ({"web": {"choose": 40}, "code": {"choose": 40}}, {}),
        ({"web": {}, "code": {}}, {0: 1.0, 1: 1.0}),
    ],
)
def test_absolute_weights(config_of, rows_of, weights, times):
    config = config_of(weights)
    loader = loader_of(config)
    wanted = {
        number: int(times[number] * len(rows)) if times else 40 for number, rows in rows_of.items()
    }
    counts = shares(read(loader))
    left_out = sum(wanted.values()) % 8
    assert sum(counts.values()) == sum(wanted.values()) - left_out
    assert all(wanted[number] - left_out <= counts[number] <= wanted[number] for number in wanted)


@pytest.mark.parametrize("method", METHODS)
def test_resuming_goes_on_with_the_rows_that_were_to_come(config_of, method):
    loader = loader_of(config_of(MIX, batching_method=method))
    states, epochs = [], []
    for _ in range(2):
        epochs.append([])
        for batch in loader:
            epochs[-1].append(batch["input_ids"].tolist())
            states.append(
                (len(epochs), len(epochs[-1]), loader.dataset.state_dict(8 * len(epochs[-1]), True))
            )
    last = len(epochs[0])
    chosen = [
        state for state in states if state[0] == 1 and state[1] in (1, last // 2, last - 1, last)
    ]
    assert len(chosen) == 4
    for epoch, served, state in chosen:
        resumed = loader_of(
            config_of(MIX, batching_method=method, num_workers=2 if served == 1 else 0)
        )
        resumed.dataset.load_state_dict(json.loads(json.dumps(state)))
        assert [batch["input_ids"].tolist() for batch in resumed] == epochs[epoch - 1][served:], (
            served
        )
        assert [batch["input_ids"].tolist() for batch in resumed] == epochs[epoch], (
            "the epoch after it"
        )


def test_a_mixture_that_changed_is_refused_by_name(config_of):
    config = config_of(MIX)
    datasets = opened(config)
    order = describe_order(datasets, config, global_batch_size=8, seed=7)
    renamed = DataConfig(streams={"web": config.streams["web"], "prose": config.streams["code"]})
    changes = {
        "train_data.streams.code.proportion (0.25 before, 0.5 now)": config_of(
            {**MIX, "code": {"proportion": 0.5}}
        ),
        "train_data.streams.code.repeat (None before, 1 now)": config_of(
            {"web": {"repeat": 1}, "code": {"repeat": 1}}
        ),
        "train_data.batching_method (random before, stratified now)": config_of(
            MIX, batching_method="stratified"
        ),
        "train_data.streams (web, code before, web now)": config_of({"web": MIX["web"]}),
        "train_data.streams (web, code before, code, web now)": config_of(
            {"code": MIX["code"], "web": MIX["web"]}
        ),
        "train_data.streams (web, code before, None now)": DataConfig(
            local=config.streams["web"].local
        ),
        "train_data.streams (web, code before, web, prose now)": renamed,
    }
    for message, changed in changes.items():
        now = describe_order(opened(changed), changed, global_batch_size=8, seed=7)
        with pytest.raises(ConfigError, match=re.escape(message)):
            SameData(now, allow_change=False).load_state_dict({"order": order})
    moved = config_of(MIX)
    assert describe_order(opened(moved), moved, global_batch_size=8, seed=7) == order, (
        "the same data elsewhere"
    )


def test_the_window_of_a_run_is_written_down(config_of, monkeypatch):
    """Should a later version have another default, a run that goes on is refused, not changed."""
    config = config_of(MIX)
    key = "train_data.shuffle_block_size"

    def order_of(config: DataConfig) -> dict[str, Any]:
        return describe_order(opened(config), config, global_batch_size=8, seed=7)

    before = order_of(config)
    assert before[key] == (16 << 30) // (2 * CONTEXT_LENGTH) or before[key] == layout.MOST_WINDOW
    monkeypatch.setattr(layout, "MOST_WINDOW", 1 << 20)
    with pytest.raises(ConfigError, match=rf"{key} \({before[key]} before, {1 << 20} now\)"):
        SameData(order_of(config), allow_change=False).load_state_dict({"order": before})
    assert order_of(config_of(MIX, shuffle_block_size=9))[key] == 9
    assert order_of(config_of(MIX, shuffle_algo="py1e"))[key] is None


def test_the_index_of_every_stream_counts(config_of, tmp_path):
    config = config_of(MIX)
    make_dataset(tmp_path / "new", num_documents=20, seed=9)
    other = DataConfig(
        streams={
            **config.streams,
            "code": StreamConfig(local=str(tmp_path / "new/out"), proportion=0.25),
        }
    )
    orders = [
        describe_order(opened(each), each, global_batch_size=8, seed=7) for each in (config, other)
    ]
    assert [key for key in orders[0] if orders[0][key] != orders[1][key]] == [
        "train_data.streams.code (index.json)"
    ]


def test_streams_that_cannot_be(config_of, dataset, copy_of, tmp_path):
    same = DataConfig(
        streams={name: StreamConfig(local=str(copy_of(dataset))) for name in ("a", "b")}
    )
    with pytest.raises(
        InvalidField,
        match=r"^train_data\.streams\.b: must be another dataset than train_data.streams.a; ",
    ):
        opened(same)
    make_dataset(tmp_path / "long", num_documents=20, context_length=64, shard_size=3000)
    config = config_of({"web": {}})
    config.streams["long"] = StreamConfig(local=str(tmp_path / "long/out"))
    with pytest.raises(
        ConfigError,
        match=f"^{tmp_path}/long/out: its rows are 64 tokens long, but context_length is 32",
    ):
        opened(config)
    make_dataset(tmp_path / "other", num_documents=20, tokenizer=byte_tokenizer(300))
    config.streams["long"] = StreamConfig(local=str(tmp_path / "other/out"))
    with pytest.raises(
        ConfigError, match=f"^{tmp_path}/other/out: was made with another tokenizer than"
    ):
        opened(config)


def test_a_stream_too_small_for_its_part_of_a_batch(config_of):
    tiny: dict[str, Any] = {"web": {"proportion": 0.99}, "code": {"proportion": 0.01}}
    with pytest.raises(
        InvalidField,
        match=r"train_data.batching_method: stream 1 is too small a part .* in a batch of 8",
    ):
        loader_of(config_of(tiny, batching_method="stratified"))
    with pytest.raises(
        InvalidField,
        match=r"train_data.batching_method: stream 1 has \d rows an epoch, fewer than a batch of 8",
    ):
        loader_of(config_of(tiny, batching_method="per_stream"))
    assert shares(read(loader_of(config_of(tiny))))[1] <= 2, "at random it comes now and then"


def test_one_dataset_is_no_mixture(dataset, copy_of):
    config = DataConfig(local=str(copy_of(dataset)), num_workers=0)
    datasets = opened(config)
    loader = build_train_loader(datasets, config, global_batch_size=8, seed=7)
    assert "stream" not in next(iter(loader.dataloader))
    assert build_mixture(loader, datasets, StepSums()) == []


# A whole run


def keys_of(corpus: Corpus, run: Path, *more: str) -> list[str]:
    """A run on the corpus and, twice as often, its held-out part."""
    streams = {
        "train_data.streams.web.local": corpus.train,
        "train_data.streams.web.repeat": 1,
        "train_data.streams.code.remote": corpus.val,
        "train_data.streams.code.local": f"{run}-cache",
        "train_data.streams.code.repeat": 2,
    }
    keys = [key for key in corpus.keys(run) if not key.startswith(("train_data.local", "eval_"))]
    keys += ["train_data.local=null", "eval_data=null", "max_duration=25ba"]
    # Cuts every tensor but the rows' streams
    keys += ["algorithms.seq_length_warmup.min_seq_length=32"]
    return [*keys, *(f"{key}={value}" for key, value in streams.items()), *more]


def test_a_killed_run_on_streams_ends_bit_identical_and_logs_what_it_had(
    corpus: Corpus, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = check(run_script("recipes/train.py", *keys_of(corpus, whole)))
    web_part, code_part = (
        r"web (\d+) \((.+)%, 1.00 x its \1\)",
        r"code (\d+) \((.+)%, 2.00 x its (\d+)\)",
    )
    line = re.search(f"rows of an epoch by stream: {web_part}, {code_part}\n", process.stdout)
    assert line, process.stdout
    assert int(line[3]) == 2 * int(line[5])

    script = Script("recipes/train.py", *keys_of(corpus, killed))
    while (
        not (killed / "train_log.jsonl").exists()
        or (killed / "train_log.jsonl").read_text().count("\n") < 17
    ):
        assert script.process.is_alive(), script.read("err")
    script.process.kill()
    script.wait()
    last_json(run_script("recipes/train.py", *keys_of(corpus, killed)))
    assert read_log(killed) == read_log(whole)

    for row in read_log(whole):
        web, code = row["streams"]["web"], row["streams"]["code"]
        assert web["rows"] + code["rows"] == row["current_steps"] * 4
        assert web["tokens"] + code["tokens"] == row["num_tokens"]
        assert web["share"] + code["share"] == pytest.approx(1)
    assert code["share"] == pytest.approx(float(line[4]) / 100, abs=0.1)
