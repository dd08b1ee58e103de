"""Rows that repeat themselves: found as by looking at each sequence, left out of the loss and
nowhere else, and counted.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_composer.batch import IGNORE, collate
from flame_composer.config.sections import RepetitionConfig
from flame_composer.dataset.open import open_dataset
from flame_composer.loader.fetch import Shards
from flame_composer.loader.repetition import LEFT_OUT, leave_out, repeat_themselves
from tests.runs import Corpus, check, read_log, run_ranks, run_script

RULE = RepetitionConfig(min_period=1, max_period=4, max_count=8)
KEYS = [f"repetition_filter.{name}={value}" for name, value in vars(RULE).items()]
STEPS = ("max_duration=6ba", "save_interval=2ba", "eval_interval=6ba", "scheduler.warmup=1ba")


def repeats(row: list[int], rule: RepetitionConfig) -> bool:
    """Whether the row has a sequence too often, by looking for it at every place."""
    for period in range(rule.min_period, rule.max_period + 1):
        for start in range(len(row) - period * rule.max_count + 1):
            sequence = row[start : start + period]
            if row[start : start + period * rule.max_count] == sequence * rule.max_count:
                return True
    return False


@st.composite
def rows_with_repeats(draw: st.DrawFn) -> list[list[int]]:
    length = draw(st.integers(1, 90))
    tokens = st.integers(0, 2)
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.lists(tokens, min_size=length, max_size=length))
        sequence = draw(st.lists(tokens, min_size=1, max_size=8)) * draw(st.integers(1, 12))
        start = draw(st.integers(0, length - 1))
        rows.append((row[:start] + sequence + row[start:])[:length])
    return rows


@settings(max_examples=400)
@given(rows_with_repeats(), st.integers(1, 6), st.integers(0, 6), st.integers(2, 12))
def test_rows_are_found_as_by_looking_at_every_place(rows, least, more, count) -> None:
    rule = RepetitionConfig(least, least + more, count)
    found = repeat_themselves(np.array(rows, np.int64), rule)
    assert found.tolist() == [repeats(row, rule) for row in rows]


@pytest.mark.parametrize("period", [1, 2, 5, 13])
def test_olmos_rule_is_32_times_and_not_31(period: int) -> None:
    """At any place in a row of 4096 tokens of which no other two are equal."""
    sequence, rule = [*range(5000, 5000 + period)], RepetitionConfig()
    for times, expected in ((31, False), (32, True)):
        for start in (0, 1, 777, 4096 - times * period):
            row = np.arange(4096)
            row[start : start + times * period] = sequence * times
            assert repeat_themselves(row[None], rule).tolist() == [expected]


def test_only_the_labels_of_such_rows_go() -> None:
    plain, again = np.arange(64), np.array([7, 8] * 8 + [*range(48)])
    rows = [{"input_ids": row, "doc_lengths": np.array([64])} for row in (plain, again)]
    whole = collate(rows)
    batch = leave_out(whole, RULE)
    assert batch[LEFT_OUT].tolist() == [False, True]
    assert (batch["input_ids"] == whole["input_ids"]).all()
    assert (batch["labels"][0] == whole["labels"][0]).all()
    assert (batch["labels"][1] == IGNORE).all()
    assert (whole["labels"][1, 1:] != IGNORE).all()


# Runs


def convert(corpus: Corpus, folder: Path, documents: list[str]) -> Path:
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    check(
        run_script(
            "convert/to_mds.py",
            f"source={source}",
            f"tokenizer={corpus.tokenizer}",
            "context_length=64",
            f"out={folder / 'data'}",
        )
    )
    return folder / "data"


@pytest.fixture(scope="module")
def mixed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of which a part of the rows repeats itself."""
    texts = [json.loads(line)["text"] for line in corpus.text.read_text().splitlines()]
    strange = ["ka" * 40, "lo mi " * 30]
    documents = [text for i, text in enumerate(texts) for text in (text, *strange[: i % 5 == 0])]
    return convert(corpus, tmp_path_factory.mktemp("mixed"), documents)


def share_of(data: Path) -> float:
    shards = Shards([open_dataset(str(data))])
    found = [
        repeats(shards.row(number)["input_ids"].tolist(), RULE) for number in range(shards.num_rows)
    ]
    return sum(found) / len(found)


def without(rows: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key not in keys} for row in rows]


def test_a_run_leaves_them_out_counts_them_and_goes_on_bit_for_bit(
    corpus: Corpus, mixed: Path, tmp_path: Path
) -> None:
    assert 0.05 < share_of(mixed) < 0.6
    data = f"train_data.local={mixed}"
    corpus.train_run(tmp_path / "all", data, *STEPS)
    corpus.train_run(tmp_path / "filtered", data, *STEPS, *KEYS)
    every, filtered = read_log(tmp_path / "all"), read_log(tmp_path / "filtered")
    assert [row["batch_hash"] for row in filtered] == [row["batch_hash"] for row in every]
    assert "left_out" not in every[0]
    counts = [row["left_out"] for row in filtered]
    numbers = [each["rows"] for each in counts]
    assert numbers == sorted(numbers)
    assert 0 < numbers[-1] < 24
    for step, each in enumerate(counts, 1):
        assert each["tokens"] == 64 * each["rows"]
        assert each["share"] == pytest.approx(each["rows"] / (4 * step), abs=1e-6)
    # Losses are others from the first batch with such a row on
    first = next(i for i, number in enumerate(numbers) if number)
    losses = [[row["loss"] for row in rows] for rows in (every, filtered)]
    assert losses[0][:first] == losses[1][:first]
    assert losses[0][first] != losses[1][first]
    assert every[-1]["num_tokens"] == filtered[-1]["num_tokens"] == 6 * 4 * 64

    # Stopped on the way, with processes that read, and on two ranks: the same rows
    run = tmp_path / "killed"
    corpus.killed_run(run, data, *STEPS, *KEYS, "train_data.num_workers=1", after_step=3)
    corpus.train_run(run, data, *STEPS, *KEYS, "train_data.num_workers=1")
    assert read_log(run) == filtered
    ranks = tmp_path / "ranks"
    run_ranks(2, "recipes/train.py", *corpus.keys(ranks, data, *STEPS, *KEYS))
    assert [row["left_out"] for row in read_log(ranks)] == counts
    two = [row["loss"] for row in read_log(ranks)]
    assert two == pytest.approx([row["loss"] for row in filtered], rel=1e-4)

    # Another rule would be another loss
    changed = [*KEYS[:2], "repetition_filter.max_count=9"]
    for keys, said in (
        (changed, "repetition_filter.max_count (8 before, 9 now)"),
        ([], "repetition_filter.min_period (1 before, None now), "),
        ([*KEYS, "z_loss=0.1"], "z_loss (0.0 before, 0.1 now)"),
    ):
        process = run_script("recipes/train.py", *corpus.keys(run, data, *STEPS, *keys))
        assert process.returncode == 2
        line = process.stderr.splitlines()[-1]
        assert line.startswith("error: the checkpoint was trained on another loss: "), line
        assert said in line
        assert line.endswith("or set allow_schedule_change=true to continue anyway")
    longer = ("max_duration=7ba", "allow_schedule_change=true")
    corpus.train_run(run, data, *STEPS, *KEYS, "z_loss=0.1", *longer)
    assert len(read_log(run)) == 7


def test_batches_without_any_label_are_no_loss_and_evaluation_is_as_ever(
    corpus: Corpus, tmp_path: Path
) -> None:
    """Every row repeats itself: steps of nothing, with weight decay and nothing else."""
    data = convert(corpus, tmp_path, ["ka" * 100] * 60)
    assert share_of(data) == 1.0
    keys = (f"train_data.local={data}", *STEPS, f"eval_data.local={corpus.val}")
    run = tmp_path / "void"
    summary = corpus.train_run(run, *keys, *KEYS, "optimizer.weight_decay=0", "max_duration=2ba")
    rows = read_log(run)
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(0, 0)] * 2
    assert rows[-1]["left_out"] == {"rows": 8, "tokens": 512, "share": 1.0}
    assert math.isfinite(summary["eval_loss"])
    assert summary["eval_loss"] == summary["eval_loss_initial"] > 1

    # Evaluation on such rows counts them
    keys = (f"eval_data.local={data}", *STEPS)
    summary = corpus.train_run(tmp_path / "eval", *keys, *KEYS, "max_duration=1ba")
    assert summary["eval_loss_initial"] > 1
