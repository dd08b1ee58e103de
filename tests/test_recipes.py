"""The scripts as a user runs them: every README command, one after the other, and what they say to a mistake."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import TINY, read_log, run_script

ROOT = Path(__file__).parent.parent


def test_train_logs_one_row_per_step(trained: Path) -> None:
    rows = read_log(trained)
    assert [row["current_steps"] for row in rows] == list(range(1, 13))
    assert {tuple(row) for row in rows if row["current_steps"] not in (6, 12)} == {(
        "current_steps", "total_steps", "loss", "learning_rate", "epoch", "percentage", "num_tokens", "throughput", "batch_hash",
    )}
    assert [row["num_tokens"] for row in rows] == [step * 4 * 64 for step in range(1, 13)]
    assert rows[-1]["percentage"] == 100
    assert len({row["batch_hash"] for row in rows}) == 12
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["current_steps"] for row in evaluated] == [6, 12]
    for row in evaluated:
        assert math.isclose(row["eval_perplexity"], math.exp(row["eval_loss"]), rel_tol=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert max(row["learning_rate"] for row in rows) == 0.002
