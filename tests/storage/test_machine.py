"""What belongs to one job of a machine: taken by no other while it lives, and gone once it is
dead.
"""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from flame_composer.config.parallelism import ParallelismConfig
from flame_composer.errors import ConfigError
from flame_composer.loader.machine import shared_array
from flame_composer.storage import locks
from flame_composer.storage.folders import private_folder
from flame_composer.train import parallelism

OTHER = 54321  # a user id without a name
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everybody's folder, in place of /tmp."""
    tmp_path.chmod(0o1777)
    for folder in tmp_path.parents[:3]:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def as_other(do: Callable[[], Any]) -> Any:
    """What `do` returns in a process of another user."""

    def work(connection: Any) -> None:
        os.setgroups([])
        os.setgid(OTHER)
        os.setuid(OTHER)
        try:
            connection.send(do())
        except BaseException as error:
            connection.send(error)

    ours, theirs = fork.Pipe()
    process = fork.Process(target=work, args=(theirs,))
    process.start()
    found = ours.recv()
    process.join()
    if isinstance(found, BaseException):
        raise found
    return found


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user, which takes root")


def test_the_private_folder_is_found_again_and_closed(temporary: Path) -> None:
    found = private_folder()
    assert found.parent == temporary
    assert found.stat().st_mode & 0o777 == 0o700
    assert private_folder() == found


def test_a_planted_folder_is_not_used(temporary: Path) -> None:
    """Open to all, or a link, under names that come first."""
    open_to_all, target = temporary / f"flame_composer-{os.geteuid()}-", temporary / "theirs"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    target.mkdir(mode=0o700)
    (temporary / f"flame_composer-{os.geteuid()}-0").symlink_to(target)
    (temporary / f"flame_composer-{os.geteuid()}").mkdir(mode=0o777)
    found = private_folder()
    assert not found.is_symlink()
    assert found.stat().st_mode & 0o777 == 0o700
    assert found not in (open_to_all, target)
    assert not any(target.iterdir())


@needs_root
def test_another_user_s_folder_is_not_used(temporary: Path) -> None:
    planted = temporary / "flame_composer-0-0"
    as_other(lambda: planted.mkdir(mode=0o700))
    assert private_folder() != planted
    assert private_folder().stat().st_uid == 0


@needs_root
def test_one_user_does_not_keep_another_from_sharing_memory(temporary: Path) -> None:
    """Nor reaches into it: where it is cannot be guessed, and nobody else gets in."""

    def attack() -> list[str]:
        refused = []
        for path in (temporary / "taken", folder.path / "memory", folder.path):
            try:
                os.open(path, os.O_RDWR | os.O_CREAT if path != folder.path else os.O_RDONLY)
            except PermissionError:
                refused.append(path.name)
        return refused

    folder = locks.JobFolder()
    memory = shared_array(folder.path / "memory", np.uint8, (8,))
    memory[:4] = 7
    assert as_other(attack) == ["memory", folder.path.name]
    assert memory.tolist() == [7] * 4 + [0] * 4
    theirs = as_other(lambda: str(locks.JobFolder().path.parent))
    assert theirs != str(folder.path.parent), "and they have a folder of their own"


def test_no_temporary_folder_can_be_had(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    (temporary / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "file"))
    message = (
        r"^TMPDIR: no folder can be made in it: .*; set it to a folder that can be written to$"
    )
    with pytest.raises(ConfigError, match=message):
        private_folder()


def test_arrays_are_shared_by_name_and_their_space_is_had_before_it_is_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (shared_array(temporary / "array", np.int64, (2, 3)) for _ in range(2))
    first[:] = [[1, 2, 3], [4, 5, 6]]
    assert second.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert shared_array(temporary / "nothing", np.int64, (0, 3)).shape == (0, 3)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = f"^{temporary}/full: cannot be made: No space left on device; set TMPDIR to a folder"
    with pytest.raises(ConfigError, match=message):
        shared_array(temporary / "full", np.int64, (3,))


def _child(connection: Any) -> None:
    folder = locks.JobFolder()
    connection.send(folder.path)
    connection.recv()


def test_a_job_s_folder_goes_with_it_killed_or_not(temporary: Path) -> None:
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_child, args=(theirs,))
    process.start()
    path = ours.recv()
    mine = locks.JobFolder()
    assert path.exists(), "its job lives"
    assert mine.path != path
    process.kill()
    process.join()
    assert path.exists()
    another = locks.JobFolder()
    assert not path.exists(), "the next job has cleared it away"
    assert mine.path.exists()
    gone = another.path
    del another
    gc.collect()
    assert not gone.exists()
    assert mine.path.exists()


def test_a_lock_is_one_job_s(temporary: Path) -> None:
    lock = locks.hold(temporary / "lock")
    assert lock is not None
    assert locks.hold(temporary / "lock") is None
    os.close(lock)
    assert locks.hold(temporary / "lock") is not None


def test_what_is_planted_at_the_name_of_a_lock_is_passed_over(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "CLAIM_SECONDS", 0.0)
    (temporary / "cache-1.lock").mkdir()
    (temporary / "cache-2.lock").symlink_to(temporary / "elsewhere")
    os.mkfifo(temporary / "cache-3.lock")
    (temporary / "target").mkdir()
    (temporary / "cache-4").symlink_to(temporary / "target")
    assert locks.claim_folder(temporary / "cache") == str(temporary / "cache-5")
    assert not (temporary / "elsewhere").exists()


@needs_root
def test_another_user_s_lock_and_folder_are_passed_over(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "CLAIM_SECONDS", 0.0)

    def plant() -> None:
        (temporary / "cache-1.lock").touch(mode=0o666)
        (temporary / "cache-2").mkdir(mode=0o777)

    as_other(plant)
    assert locks.claim_folder(temporary / "cache") == str(temporary / "cache-3")
    as_other(lambda: (temporary / "x-1.lock").mkdir())
    assert as_other(lambda: locks.claim_folder(temporary / "cache")) == str(
        temporary / "cache-1"
    ), "theirs is theirs to use"


@needs_root
def test_a_place_that_cannot_be_written_to_is_an_error_and_no_endless_search(
    temporary: Path,
) -> None:
    (temporary / "locked").mkdir(mode=0o755)
    began = time.monotonic()
    with pytest.raises(PermissionError):
        as_other(lambda: locks.claim_folder(temporary / "locked" / "cache"))
    assert time.monotonic() - began < 5


def _with_limit(soft: int, hard: int) -> int | str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        return locks.allow_files()
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (64, 4096, locks.WANTED_FILES),
        (64, 100, 100),
        (1024, 1024, 1024),
        (
            24,
            24,
            (
                "ulimit -n: a process may have 24 files open, and this takes 64 or more; raise the"
                " limit"
            ),
        ),
    ],
)
def test_few_files(soft: int, hard: int, expected: int | str) -> None:
    ours, theirs = fork.Pipe()
    process = fork.Process(target=lambda: theirs.send(_with_limit(soft, hard)))
    process.start()
    assert ours.recv() == expected
    process.join()


def test_what_torch_compiles_is_in_the_private_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs what it finds there. A folder that the user has chosen stays."""
    given = default_cache_dir()
    for before, expected in (
        (given, str(private_folder() / "torchinductor")),
        ("/chosen", "/chosen"),
    ):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        parallelism.check_devices(ParallelismConfig(compile=True), precision="fp32")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == expected


def test_a_folder_that_another_job_sweeps_before_it_is_locked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, swept = tempfile.mkdtemp, []

    def make_and_sweep(**options: Any) -> str:
        path = make(**options)
        if options.get("prefix") == "job-" and not swept:
            swept.append(path)
            Path(path).rmdir()
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_sweep)
    folder = locks.JobFolder()
    assert folder.path.is_dir()
    assert str(folder.path) not in swept
    assert len(swept) == 1
