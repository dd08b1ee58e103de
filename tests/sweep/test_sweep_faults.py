"""A sweep that is killed again and again, wherever it is, ends bit for bit as one that nothing
disturbed: its trials' losses, its suggestions and its results.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Corpus, Script, check, last_json, read_log
from tests.sweep.test_sweeps import ENV, WARM, keys, starts_of

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
    ),
]
KILLS, STEPS = 5, 12
# A trial saves after every step, so that many a kill comes while it does.
RUNS = (f"max_duration={STEPS}ba", "eval_interval=4ba", "save_interval=1ba")
SPACES = {
    "grid": ("optimizer.lr=[1e-3,3e-3,1e-2]", "model.config.num_hidden_layers=[1,2]"),
    "tpe": (
        "search=tpe",
        "trials=6",
        "random_trials=2",
        "optimizer.lr=loguniform(1e-4,1e-1)",
        "optimizer.weight_decay=uniform(0,0.2)",
    ),
}


class Killed:
    """A sweep by one process or more, each with its trials in a process group of its own."""

    def __init__(self, corpus: Corpus, folder: Path, space: str):
        self.folder = folder
        self.keys = keys(corpus, folder, *RUNS, *SPACES[space])

    def start(self, number: int) -> list[Script]:
        return [Script(WARM, *self.keys, env=ENV) for _ in range(number)]

    def steps(self) -> int:
        return sum(log.read_text().count("\n") for log in self.folder.glob("*/train_log.jsonl"))

    def is_saving(self) -> bool:
        return any(self.folder.glob("*/checkpoints/unfinished-*.pt"))

    def kill(self, script: Script) -> None:
        """Kill a process of the sweep, and its trial with it."""
        assert script.process.pid is not None
        while True:
            try:
                os.killpg(script.process.pid, signal.SIGKILL)
                break
            except ProcessLookupError:  # it was started just now, and has no group yet
                assert script.process.is_alive(), script.read("err")
                time.sleep(0.001)
        assert script.wait().returncode == -signal.SIGKILL


def logs_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {log.parent.name: read_log(log.parent) for log in folder.glob("*/train_log.jsonl")}


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sweeps that nothing disturbed, by their search."""
    folders = {space: tmp_path_factory.mktemp(space) / "sweep" for space in SPACES}
    for space, folder in folders.items():
        (script,) = Killed(corpus, folder, space).start(1)
        check(script.wait())
        assert len(starts_of(folder)) == 6
    return folders


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("space", list(SPACES))
def test_5_kills_of_a_sweep(
    corpus: Corpus, whole: dict[str, Path], tmp_path: Path, space: str, processes: int
) -> None:
    """Of a process and its trial at once, at random instants, every second in a trial's save.

    Of two processes, one is killed, or both are.
    """
    sweep = Killed(corpus, tmp_path / "sweep", space)
    choose = random.Random(f"{space} {processes}")
    scripts = sweep.start(processes)
    kills_in_saves = 0
    for number in range(KILLS):
        target, wait_for_save = sweep.steps() + choose.randint(3, 9), number % 2 == 0
        while sweep.steps() < target or (wait_for_save and not sweep.is_saving()):
            assert any(script.process.is_alive() for script in scripts), scripts[0].read("err")
            time.sleep(0.0005)
        time.sleep(choose.random() * (0.002 if wait_for_save else 0.3))
        kills_in_saves += sweep.is_saving()
        last = number == KILLS - 1
        killed = scripts if last or choose.random() < 0.5 else [choose.choice(scripts)]
        for script in killed:
            sweep.kill(script)
        if not last:
            fresh = iter(sweep.start(len(killed)))
            scripts = [next(fresh) if script in killed else script for script in scripts]
    summaries = [last_json(script.wait()) for script in sweep.start(processes)]
    assert kills_in_saves >= 1
    restarts = sum(len(starts) - 1 for starts in starts_of(sweep.folder).values())
    assert restarts >= 2, "most kills should have met a trial that had begun"
    before = whole[space]
    assert logs_of(sweep.folder) == logs_of(before)
    results = (before / "results.json").read_bytes()
    assert (sweep.folder / "results.json").read_bytes() == results
    assert all(summary["best"] == json.loads(results)["best"] for summary in summaries)
    print(f"{restarts} restarts of trials; {kills_in_saves} of {KILLS} kills while one saved")
