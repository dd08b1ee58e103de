"""What another user plants in a folder: links, pipes, files and folders under names that can be
guessed. Nothing is written through them, waited for, or taken for ours.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import resource
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flame_composer.checkpoint.save import SaveCheckpoints
from flame_composer.cleaning.parts import PartsFolder, PartWriter, read_part
from flame_composer.dataset.manifest import read_manifest
from flame_composer.errors import ConfigError, DataError, TrainingError
from flame_composer.loader.datasets import open_for_model
from flame_composer.storage import files, locks
from flame_composer.storage.folders import new_folder
from flame_composer.storage.local import create
from flame_composer.text import hub
from flame_composer.train.preemption import lock_folders, lock_run
from flame_composer.train.rows import appending, keep_rows, writing
from tests.conftest import make_run
from tests.data_fixtures import byte_tokenizer
from tests.loader.test_fetch import as_user, loader_of, remote_of, rows_of, shards_of, stream
from tests.runs import Corpus, Script

OTHER = 54321  # a user id without a name
SECRET = "precious"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user, which takes root")


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A pipe that is waited for is an error, and no test that hangs."""

    def end(*_: object) -> None:
        raise AssertionError("waited for a pipe")  # and no OSError, which may be answered

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def everybody_s(tmp_path: Path) -> Path:
    """As /tmp."""
    for folder in (*tmp_path.parents, tmp_path):
        temporary = Path(tempfile.gettempdir())
        if folder.is_relative_to(temporary) and folder != temporary:
            folder.chmod(0o755)
    tmp_path.chmod(0o1777)
    return tmp_path


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text(SECRET)
    return path


def plant_folder(path: Path, mode: int = 0o777) -> Path:
    """Have another user make a folder."""

    def make() -> None:
        path.mkdir(parents=True)
        path.chmod(mode)

    assert as_user(OTHER, make) is None
    return path


# Files that are made anew


def test_a_link_at_the_name_of_a_temporary_is_not_written_through(
    tmp_path: Path, victim: Path
) -> None:
    place = tmp_path / "config.yaml"
    for do in (
        lambda: files.write(str(place), b"ours"),
        lambda: files.put(tmp_path / "local", str(place)),
    ):
        (tmp_path / "local").write_bytes(b"ours")
        (tmp_path / "config.yaml.tmp").symlink_to(victim)
        do()
        assert place.read_bytes() == b"ours"
        assert not place.is_symlink()
        assert victim.read_text() == SECRET
        place.unlink()
        os.mkfifo(tmp_path / "config.yaml.tmp")
        do()
        assert place.read_bytes() == b"ours"


def test_a_link_that_comes_again_and_again_ends_in_an_error(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, unlink = tmp_path / "file", os.unlink

    def unlink_in_vain(path: Any) -> None:
        if os.path.lexists(path):
            unlink(path)
        os.symlink(victim, path)

    monkeypatch.setattr(os, "unlink", unlink_in_vain)
    with pytest.raises(FileExistsError):
        create(place)
    assert victim.read_text() == SECRET


@pytest.mark.parametrize("compression", ["zst", "gz", "none"])
def test_a_part_is_not_written_through_a_link(
    tmp_path: Path, victim: Path, compression: str
) -> None:
    suffix = "" if compression == "none" else f".{compression}"
    contents = []
    for name in ("a", "b"):
        path = tmp_path / name / f"00000.jsonl{suffix}"
        path.parent.mkdir()
        if name == "b":
            path.with_name(f"{path.name}.tmp").symlink_to(victim)
        writer = PartWriter(path)
        writer.write("1", "text")
        writer.commit()
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert victim.read_text() == SECRET
    if compression == "zst":
        assert list(read_part(path)) == [("1", "text")]


# Conversions


def parts_folder(out: Path) -> PartsFolder:
    return PartsFolder("out", str(out), {"compression": "none"}, {}, ())


def test_the_plan_of_a_cleaning_is_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "out/.work").mkdir(parents=True)
    (tmp_path / "out/.work/plan.json.tmp").symlink_to(victim)
    folder = parts_folder(tmp_path / "out")
    assert folder.finished() is None
    folder.begin()
    assert victim.read_text() == SECRET
    assert json.loads((folder.work / "plan.json").read_bytes())["num_units"] == 0


@pytest.mark.parametrize("name", [".work", ".work/documents", "documents"])
def test_a_cleaning_does_not_work_in_a_folder_that_a_link_leads_to(
    tmp_path: Path, name: str
) -> None:
    folder = parts_folder(tmp_path / "out")
    folder.begin()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "documents").mkdir(parents=True)
    (elsewhere / "documents/mine").write_text(SECRET)
    if name == ".work":
        shutil.rmtree(folder.work)
    (tmp_path / "out" / name).symlink_to(elsewhere)
    with pytest.raises(
        ConfigError,
        match=rf"^out: {tmp_path}/out/{name}: is a link, not a folder, or another user's;",
    ):
        folder.finished()
    assert (elsewhere / "documents/mine").read_text() == SECRET
    assert [path.name for path in elsewhere.rglob("*")] == ["documents", "mine"]


@needs_root
def test_a_cleaning_does_not_work_in_another_user_s_folder(everybody_s: Path) -> None:
    theirs = plant_folder(everybody_s / "theirs")
    message = rf"^out: {theirs}: belongs to user {OTHER}, this is 0, and everybody may write in it;"
    with pytest.raises(ConfigError, match=message):
        parts_folder(theirs).finished()
    ours = everybody_s / "ours"
    ours.mkdir()
    ours.chmod(0o777)
    plant_folder(ours / ".work", 0o755)
    with pytest.raises(
        ConfigError, match=r"^out: .*/ours/\.work: is a link, not a folder, or another"
    ):
        parts_folder(ours).finished()


@needs_root
@pytest.mark.parametrize("name", ["", "units", "tmp"])
def test_a_conversion_does_not_write_in_another_user_s_folder(
    corpus: Corpus, everybody_s: Path, name: str
) -> None:
    out, victim = everybody_s / "out", everybody_s / "victim"
    victim.mkdir()
    if name:
        out.mkdir()
        (out / name).symlink_to(victim)
        rule = f"{out}/{name}: is a link, not a folder, or another user's;"
    else:
        plant_folder(out)
        rule = f"{out}: belongs to user {OTHER}, this is 0, and everybody may write in it;"
        (out / "plan.json.tmp").symlink_to(victim)
    ended = Script(
        "convert/to_mds.py",
        f"source={corpus.text}",
        f"tokenizer={corpus.tokenizer}",
        "context_length=64",
        f"out={out}",
    ).wait()
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith(f"error: out: {rule}")
    assert not any(victim.iterdir())
    assert [path.name for path in out.iterdir()] == [name or "plan.json.tmp"]


def test_a_tokenizer_is_not_written_through_a_link(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / ".tok.tmp").symlink_to(tmp_path / "victim")
    ended = Script(
        "convert/train_tokenizer.py",
        f"source={corpus.text}",
        f"out={tmp_path / 'tok'}",
        "vocab_size=300",
    ).wait()
    assert ended.returncode == 2
    assert f"error: out: {tmp_path}/.tok.tmp: is in the way: a link, or" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not any((tmp_path / "victim").iterdir())


@needs_root
def test_what_lies_at_the_names_of_unfinished_folders_is_passed_over(everybody_s: Path) -> None:
    """Pipes, files that cannot be opened, links, and folders of others; only ours go."""
    names = {kind: everybody_s / f".out-{kind}.unfinished" for kind in ("a", "b", "c", "d", "e")}

    def plant() -> None:
        os.mkfifo(names["a"])
        names["b"].touch(mode=0)
        names["c"].symlink_to(everybody_s)
        names["d"].mkdir()

    assert as_user(OTHER, plant) is None
    names["e"].mkdir()

    def convert(out: str) -> None:
        with new_folder(everybody_s / out) as folder:
            (folder / "file").touch()

    convert("out")
    assert (everybody_s / "out/file").exists()
    left = {path.name for path in everybody_s.glob(".out-*")}
    assert left == {names[kind].name for kind in "abcd"}
    shutil.rmtree(everybody_s / "out")
    assert as_user(OTHER + 1, lambda: convert("out")) is None
    assert (everybody_s / "out/file").exists()
    assert {path.name for path in everybody_s.glob(".out-*")} == left


# Runs


@needs_root
def test_a_run_does_not_write_in_another_user_s_folder(everybody_s: Path) -> None:
    theirs = plant_folder(everybody_s / "theirs")
    message = (
        rf"^log_folder, save_folder: {theirs}: belongs to user {OTHER}, this is 0, and everybody"
        r" may write in it; name a folder of your own"
    )
    (everybody_s / "run").mkdir()
    for folders in ((str(theirs), None), (str(everybody_s / "run"), str(theirs))):
        with pytest.raises(ConfigError, match=message):
            lock_folders(*folders)
    assert not any(theirs.iterdir())


@needs_root
def test_training_in_another_user_s_folder_writes_nothing(
    corpus: Corpus, everybody_s: Path, victim: Path
) -> None:
    run = plant_folder(everybody_s / "run")
    plant_folder(run / "checkpoints")
    for name in ("starts.jsonl", "config.yaml.tmp", "checkpoints/config.yaml.tmp"):
        (run / name).symlink_to(victim)
    ended = Script("recipes/train.py", *corpus.keys(run)).wait()
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith(f"error: log_folder, save_folder: {run}: belongs to user")
    assert victim.read_text() == SECRET
    assert len([path for path in run.rglob("*") if not path.is_symlink()]) == 1


@needs_root
@pytest.mark.parametrize("mode", [0o755, 0o775])
def test_root_goes_on_in_a_folder_that_a_user_has_closed_to_others(
    everybody_s: Path, mode: int
) -> None:
    theirs = plant_folder(everybody_s / "theirs", mode)
    lock = lock_run(theirs)
    assert lock is not None
    lock.release()
    ours = plant_folder(everybody_s / "shared") / "run"
    ours.mkdir()
    lock = lock_run(ours)
    assert lock is not None, "one of our own in it will do"
    lock.release()


@pytest.mark.parametrize("name", ["train_log.jsonl", "starts.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_log_that_is_no_file_is_refused(
    tmp_path: Path, victim: Path, name: str, kind: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    plant: dict[str, Callable[[Path], object]] = {
        "link": lambda path: path.symlink_to(victim),
        "pipe": os.mkfifo,
        "folder": lambda path: path.mkdir(),
    }
    plant[kind](run / name)
    with pytest.raises(ConfigError, match=rf"^{run}/{name}: is a link, or not a regular file, but"):
        lock_run(run)
    # And where it is put there later
    for write in (
        lambda path: appending(path).close(),
        lambda path: keep_rows(path, last_step=1),
    ):
        with (
            pytest.raises(
                TrainingError, match=rf"^{run}/{name}: cannot be written: is a link, or no file;"
            ),
            writing(run / name),
        ):
            write(run / name)
    assert victim.read_text() == SECRET


def test_rows_are_not_kept_through_a_link(tmp_path: Path, victim: Path) -> None:
    row = b'{"current_steps": 1}\n'
    (tmp_path / "train_log.jsonl").write_bytes(row)
    (tmp_path / "train_log.tmp").symlink_to(victim)
    keep_rows(tmp_path / "train_log.jsonl", last_step=1)
    assert (tmp_path / "train_log.jsonl").read_bytes() == row
    assert victim.read_text() == SECRET


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_checkpoint_is_not_written_through_a_link(
    dataset: Path,
    eval_dataset: Path,
    tmp_path: Path,
    victim: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """However late it is put there: before the file is made, or while it is written."""
    run = make_run(tmp_path, dataset, eval_dataset, total=2)
    saver = next(each for each in run.trainer.state.callbacks if isinstance(each, SaveCheckpoints))
    planted = run.checkpoints / "unfinished-ba1.pt"
    save, write = saver.files._write_file, torch.save

    def plant(*_: object) -> None:
        if saver.saved is None:
            planted.unlink(missing_ok=True)
            planted.symlink_to(victim)

    def plant_before(*given: Any) -> None:
        plant()
        save(*given)

    def plant_during(*given: Any, **more: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            plant()
        write(*given, **more)

    if when == "before":
        monkeypatch.setattr(saver.files, "_write_file", plant_before)
        run.trainer.fit()
        assert stat.S_ISREG((run.checkpoints / "ba1.pt").lstat().st_mode)
    else:
        monkeypatch.setattr(torch, "save", plant_during)
        with pytest.raises(TrainingError, match=r"ba1\.pt: cannot be saved: somebody else has put"):
            run.trainer.fit()
        assert not (run.checkpoints / "ba1.pt").exists()
    assert victim.read_text() == SECRET


# Locks


@needs_root
def test_whoever_may_read_a_run_does_not_keep_it_from_training(everybody_s: Path) -> None:
    run = everybody_s / "run"
    run.mkdir(mode=0o755)
    (run / ".lock").touch(mode=0o644)  # as earlier versions made it

    def attack(path: Path) -> None:
        fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)

    for _ in ("there", "made"):
        lock = lock_run(run)
        assert lock is not None
        assert stat.S_IMODE((run / ".lock").stat().st_mode) == 0o600
        lock.release()
        assert isinstance(as_user(OTHER, lambda: attack(run / ".lock")), PermissionError)
        (run / ".lock").unlink()

    cache = everybody_s / "cache-1.lock"
    cache.touch(mode=0o644)
    for _ in ("there", "made"):
        number = locks.hold(cache)
        assert number is not None
        assert isinstance(as_user(OTHER, lambda: attack(cache)), PermissionError)
        os.close(number)
        cache.unlink()


@needs_root
def test_a_run_that_a_group_shares_says_whose_it_is(everybody_s: Path) -> None:
    run = everybody_s / "run"
    run.mkdir()
    os.chown(run, OTHER, OTHER)
    run.chmod(0o2775)

    def begin() -> None:
        lock = lock_run(run)
        assert lock is not None

    assert as_user(OTHER, begin) is None

    def join() -> Any:
        os.setgroups([])
        os.setgid(OTHER)
        os.setuid(OTHER + 1)
        return lock_run(run)

    error = as_user(0, join)
    assert str(error) == (
        f"{run}/.lock: is in use by this run, but cannot be written to: it belongs to user {OTHER};"
        f" this is user {OTHER + 1}; give this run another run_name, or set log_folder"
    )


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, victim: Path, kind: str) -> None:
    if kind == "link":
        (tmp_path / ".lock").symlink_to(victim)
    else:
        os.mkfifo(tmp_path / ".lock")
    with pytest.raises(
        ConfigError, match=rf"^{tmp_path}/\.lock: cannot be locked: is a link, or no file; remove"
    ):
        lock_run(tmp_path)
    assert victim.read_text() == SECRET


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_locked_on_a_disk_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the file's being there is the lock, so that it must not be made before."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no flock here")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = lock_run(tmp_path, seconds=1)
    assert lock is not None
    assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) & 0o077 == 0
    with pytest.raises(ConfigError, match="another process is training this run"):
        lock_run(tmp_path, seconds=0.1)
    lock.release()


# Caches


@needs_root
@pytest.mark.parametrize("kind", ["pipe", "endless", "large"])
@pytest.mark.parametrize("name", ["manifest.json", "index.json"])
def test_a_cache_of_pipes_and_devices_is_not_read(
    dataset: Path, copy_of: Any, everybody_s: Path, kind: str, name: str
) -> None:
    remote, cache = copy_of(dataset), everybody_s / "cache"
    planted = cache / read_manifest(str(remote)).index_sha256[:16]
    plant_folder(planted)

    def plant() -> None:
        if name == "index.json":
            shutil.copy(remote / "manifest.json", planted)
        if kind == "pipe":
            os.mkfifo(planted / name)
        elif kind == "endless":
            (planted / name).symlink_to("/dev/zero")
        else:
            with (planted / name).open("wb") as file:
                file.truncate(1 << 40)

    assert as_user(OTHER, plant) is None
    cache.chmod(0o1777)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30), limits[1]))
    try:
        found = remote_of(remote, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert found.folder == f"{planted}-user-0"


@pytest.mark.parametrize("exclusive", [False, True])
def test_no_shard_is_written_through_a_link_in_a_cache(
    dataset: Path, copy_of: Any, tmp_path: Path, exclusive: bool
) -> None:
    found = remote_of(copy_of(dataset), tmp_path / "cache", exclusive=exclusive)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    units = Path(found.folder, "units")
    units.symlink_to(elsewhere)
    message = rf"{units} belongs to another user, or is a link"
    with pytest.raises(DataError, match=message):
        stream(found, download_retries=0)
    assert not any(elsewhere.iterdir())
    if not exclusive:  # else the lock is this process's still
        with pytest.raises(ConfigError, match=f"cannot be written to: {message}; set local to a"):
            remote_of(found.remote, tmp_path / "cache")


# Shards that are changed while they are mapped


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize(
    "what", ["size of a column", "kind of a length", "length", "offset", "order of offsets"]
)
def test_a_row_that_is_damaged_after_its_check_is_that_of_a_damaged_shard(
    dataset: Path, copy_of: Any, tmp_path: Path, is_remote: bool, what: str
) -> None:
    """By one who has the file mapped into memory, which leaves its times as they are."""
    found = (
        remote_of(copy_of(dataset), tmp_path / "cache")
        if is_remote
        else open_for_model(str(copy_of(dataset)), None, tokenizer=byte_tokenizer())
    )
    loader = loader_of(found)
    expected = rows_of(loader)
    shard = shards_of(found.folder)[0]
    shards = loader.dataset.shards
    with shard.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        start = int.from_bytes(mapped[4:8], "little")
        place, value = {
            "size of a column": (start, b"\x07"),
            "kind of a length": (start + 4, b"\xff"),
            "length": (start + 6, b"\xff"),
            "offset": (8, b"\xff\xff\xff\xff"),
            "order of offsets": (8, b"\x00\x00\x00\x00"),
        }[what]
        # The times change when a page is first written to, and not again before it is on disk
        mapped[place] = mapped[place]
        rows_of(loader)  # which checks it again
        before = os.stat(shard)
        shards.opened.close()
        shards.row(1)  # of what was checked, and stays open
        if what in ("offset", "order of offsets"):
            shards.opened.close()  # the offsets are read when it is opened
        mapped[place : place + len(value)] = value
        after = os.stat(shard)
        if (before.st_mtime_ns, before.st_ctime_ns) != (after.st_mtime_ns, after.st_ctime_ns):
            pytest.skip("this file system notes every write to a mapped page")
        if is_remote:
            row = tuple(shards.row(0)["input_ids"].tolist())
            assert row in expected
            assert shard.read_bytes() == shards_of(found.remote)[0].read_bytes()
            return
        with pytest.raises(
            DataError, match=rf"^{shard}: damaged shard: its .* hash is .*; restore"
        ):
            shards.row(0)


# Datasets


def make_dataset_folder(folder: Path, data_files: str) -> Path:
    folder.mkdir()
    (folder / "inside.jsonl").write_text('{"text": "inside"}\n')
    (folder.parent / "outside.jsonl").write_text('{"text": "outside"}\n')
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n"
    )
    return folder


def texts_of(folder: Path) -> list[str]:
    return [row["text"] for row in hub.read_shard(hub.address(str(folder), None, "train"), 0)]


@pytest.mark.parametrize("name", ["{above}/outside.jsonl", "../outside.jsonl", "../out*.jsonl"])
def test_a_dataset_folder_does_not_have_files_outside_of_it_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = make_dataset_folder(tmp_path / "set", name.format(above=tmp_path))
    with pytest.raises(
        ConfigError, match=rf"^source: {folder}: its data_files name .*outside\.jsonl, which lies"
    ):
        texts_of(folder)


def test_a_dataset_folder_names_its_own_files(tmp_path: Path) -> None:
    folder = make_dataset_folder(tmp_path / "set", "inside.jsonl")
    assert texts_of(folder) == ["inside"]
    (tmp_path / "link").symlink_to(folder)
    assert texts_of(tmp_path / "link") == ["inside"]
    (folder / "inside.jsonl").unlink()  # as a download of the hub's is laid out
    (folder / "inside.jsonl").symlink_to(tmp_path / "outside.jsonl")
    assert texts_of(folder) == ["outside"]
