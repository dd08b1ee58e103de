"""Runs that train on while their checkpoints are written: killed in every phase of it, stopped in
the middle of one, and with one that cannot be saved.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flame_composer.checkpoint.names import step_of
from flame_composer.errors import GOES_ON
from tests.checkpoint.test_save import differences
from tests.phases import IN_FOLDER, IN_STORE
from tests.runs import ROOT, Corpus, Ranks, Script, check, read_log
from tests.s3 import S3
from tests.train.test_resume import assert_same_run

PHASES = ROOT / "tests/phases.py"


def steps_in(names: Any) -> list[int]:
    return sorted(step for name in names if (step := step_of(str(name))) is not None)


@pytest.mark.parametrize("in_s3", [False, True], ids=["folder", "s3"])
def test_a_run_that_is_killed_in_every_phase_of_a_save_ends_bit_identical(
    corpus: Corpus, undisturbed: Path, s3_server: S3, tmp_path: Path, in_s3: bool
) -> None:
    """At its second checkpoint, whose steps the next start computes again, or not if it was whole.

    The checkpoint before is always there.
    """
    run = tmp_path / "killed"
    place = f"s3://data/{tmp_path.name}-killed" if in_s3 else f"{run}/checkpoints"
    keys = corpus.keys(run, f"save_folder={place}")
    done = 0
    for phase in IN_STORE if in_s3 else IN_FOLDER:
        script = Script(PHASES, phase, 2, *keys, env=s3_server.env)
        process = script.wait()
        assert process.returncode == -signal.SIGKILL, f"{phase}: {process.stderr}"
        names = (
            s3_server.keys(f"{tmp_path.name}-killed")
            if in_s3
            else [path.name for path in (run / "checkpoints").iterdir()]
        )
        found = steps_in(names)
        is_whole = phase in ("named", "uploaded", "deleting")
        assert found[-1] in ((done + 5, done + 10) if phase == "uploading" else ()) or (
            found[-1] == done + (10 if is_whole else 5)
        ), f"{phase}: {found}"
        assert done + 5 in found
        done = found[-1]
        if done >= 30:
            break
    check(Script("recipes/train.py", *keys, env=s3_server.env).wait())
    if in_s3:
        (run / "checkpoints").mkdir()
        newest = s3_server.read(f"{tmp_path.name}-killed/ba40.pt")
        (run / "checkpoints/ba40.pt").write_bytes(newest)
        assert not list((run / "staging").glob("unfinished-*"))
    assert_same_run(run, undisturbed)


def test_sigterm_while_a_checkpoint_is_written_loses_nothing(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    run, until = tmp_path / "stopped", tmp_path / "stop"
    keys = corpus.keys(run, "save_interval=10ba")
    script = Script(PHASES, "slow", 0, *keys, env={"UNTIL": str(until)})
    log = run / "train_log.jsonl"
    unfinished = run / "checkpoints/unfinished-ba10.pt"
    # It trains on while the checkpoint is written, which takes as long as there is no `until`
    while not unfinished.exists() or log.read_text().count("\n") < 11:
        assert script.process.is_alive(), script.read("err")
        time.sleep(0.002)
    assert script.process.pid is not None
    os.kill(script.process.pid, signal.SIGTERM)
    until.touch()
    process = script.wait()
    assert process.returncode == 143, process.stderr
    steps = len(read_log(run))
    assert 11 <= steps < 20
    assert steps_in((run / "checkpoints").iterdir()) == [10, steps]
    assert process.stderr.splitlines()[-1].startswith(
        f"stopped after step {steps}; saved {run}/checkpoints/ba{steps}.pt; the same command"
    )
    corpus.train_run(run)
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("save_async", ["true", "false"])
def test_a_checkpoint_that_is_due_waits_for_the_one_before_and_says_so(
    corpus: Corpus, tmp_path: Path, save_async: str
) -> None:
    """And the end of the run waits for the last one."""
    run = tmp_path / "waits"
    keys = ("save_interval=1ba", "max_duration=3ba", "scheduler.warmup=0ba")
    keys = (*keys, f"save_async={save_async}")
    process = check(Script(PHASES, "slow", 0, *corpus.keys(run, *keys)).wait())
    said = [line for line in process.stderr.splitlines() if "waited" in line]
    expected = [
        f"warning: step {step}: training waited T for {run}/checkpoints/ba{step - 1}.pt to be"
        " saved, before it could save the next checkpoint; raise save_interval if it is often so"
        for step in (2, 3)
    ]
    found = [re.sub(r"\d+\.\d s", "T", line) for line in said]
    assert found == (expected if save_async == "true" else [])
    assert steps_in((run / "checkpoints").iterdir()) == [1, 2, 3]


@pytest.mark.parametrize("save_async", [True, False])
def test_a_checkpoint_that_cannot_be_saved_ends_every_rank_by_the_same_line(
    corpus: Corpus, tmp_path: Path, save_async: bool
) -> None:
    """Also those that have no part in it."""
    run = tmp_path / "fails"
    more = ("eval_data=null", "max_duration=4000ba", f"save_async={str(save_async).lower()}")
    ranks = Ranks(2, *corpus.keys(run, *more))
    place = run / "checkpoints"
    while not (place / "ba5.pt").exists():
        assert all(script.process.is_alive() for script in ranks.scripts)
        time.sleep(0.002)
    place.rename(run / "elsewhere")
    place.touch()
    processes = [script.wait() for script in ranks.scripts]
    lines = {process.stderr.splitlines()[-1] for process in processes}
    assert [process.returncode for process in processes] == [1, 1], processes
    (line,) = lines
    said = rf"error: {re.escape(str(place))}/ba\d+\.pt: cannot be saved: File exists; {GOES_ON}"
    assert re.fullmatch(said, line), line
    place.unlink()
    (run / "elsewhere").rename(place)
    steps = len(read_log(run))
    longer = ("max_duration=4000ba", "eval_data=null")
    script = Script("recipes/train.py", *corpus.keys(run, *longer))
    corpus.wait_for_step(script, run, steps + 1)
    script.process.kill()
    script.wait()


def test_async_and_sync_checkpoints_of_everything_are_the_same(
    corpus: Corpus, tmp_path: Path
) -> None:
    """Weights, averages, moments, random states, callbacks, metrics, data: tensor for tensor."""
    found = {}
    for name in ("true", "false"):
        run = tmp_path / name / "same"
        run.parent.mkdir()
        keys = corpus.keys(
            run,
            "max_duration=10ba",
            f"save_async={name}",
            "save_num_checkpoints_to_keep=-1",
            "save_interval=1ba",
            "model.config.hidden_size=32",
            "algorithms.ema.half_life=3ba",
            "callbacks.speed_monitor.window_size=2",
            "loss_spike={}",
            "loggers.file_logger={}",
        )
        check(Script("recipes/train.py", *keys).wait())
        found[name] = {
            file.name: torch.load(file, weights_only=False)
            for file in sorted((run / "checkpoints").glob("ba*.pt"))
        }
    assert len(found["true"]) == 10
    timed = ("_wct: ",)
    differ = [
        each
        for each in differences(found["true"], found["false"])
        if not any(name in each for name in timed)
    ]
    assert differ == []
