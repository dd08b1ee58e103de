"""Checkpoints of a real run: which one is taken, what is refused, and that the weights come out as they went in."""

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

from flame_composer.checkpoint import (
    Checkpoint,
    SaveCheckpoints,
    find_checkpoint,
    find_newest,
    find_start,
    list_checkpoints,
    load_from_checkpoint,
    load_model,
    model_in,
    read_checkpoint,
    save_hf_folder,
)
from flame_composer.config import ConfigError, DataError
from flame_composer.tokenizer import fingerprint
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
    assert sorted(path.name for path in trained.checkpoints.iterdir()) == ["ba1.pt", "ba2.pt", "ba3.pt"]


def test_newest_first_by_number_and_nothing_else_counts(tmp_path):
    others = ("unfinished-ba200.pt", "ba300.pt.tmp", "ba.pt", "ba-1.pt", "xba7.pt", "ba7.txt")
    for name in ("ba9.pt", "ba10.pt", "ba100.pt", *others):
        (tmp_path / name).touch()
    assert list_checkpoints(str(tmp_path)) == [str(tmp_path / f"ba{step}.pt") for step in (100, 10, 9)]
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


DAMAGE: list[Callable[[Path], None]] = [
    truncate, lose_the_last_byte, flip_a_bit, empty, text, other_zip, dangling_link, a_folder,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_falls_back_over_a_damaged_checkpoint_and_names_it(folder, caplog, damage):
    damage(folder / "ba3.pt")
    with caplog.at_level(logging.WARNING, "flame_composer.checkpoint"):
        assert newest(folder) == folder / "ba2.pt"
    (message,) = caplog.messages
    assert message.startswith(f"warning: {folder / 'ba3.pt'}: ")
    assert message.endswith("; trying the one before it")
    assert "\n" not in message
    with pytest.raises(DataError, match=f"^{re.escape(str(folder / 'ba3.pt'))}: ") as caught:
        read(folder / "ba3.pt")
    assert "\n" not in str(caught.value)


def test_falls_back_more_than_once(folder, caplog):
    flip_a_bit(folder / "ba3.pt")
    truncate(folder / "ba2.pt")
    assert newest(folder) == folder / "ba1.pt"
    assert [re.findall(r"ba\d\.pt", message)[0] for message in caplog.messages] == ["ba3.pt", "ba2.pt"]


def test_a_whole_checkpoint_gives_no_warning(folder, caplog):
    assert newest(folder) == folder / "ba3.pt"
    assert caplog.messages == []


def test_all_damaged_is_an_error_not_a_fresh_start(folder):
    for path in folder.iterdir():
        truncate(path)
    message = f"{folder}: none of its 3 checkpoints can be read; move them away (or set another run_name) to start over"
    for find in (newest, meant, start):
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            find(folder)


def test_where_a_run_starts(folder, tmp_path):
    assert start(folder, autoresume=True) == folder / "ba3.pt"
    assert start(tmp_path / "nowhere", autoresume=True) is None
    assert start(tmp_path / "nowhere", autoresume=False) is None
    message = (
        f"{folder}: holds checkpoints of an earlier run (ba3.pt); set autoresume=true to go on from them, or another "
        "run_name or save_folder"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        start(folder, autoresume=False)


def test_finding_the_checkpoint_that_is_meant(folder, tmp_path):
    assert meant(folder) == folder / "ba3.pt"
    assert meant(folder / "ba1.pt") == folder / "ba1.pt"
    shutil.copytree(folder, tmp_path / "run/checkpoints")
    message = f"{tmp_path}/run: a folder without checkpoints (ba*.pt); did you mean {tmp_path}/run/checkpoints?"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        meant(tmp_path / "run")
    (tmp_path / "none").mkdir()
    for name, what in (("none", "a folder without checkpoints (ba*.pt)"), ("no", "no such file or folder")):
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
        with pytest.raises(DataError, match=r"ba4\.pt: (refused, it holds something other than|not a whole checkpoint)"):
            attempt(folder / "ba4.pt")
    assert newest(folder) == folder / "ba3.pt"
    assert "ba4.pt" in caplog.text
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))  # noqa: S301
    assert marker.exists(), "the trap works"


def rotate(folder: Path, num_to_keep: int) -> list[str]:
    SaveCheckpoints(str(folder), folder, batches=1, num_to_keep=num_to_keep)._rotate()
    return sorted(path.name for path in folder.iterdir())


def test_rotation_counts_what_lies_in_the_folder(folder):
    (folder / "notes.txt").touch()
    assert rotate(folder, -1) == ["ba1.pt", "ba2.pt", "ba3.pt", "notes.txt"]
    assert rotate(folder, 3) == ["ba1.pt", "ba2.pt", "ba3.pt", "notes.txt"]
    assert rotate(folder, 2) == ["ba2.pt", "ba3.pt", "notes.txt"]
    assert rotate(folder, 1) == ["ba3.pt", "notes.txt"]


def test_saving_by_the_clock(folder):
    saver = SaveCheckpoints(str(folder), folder, batches=None, seconds=60, num_to_keep=1)
    assert not saver._is_due(1)
    saver._last_time -= 60
    assert saver._is_due(2)


def test_torsos_of_a_killed_run_are_cleared_at_the_start(folder):
    (folder / "unfinished-ba4.pt").write_bytes(b"x")
    state: Any = SimpleNamespace()
    SaveCheckpoints(str(folder), folder, batches=1, num_to_keep=1).fit_start(state, state)
    assert sorted(path.name for path in folder.iterdir()) == ["ba1.pt", "ba2.pt", "ba3.pt"]


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
    assert not all(torch.equal(before[name], tensor) for name, tensor in trained.weights.items()), "training moved them"


def test_an_average_of_the_weights_is_taken_where_there_is_one(trained):
    checkpoint = Checkpoint("ba3.pt", trained.checkpoints / "ba3.pt")
    content = read_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match=r"^weights=ema: ba3.pt: holds no average of the weights; set weights=model$"):
        model_in(content, checkpoint, "ema")
    name = "model.model.norm.weight"
    average = torch.full_like(content["state"]["model"][name], 0.5)
    content["state"]["algorithms"] = [*content["state"]["algorithms"], ("EMA", {"average": {name: average}})]
    for which, expected in (("auto", average), ("ema", average), ("model", content["state"]["model"][name])):
        model, _ = model_in(content, checkpoint, which)
        assert torch.equal(model.state_dict()["model.norm.weight"], expected)
    content["state"]["algorithms"] = [("EMA", {"average": None})]  # not begun yet
    model, _ = model_in(content, checkpoint)
    assert torch.equal(model.state_dict()["model.norm.weight"], trained.weights["model.norm.weight"])


def test_a_checkpoint_of_something_else(tmp_path):
    for content in ({"state": {"model": {}}}, {}, [1, 2], {"state": 3}):
        torch.save(content, tmp_path / "ba1.pt")
        message = f"{tmp_path / 'ba1.pt'}: not a training checkpoint of this package: it holds no Hugging Face model"
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
    for place, tokenizer in ((tmp_path / "hf", None), (trained.checkpoints, str(tmp_path / "tokenizer"))):
        message = f"{tokenizer or place}: its tokenizer has 420 tokens, the model only 400; give the one it was trained with"
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            load_model(str(place), tokenizer)


def test_an_export_is_whole_or_not_there_and_overwrites_nothing(trained, tmp_path, monkeypatch):
    model, tokenizer = load(trained.checkpoints / "ba3.pt")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in ("used", "file"):
        with pytest.raises(ConfigError, match=f"^out={re.escape(str(tmp_path / out))}: already exists and is not empty"):
            save_hf_folder(model, tokenizer, tmp_path / out, dtype="float32")
    (tmp_path / "empty").mkdir()
    save_hf_folder(model, tokenizer, tmp_path / "empty", dtype="float32")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "empty").iterdir()}
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
        assert message == f"warning: {tmp_path / dtype} ({dtype}): values that are infinite or not a number in {named}"
        caplog.clear()
    fine, _ = load(trained.checkpoints / "ba3.pt")
    save_hf_folder(fine, tokenizer, tmp_path / "fine", dtype="float16")
    assert caplog.messages == []


def test_checkpoints_are_written_under_another_name_first(folder):
    """A reader never sees a file that is still being written as ba*.pt."""
    shutil.copy(folder / "ba3.pt", folder / "unfinished-ba4.pt")
    assert newest(folder) == folder / "ba3.pt"
