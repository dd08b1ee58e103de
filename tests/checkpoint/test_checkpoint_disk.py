"""Checkpoints in folders that cannot be read or written, that others use, or that a kill left in
between.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flame_composer.checkpoint.find import find_newest
from flame_composer.checkpoint.names import list_checkpoints
from flame_composer.checkpoint.save import SaveCheckpoints
from flame_composer.errors import ConfigError, DataError, TrainingError
from flame_composer.storage import files
from flame_composer.storage.filesystems import local_stat
from flame_composer.train.preemption import lock_folders
from tests.conftest import Run
from tests.train.test_parallelism import as_pieces
from tests.train.test_preemption import small_disk

GOES_ON = "the same command goes on from what was saved last"


@pytest.fixture
def folder(trained: Run, copy_of: Callable[[Path], Path]) -> Path:
    """ba1.pt, ba2.pt and ba3.pt, to damage."""
    return copy_of(trained.checkpoints)


@contextmanager
def another_user() -> Iterator[None]:
    """In the body this process has the rights of nobody."""
    if os.geteuid() != 0:
        yield  # which has no more rights than nobody over what it has shut to itself
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def opened_up(path: Path) -> None:
    """Let other users reach a folder of the tests."""
    for each in (path, *path.parents):
        if each.owner() == path.owner() and each != Path("/tmp"):
            each.chmod(0o755)


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_that_may_not_be_read_is_no_fresh_start(folder: Path, mode: int) -> None:
    """Nor where only the names in it may be seen, or what is above it is shut."""
    opened_up(folder)
    below = folder / "below"
    shutil.copytree(folder, below)
    for shut, place in ((folder, folder), (folder, below)):
        shut.chmod(mode)
        try:
            with another_user(), pytest.raises((ConfigError, DataError)) as caught:
                find_newest(str(place), folder / "staging")
        finally:
            shut.chmod(0o755)
        assert str(caught.value) in (
            f"{place}: cannot be read: Permission denied; let this user read it",
            (
                f"{place}: none of its 3 checkpoints can be read; move them away (or set another"
                " run_name) to start over"
            ),
        )


def test_pieces_that_may_not_be_read_are_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened_up(folder)
    as_pieces(folder / "ba3.pt").chmod(0o444)
    try:
        with another_user():
            start = find_newest(str(folder), folder / "staging")
    finally:
        (folder / "ba3").chmod(0o755)
    assert start is not None
    assert start.place == str(folder / "ba2.pt")
    (line,) = caplog.messages
    said = (
        rf"warning: {folder / 'ba3'}: not a whole checkpoint: .*Permission denied.*; trying the one"
        r" before it"
    )
    assert re.fullmatch(said, line)


def test_a_disk_that_cannot_be_written_is_named_with_the_checkpoint(
    folder: Path, state_at: Callable[[int], Any], tmp_path: Path
) -> None:
    saver = SaveCheckpoints(str(folder), folder, batches=1, num_to_keep=3)
    opened_up(folder)
    with another_user(), pytest.raises(TrainingError) as caught:
        saver.save(state_at(4))
    assert (
        str(caught.value) == f"{folder / 'ba4.pt'}: cannot be saved: Permission denied; {GOES_ON}"
    )
    assert {path.name for path in folder.iterdir()} == {"ba1.pt", "ba2.pt", "ba3.pt"}


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk takes root to mount")
def test_a_full_disk_leaves_what_was_saved(
    folder: Path, state_at: Callable[[int], Any], tmp_path: Path
) -> None:
    place, size = tmp_path / "small", (folder / "ba3.pt").stat().st_size
    with small_disk(place, f"{3 * size // 2 // 1024}k"):
        shutil.copy(folder / "ba3.pt", place)
        saver = SaveCheckpoints(str(place), place, batches=1, num_to_keep=1)
        with pytest.raises(TrainingError) as caught:
            saver.save(state_at(4))
        said = (
            rf"{place / 'ba4.pt'}: cannot be saved: (is the disk full\?|No space left on device);"
            rf" {GOES_ON}"
        )
        assert re.fullmatch(said, str(caught.value))
        assert list_checkpoints(str(place)) == [str(place / "ba3.pt")]
        saver.fit_start(None, None)  # pyright: ignore
        assert [path.name for path in place.iterdir()] == ["ba3.pt"]


def test_a_kill_while_pieces_are_deleted_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever instant it is: what is left is cleared away by the next start, and is a
    checkpoint until then or none.
    """
    as_pieces(folder / "ba1.pt")
    saver = SaveCheckpoints(str(folder), folder, batches=1, num_to_keep=2)
    with monkeypatch.context() as patch:

        def killed(place: Any, *_: Any, **__: Any) -> None:
            (Path(place) / "state.pt").unlink()
            raise KeyboardInterrupt

        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            saver.kept.delete_old()
    assert list_checkpoints(str(folder)) == [str(folder / "ba3.pt"), str(folder / "ba2.pt")]
    nothing: Any = None
    SaveCheckpoints(str(folder), folder, batches=1, num_to_keep=2).fit_start(nothing, nothing)
    assert {path.name for path in folder.iterdir()} == {"ba2.pt", "ba3.pt"}


def test_pieces_without_a_head_are_deleted_when_enough_newer_ones_are_whole(folder: Path) -> None:
    """As a kill of an earlier version while it deleted has left them; a folder of something else
    stays.
    """
    for name in ("ba0", "ba10"):
        shutil.copytree(
            as_pieces(Path(shutil.copy(folder / "ba1.pt", folder / f"copy-{name}.pt"))),
            folder / name,
        )
        shutil.rmtree(folder / f"copy-{name}")
        (folder / name / "state.pt").unlink()
    (folder / "ba1").mkdir()
    (folder / "ba1/piece0.pt").touch()
    (folder / "ba1/thesis.tex").write_text("mine")
    (folder / "ba2").mkdir()
    saver = SaveCheckpoints(str(folder), folder, batches=1, num_to_keep=4)
    saver.kept.delete_old()
    assert {path.name for path in folder.iterdir()} == {
        "ba0",
        "ba10",
        "ba1",
        "ba2",
        "ba1.pt",
        "ba2.pt",
        "ba3.pt",
    }
    saver.kept.num_to_keep = 2
    saver.kept.delete_old()
    assert {path.name for path in folder.iterdir()} == {"ba10", "ba1", "ba2", "ba2.pt", "ba3.pt"}
    assert (folder / "ba1/thesis.tex").read_text() == "mine"


def test_a_checkpoint_that_somebody_else_deletes_meanwhile_ends_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stat = files.stat

    def deleted_meanwhile(place: str) -> Any:
        if place.endswith("ba2.pt"):
            Path(place).unlink(missing_ok=True)
            return local_stat(place)
        return stat(place)

    monkeypatch.setattr(files, "stat", deleted_meanwhile)
    SaveCheckpoints(str(folder), folder, batches=1, num_to_keep=2).kept.delete_old()
    assert {path.name for path in folder.iterdir()} == {"ba1.pt", "ba3.pt"}
    (line,) = caplog.messages
    assert line.startswith(f"warning: {folder}: no old checkpoint is deleted this time: ")


def test_two_runs_do_not_save_in_one_folder(tmp_path: Path) -> None:
    """The one would set aside, replace and delete what the other saves."""
    shared, link = tmp_path / "checkpoints", tmp_path / "link"
    link.symlink_to("checkpoints")
    logs = [tmp_path / "a", tmp_path / "b"]
    for each in (shared, *logs):
        each.mkdir()
    locks = lock_folders(str(logs[0]), str(shared))
    assert set(locks) == {logs[0], shared}
    for place in (shared, link):
        with pytest.raises(
            ConfigError,
            match=f"^{place}: another process is training this run; wait until it has ended, or",
        ):
            lock_folders(str(logs[1]), str(place), seconds=0)
    assert lock_folders(
        str(logs[0]), str(link), held={logs[0]: locks[logs[0]], link: locks[shared]}, seconds=0
    )
    for lock in locks.values():
        assert lock is not None
        lock.release()
    (lock,) = lock_folders(str(shared), str(link), seconds=0).values()
    assert lock is not None, "one folder for both is no other run"
    lock.release()
    assert set(lock_folders(str(logs[0]), "s3://data/run")) == {logs[0]}


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    opened_up(tmp_path)
    message = (
        f"^{tmp_path}/?: is in use by this run, but cannot be written to: it belongs to user 0;"
        " this is user 65534; give this run "
    )
    tmp_path.chmod(0o555)
    try:
        with another_user(), pytest.raises(ConfigError, match=message):
            lock_folders(str(tmp_path), None, seconds=0)
    finally:
        tmp_path.chmod(0o755)
