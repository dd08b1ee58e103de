"""What the ranks tell one another at a step takes one all-reduce, and comes to the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_composer.train.log import from_halves, in_halves
from tests.loader.test_streams import keys_of
from tests.runs import ROOT, Corpus, Ranks, check, read_log

COLLECTIVES = (ROOT / "tests/collectives.py",)
# A run of everything that the ranks add up: streams, rows left out, and hashes of batches
ADDS_UP = ("repetition_filter.max_count=8", "global_batch_size=4", "save_interval=100ba")


@given(st.lists(st.integers(0, 2**70), min_size=1, max_size=8))
def test_the_sum_of_hashes_in_halves_is_that_of_the_hashes(hashes: list[int]) -> None:
    upper, lower = map(sum, zip(*map(in_halves, hashes), strict=True))
    assert from_halves([upper, lower]) == sum(hashes) % 2**64
    assert max(upper, lower) < 8 * 2**32


def counts_of(corpus: Corpus, run: Path, steps: int, *more: str) -> dict[str, int]:
    """How often what was called in a run on two ranks."""
    counts = run.with_suffix(".json")
    keys = keys_of(corpus, run, *ADDS_UP, f"max_duration={steps}ba", *more)
    Ranks(2, *keys, env={"COUNTS": str(counts)}, command=COLLECTIVES).finish()
    return json.loads(counts.read_text())


def test_a_step_takes_one_all_reduce(corpus: Corpus, tmp_path: Path) -> None:
    """Beside Composer's own, and the one that tells whether a batch has anything to learn from,
    which has to come before the forward pass.
    """
    few, many = (counts_of(corpus, tmp_path / f"run{steps}", steps) for steps in (4, 9))
    more = {name: many[name] - few[name] for name in many if many[name] != few[name]}
    assert more == {"train.sums all_reduce": 5, "loader.batches all_reduce": 5}


def test_the_sums_of_two_ranks_are_those_of_one(corpus: Corpus, tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    counts_of(corpus, two, 6)
    Ranks(1, *keys_of(corpus, one, *ADDS_UP, "max_duration=6ba")).finish()
    summed = ("batch_hash", "streams", "left_out")
    ours, theirs = (
        [{key: row[key] for key in summed} for row in read_log(run)] for run in (two, one)
    )
    assert ours == theirs
    assert ours[-1]["streams"]["code"]["rows"] > 0


# Where the signal comes on the second rank, by method and clock, and the step the run ends with
SIGNALS = {
    "before the sums": ("gradients Gradients.after_train_batch 2", 3),
    "after the sums": ("preemption Preemption.batch_end 3", 4),
    "at the end of an evaluation": ("log JsonlLog.eval_end 4", 4),
    "just before a checkpoint": ("log JsonlLog.batch_checkpoint 5", 5),
}


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "whole"
    Ranks(2, *corpus.keys(run, *SHORT)).finish()
    return run


SHORT = ("max_duration=8ba", "eval_interval=4ba", "save_interval=5ba")


@pytest.mark.parametrize("case", SIGNALS)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    corpus: Corpus, whole: Path, tmp_path: Path, case: str
) -> None:
    run = tmp_path / "stopped"
    where, step = SIGNALS[case]
    env = {"SIGNAL": f"{where} 1"}
    ranks = Ranks(2, *corpus.keys(run, *SHORT), env=env, command=COLLECTIVES)
    ended = [script.wait() for script in ranks.scripts]
    assert [each.returncode for each in ended] == [143, 143], ended
    saved = run / f"checkpoints/ba{step}.pt"
    assert ended[0].stderr.splitlines()[-1] == (
        f"stopped after step {step}; saved {saved}; the same command goes on from there"
    )
    assert len(read_log(run)) == step
    for script in Ranks(2, *corpus.keys(run, *SHORT)).scripts:
        check(script.wait())
    assert read_log(run) == read_log(whole)
