"""Checkpoints of a real run: which one is taken, what is refused, and that the weights come out
as they went in.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.utils import checkpoint as composer_checkpoint

from flame_composer.checkpoint import keep
from flame_composer.checkpoint.content import needed_by
from flame_composer.checkpoint.find import (
    find_checkpoint,
    find_newest,
    find_start,
)
from flame_composer.checkpoint.names import list_checkpoints
from flame_composer.checkpoint.parts import Needed
from flame_composer.checkpoint.read import Checkpoint, read_checkpoint
from flame_composer.checkpoint.save import SaveCheckpoints, find_start_of
from flame_composer.checkpoint.to_model import (
    load_from_checkpoint,
    load_model,
    model_in,
    save_hf_folder,
)
from flame_composer.config.sections import ModelConfig
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError, DataError
from flame_composer.model.hf_config import build_hf_config
from flame_composer.text.tokenizer import fingerprint
from tests.conftest import CONTEXT_LENGTH, GLA
from tests.data_fixtures import byte_tokenizer


def read(file: Path) -> dict[str, Any]:
    return read_checkpoint(Checkpoint(str(file), file))


def load(file: Path) -> Any:
    return load_from_checkpoint(Checkpoint(str(file), file))


def newest(folder: Path) -> Path | None:
    return file_of(find_newest(str(folder), folder / "staging"))


def start(folder: Path, autoresume: bool = True) -> Path | None:
    return file_of(find_start(str(folder), folder / "staging", autoresume=autoresume))


def meant(place: Path) -> Path | None:
    return file_of(find_checkpoint(str(place), place / "staging"))


def file_of(found: Checkpoint | None) -> Path | None:
    assert found is None or found.place == str(found.file), "a local one is read where it is"
    return found and found.file


@pytest.fixture
def folder(trained, copy_of) -> Path:
    """ba1.pt, ba2.pt and ba3.pt, to damage."""
    return copy_of(trained.checkpoints)


def test_the_run_saved_what_it_should(trained):
    assert sorted(path.name for path in trained.checkpoints.iterdir()) == [
        "ba1.pt",
        "ba2.pt",
        "ba3.pt",
    ]


def test_newest_first_by_number_and_nothing_else_counts(tmp_path):
    others = (
        "unfinished-ba200.pt",
        "ba300.pt.tmp",
        "ba.pt",
        "ba-1.pt",
        "xba7.pt",
        "ba7.txt",
        "ba010.pt",
        "BA11.pt",
        "ba12.PT",
        "ba1\u0663.pt",
        "ba13.pt\n",
        "ba" + "9" * 200 + ".pt",
        "ba14",
        "aside-ba15.pt",
        "ba1e9.pt",
        "ba+16.pt",
        " ba17.pt",
    )
    for name in ("ba9.pt", "ba10.pt", "ba100.pt", *others):
        (tmp_path / name).touch()
    assert list_checkpoints(str(tmp_path)) == [
        str(tmp_path / f"ba{step}.pt") for step in (100, 10, 9)
    ]
    assert list_checkpoints(str(tmp_path / "nowhere")) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_the_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest tensor, where only a checksum sees it."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("<html>404</html>")


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.pt")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    """Whoever opens it waits for a writer."""
    path.unlink()
    os.mkfifo(path)


def endless_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def bomb(path: Path) -> None:
    """Many zeros in a few bytes."""
    with zipfile.ZipFile(path) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
        with archive.open("archive/data/999", "w") as part:
            part.write(bytes(16 << 20))


DAMAGE: list[Callable[[Path], None]] = [
    truncate,
    lose_the_last_byte,
    flip_a_bit,
    empty,
    text,
    other_zip,
    dangling_link,
    a_folder,
    a_pipe,
    endless_device,
    link_to_itself,
    bomb,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_falls_back_over_a_damaged_checkpoint_and_names_it(folder, caplog, damage):
    damage(folder / "ba3.pt")
    with caplog.at_level(logging.WARNING, "flame_composer.checkpoint.find"):
        assert newest(folder) == folder / "ba2.pt"
    (message,) = caplog.messages
    assert message.startswith(f"warning: {folder / 'ba3.pt'}: ")
    assert message.endswith("; trying the one before it")
    assert "\n" not in message
    with pytest.raises(DataError, match=f"^{re.escape(str(folder / 'ba3.pt'))}: ") as caught:
        read(folder / "ba3.pt")
    assert "\n" not in str(caught.value)


def small_checkpoint(path: Path) -> None:
    torch.save(
        {
            "state": {"model": {f"w{n}": torch.arange(n + 1.0) for n in range(4)}},
            "rng": [b"x" * 40],
        },
        path,
    )


def places_of_flips(path: Path) -> list[int]:
    """Every byte of the zip directory and of the headers in front of the parts, and one of each
    part.
    """
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts, start = archive.infolist(), archive.start_dir
    headers = [
        range(
            part.header_offset,
            content.index(part.filename.encode(), part.header_offset) + len(part.filename) + 1,
        )
        for part in parts
    ]
    return [*range(start, len(content)), *(place for header in headers for place in header)]


def outcome(path: Path, whole: Any) -> str:
    """`whole` if it is read as it was, else `damage`; anything but a line that names it fails."""
    try:
        content = read(path)
    except DataError as error:
        message = str(error)
        content = None
    if content is None:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert len(message) < 600
        return "damage"
    assert content["rng"] == whole["rng"]
    assert content["state"]["model"].keys() == whole["state"]["model"].keys()
    assert all(
        torch.equal(tensor, whole["state"]["model"][name])
        for name, tensor in content["state"]["model"].items()
    )
    return "whole"


@pytest.mark.parametrize(
    "stride",
    [
        13,
        pytest.param(
            1,
            marks=[
                pytest.mark.faults,
                pytest.mark.skipif(
                    "FLAME_COMPOSER_FAULTS" not in os.environ,
                    reason="takes a minute: make test-faults",
                ),
            ],
        ),
    ],
)
def test_whatever_bit_is_flipped_it_is_named_or_does_no_harm(tmp_path, stride):
    path = tmp_path / "ba1.pt"
    small_checkpoint(path)
    content, whole = path.read_bytes(), read(path)
    seen = set()
    for place in places_of_flips(path)[::stride]:
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            seen.add(outcome(path, whole))
    assert seen == {"whole", "damage"}


def test_whatever_length_it_was_cut_to_it_is_damage(tmp_path):
    path = tmp_path / "ba1.pt"
    small_checkpoint(path)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        assert outcome(path, {}) == "damage"


def test_falls_back_more_than_once(folder, caplog):
    flip_a_bit(folder / "ba3.pt")
    truncate(folder / "ba2.pt")
    assert newest(folder) == folder / "ba1.pt"
    assert [re.findall(r"ba\d\.pt", message)[0] for message in caplog.messages] == [
        "ba3.pt",
        "ba2.pt",
    ]


def test_a_whole_checkpoint_gives_no_warning(folder, caplog):
    assert newest(folder) == folder / "ba3.pt"
    assert caplog.messages == []


def test_all_damaged_is_an_error_not_a_fresh_start(folder):
    for path in folder.iterdir():
        truncate(path)
    message = (
        f"{folder}: none of its 3 checkpoints can be read; move them away (or set another run_name)"
        " to start over"
    )
    for find in (newest, meant, start):
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            find(folder)


def test_where_a_run_starts(folder, tmp_path):
    assert start(folder, autoresume=True) == folder / "ba3.pt"
    assert start(tmp_path / "nowhere", autoresume=True) is None
    assert start(tmp_path / "nowhere", autoresume=False) is None
    message = (
        f"{folder}: holds checkpoints of an earlier run (ba3.pt); set autoresume=true to go on from"
        " them, or another run_name or save_folder"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        start(folder, autoresume=False)


def test_finding_the_checkpoint_that_is_meant(folder, tmp_path):
    assert meant(folder) == folder / "ba3.pt"
    assert meant(folder / "ba1.pt") == folder / "ba1.pt"
    shutil.copytree(folder, tmp_path / "run/checkpoints")
    message = (
        f"{tmp_path}/run: a folder without checkpoints (ba*.pt); did you mean"
        f" {tmp_path}/run/checkpoints?"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        meant(tmp_path / "run")
    (tmp_path / "none").mkdir()
    for name, what in (
        ("none", "a folder without checkpoints (ba*.pt)"),
        ("no", "no such file or folder"),
    ):
        path = tmp_path / name
        message = f"{path}: {what}; name a checkpoint or the folder a run saved them in"
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            meant(path)


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_never_run(folder, tmp_path, caplog, legacy):
    marker = tmp_path / "marker"
    content = read(folder / "ba3.pt")
    content = {"state": {**content["state"], "extra": Malicious(marker)}, "rng": content["rng"]}
    torch.save(content, folder / "ba4.pt", _use_new_zipfile_serialization=not legacy)
    for attempt in (read, load, lambda path: load_model(str(path))):
        with pytest.raises(
            DataError,
            match=r"ba4\.pt: (refused, it holds something other than|not a whole checkpoint)",
        ):
            attempt(folder / "ba4.pt")
    assert newest(folder) == folder / "ba3.pt"
    assert "ba4.pt" in caplog.text
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))  # noqa: S301
    assert marker.exists(), "the trap works"


def test_a_file_that_is_replaced_after_it_was_checked_runs_no_code(
    trained, folder, tmp_path, monkeypatch
):
    """A run's Composer reads as its check did; its own reader is the one that would run it."""
    marker, file = tmp_path / "marker", folder / "ba3.pt"
    content = torch.load(file, weights_only=False)
    content["state"]["extra"] = Malicious(marker)
    torch.save(content, file)
    monkeypatch.setattr(
        composer_checkpoint,
        "_torch_load_with_validation",
        composer_checkpoint._torch_load_with_validation,
    )
    start = find_start_of(TrainConfig(save_folder=None), tmp_path, pytest.fail)
    assert start is None
    state = trained.trainer.state
    with pytest.raises(
        DataError, match=r"ba3\.pt: refused, it holds something other than tensors and plain values"
    ):
        composer_checkpoint.load_checkpoint(str(file), state, trained.trainer.logger)
    assert not marker.exists()


# What a run needs to find in it


@pytest.fixture(scope="session")
def needed(trained) -> Callable[[], Needed]:
    config = TrainConfig(model=ModelConfig(config=GLA))
    hf_config = build_hf_config(GLA, byte_tokenizer(), CONTEXT_LENGTH)
    return lambda: needed_by(config, hf_config)


def drop(*path: Any) -> Callable[[dict[str, Any]], Any]:
    def change(content: dict[str, Any]) -> None:
        *above, last = path
        for name in above:
            content = content[name]
        del content[last]

    return change


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], Any]:
    def change(content: dict[str, Any]) -> None:
        *above, last = path
        for name in above:
            content = content[name]
        content[last] = value

    return change


WEIGHT = "model.model.norm.weight"
MOMENTS = ("state", "optimizers", "AdamW", "state", WEIGHT)
GROUP: tuple[Any, ...] = ("state", "optimizers", "AdamW", "param_groups", 0)
CLOCK = ("state", "timestamp", "Timestamp")
ROWS = ("state", "dataset_state", "train")
CALLBACKS = ("state", "callbacks")
CONTENTS: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "it has no state"),
    "a list": ([1, 2], "it holds a list"),
    "a number": (3, "it holds a int"),
    "state is text": ({"state": "x"}, "its state is a str"),
    "no model": (drop("state", "model"), "it has no model"),
    "an empty model": (put({}, "state", "model"), "it holds no weights"),
    "a model that is a list": (put([1], "state", "model"), "its model is a list"),
    "a weight that is text": (
        put("x", "state", "model", WEIGHT),
        f"its model.{WEIGHT} is not a whole tensor",
    ),
    "settings of the loss that are text": (
        put("x", *CALLBACKS, "SameLoss", "settings"),
        "its settings is a str",
    ),
    "a t_max that is text": (
        put("x", *CALLBACKS, "Schedule", "made_from", "scheduler.t_max"),
        "its scheduler.t_max is a str",
    ),
    "no optimizers": (drop("state", "optimizers"), "it has no optimizers"),
    "empty optimizers": (put({}, "state", "optimizers"), "it holds no optimizer's state"),
    "no moments": (
        put({}, "state", "optimizers", "AdamW", "state"),
        "it has no optimizers.AdamW.state.model.model.embed",
    ),
    "moments of one missing": (drop(*MOMENTS), f"it has no optimizers.AdamW.state.{WEIGHT}"),
    "one moment missing": (
        drop(*MOMENTS, "exp_avg_sq"),
        f"its optimizers.AdamW.state.{WEIGHT}.exp_avg_sq is not of",
    ),
    "a moment's shape": (
        put(torch.zeros(3), *MOMENTS, "exp_avg"),
        f"its optimizers.AdamW.state.{WEIGHT}.exp_avg is not of",
    ),
    "a weight without values": (
        put(torch.zeros(32, device="meta"), "state", "model", WEIGHT),
        f"its model.{WEIGHT} is not a whole tensor",
    ),
    "a moment without values": (
        put(torch.zeros(32, device="meta"), *MOMENTS, "exp_avg"),
        "exp_avg is not of the shape",
    ),
    "a weight of few values": (
        put(torch.zeros(32).to_sparse(), "state", "model", WEIGHT),
        f"its model.{WEIGHT} is not a whole tensor",
    ),
    "a weight of whole numbers": (
        put(torch.ones(32, dtype=torch.int64), "state", "model", WEIGHT),
        f"its model.{WEIGHT} is of type int64",
    ),
    "a weight that is no number": (
        put(torch.full((32,), torch.nan), "state", "model", WEIGHT),
        f"its model.{WEIGHT} has values that are infinite or not a number",
    ),
    "an infinite weight": (
        put(torch.full((32,), -torch.inf), "state", "model", WEIGHT),
        f"its model.{WEIGHT} has values that are infinite or not a number",
    ),
    "a moment that is no number": (
        put(torch.full((32,), torch.nan), *MOMENTS, "exp_avg"),
        "exp_avg has values that are infinite or not a number",
    ),
    "a square that is no number": (
        put(torch.full((32,), torch.nan), *MOMENTS, "exp_avg_sq"),
        "exp_avg_sq has values that are infinite or not",
    ),
    "a square below zero": (
        put(torch.full((32,), -1.0), *MOMENTS, "exp_avg_sq"),
        "exp_avg_sq has values below zero",
    ),
    "a step of the optimizer below zero": (
        put(torch.tensor(-1.0), *MOMENTS, "step"),
        "step is -1.0",
    ),
    "a step that is no number": (put(torch.tensor(torch.nan), *MOMENTS, "step"), "step is nan"),
    "a step beyond the clock": (put(torch.tensor(4.0), *MOMENTS, "step"), "its clock is at step 3"),
    "a step beyond all steps": (put(torch.tensor(1e9), *MOMENTS, "step"), "its clock is at step 3"),
    "a step of one weight": (
        put(torch.tensor(2.0), *MOMENTS, "step"),
        "norm.weight.step is 2, and that of other weights 3",
    ),
    "no step of one weight": (
        put(torch.tensor(0.0), *MOMENTS, "step"),
        "norm.weight.step is 0, and",
    ),
    "half a step": (put(torch.tensor(2.5), *MOMENTS, "step"), "norm.weight.step at 2.5"),
    "a step that is a flag": (put(True, *MOMENTS, "step"), "norm.weight.step is True"),
    "a step that is a tensor of a flag": (
        put(torch.tensor(True), *MOMENTS, "step"),
        "norm.weight.step is a Tensor",
    ),
    "a step of another type": (put(3, *MOMENTS, "step"), "have steps of several types"),
    "two steps": (put(torch.full((2,), 3.0), *MOMENTS, "step"), "norm.weight.step is a Tensor"),
    "no step of any weight": (
        lambda content: [
            state.update(step=torch.tensor(0.0))
            for state in content["state"]["optimizers"]["AdamW"]["state"].values()
        ],
        "step is 0, and there are moments",
    ),
    "a flag of two": (
        put(torch.zeros(2), *GROUP, "differentiable"),
        "have differentiable=a Tensor",
    ),
    "a flag that is set": (put(True, *GROUP, "differentiable"), "have differentiable=True"),
    "another flag that is set": (put(True, *GROUP, "capturable"), "have capturable=True"),
    "a flag that is a number": (put(0, *GROUP, "capturable"), "have capturable=0"),
    "a flag of text": (put("text", *GROUP, "foreach"), "have foreach='text'"),
    "a rate of two": (put(torch.zeros(2), *GROUP, "lr"), "have lr=a Tensor"),
    "decay as Adam has it": (
        put(False, *GROUP, "decoupled_weight_decay"),
        "have decoupled_weight_decay=False",
    ),
    "a schedule of another step": (
        put(2, *CALLBACKS, "Schedule", "num_used"),
        "its clock is at step 3, and its schedule at 2",
    ),
    "the head of one in pieces": (
        lambda content: content.update(
            pieces=[{kind: content["state"].pop(kind) for kind in ("model", "optimizers")}]
        ),
        "not a whole checkpoint: the head of one in pieces",
    ),
    "no step": (drop(*MOMENTS, "step"), f"it has no optimizers.AdamW.state.{WEIGHT}.step"),
    "no parameter groups": (
        drop("state", "optimizers", "AdamW", "param_groups"),
        "it has no AdamW.param_groups",
    ),
    "no betas": (drop(*GROUP, "betas"), "its optimizers.AdamW.param_groups have no betas"),
    "moments of no weight": (
        put(["x"], *GROUP, "params"),
        "param_groups name 'x', which it has no weights of",
    ),
    "a seed that is text": (
        put("x", "state", "dataset_state", "train", "shuffle_seed"),
        "train.shuffle_seed is a str",
    ),
    "no nodes": (
        put(0, "state", "dataset_state", "train", "num_canonical_nodes"),
        "train.num_canonical_nodes is 0",
    ),
    "a place further back": (
        put(8, *ROWS, "sample_in_epoch"),
        "its clock's sample_in_epoch is 12, but its rows' is 8",
    ),
    "a place beyond the data": (
        put(100_000, *ROWS, "sample_in_epoch"),
        "its clock's sample_in_epoch is 12, but its rows' is 100000",
    ),
    "another epoch": (put(1, *ROWS, "epoch"), "its clock's epoch is 0, but its rows' is 1"),
    "an epoch beyond the clock": (
        lambda content: [put(10**9, *path, "epoch")(content) for path in (CLOCK, ROWS)],
        "its clock's epoch is 1000000000, after 3 batches",
    ),
    "another seed": (
        put(99, *ROWS, "shuffle_seed"),
        "its rows have the shuffle_seed 99, and it was trained with train_data.shuffle_seed=7",
    ),
    "another number of nodes": (
        put(10**7, *ROWS, "num_canonical_nodes"),
        "num_canonical_nodes=1; if that was changed on the way, set allow_data_change",
    ),
    "machines of text": (
        put("1", *ROWS, "initial_physical_nodes"),
        "initial_physical_nodes is '1'",
    ),
    "rows of the first epoch missing": (
        put(8, *CLOCK, "sample"),
        "its clock's sample is 8, and its sample_in_epoch 12 in epoch 0",
    ),
    "no clock": (drop("state", "timestamp"), "it has no state.timestamp"),
    "a clock that is text": (put("noon", *CLOCK), "its state.timestamp.Timestamp is a str"),
    "a step that is text": (put("3", *CLOCK, "batch"), "its batch is a str"),
    "a step below zero": (put(-3, *CLOCK, "batch"), "its clock's batch is -3"),
    "a step beyond all": (put(10**30, *CLOCK, "token"), "its clock's token is 1000000000"),
    "a time that is text": (put("1 s", *CLOCK, "batch_wct"), "its clock's batch_wct is a str"),
    "another step": (put(7, *CLOCK, "batch"), "it is of step 7, and not of the 3 in its name"),
    "no callbacks": (drop(*CALLBACKS), "it has no state.callbacks"),
    "no order of data": (drop(*CALLBACKS, "SameData"), "it has no state.callbacks.SameData"),
    "no random state": (drop(*CALLBACKS, "RandomState"), "it has no state.callbacks.RandomState"),
    "random state that is none": (
        put([1], *CALLBACKS, "RandomState", "rng"),
        "its state.callbacks.RandomState.rng is not a random state",
    ),
    "no schedule": (
        drop(*CALLBACKS, "Schedule", "num_used"),
        "it has no state.callbacks.Schedule.num_used",
    ),
    "a schedule of text": (
        put("x", *CALLBACKS, "Schedule", "made_from", "max_duration"),
        "its max_duration is a str",
    ),
    "no log": (
        put(None, *CALLBACKS, "JsonlLog"),
        "it has no state.callbacks.JsonlLog.initial_evaluation",
    ),
    "a callback's state that is none": (
        put(3, *CALLBACKS, "Gradients"),
        "its state.callbacks.Gradients is a int",
    ),
    "no place in the data": (drop("state", "dataset_state"), "it has no state.dataset_state"),
    "a place that is text": (
        put("x", "state", "dataset_state", "train", "epoch"),
        "its state.dataset_state.train.epoch is",
    ),
    "no rng": (drop("rng"), "it has no rng"),
    "algorithms of another kind": (
        put({"a": 1}, "state", "algorithms"),
        "its state.algorithms is a dict",
    ),
    "an average of something else": (
        lambda content: content["state"]["algorithms"].append(
            ("EMA", {"average": {WEIGHT: torch.zeros(2)}})
        ),
        "its average of EMA lacks the names and shapes",
    ),
    "no tokenizer or config": (drop("state", "integrations"), "it has no state.integrations"),
}
OTHERS: dict[str, tuple[Any, str]] = {
    "a weight missing": (
        drop("state", "model", WEIGHT),
        f"it has no weights {WEIGHT}, which this run's model has",
    ),
    "a weight too many": (
        put(torch.zeros(2), "state", "model", "more"),
        "it has weights 'more', which this run's model lacks",
    ),
    "another shape": (
        put(torch.zeros(3), "state", "model", WEIGHT),
        rf"its weights {WEIGHT} have the shape [3], and [32]",
    ),
    "another decay": (
        put(0.25, *GROUP, "weight_decay"),
        (
            "it was trained with another optimizer.weight_decay or optimizer.decay: its optimizer"
            " has weight_decay=0.25 for model.model.embeddings.weight, and this run's"
            " weight_decay=0.01"
        ),
    ),
    "other betas": (put((0.5, 0.5), *GROUP, "betas"), "another optimizer.betas: its optimizer has"),
    "another direction": (put(True, *GROUP, "maximize"), "its optimizer has maximize=True for"),
    "another optimizer": (
        lambda content: content["state"]["optimizers"].update(
            Lamb=content["state"]["optimizers"].pop("AdamW")
        ),
        "its optimizer is Lamb, and this run's AdamW",
    ),
}


def rewrite(file: Path, change: Any) -> None:
    content = torch.load(file, weights_only=False)
    if callable(change):
        change(content)
    else:
        content = change
    torch.save(content, file)


@pytest.mark.parametrize("case", [*CONTENTS, *OTHERS])
def test_a_checkpoint_that_lacks_something_is_named_and_the_one_before_used(
    folder, needed, caplog, case
):
    change, message = {**CONTENTS, **OTHERS}[case]
    rewrite(folder / "ba3.pt", change)
    found = find_newest(str(folder), folder / "staging", needed)
    assert found == Checkpoint(str(folder / "ba2.pt"), folder / "ba2.pt", (str(folder / "ba3.pt"),))
    (line,) = caplog.messages
    assert line.startswith(f"warning: {folder / 'ba3.pt'}: ")
    assert message in line
    assert "\n" not in line
    assert len(line) < 500


def test_a_genuine_checkpoint_holds_all_that_is_needed(folder, needed, caplog):
    found = find_newest(str(folder), folder / "staging", needed)
    assert found == Checkpoint(str(folder / "ba3.pt"), folder / "ba3.pt")
    assert caplog.messages == []
    assert set(needed().weights) == set(read(folder / "ba3.pt")["state"]["model"])


def test_checkpoints_of_another_model_only_are_a_mistake_in_the_configuration(
    folder, needed, caplog
):
    """It is said once, not for each of them."""
    for step in (1, 2, 3):
        rewrite(folder / f"ba{step}.pt", OTHERS["another shape"][0])
    message = (
        f"{folder}: none of its 3 checkpoints is of this run: {folder / 'ba3.pt'}: its weights"
        f" {WEIGHT} have the shape"
    )
    with pytest.raises(
        ConfigError,
        match=f"^{re.escape(message)}.*; set back what changed, or give another run_name",
    ):
        find_newest(str(folder), folder / "staging", needed)
    assert caplog.messages == []


def test_squares_of_gradients_may_be_infinite(folder, needed, caplog):
    """Those of finite ones can be, and a run goes on with them."""
    rewrite(folder / "ba3.pt", put(torch.full((32,), torch.inf), *MOMENTS, "exp_avg_sq"))
    assert find_newest(str(folder), folder / "staging", needed) == Checkpoint(
        str(folder / "ba3.pt"), folder / "ba3.pt"
    )
    assert caplog.messages == []


@pytest.mark.parametrize("says", [{"passed_over": True}, {}], ids=["so", "nothing"])
def test_weights_that_were_passed_over_may_have_taken_fewer_steps(folder, needed, caplog, says):
    """As those of frozen layers and of experts; earlier versions did not note it."""

    def change(content: dict[str, Any]) -> None:
        assert content["state"]["callbacks"]["Gradients"] == {"skipped": 0, "passed_over": False}
        content["state"]["callbacks"]["Gradients"] = {"skipped": 0, **says}
        put(torch.tensor(1.0), *MOMENTS, "step")(content)

    rewrite(folder / "ba3.pt", change)
    assert file_of(find_newest(str(folder), folder / "staging", needed)) == folder / "ba3.pt"
    assert caplog.messages == []
    rewrite(folder / "ba3.pt", put(torch.tensor(4.0), *MOMENTS, "step"))
    assert file_of(find_newest(str(folder), folder / "staging", needed)) == folder / "ba2.pt"


def test_steps_that_were_left_out_are_no_damage(folder, needed, caplog):
    """With on_nan=skip, of all weights alike."""
    rewrite(
        folder / "ba3.pt",
        lambda content: [
            state.update(step=torch.tensor(2.0))
            for state in content["state"]["optimizers"]["AdamW"]["state"].values()
        ],
    )
    assert file_of(find_newest(str(folder), folder / "staging", needed)) == folder / "ba3.pt"
    assert caplog.messages == []


def test_an_order_that_was_changed_on_the_way_is_no_damage(folder, needed, caplog):
    """Earlier versions went on in the old order, and their checkpoints name the new one."""
    rewrite(folder / "ba3.pt", put(99, *ROWS, "shuffle_seed"))
    run = needed()._replace(other_order=True)
    assert file_of(find_newest(str(folder), folder / "staging", lambda: run)) == folder / "ba3.pt"
    assert caplog.messages == []


def test_names_and_content_must_agree(folder, needed, caplog):
    shutil.copy(folder / "ba2.pt", folder / "ba999.pt")
    assert newest(folder) == folder / "ba3.pt"
    assert (
        "ba999.pt: not a checkpoint that can be used: it is of step 2, and not of the 999 in its"
        " name" in caplog.text
    )
    assert meant(folder / "ba999.pt") == folder / "ba999.pt", (
        "one that is named by itself may have any name"
    )


def test_a_folder_is_exported_from_the_newest_that_holds_a_model(folder, caplog):
    torch.save({}, folder / "ba4.pt")
    assert meant(folder) == folder / "ba3.pt"
    assert "ba4.pt: not a checkpoint that can be used: it has no state" in caplog.text


# Old ones


def rotate(folder: Path, num_to_keep: int) -> list[str]:
    SaveCheckpoints(str(folder), folder, batches=1, num_to_keep=num_to_keep).kept.delete_old()
    return sorted(path.name for path in folder.iterdir())


def test_rotation_counts_what_lies_in_the_folder(folder):
    (folder / "notes.txt").touch()
    assert rotate(folder, -1) == ["ba1.pt", "ba2.pt", "ba3.pt", "notes.txt"]
    assert rotate(folder, 3) == ["ba1.pt", "ba2.pt", "ba3.pt", "notes.txt"]
    assert rotate(folder, 2) == ["ba2.pt", "ba3.pt", "notes.txt"]
    assert rotate(folder, 1) == ["ba3.pt", "notes.txt"]


def saver_of(folder: Path, needed: Any, num_to_keep: int = 3) -> SaveCheckpoints:
    start = find_newest(str(folder), folder / "staging", needed)
    saver = SaveCheckpoints(
        str(folder), folder, batches=1, num_to_keep=num_to_keep, start=start, needed=needed
    )
    saver.fit_start(SimpleNamespace(), SimpleNamespace())  # pyright: ignore
    return saver


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("damage", [*DAMAGE, lambda path: torch.save({}, path)])
def test_damaged_checkpoints_that_are_newer_delete_no_good_one(folder, needed, state_at, damage):
    damaged = {"ba8.pt", "ba9.pt", "ba10.pt"}
    for name in damaged:
        shutil.copy(folder / "ba3.pt", folder / name)
        damage(folder / name)
    saver = saver_of(folder, needed)
    assert saver.start.place == str(folder / "ba3.pt")
    for step, kept in ((4, {2, 3, 4}), (5, {3, 4, 5}), (6, {4, 5, 6})):
        saver.save(state_at(step))
        assert names(folder) == damaged | {f"ba{number}.pt" for number in kept}
        assert start(folder) == folder / f"ba{step}.pt"


def test_a_damaged_one_in_the_way_is_set_aside_and_named(folder, needed, state_at, caplog):
    (folder / "ba4.pt").mkdir()
    (folder / "ba4.pt" / "thesis.tex").write_text("mine")
    (folder / "aside-ba4.pt").write_text("from before")
    shutil.copy(folder / "ba3.pt", folder / "ba5.pt")
    rewrite(folder / "ba5.pt", OTHERS["another shape"][0])
    other = (folder / "ba5.pt").read_bytes()
    (folder / "ba6.pt").symlink_to("nowhere")
    saver = saver_of(folder, needed)
    for step in (4, 5, 6):
        saver.save(state_at(step))
        assert start(folder) == folder / f"ba{step}.pt"
    aside = {"aside-ba4.pt", "aside1-ba4.pt", "aside-ba5.pt", "aside-ba6.pt"}
    assert names(folder) == {"ba4.pt", "ba5.pt", "ba6.pt", *aside}
    assert (folder / "aside1-ba4.pt/thesis.tex").read_text() == "mine"
    assert (folder / "aside-ba5.pt").read_bytes() == other, "it may be all there is of another run"
    assert (
        f"warning: {folder / 'ba5.pt'}: was not a checkpoint of this run that can be read; it is"
        " set aside as" in caplog.text
    )


def test_old_ones_count_only_if_they_are_whole(folder, needed, state_at, caplog):
    """And are read once for it, when they have to be."""
    truncate(folder / "ba2.pt")
    saver = saver_of(folder, needed, num_to_keep=3)
    saver.save(state_at(4))
    assert names(folder) == {"ba1.pt", "ba2.pt", "ba3.pt", "ba4.pt"}
    (line,) = caplog.messages
    assert line.startswith(f"warning: {folder / 'ba2.pt'}: not a whole checkpoint")
    assert line.endswith("; it stays, and does not count as one of the 3 that are kept")
    saver.save(state_at(5))
    assert names(folder) == {"ba3.pt", "ba4.pt", "ba5.pt"}
    assert len(caplog.messages) == 1


def test_what_is_known_is_not_read_again_unless_it_changes(
    folder, needed, state_at, monkeypatch, caplog
):
    looked: list[str] = []
    look_at = keep.look_at
    monkeypatch.setattr(
        keep,
        "look_at",
        lambda place, *rest: looked.append(Path(place).name) or look_at(place, *rest),
    )
    saver = saver_of(folder, needed, num_to_keep=2)
    for step in (4, 5, 6):
        saver.save(state_at(step))
    assert looked == []
    assert names(folder) == {"ba5.pt", "ba6.pt"}
    saver = saver_of(folder, needed, num_to_keep=4)
    for step in (7, 8, 9, 10):
        saver.save(state_at(step))
    assert looked == ["ba5.pt"]
    truncate(folder / "ba9.pt")
    saver.save(state_at(11))
    saver.save(state_at(12))
    assert looked == ["ba5.pt", "ba9.pt"]
    assert names(folder) == {"ba8.pt", "ba9.pt", "ba10.pt", "ba11.pt", "ba12.pt"}


def test_a_look_that_takes_long_is_spread_over_several_saves(folder, needed, state_at, monkeypatch):
    monkeypatch.setattr(keep, "VERIFY_SECONDS", -1)
    saver = saver_of(folder, needed, num_to_keep=3)
    saver.save(state_at(4))
    assert names(folder) == {
        "ba1.pt",
        "ba2.pt",
        "ba3.pt",
        "ba4.pt",
    }, "nothing was looked at, so nothing is deleted"
    saver.save(state_at(5))
    assert names(folder) == {"ba3.pt", "ba4.pt", "ba5.pt"}


def test_an_old_one_that_cannot_be_deleted_is_named_once(folder, needed, state_at, caplog):
    (folder / "ba1.pt").unlink()
    (folder / "ba1.pt").mkdir()  # which no one may unlink, not even root
    (folder / "ba1.pt/file").touch()
    saver = saver_of(folder, needed, num_to_keep=2)
    for step in (4, 5):
        saver.save(state_at(step))
    assert names(folder) == {"ba1.pt", "ba4.pt", "ba5.pt"}
    (line,) = caplog.messages
    assert re.fullmatch(
        rf"warning: {re.escape(str(folder / 'ba1.pt'))}: an old checkpoint stays: .*directory.*",
        line,
    )


def test_a_link_is_deleted_and_not_what_it_leads_to(folder, needed, state_at, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("ba1.pt", "ba2.pt"):
        shutil.move(folder / name, other / name)
        (folder / name).symlink_to(other / name)
    saver_of(folder, needed, num_to_keep=1).save(state_at(4))
    assert names(folder) == {"ba4.pt"}
    assert names(other) == {"ba1.pt", "ba2.pt"}


def test_the_log_is_on_disk_before_a_checkpoint_has_its_name(
    folder, state_at, tmp_path, monkeypatch
):
    """What is not on disk by then may be lost with the power, and the checkpoint not."""
    train_log = tmp_path / "log" / "train_log.jsonl"
    train_log.parent.mkdir()
    train_log.write_text("{}\n")
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def named(number: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    monkeypatch.setattr(os, "fsync", named)
    monkeypatch.setattr(
        os, "replace", lambda source, to: done.append(f"= {Path(to).name}") or replace(source, to)
    )
    SaveCheckpoints(str(folder), folder, batches=1, num_to_keep=-1, train_log=train_log).save(
        state_at(4)
    )
    assert done == ["train_log.jsonl", "log", "unfinished-ba4.pt", "= ba4.pt", folder.name]


def test_saving_by_the_clock(folder):
    saver = SaveCheckpoints(str(folder), folder, batches=None, seconds=60, num_to_keep=1)
    assert not saver._is_due(1)
    saver._last_time -= 60
    assert saver._is_due(2)


def test_torsos_of_a_killed_run_are_cleared_at_the_start(folder):
    (folder / "unfinished-ba4.pt").write_bytes(b"x")
    (folder / "unfinished-ba5").mkdir()
    (folder / "unfinished-ba6.pt").symlink_to("ba3.pt")
    mine = {"unfinished-thesis.tex", "unfinished-bach.ly"}
    for name in mine:
        (folder / name).write_text("mine")
    state: Any = SimpleNamespace()
    SaveCheckpoints(str(folder), folder, batches=1, num_to_keep=1).fit_start(state, state)
    assert names(folder) == {"ba1.pt", "ba2.pt", "ba3.pt", *mine}


def test_weights_come_out_bit_for_bit(trained):
    model, tokenizer = load(trained.checkpoints / "ba3.pt")
    loaded = model.state_dict()
    assert loaded.keys() == trained.weights.keys()
    for name, tensor in trained.weights.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert fingerprint(tokenizer) == fingerprint(byte_tokenizer())
    assert model.config.model_type == "gla"
    before = load(trained.checkpoints / "ba1.pt")[0].state_dict()
    assert not all(torch.equal(before[name], tensor) for name, tensor in trained.weights.items()), (
        "training moved them"
    )


def test_an_average_of_the_weights_is_taken_where_there_is_one(trained):
    checkpoint = Checkpoint("ba3.pt", trained.checkpoints / "ba3.pt")
    content = read_checkpoint(checkpoint)
    with pytest.raises(
        ConfigError,
        match=r"^weights=ema: ba3.pt: holds no average of the weights; set weights=model$",
    ):
        model_in(content, checkpoint, "ema")
    name = "model.model.norm.weight"
    average = torch.full_like(content["state"]["model"][name], 0.5)
    content["state"]["algorithms"] = [
        *content["state"]["algorithms"],
        ("EMA", {"average": {name: average}}),
    ]
    for which, expected in (
        ("auto", average),
        ("ema", average),
        ("model", content["state"]["model"][name]),
    ):
        model, _ = model_in(content, checkpoint, which)
        assert torch.equal(model.state_dict()["model.norm.weight"], expected)
    content["state"]["algorithms"] = [("EMA", {"average": None})]  # not begun yet
    model, _ = model_in(content, checkpoint)
    assert torch.equal(
        model.state_dict()["model.norm.weight"], trained.weights["model.norm.weight"]
    )


def test_a_checkpoint_of_something_else(tmp_path):
    for content in ({"state": {"model": {}}}, {}, [1, 2], {"state": 3}):
        torch.save(content, tmp_path / "ba1.pt")
        message = (
            f"{tmp_path / 'ba1.pt'}: not a training checkpoint of this package: it holds no Hugging"
            " Face model"
        )
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            load(tmp_path / "ba1.pt")


def test_load_model_takes_all_that_holds_a_model(trained, tmp_path):
    from_file, tokenizer = load_model(str(trained.checkpoints / "ba3.pt"))
    save_hf_folder(from_file, tokenizer, tmp_path / "hf", dtype="float32")
    for place in (trained.checkpoints, tmp_path / "hf"):
        model, tokenizer = load_model(str(place))
        assert fingerprint(tokenizer) == fingerprint(byte_tokenizer())
        for name, tensor in trained.weights.items():
            assert torch.equal(model.state_dict()[name], tensor), name


def test_a_tokenizer_with_tokens_that_the_model_has_not(trained, tmp_path):
    larger = byte_tokenizer(420)
    model, _ = load(trained.checkpoints / "ba3.pt")
    save_hf_folder(model, larger, tmp_path / "hf", dtype="float32")
    larger.save_pretrained(tmp_path / "tokenizer")
    for place, tokenizer in (
        (tmp_path / "hf", None),
        (trained.checkpoints, str(tmp_path / "tokenizer")),
    ):
        message = (
            f"{tokenizer or place}: its tokenizer has 420 tokens, the model only 400; give the one"
            " it was trained with"
        )
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            load_model(str(place), tokenizer)


def test_an_export_is_whole_or_not_there_and_overwrites_nothing(trained, tmp_path, monkeypatch):
    model, tokenizer = load(trained.checkpoints / "ba3.pt")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in ("used", "file"):
        with pytest.raises(
            ConfigError,
            match=f"^out={re.escape(str(tmp_path / out))}: already exists and is not empty",
        ):
            save_hf_folder(model, tokenizer, tmp_path / out, dtype="float32")
    (tmp_path / "empty").mkdir()
    save_hf_folder(model, tokenizer, tmp_path / "empty", dtype="float32")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "empty").iterdir()
    }
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "empty").iterdir())

    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(DataError, match="cut: cannot be written: No space left"):
        save_hf_folder(model, tokenizer, tmp_path / "cut", dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "used"]


def test_an_export_in_several_files_is_the_same_model(trained, tmp_path):
    model, tokenizer = load(trained.checkpoints / "ba3.pt")
    save_hf_folder(model, tokenizer, tmp_path / "hf", dtype="float32", max_shard_size=20000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    again, _ = load_model(str(tmp_path / "hf"))
    for name, tensor in trained.weights.items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_in_another_type(trained, tmp_path, dtype):
    model, tokenizer = load(trained.checkpoints / "ba3.pt")
    save_hf_folder(model, tokenizer, tmp_path / "hf", dtype=dtype)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensor, trained.weights[name].to(getattr(torch, dtype))), name


def test_weights_that_are_no_numbers_are_named_when_they_are_exported(trained, tmp_path, caplog):
    model, tokenizer = load(trained.checkpoints / "ba3.pt")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
        model.model.embeddings.weight[:2] = -torch.inf
        model.lm_head.weight[0, 0] = 1e5  # more than float16 has
    for dtype, names in (("float32", ()), ("float16", ("lm_head.weight (1)",))):
        save_hf_folder(copy.deepcopy(model), tokenizer, tmp_path / dtype, dtype=dtype)
        (message,) = caplog.messages
        named = ", ".join(("model.embeddings.weight (64)", "model.norm.weight (1)", *names))
        assert (
            message
            == f"warning: {tmp_path / dtype} ({dtype}): values that are infinite or not a number in"
            f" {named}"
        )
        caplog.clear()
    fine, _ = load(trained.checkpoints / "ba3.pt")
    save_hf_folder(fine, tokenizer, tmp_path / "fine", dtype="float16")
    assert caplog.messages == []


def test_checkpoints_are_written_under_another_name_first(folder):
    """A reader never sees a file that is still being written as ba*.pt."""
    shutil.copy(folder / "ba3.pt", folder / "unfinished-ba4.pt")
    assert newest(folder) == folder / "ba3.pt"
