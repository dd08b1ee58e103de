"""The two stacks of packages (docs/stacks.md) on the same run: real processes of both."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, Corpus, check, read_log

STACKS = [ROOT / folder / "bin/python" for folder in (".venv", ".venv-current")]

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
    ),
    pytest.mark.skipif(
        not all(python.exists() for python in STACKS),
        reason="needs both stacks: make setup, make setup STACK=current",
    ),
]

Rows = list[dict[str, Any]]


def command(python: Path, script: str, *keys: object) -> subprocess.CompletedProcess[str]:
    """What a script, run to its end by the interpreter of a stack, comes to."""
    process = subprocess.run(
        [python, script, *map(str, keys)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    return check(process)


def train_to(python: Path, run: Path, step: int, *keys: str) -> str:
    """Train until `step` is logged, send SIGTERM, and return what was said on the way."""
    log = run / "train_log.jsonl"
    process = subprocess.Popen(
        [python, "recipes/train.py", *keys], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not log.exists() or log.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 143, said
    return said


def largest_difference(ours: Rows, theirs: Rows) -> float:
    """Return by how much the losses of two runs differ; both took the same rows."""
    assert [row["batch_hash"] for row in ours] == [row["batch_hash"] for row in theirs]
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))


def test_a_run_goes_to_the_other_stack_and_back(tmp_path: Path) -> None:
    """Its datasets and checkpoints are read by both, and only rounding tells it from another."""
    corpus = Corpus(tmp_path)
    corpus.convert()
    here, there = STACKS if str(STACKS[0]).startswith(sys.prefix) else STACKS[::-1]
    whole, moving = tmp_path / "whole", tmp_path / "moving"
    slow = "train_data.num_workers=1"  # so that SIGTERM comes before the end
    command(here, "recipes/train.py", *corpus.keys(whole, slow))
    said = [
        train_to(here, moving, 8, *corpus.keys(moving, slow)),
        train_to(there, moving, 20, *corpus.keys(moving, slow)),
        command(here, "recipes/train.py", *corpus.keys(moving, slow)).stderr,
    ]
    assert ["other packages" in each for each in said] == [False, True, True], said
    ours, theirs = read_log(moving), read_log(whole)
    assert [row["current_steps"] for row in ours] == list(range(1, 41))
    assert largest_difference(ours, theirs) < 1e-3


def test_the_quickstart_learns_the_same_on_both(tmp_path: Path) -> None:
    """200 steps of yamls/gla_tiny.yaml, each stack on a dataset that it made.

    After some ten steps what rounding began has grown (docs/stacks.md).
    """
    write_corpus = runpy.run_path(str(ROOT / "recipes/quickstart.py"))["write_corpus"]
    write_corpus(tmp_path / "corpus.jsonl")
    logs = []
    for python in STACKS:
        folder = tmp_path / python.parts[-3]
        source, tokenizer = f"source={tmp_path / 'corpus.jsonl'}", folder / "tokenizer"
        command(python, "convert/train_tokenizer.py", source, f"out={tokenizer}", "vocab_size=4096")
        command(
            python,
            "convert/to_mds.py",
            source,
            f"tokenizer={tokenizer}",
            "context_length=512",
            f"out={folder / 'train'}",
            "val_fraction=0.05",
            f"val_out={folder / 'val'}",
        )
        command(
            python,
            "recipes/train.py",
            "yamls/gla_tiny.yaml",
            "log_batch_hash=true",
            f"tokenizer={tokenizer}",
            f"train_data.local={folder / 'train'}",
            f"eval_data.local={folder / 'val'}",
            f"log_folder={folder}",
            f"save_folder={folder / 'checkpoints'}",
        )
        logs.append(read_log(folder))
    assert len(logs[0]) == 200
    assert largest_difference(*(rows[:10] for rows in logs)) < 1e-5
    assert largest_difference(*logs) < 0.3
