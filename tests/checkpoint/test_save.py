"""Checkpoints that are written while training goes on: what is in them, and when they are there."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flame_composer.checkpoint import write
from flame_composer.checkpoint.agree import agreed
from flame_composer.checkpoint.save import SaveCheckpoints
from flame_composer.checkpoint.snapshot import HostMemory
from flame_composer.errors import ConfigError, InvalidField, StoreError, TrainingError


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Where two checkpoints differ, in a bit or in the type of something."""
    if type(ours) is not type(theirs):
        yield f"{path}: {type(ours)} and {type(theirs)}"
    elif isinstance(ours, torch.Tensor):
        same = (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and ours.stride() == theirs.stride()
            and ours.requires_grad == theirs.requires_grad
            and ours.contiguous().view(-1).view(torch.uint8).tolist()
            == theirs.contiguous().view(-1).view(torch.uint8).tolist()
        )
        if not same:
            yield f"{path}: another tensor"
    elif isinstance(ours, dict):
        if list(ours) != list(theirs):
            yield f"{path}: {list(ours)} and {list(theirs)}"
        for key in ours.keys() & theirs.keys():
            yield from differences(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            yield f"{path}: {len(ours)} and {len(theirs)} parts"
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
            yield from differences(mine, other, f"{path}.{number}")
    elif isinstance(ours, np.ndarray):
        if ours.dtype != theirs.dtype or not np.array_equal(ours, theirs):
            yield f"{path}: another array"
    elif ours != theirs and not (ours != ours and theirs != theirs):  # noqa: PLR0124
        yield f"{path}: {ours!r} and {theirs!r}"


def read(file: Path) -> Any:
    return torch.load(file, weights_only=False)


class Held:
    """Checkpoints are not written before `go` is set; `begun` is set when the first would be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun, self.go = threading.Event(), threading.Event()
        save = torch.save

        def held(*args: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.begun.set()
                assert self.go.wait(60)
            save(*args)

        monkeypatch.setattr(torch, "save", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(monkeypatch)
    yield made
    made.go.set()


def saver_in(folder: Path, *, in_background: bool = True, **more: Any) -> SaveCheckpoints:
    saver = SaveCheckpoints(
        str(folder), folder, batches=1, num_to_keep=-1, in_background=in_background, **more
    )
    saver.fit_start(SimpleNamespace(), SimpleNamespace())  # pyright: ignore
    return saver


def test_a_checkpoint_is_of_the_moment_at_which_it_was_due(
    state_at: Callable[[int], Any], tmp_path: Path, held: Held
) -> None:
    """Whatever becomes of weights, moments, clock and random numbers while it is written."""
    state = state_at(4)
    saver_in(tmp_path / "now", in_background=False).save(state)
    saver = saver_in(tmp_path / "later")
    saver.save(state)
    assert held.begun.wait(60)
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    moments = [part for each in state.optimizers[0].state.values() for part in each.values()]
    kept = [part.clone() for part in moments]
    try:
        with torch.no_grad():
            for tensor in (*state.model.parameters(), *moments):
                tensor.add_(1)
        torch.rand(7)
        state_at(5)
        held.go.set()
        saver.wait()
    finally:
        with torch.no_grad():
            for tensor, value in zip(
                (*state.model.parameters(), *moments), (*before, *kept), strict=True
            ):
                tensor.copy_(value)
    now, later = (tmp_path / name / "ba4.pt" for name in ("now", "later"))
    assert list(differences(read(later), read(now))) == []
    assert later.stat().st_size == now.stat().st_size


def test_a_name_appears_when_the_checkpoint_is_whole(
    state_at: Callable[[int], Any], tmp_path: Path, held: Held
) -> None:
    saver = saver_in(tmp_path)
    saver.save(state_at(4))
    assert held.begun.wait(60)
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished-ba4.pt"]
    assert saver.saved is None
    saver.save(state_at(4))  # as at SIGTERM: there is no need to save this batch again
    held.go.set()
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["ba4.pt"]
    assert saver.saved == str(tmp_path / "ba4.pt")
