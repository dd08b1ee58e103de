"""Checkpoints that are written in the background: what is in them, and when they are there."""

from __future__ import annotations

import copy
import io
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flame_composer.agree import agreed
from flame_composer.checkpoint import snapshot
from flame_composer.checkpoint.save import SaveCheckpoints
from flame_composer.checkpoint.sharded import Share
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
    elif ours != theirs and not (ours != ours and theirs != theirs):
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


def test_what_prevented_a_checkpoint_is_raised_once_and_the_next_is_saved(
    state_at: Callable[[int], Any], tmp_path: Path
) -> None:
    saver = saver_in(tmp_path)
    (tmp_path / "unfinished-ba4.pt").mkdir()
    saver.save(state_at(4))
    with pytest.raises(TrainingError, match=r"ba4\.pt: cannot be saved: ") as caught:
        saver.save(state_at(5))
    assert "\n" not in str(caught.value)
    assert not saver.has_failed()
    saver.save(state_at(5))
    saver.wait()
    assert (tmp_path / "ba5.pt").is_file()


def test_a_run_that_ends_for_another_reason_has_its_last_checkpoint(
    state_at: Callable[[int], Any],
    tmp_path: Path,
    held: Held,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saver = saver_in(tmp_path)
    saver.save(state_at(4))
    threading.Timer(0.2, held.go.set).start()
    saver.close(SimpleNamespace(), SimpleNamespace())  # pyright: ignore
    assert (tmp_path / "ba4.pt").is_file()
    (tmp_path / "unfinished-ba5.pt").mkdir()
    saver.save(state_at(5))
    saver.close(SimpleNamespace(), SimpleNamespace())  # pyright: ignore
    (line,) = caplog.messages
    assert line.startswith(
        f"warning: the last checkpoint may not be saved: {tmp_path}/ba5.pt: cannot be saved: "
    )


def test_pieces_on_a_disk_of_another_machine_are_no_checkpoint(tmp_path: Path) -> None:
    """With a save_folder that every machine has for itself."""
    saver = saver_in(tmp_path)
    answers = iter([(1, "fingerprint"), None])
    with pytest.raises(TrainingError, match=r"ba4: cannot be saved: piece1\.pt is on another mach"):
        saver.files.write(
            Share({"state": {}}, {"model": {}}, 0, 2),
            str(tmp_path / "ba4"),
            lambda mine: [mine, next(answers)],
        )
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished-ba4"]


TENSORS: list[Callable[[], torch.Tensor]] = [
    lambda: torch.randn(3, 4),
    lambda: torch.randn(5, 6).t(),
    lambda: torch.randn(4, 6)[:, ::2],
    lambda: torch.randn(7).to(torch.bfloat16),
    lambda: torch.tensor(3.5, dtype=torch.float64),
    lambda: torch.empty(0, 3),
    lambda: torch.tensor([True, False]),
    lambda: torch.arange(1000),
    lambda: torch.randn(1).expand(4),
]
LEAVES = st.sampled_from(TENSORS).map(lambda make: make()) | st.integers() | st.text(max_size=3)
TREES = st.recursive(
    LEAVES,
    lambda below: (
        st.lists(below, max_size=4)
        | st.tuples(below, below)
        | st.dictionaries(st.text(max_size=3), below, max_size=4)
    ),
    max_leaves=12,
)


@given(first=TREES, second=TREES, slab=st.sampled_from([1, 4096, 1 << 30]))
def test_a_copy_is_the_same_and_nobody_elses(first: Any, second: Any, slab: int) -> None:
    memory = HostMemory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "SLAB", slab)
        for tree in (first, first, second, [first, second, first]):
            before = copy.deepcopy(tree)
            found = memory.copy(tree)
            file, plain = io.BytesIO(), io.BytesIO()
            torch.save(found, file)
            torch.save(copy.deepcopy(found), plain)
            for tensor in snapshot._tensors(tree, None):
                if tensor.dtype != torch.bool and tensor.numel() and 0 not in tensor.stride():
                    tensor.add_(1)
            assert list(differences(dense(found), dense(before))) == []
            assert file.tell() < plain.tell() + 4096, "no more is saved than the values"


def dense(tree: Any) -> Any:
    """The tree with tensors that have gaps, or values several times, laid out anew."""
    if isinstance(tree, torch.Tensor):
        return torch.empty_like(tree).copy_(tree)
    if isinstance(tree, dict):
        return {key: dense(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(dense, tree))
    return tree


def test_a_state_that_does_not_fit_twice_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "SLAB", 1 << 60)
    big = torch.empty(1).expand(1 << 52)  # a tensor of 18 PB, of a single value
    with pytest.raises(TrainingError) as caught:
        HostMemory().copy({"big": big})
    assert re.fullmatch(
        r"no room for a copy of the state, 18,?\d* [TP]B of host memory: .*can't allocate memory.*;"
        r" set save_async=false, which makes none",
        str(caught.value),
    )


def test_memory_is_taken_once_and_shared_values_are_copied_once() -> None:
    weight = torch.randn(100, 100)
    state = {"tied": weight, "other": weight.detach(), "row": weight[1], "text": ["constant"]}
    memory = HostMemory()
    first = memory.copy(state, state["text"])
    assert first["tied"].data_ptr() == first["other"].data_ptr() != weight.data_ptr()
    assert first["text"] is state["text"]
    assert memory.size == 4 * (100 * 100 + 100)
    second = memory.copy(state)
    assert second["tied"].data_ptr() == first["tied"].data_ptr()
    assert second["text"] is not state["text"]
    grown = memory.copy({**state, "more": torch.ones(3)})
    assert torch.equal(grown["tied"], weight)
    assert memory.size == 4 * (100 * 100 + 100 + 3)


@pytest.mark.parametrize(
    ("error", "other"),
    [
        (StoreError("s3://x: gone"), (StoreError, "s3://x: gone")),
        (TrainingError("ba4.pt: cannot be saved"), (TrainingError, "ba4.pt: cannot be saved")),
        (InvalidField("key", "rule"), (ConfigError, "key: rule")),
        (KeyError("x"), (TrainingError, "another rank failed: 'x'")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_one_rank_raises_all_raise(
    error: Exception, other: tuple[type[Exception], str]
) -> None:
    ranks = threading.Barrier(3)
    said: dict[int, Any] = {}
    raised: dict[int, Exception] = {}

    def run(rank: int) -> None:
        def gather(mine: Any) -> list[Any]:
            said[rank] = pickle.dumps(mine)
            ranks.wait(30)
            return [pickle.loads(said[number]) for number in range(3)]  # noqa: S301

        def answer() -> int:
            if rank == 1:
                raise error
            return rank

        try:
            agreed(gather, answer)
        except Exception as caught:
            raised[rank] = caught

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised[1] is error
    assert [(type(raised[rank]), str(raised[rank])) for rank in (0, 2)] == [other, other]
