"""Several ranks: the same rows in the same global batches on any number of them, and one that
fails stops all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, Corpus, Ranks, read_log
from tests.s3 import S3


def slow(test: Any) -> Any:
    """For `make test-faults`."""
    skip = pytest.mark.skipif(
        "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes a minute: make test-faults"
    )
    return pytest.mark.faults(skip(test))


def assert_same_batches(run: Path, other: Path) -> None:
    """As far as `run` has come."""
    ours, theirs = read_log(run), read_log(other)
    assert [row["current_steps"] for row in ours] == list(range(1, len(ours) + 1))
    for mine, row in zip(ours, theirs, strict=False):
        assert (mine["batch_hash"], mine["num_tokens"]) == (row["batch_hash"], row["num_tokens"])
        assert mine["loss"] == pytest.approx(row["loss"], rel=1e-3)


def test_the_same_global_batches_on_one_two_and_one_ranks(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    """An epoch is 15 steps: both changes are in the middle of one."""
    run = tmp_path / "elastic"
    log = run / "train_log.jsonl"
    keys = corpus.keys(run, "microbatch_size=1", "save_interval=1ba", "eval_data=null")
    Ranks(1, *keys).kill_after(log, 5)
    Ranks(2, *keys).kill_after(log, 9)
    Ranks(1, *keys).kill_after(log, 12)
    assert_same_batches(run, undisturbed)


@slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_global_batches_on_one_two_four_and_one_ranks(
    corpus: Corpus, undisturbed: Path, tmp_path: Path, num_workers: int
) -> None:
    run = tmp_path / "elastic"
    log = run / "train_log.jsonl"
    keys = corpus.keys(
        run, f"train_data.num_workers={num_workers}", "microbatch_size=1", "save_interval=1ba"
    )
    Ranks(1, *keys).kill_after(log, 9)
    Ranks(2, *keys).kill_after(log, 16)
    Ranks(4, *keys).kill_after(log, 26)
    Ranks(1, *keys).finish()
    assert_same_batches(run, undisturbed)
    assert len(read_log(run)) == 40


@slow
def test_a_shard_that_cannot_be_had_stops_every_rank(
    s3: S3, corpus: Corpus, tmp_path: Path
) -> None:
    """Under the real launcher, whichever rank comes across it, and with one line."""
    remote = s3.upload(corpus.train, "stops")
    name = min(key for key in s3.keys("stops") if key.endswith(".mds"))
    content = s3.read(f"stops/{name}")
    s3.client.put_object(
        Bucket="data", Key=f"stops/{name}", Body=content[:-1] + bytes([content[-1] ^ 1])
    )
    run = tmp_path / "stops"
    keys = corpus.keys(
        run,
        "train_data.num_workers=2",
        f"train_data.remote={remote}",
        f"train_data.local={tmp_path}/cache",
    )
    launcher = Path(sys.executable).with_name("composer")
    process = subprocess.run(
        [sys.executable, launcher, "-n", "2", "recipes/train.py", *keys],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode != 0
    line = (
        rf"error: {remote}/{name}: damaged shard: .* \(tried 4 times\); put a good copy there, or"
        r" convert again"
    )
    assert re.search(f"^{line}$", process.stdout + process.stderr, re.MULTILINE)
    assert "Traceback" not in process.stdout + process.stderr
