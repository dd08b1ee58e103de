"""A run that is killed or stopped again and again, wherever it is, ends bit for bit as one that
nothing disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.runs import Corpus, Script, check, read_log
from tests.s3 import S3, Relay
from tests.train.test_resume import LLAMA

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
    ),
]
STEPS = 90  # six epochs
RATE = 4 << 20  # bytes per second to S3, so that an upload takes longer than the steps between two


class LongRun:
    """A run with dropout and two loader processes that saves after every second step, in a
    folder or, over a slow line, in S3.
    """

    def __init__(self, corpus: Corpus, folder: Path, s3: S3, *, line: Relay | None = None):
        self.folder = folder
        self.s3 = s3
        self.line = line
        self.env = s3.env | ({} if line is None else {"S3_ENDPOINT_URL": line.endpoint})
        self.save_folder = f"{folder}/checkpoints" if line is None else f"s3://data/{folder.name}"
        self.unfinished = folder / ("checkpoints" if line is None else "staging")
        self.newest = 0
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
        return Script("recipes/train.py", *self.keys, env=self.env)

    def steps(self) -> int:
        log = self.folder / "train_log.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or uploaded."""
        if self.line is None:
            return any(self.unfinished.glob("unfinished-*.pt"))
        return time.monotonic() - self.line.last_upload < 0.03

    def checkpoints(self) -> list[int]:
        names = (
            [path.name for path in self.unfinished.glob("ba*.pt")]
            if self.line is None
            else self.s3.keys(self.folder.name)
        )
        return sorted(int(name[2:-3]) for name in names if name.startswith("ba"))

    def lose_none(self) -> None:
        """The newest checkpoint that was ever there is, or a newer one."""
        newest = max(self.checkpoints(), default=0)
        assert newest >= self.newest
        self.newest = newest

    def weights(self) -> dict[str, torch.Tensor]:
        file = self.folder / f"checkpoints/ba{STEPS}.pt"
        if self.line is not None:
            file.parent.mkdir()
            file.write_bytes(self.s3.read(f"{self.folder.name}/{file.name}"))
        return torch.load(file, weights_only=False)["state"]["model"]


@pytest.fixture(scope="module")
def whole(corpus: Corpus, s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> LongRun:
    run = LongRun(corpus, tmp_path_factory.mktemp("whole") / "whole", s3_server)
    check(run.start().wait())
    return run


@pytest.fixture
def line(s3_server: S3, request: pytest.FixtureRequest) -> Iterator[Relay | None]:
    if not request.param:
        yield None
        return
    with Relay(s3_server.endpoint, RATE) as slow:
        yield slow


def assert_same(run: LongRun, whole: LongRun) -> None:
    assert read_log(run.folder) == read_log(whole.folder)
    ours, theirs = run.weights(), whole.weights()
    assert list(ours) == list(theirs)
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


@pytest.mark.parametrize("line", [False, True], ids=["folder", "s3"], indirect=True)
def test_30_kills(
    corpus: Corpus, s3_server: S3, whole: LongRun, tmp_path: Path, line: Relay | None
) -> None:
    """At random instants, every second of them while a checkpoint is written or uploaded."""
    run = LongRun(corpus, tmp_path / "killed", s3_server, line=line)
    choose = random.Random(30)
    kills_in_saves = 0
    for number in range(30):
        script, target, wait_for_save = (
            run.start(),
            run.steps() + choose.randint(1, 2),
            number % 2 == 0,
        )
        while run.steps() < target or (wait_for_save and not run.is_saving()):
            assert script.process.is_alive(), script.read("err")
            time.sleep(0.0005)
        time.sleep(choose.random() * (0.1 if line is not None or not wait_for_save else 0.004))
        kills_in_saves += run.is_saving()
        script.process.kill()
        assert script.wait().returncode == -signal.SIGKILL
        run.lose_none()
    check(run.start().wait())
    assert kills_in_saves >= 8
    assert_same(run, whole)
    print(f"{kills_in_saves} of 30 kills while a checkpoint was written or uploaded")


@pytest.mark.parametrize("line", [False, True], ids=["folder", "s3"], indirect=True)
def test_10_terms(
    corpus: Corpus, s3_server: S3, whole: LongRun, tmp_path: Path, line: Relay | None
) -> None:
    """To the process or to its whole group, three times each; no batch is computed twice.

    Every second one while a checkpoint is written or uploaded.
    """
    run = LongRun(corpus, tmp_path / "stopped", s3_server, line=line)
    choose = random.Random(10)
    done = terms_in_saves = 0
    for number in range(10):
        script, target = run.start(), done + choose.randint(1, 4)
        while run.steps() < target or (number % 2 == 0 and not run.is_saving()):
            assert script.process.is_alive(), script.read("err")
            time.sleep(0.0005)
        assert run.steps() >= done, "a row was dropped, to be computed again"
        time.sleep(choose.random() * (0.1 if number % 2 else 0.002))
        terms_in_saves += run.is_saving()
        assert script.process.pid is not None
        for _ in range(3):
            (os.killpg if number % 4 > 1 else os.kill)(script.process.pid, signal.SIGTERM)
        since = time.monotonic()
        process = script.wait()
        assert process.returncode == 143, process.stderr
        assert time.monotonic() - since < 30
        done = run.steps()
        assert run.checkpoints()[-1] == done
        run.lose_none()
    check(run.start().wait())
    assert terms_in_saves >= 3
    assert_same(run, whole)
    print(f"{terms_in_saves} of 10 SIGTERMs while a checkpoint was written or uploaded")
