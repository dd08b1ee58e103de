"""A run that is killed or stopped again and again, wherever it is, ends bit for bit as one that
nothing disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.runs import Corpus, Script, check, read_log
from tests.s3 import S3
from tests.train.test_resume import LLAMA

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
    ),
]
STEPS = 60  # four epochs


class LongRun:
    """A run with dropout and two loader processes that saves after every second step, in a
    folder or in S3.
    """

    def __init__(self, corpus: Corpus, folder: Path, s3: S3, *, in_s3: bool):
        self.folder = folder
        self.s3 = s3
        self.in_s3 = in_s3
        self.save_folder = f"s3://data/{folder.name}" if in_s3 else f"{folder}/checkpoints"
        self.unfinished = folder / ("staging" if in_s3 else "checkpoints")
        self.keys = corpus.keys(
            folder,
            corpus.yaml_with({**LLAMA, "attention_dropout": 0.1}),
            f"max_duration={STEPS}ba",
            "save_interval=2ba",
            "train_data.num_workers=2",
            "save_num_checkpoints_to_keep=2",
            f"save_folder={self.save_folder}",
        )

    def start(self) -> Script:
        return Script("recipes/train.py", *self.keys, env=self.s3.env)

    def steps(self) -> int:
        log = self.folder / "train_log.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def is_saving(self) -> bool:
        return any(self.unfinished.glob("unfinished-*.pt"))

    def checkpoints(self) -> list[int]:
        names = (
            self.s3.keys(self.folder.name)
            if self.in_s3
            else [path.name for path in self.unfinished.glob("ba*.pt")]
        )
        return sorted(int(name[2:-3]) for name in names if name.startswith("ba"))

    def weights(self) -> dict[str, torch.Tensor]:
        file = self.folder / f"checkpoints/ba{STEPS}.pt"
        if self.in_s3:
            file.parent.mkdir()
            file.write_bytes(self.s3.read(f"{self.folder.name}/{file.name}"))
        return torch.load(file, weights_only=False)["state"]["model"]


@pytest.fixture(scope="module")
def whole(corpus: Corpus, s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> LongRun:
    run = LongRun(corpus, tmp_path_factory.mktemp("whole") / "whole", s3_server, in_s3=False)
    check(run.start().wait())
    return run


def assert_same(run: LongRun, whole: LongRun) -> None:
    assert read_log(run.folder) == read_log(whole.folder)
    ours, theirs = run.weights(), whole.weights()
    assert list(ours) == list(theirs)
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


@pytest.mark.parametrize("in_s3", [False, True], ids=["folder", "s3"])
def test_25_kills(
    corpus: Corpus, s3_server: S3, whole: LongRun, tmp_path: Path, in_s3: bool
) -> None:
    """At random instants, every third of them while a checkpoint is being written or uploaded."""
    run = LongRun(corpus, tmp_path / "killed", s3_server, in_s3=in_s3)
    choose = random.Random(25)
    kills_in_saves = 0
    for number in range(25):
        script, target, wait_for_save = (
            run.start(),
            run.steps() + choose.randint(1, 2),
            number % 3 == 0,
        )
        while run.steps() < target or (wait_for_save and not run.is_saving()):
            assert script.process.is_alive(), script.read("err")
            time.sleep(0.0005)
        time.sleep(choose.random() * (0.1 if not wait_for_save else 0.02 if in_s3 else 0.004))
        script.process.kill()
        assert script.wait().returncode == -signal.SIGKILL
        kills_in_saves += run.is_saving()
    check(run.start().wait())
    assert kills_in_saves >= 5
    assert_same(run, whole)


@pytest.mark.parametrize("in_s3", [False, True], ids=["folder", "s3"])
def test_10_terms(
    corpus: Corpus, s3_server: S3, whole: LongRun, tmp_path: Path, in_s3: bool
) -> None:
    """To the process or to its whole group, three times each; no batch is computed twice."""
    run = LongRun(corpus, tmp_path / "stopped", s3_server, in_s3=in_s3)
    choose = random.Random(10)
    done = 0
    for number in range(10):
        script, target = run.start(), done + choose.randint(1, 4)
        while run.steps() < target:
            assert script.process.is_alive(), script.read("err")
            time.sleep(0.0005)
        assert run.steps() >= done, "a row was dropped, to be computed again"
        time.sleep(choose.random() * 0.1)
        assert script.process.pid is not None
        for _ in range(3):
            (os.killpg if number % 2 else os.kill)(script.process.pid, signal.SIGTERM)
        since = time.monotonic()
        process = script.wait()
        assert process.returncode == 143, process.stderr
        assert time.monotonic() - since < 30
        done = run.steps()
        assert run.checkpoints()[-1] == done
    check(run.start().wait())
    assert_same(run, whole)
