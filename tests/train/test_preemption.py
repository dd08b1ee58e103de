"""SIGTERM and Ctrl-C: nothing that was computed is lost, and the restarted run is the one that
nothing disturbed.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from composer.core import Callback, State
from composer.loggers import Logger
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flame_composer.errors import ConfigError
from flame_composer.train.preemption import Preempted, lock_run
from tests.conftest import make_run
from tests.runs import ROOT, Corpus, Ranks, Script, check, read_log
from tests.train.test_resume import assert_same_run


@pytest.mark.parametrize(
    ("num_workers", "group", "steps"), [(0, False, (1, 9, 20)), (2, True, (13, 39))]
)
def test_stopped_run_loses_no_batch_and_ends_bit_identical(
    corpus: Corpus,
    undisturbed: Path,
    tmp_path: Path,
    num_workers: int,
    group: bool,
    steps: tuple[int, ...],
) -> None:
    """Steps 10, 20, 30 and 40 evaluate; what a signal made them leave out is done by the
    restart.
    """
    run = tmp_path / "stopped"
    workers = f"train_data.num_workers={num_workers}"
    for step in steps:
        process = corpus.stopped_run(run, workers, after_step=step, group=group)
        assert process.returncode == 143, process.stderr
        rows = read_log(run)
        assert step <= process.args <= len(rows) <= process.args + 2
        newest = run / f"checkpoints/ba{len(rows)}.pt"
        assert process.stderr.splitlines()[-2:] == [
            "SIGTERM: finishing the current batch and saving it",
            f"stopped after step {len(rows)}; saved {newest}; the same command goes on from there",
        ], process.stderr
        assert newest.is_file()  # so that no batch is computed twice
    summary = corpus.train_run(run, workers)
    assert_same_run(run, undisturbed)
    expected = json.loads((undisturbed / "summary.json").read_text())
    assert {key: summary[key] for key in ("steps", "eval_loss")} == {
        key: expected[key] for key in ("steps", "eval_loss")
    }


class SendAt(Callback):
    """Sends this process a signal in the middle of the evaluation after `step`."""

    def __init__(self, step: int):
        self.step = step

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        if (state.timestamp.batch, state.eval_timestamp.batch) == (self.step, 1):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [2, 3])
def test_an_evaluation_that_was_cut_short_is_done_by_the_restart(
    trained, dataset, eval_dataset, tmp_path, capfd, step
):
    """After the second of three steps, and after the last."""
    first = make_run(tmp_path, dataset, eval_dataset, watchers=(SendAt(step),))
    first.trainer.eval()
    with pytest.raises(Preempted) as stopped:
        first.trainer.fit()
    first.trainer.close()
    assert stopped.value.code == 143
    assert (
        first.trainer.state.eval_timestamp.batch
        == 2
        < len(first.trainer.state.evaluators[0].dataloader.dataloader)
    )
    before = [
        json.loads(line) for line in (first.log_folder / "train_log.jsonl").read_text().splitlines()
    ]
    assert len(before) == step
    assert "eval_loss" not in before[-1]
    assert (
        f"stopped after step {step}; saved {tmp_path}/checkpoints/ba{step}.pt; the same"
        in capfd.readouterr().err
    )

    second = make_run(
        tmp_path, dataset, eval_dataset, load_path=tmp_path / f"checkpoints/ba{step}.pt"
    )
    assert second.log.eval_missing
    second.trainer.eval()
    if step < 3:
        second.trainer.fit()
    second.trainer.close()
    for run in (trained, second):
        assert not run.log.eval_missing
    whole, restarted = (
        [
            {**json.loads(line), "throughput": 0}
            for line in (run.log_folder / "train_log.jsonl").read_text().splitlines()
        ]
        for run in (trained, second)
    )
    assert restarted == whole
    assert [list(row) for row in restarted] == [list(row) for row in whole]
    assert (
        second.log.summary(second.trainer.state)["eval_loss"]
        == trained.log.summary(trained.trainer.state)["eval_loss"]
    )


def test_a_signal_before_the_first_step_leaves_nothing(dataset, eval_dataset, tmp_path, capfd):
    run = make_run(tmp_path, dataset, eval_dataset, watchers=(SendAt(0),))
    with pytest.raises(Preempted):
        run.trainer.eval()
    run.trainer.close()
    assert (
        capfd.readouterr()
        .err.splitlines()[-1]
        .startswith("stopped after step 0; nothing new to save; the same command")
    )
    assert not run.checkpoints.exists()
    assert run.log.initial_evaluation == {}


def test_w_and_b_and_tensorboard_go_on_with_the_same_run(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed past a checkpoint at an evaluation: TensorBoard shows every step and evaluation
    once, W&B has one run id.
    """
    run = tmp_path / "logged"
    keys, env = (
        ("wandb.project=tests", "tensorboard=true", "save_interval=10ba"),
        {"WANDB_MODE": "offline"},
    )
    corpus.killed_run(run, *keys, after_step=14, env=env)
    corpus.train_run(run, *keys, env=env)

    parts = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [part.name for part in parts] == ["run-logged.wandb"] * 2

    events = EventAccumulator(str(run / "tensorboard/logged"), purge_orphaned_data=True).Reload()
    rows = read_log(run)
    losses = {event.step: event.value for event in events.Scalars("loss/train/total")}
    assert len(losses) == len(events.Scalars("loss/train/total"))
    assert losses == {
        row["current_steps"] - 1: pytest.approx(row["loss"], rel=1e-6) for row in rows
    }
    evaluations = [
        (event.step, event.value) for event in events.Scalars("metrics/eval/LanguageCrossEntropy")
    ]
    assert [step for step, _ in evaluations] == [0, 10, 20, 30, 40]
    expected = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert [value for _, value in evaluations[1:]] == pytest.approx(expected, rel=1e-6)
    assert_same_run(run, undisturbed)


def test_ctrl_c_saves_and_the_second_ends_at_once(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "interrupted"
    script = Script("recipes/train.py", *corpus.keys(run))
    corpus.wait_for_step(script, run, 3)
    assert script.process.pid
    os.kill(script.process.pid, signal.SIGINT)
    process = script.wait()
    assert process.returncode == 130
    assert (
        "SIGINT: finishing the current batch and saving it; Ctrl-C again ends it at once"
        in process.stderr
    )
    assert (run / f"checkpoints/ba{len(read_log(run))}.pt").is_file()


def test_a_run_that_is_started_twice_waits_for_the_other(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "twice"
    run.mkdir()
    with FileLock(run / ".lock"):
        script = Script("recipes/train.py", *corpus.keys(run))
        while f"{run}: waiting for another process that trains this run" not in script.read("err"):
            assert script.process.is_alive()
            time.sleep(0.05)
        assert [path.name for path in run.iterdir()] == [".lock"]
    check(script.wait())
    assert_same_run(run, undisturbed)


def test_a_run_that_another_process_keeps(tmp_path: Path) -> None:
    assert lock_run(tmp_path / "new") is None
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ConfigError, match="another process is training this run; wait until"),
    ):
        lock_run(tmp_path, seconds=0.1)
    lock = lock_run(tmp_path)
    assert lock is not None
    assert lock.is_locked
    lock.release()


def error_lines(process: Any) -> list[str]:
    """All that a process has to say; a traceback would be more than one line."""
    assert "Traceback" not in process.stderr, process.stderr
    return [line for line in process.stderr.splitlines() if line.startswith("error: ")]


def loader_processes(script: Script) -> list[psutil.Process]:
    return [
        each
        for each in psutil.Process(script.process.pid).children()
        if "pt_data_worker" in each.name()
    ]


def test_ranks_and_loader_processes_that_are_killed(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    """Each is one line of each rank that is left, at once, and the same command goes on."""
    run = tmp_path / "lost"
    keys = corpus.keys(run, "train_data.num_workers=1")
    for step, victim in ((3, "a rank"), (9, "a loader process")):
        ranks = Ranks(2, *keys)
        corpus.wait_for_step(ranks.scripts[0], run, step)
        first, second = ranks.scripts
        (loader,) = loader_processes(first)
        loaders = [loader, *loader_processes(second)]
        (second.process if victim == "a rank" else loader).kill()
        since = time.monotonic()
        ended = [script.wait() for script in ranks.scripts]
        assert time.monotonic() - since < 30, "it waits for somebody who is gone"
        assert psutil.wait_procs(loaders, timeout=10)[1] == []
        goes_on = "; the same command goes on from what was saved last"
        lost = (
            r"error: rank \d: another rank has ended, or cannot be reached \(.*Connection .*\)"
            + goes_on
        )
        if victim == "a rank":
            assert [process.returncode for process in ended] == [1, -signal.SIGKILL]
        else:
            assert [process.returncode for process in ended] == [1, 1]
            # torch learns of it by a signal or, on a busy machine, from the closed pipe
            loss = (
                r"error: rank 0: a loader process (was killed by signal: Killed|ended unexpectedly)"
                r" \(short of memory\? give fewer num_workers\)"
            )
            (line,) = error_lines(ended[0])
            assert re.fullmatch(loss + goes_on, line), line
        (line,) = error_lines(ended[0 if victim == "a rank" else 1])
        assert re.fullmatch(lost, line), line
    corpus.train_run(run)
    assert [row["current_steps"] for row in read_log(run)] == list(range(1, 41))
    assert [row["batch_hash"] for row in read_log(run)] == [
        row["batch_hash"] for row in read_log(undisturbed)
    ]


def test_ctrl_c_counts_for_more_than_the_sigterm_after_it(corpus: Corpus, tmp_path: Path) -> None:
    """A terminal sends the one to the whole group, and the launcher, which has it, too, the
    other to its ranks.
    """
    run = tmp_path / "interrupted"
    ranks = Ranks(2, *corpus.keys(run))
    corpus.wait_for_step(ranks.scripts[0], run, 3)
    for number in (signal.SIGINT, signal.SIGTERM):
        for script in ranks.scripts:
            with contextlib.suppress(ProcessLookupError):
                os.kill(script.process.pid, number)
        time.sleep(0.05)
    ended = [script.wait() for script in ranks.scripts]
    assert [process.returncode for process in ended] == [130, 130]
    assert ended[0].stderr.count("\n") == 2, ended[0].stderr
    assert (run / f"checkpoints/ba{len(read_log(run))}.pt").is_file()


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes half a minute: make test-faults"
)
def test_more_sigterms_than_anybody_needs(corpus: Corpus, tmp_path: Path) -> None:
    """Also while Python clears up, when its own handlers are gone: a real process, not a forked
    one.
    """
    run = tmp_path / "stopped"
    command = [sys.executable, "recipes/train.py", *corpus.keys(run, "train_data.num_workers=2")]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        while not (run / "train_log.jsonl").exists() or not (run / "train_log.jsonl").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        while process.poll() is None:
            process.terminate()
            time.sleep(0.005)
        _, err = process.communicate()
    assert process.returncode == 143, err
    step = len(read_log(run))
    newest = run / f"checkpoints/ba{step}.pt"
    assert newest.is_file()
    assert err.splitlines()[-2:] == [
        "SIGTERM: finishing the current batch and saving it",
        f"stopped after step {step}; saved {newest}; the same command goes on from there",
    ], err


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a small disk takes root to mount")


@needs_root
def test_a_disk_that_is_full(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    """Under the log folder, while a row is written: one line, and when there is room, the same
    command goes on.
    """
    run = tmp_path / "full"
    keys = corpus.keys(run, f"save_folder={tmp_path / 'checkpoints'}")
    with small_disk(run, "64k"):
        filler = run / "filler"
        # The configuration, two small files and some rows have room beside it
        filler.write_bytes(bytes(48 << 10))
        ended = Script("recipes/train.py", *keys).wait()
        assert ended.returncode == 1
        assert error_lines(ended) == [
            f"error: {run}/train_log.jsonl: cannot be written: No space left on device; when that"
            " is mended, the same command goes on from what was saved last"
        ]
        assert 5 < (run / "train_log.jsonl").read_text().count("\n") < 40
        filler.unlink()
        check(Script("recipes/train.py", *keys).wait())
        assert read_log(run) == read_log(undisturbed)


@needs_root
def test_a_disk_that_is_full_of_checkpoints(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    """It has no room for the first, of which nothing is left that has its name."""
    run, saved = tmp_path / "full", tmp_path / "checkpoints"
    keys = corpus.keys(run, f"save_folder={saved}")
    with small_disk(saved, "256k"):
        ended = Script("recipes/train.py", *keys).wait()
        assert ended.returncode == 1
        (line,) = error_lines(ended)
        said = (
            r"error: .*(No space left on device|is the disk full\?); the same command goes on from"
            r" what was saved last"
        )
        assert re.fullmatch(said, line), line
        assert not list(saved.glob("ba*"))
    check(Script("recipes/train.py", *keys).wait())
    assert read_log(run) == read_log(undisturbed)


def test_what_lies_at_the_name_of_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(
        ConfigError,
        match=rf"^{tmp_path}/\.lock: cannot be locked: .*; remove what lies there, or give",
    ):
        lock_run(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user, which takes root")
@pytest.mark.parametrize("name", ["", ".lock", "train_log.jsonl"])
def test_a_run_that_another_user_began(tmp_path: Path, name: str) -> None:
    for folder in tmp_path.parents:
        if folder.stat().st_mode & 0o077 == 0:
            folder.chmod(0o711)  # pytest's are its user's alone
    tmp_path.chmod(0o777 if name else 0o755)
    (tmp_path / (name or "config.yaml")).touch(mode=0o644)

    def begin() -> None:
        os.setgid(54321)
        os.setuid(54321)
        try:
            theirs.send(lock_run(tmp_path))
        except BaseException as error:
            theirs.send(error)

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=begin)
    process.start()
    error = ours.recv()
    process.join()
    assert isinstance(error, ConfigError)
    assert (
        str(error)
        == f"{tmp_path / name}: is in use by this run, but cannot be written to: it belongs to user"
        " 0; this is user 54321; give this run another run_name, or set log_folder"
    )
