"""What belongs to one job of a machine: taken by no other while it lives, and given to the next once it is dead."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from flame_composer import machine


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm and /tmp, where other jobs are."""
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(machine.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def _child(connection: Any) -> None:
    connection.send(machine._claim_number())
    connection.recv()


def test_a_number_is_one_living_job_s(own_folders: Path) -> None:
    first = (os.getuid() + 1) * 100_000
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_child, args=(theirs,))
    process.start()
    assert ours.recv() == first
    assert machine._claim_number() == first + 1
    process.kill()
    process.join()
    assert machine._claim_number() == first, "free again"


def test_what_a_killed_job_left_is_removed_once_nobody_else_will(own_folders: Path) -> None:
    first = (os.getuid() + 1) * 100_000
    old, new, other = (own_folders / name for name in (f"{first}_locals", f"{first + 1}_resume", "000000_locals"))
    for path in (old, new, other):
        path.write_bytes(b"")
    for path in (old, other):
        os.utime(path, (0, time.time() - 2 * machine.UNLINK_SECONDS))
    assert [machine._claim_number(), machine._claim_number()] == [first, first + 2]
    assert not old.exists()
    assert new.exists()
    assert other.exists(), "not ours"


def test_what_goes_while_it_is_looked_at(own_folders: Path) -> None:
    first = (os.getuid() + 1) * 100_000
    (own_folders / f"{first}_locals").symlink_to(own_folders / "gone")  # is listed, and then is not there
    assert machine._claim_number() == first + 1
