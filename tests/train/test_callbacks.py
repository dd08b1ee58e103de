"""The log of a run and what it refuses: on the rows that a real Trainer wrote."""

from __future__ import annotations

import json
import math
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Event, Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_composer.config.data import DataConfig
from flame_composer.config.sections import WandbConfig
from flame_composer.config.train import RunPlan
from flame_composer.errors import ConfigError
from flame_composer.loader.batches import describe_order
from flame_composer.loader.datasets import open_for_model
from flame_composer.train.announce import announce
from flame_composer.train.log import JsonlLog, describe, every, hash_row
from flame_composer.train.loggers import build_wandb_logger
from flame_composer.train.resume import RandomState, SameData
from flame_composer.train.rows import keep_rows
from tests.conftest import CONTEXT_LENGTH, Run
from tests.data_fixtures import byte_tokenizer

ROW = {
    "current_steps": 10,
    "total_steps": 20,
    "loss": 5.25,
    "grad_norm": 1.5,
    "learning_rate": 0.0003,
    "epoch": 0.5,
    "percentage": 50.0,
    "num_tokens": 123456,
    "throughput": 1234.5,
}
PLAN = RunPlan(
    total=3, per_epoch=3, warmup=0, decay=0, eval_interval=2, save_batches=1, save_seconds=None
)
EVERY_STEP = {*ROW, "batch_hash"}
EVALUATION = {"eval_loss", "eval_perplexity"}


def rows_of(run: Run) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (run.log_folder / "train_log.jsonl").read_text().splitlines()
    ]


# The log of a run


def test_every_step_is_logged_once_with_exactly_the_documented_keys(trained):
    rows = rows_of(trained)
    assert [row["current_steps"] for row in rows] == [1, 2, 3]
    for row in rows:
        evaluated = row["current_steps"] in (2, 3)  # every 2, and the last
        assert row.keys() == EVERY_STEP | (EVALUATION if evaluated else set())
        assert row["total_steps"] == 3
        assert row["num_tokens"] == row["current_steps"] * 4 * CONTEXT_LENGTH
        assert row["percentage"] == pytest.approx(100 * row["current_steps"] / 3, abs=1e-3)
        assert row["epoch"] == pytest.approx(
            row["current_steps"] / trained.batches_per_epoch, abs=1e-6
        )
        assert row["throughput"] > 0
        assert 4 < row["loss"] < 8, "about ln(400) at the start"
        if evaluated:
            assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]), rel=1e-5)
    for key in EVERY_STEP:
        assert all(
            key in line
            for line in (JsonlLog.__doc__, (trained.log_folder / "train_log.jsonl").read_text())
        ), key


def test_the_learning_rate_logged_is_the_one_the_step_was_made_with(trained):
    rates = [row["learning_rate"] for row in rows_of(trained)]
    assert rates[0] == 0.0, "the warmup starts from 0"
    assert max(rates) == 0.01
    evaluations = [
        trained.log.initial_evaluation["eval_loss"],
        *(row["eval_loss"] for row in rows_of(trained)[1:]),
    ]
    assert (evaluations[1] == evaluations[0]) == (rates[0] == rates[1] == 0.0), (
        "no step without a rate, and the reverse"
    )
    assert evaluations[2] < evaluations[1]


def test_evaluations_are_kept_for_the_summary(trained):
    log, last = trained.log, rows_of(trained)[-1]
    assert log.last_evaluation == {key: last[key] for key in EVALUATION}
    assert log.initial_evaluation["eval_loss"] > log.last_evaluation["eval_loss"]
    restored = JsonlLog(Path(), PLAN, print_lines=False)
    restored.load_state_dict(log.state_dict())
    state: Any = SimpleNamespace(timestamp=Timestamp(batch=3, token=384))
    assert restored.summary(state) == {
        "steps": 3,
        "train_tokens": 384,
        "tokens_per_second": None,
        **log.last_evaluation,
        "eval_loss_initial": log.initial_evaluation["eval_loss"],
        "eval_perplexity_initial": log.initial_evaluation["eval_perplexity"],
    }


def test_a_row_for_people():
    assert describe(ROW) == "step 10/20  loss 5.2500  lr 3.00e-04  1,234 tokens/s  123,456 tokens"
    assert (
        describe(ROW | {"eval_loss": 5.0, "eval_perplexity": 148.413})
        == "step 10/20  loss 5.2500  lr 3.00e-04  1,234 tokens/s  123,456 tokens  eval loss 5.0000,"
        " perplexity 148.4"
    )


@pytest.mark.parametrize(
    ("interval", "total", "expected"),
    [(2, 5, [2, 4, 5]), (5, 5, [5]), (9, 4, [4]), (1, 3, [1, 2, 3])],
)
def test_every(interval, total, expected):
    due = every(interval, total)

    def state(batch: int) -> Any:
        return SimpleNamespace(timestamp=Timestamp(batch=batch))

    assert [
        batch for batch in range(1, total + 1) if due(state(batch), Event.BATCH_END)
    ] == expected
    assert not due(state(total), Event.EPOCH_END)


# The log across restarts


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(0, 8), last=st.integers(0, 9), cut=st.integers(0, 200))
def test_keep_rows(tmp_path_factory, steps, last, cut):
    """Whatever a kill left of the last line: whole rows up to the checkpoint stay as they are,
    all else goes, for good.
    """
    path = tmp_path_factory.mktemp("log") / "train_log.jsonl"
    lines = [json.dumps(ROW | {"current_steps": step}) + "\n" for step in range(1, steps + 1)]
    torn = (json.dumps(ROW | {"current_steps": steps + 1}) + "\n")[:cut]
    path.write_text("".join(lines) + torn)
    keep_rows(path, last_step=last)
    whole = lines + ([torn.rstrip("\n") + "\n"] if torn.endswith(("}", "}\n")) else [])
    expected = "".join(whole[:last])
    assert path.read_text() == expected
    keep_rows(path, last_step=last)
    assert path.read_text() == expected
    assert list(path.parent.iterdir()) == [path]


def test_keep_rows_of_no_log(tmp_path):
    keep_rows(tmp_path / "train_log.jsonl", last_step=3)
    assert list(tmp_path.iterdir()) == []


def row(step: int) -> bytes:
    return json.dumps(ROW | {"current_steps": step}).encode() + b"\n"


NO_ROWS = {
    "cut and gone on": row(4)[:30],
    "zeros": bytes(300),
    "not UTF-8": row(4).replace(b"loss", b"lo\xff\xfes"),
    "a list": b"[1, 2]",
    "no step": b'{"loss": 1}',
    "a step of text": b'{"current_steps": "4"}',
    "a number": b"4",
    "null": b"null",
    "a step that is none": b'{"current_steps": -4}',
    "deep": b"[" * 100_000,
    "a truth": b'{"current_steps": true}',
    "digits without end": b'{"current_steps": ' + b"9" * 6000 + b"}",
}


@pytest.mark.parametrize("case", NO_ROWS)
def test_a_damaged_line_in_the_middle_drops_nothing_else_and_is_named(tmp_path, caplog, case):
    path = tmp_path / "train_log.jsonl"
    rows = [row(step) for step in range(1, 8)]
    path.write_bytes(b"".join([*rows[:3], NO_ROWS[case].rstrip(b"\n") + b"\n", *rows[4:]]))
    assert keep_rows(path, last_step=6) == [range(4, 5)]
    assert path.read_bytes() == b"".join([*rows[:3], *rows[4:6]])
    assert caplog.messages == [f"warning: {path}: line 4 is not a row of the log and is left out"]


def test_rows_that_are_there_twice_or_out_of_order_are_put_right_and_named(tmp_path, caplog):
    """As a log that was put together by hand, or two runs at once, have them. Every step is
    once, and in order.
    """
    path = tmp_path / "train_log.jsonl"
    later = row(3).replace(b"5.25", b"5.50")
    path.write_bytes(b"".join([row(1), row(2), row(3), row(5), row(2), later, row(4), row(9)]))
    assert keep_rows(path, last_step=5) == []
    assert path.read_bytes() == b"".join([row(1), row(2), later, row(4), row(5)])
    assert caplog.messages == [
        f"warning: {path}: has several rows, or rows out of order, for steps 2, 3, 4; they are put"
        " in order, and the last of each step is kept"
    ]
    assert keep_rows(path, last_step=5) == []
    assert len(caplog.messages) == 1


def test_a_start_that_was_cut_short_does_not_cost_the_next_one(trained, tmp_path):
    path = tmp_path / "starts.jsonl"
    state: Any = SimpleNamespace(trainer=trained.trainer)
    for before, lines in ((None, 1), ("", 1), ('{"step": 0}\n', 2), ('{"step": 0}\n{"st', 3)):
        if before is not None:
            path.write_text(before)
        step, max_duration = state.trainer.state.timestamp, state.trainer.state.max_duration
        state.trainer.state.timestamp = Timestamp(batch=1)
        try:
            announce(state.trainer, "a: 1", tmp_path, None, resumed_from=None)
        finally:
            state.trainer.state.timestamp = step
        assert max_duration is not None
        written = path.read_text().splitlines()
        assert len(written) == lines
        assert json.loads(written[-1])["step"] == 1


def test_steps_that_the_log_has_lost_are_named_on_resume(tmp_path, caplog):
    path = tmp_path / "train_log.jsonl"
    log = JsonlLog(tmp_path, PLAN, print_lines=False)

    def resume(batch: int) -> list[str]:
        caplog.clear()
        state: Any = SimpleNamespace(timestamp=Timestamp(batch=batch))
        log.fit_start(state, None)  # pyright: ignore[reportArgumentType]
        return caplog.messages

    def line(steps: str, batch: int) -> str:
        return (
            f"warning: {path}: has no row for {steps}, although the checkpoint of step {batch} is"
            " past it; the lost rows stay missing, and the run goes on"
        )

    path.write_bytes(b"".join(row(step) for step in (1, 2, 4, 5, 9)))
    assert resume(5) == [line("step 3", 5)]
    path.write_bytes(b"".join(row(step) for step in (1, 2, 4, 5, 9)))
    assert resume(12) == [line("steps 3, 6-8, 10-12", 12)]
    path.write_bytes(b"".join(row(step) for step in range(1, 60, 2)))
    assert resume(60) == [line("steps 2, 4, 6, 8, 10, 12, 14, 16, 18, 20 and more: 30 in all", 60)]
    path.unlink()
    assert resume(3) == [line("steps 1-3", 3)]
    assert resume(0) == []
    path.write_bytes(b"".join(row(step) for step in range(1, 6)))
    assert resume(4) == []


@pytest.mark.parametrize("seconds", [0, -3600])
def test_a_clock_that_was_set_back_ends_no_run(trained, tmp_path, seconds):
    """Composer measures a step by the clock on the wall."""
    log, state = (
        JsonlLog(tmp_path, PLAN, print_lines=True),
        trained.trainer.state,
    )
    before, previous = state.timestamp, state.previous_timestamp
    state.previous_timestamp = before.copy(batch=2, token=before.token.value - 128)
    state.timestamp = before.copy(
        batch_wct=timedelta(seconds=seconds), total_wct=timedelta(seconds=seconds)
    )
    try:
        log.batch_checkpoint(state, None)  # pyright: ignore[reportArgumentType]
        assert log.summary(state)["tokens_per_second"] is None
    finally:
        state.timestamp, state.previous_timestamp = before, previous
    (written,) = map(json.loads, (tmp_path / "train_log.jsonl").read_text().splitlines())
    assert written["throughput"] is None
    assert "unknown tokens/s" in describe(written)


def test_a_fresh_run_starts_its_log_anew(tmp_path):
    path = tmp_path / "train_log.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    log = JsonlLog(tmp_path, PLAN, print_lines=False)
    state: Any = SimpleNamespace(timestamp=Timestamp())
    log.fit_start(state, None)  # pyright: ignore[reportArgumentType]
    assert path.read_text() == ""


# The hash of a batch

token_rows = st.lists(
    st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), min_size=1, max_size=6
)


def batch_hash(rows: list[list[int]]) -> int:
    return sum(hash_row(torch.tensor(row)) for row in rows)


@given(rows=token_rows, data=st.data())
def test_batch_hash_depends_on_the_rows_not_on_their_order(rows, data):
    assert batch_hash(data.draw(st.permutations(rows))) == batch_hash(rows)
    split = data.draw(st.integers(0, len(rows)))
    assert batch_hash(rows[:split]) + batch_hash(rows[split:]) == batch_hash(rows), (
        "nor on the ranks"
    )


@given(
    rows=token_rows, row=st.integers(0, 5), place=st.integers(0, 3), other=st.integers(0, 2**32 - 1)
)
def test_batch_hash_sees_every_token(rows, row, place, other):
    changed = [list(each) for each in rows]
    changed[row % len(rows)][place] = other
    assert (batch_hash(changed) == batch_hash(rows)) == (changed == rows)


def test_hash_of_a_row():
    assert hash_row(torch.tensor([1, 2])) != hash_row(torch.tensor([2, 1]))
    assert hash_row(torch.tensor([1, 2], dtype=torch.int32)) == hash_row(torch.tensor([1, 2])), (
        "ids, not their type"
    )
    assert 0 <= hash_row(torch.tensor([1, 2])) < 2**64


def test_the_hashes_logged_are_those_of_the_rows(trained, dataset, copy_of):
    """Recomputed from the batches of a loader of its own."""
    from flame_composer.loader.batches import build_train_loader

    opened = open_for_model(
        str(copy_of(dataset)), None, tokenizer=byte_tokenizer(), context_length=CONTEXT_LENGTH
    )
    loader = build_train_loader(
        {"": opened}, DataConfig(num_workers=0), global_batch_size=4, seed=7
    ).dataloader
    logged = [row["batch_hash"] for row in rows_of(trained)]
    batches = [batch for batch, _ in zip(loader, logged, strict=False)]
    assert [f"{sum(map(hash_row, batch['input_ids'])) % 2**64:016x}" for batch in batches] == logged
    assert len(set(logged)) == 3


# The data a run goes on with

ORDER: dict[str, Any] = {
    "train_data (index.json)": "abc",
    "global_batch_size": 4,
    "train_data.shuffle_seed": 7,
}


def test_the_same_data_is_accepted():
    resumed = SameData(dict(ORDER), allow_change=False)
    resumed.load_state_dict(SameData(dict(ORDER), allow_change=False).state_dict())
    assert resumed.state_dict() == {"order": ORDER}


@pytest.mark.parametrize("key", ORDER)
def test_another_order_is_refused_naming_what_changed(key):
    now = ORDER | {key: "other"}
    with pytest.raises(ConfigError) as caught:
        SameData(now, allow_change=False).load_state_dict({"order": ORDER})
    assert (
        str(caught.value)
        == f"the checkpoint was trained on rows in another order: {key} ({ORDER[key]} before, other"
        " now); set back what changed, start a new run_name, or set allow_data_change=true to"
        " continue anyway"
    )
    SameData(now, allow_change=True).load_state_dict({"order": ORDER})


def test_all_that_changed_is_named():
    changes = "global_batch_size (4 before, 8 now), train_data.shuffle_seed (None before, 7 now)"
    with pytest.raises(ConfigError, match=re.escape(changes)):
        SameData(ORDER | {"global_batch_size": 8}, allow_change=False).load_state_dict(
            {
                "order": {
                    key: value for key, value in ORDER.items() if key != "train_data.shuffle_seed"
                }
            }
        )


def test_the_order_covers_what_decides_it(trained, dataset):
    opened = open_for_model(str(dataset), None, tokenizer=byte_tokenizer())
    base = describe_order({"": opened}, DataConfig(), global_batch_size=4, seed=7)
    assert base == trained.order
    changes: list[dict[str, Any]] = [
        {"shuffle": False},
        {"shuffle_algo": "py1s"},
        {"shuffle_seed": 1},
        {"shuffle_block_size": 9},
        {"num_canonical_nodes": 2},
    ]
    for change in changes:
        other = describe_order({"": opened}, DataConfig(**change), global_batch_size=4, seed=7)
        changed = {f"train_data.{name}" for name in change}
        if "shuffle_algo" in change:  # whose default block is its own
            changed.add("train_data.shuffle_block_size")
        assert {key for key in base if other[key] != base[key]} == changed
    assert describe_order({"": opened}, DataConfig(), global_batch_size=4, seed=8) != base
    assert (
        describe_order({"": opened}, DataConfig(shuffle_seed=7), global_batch_size=4, seed=8)
        == base
    ), "the seed in force"
    for change in (
        {"num_workers": 7},
        {"prefetch_factor": 9},
        {"predownload": 3},
        {"cache_limit": "1gb"},
    ):
        other = describe_order({"": opened}, DataConfig(**change), global_batch_size=4, seed=7)
        assert other == base, "may change on a restart"


def test_w_and_b_without_an_account_is_one_line(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    logger = build_wandb_logger(WandbConfig(project="p"), "run", tmp_path)
    state: Any = SimpleNamespace(run_name="run")
    with pytest.raises(
        ConfigError,
        match=r"^wandb: cannot be logged to: (?i:(no )?api.key( not)? configured).*;"
        " run `wandb login`",
    ):
        logger.init(state, None)  # pyright: ignore[reportArgumentType]


# Random state


def test_random_state_is_restored_before_the_first_batch_only():
    torch.manual_seed(3)
    callback = RandomState()
    saved = callback.state_dict()
    expected = torch.rand(3)
    torch.manual_seed(99)
    restarted = RandomState()
    restarted.load_state_dict(saved)
    none: Any = None
    restarted.after_dataloader(none, none)
    assert torch.equal(torch.rand(3), expected)
    restarted.after_dataloader(none, none)
    assert not torch.equal(torch.rand(3), expected), "not again at the second batch"


def test_random_state_of_another_number_of_ranks_is_left_alone():
    callback = RandomState()
    state = callback.state_dict()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    callback.load_state_dict({"rng": state["rng"] * 2})
    none: Any = None
    callback.after_dataloader(none, none)
    assert torch.equal(torch.rand(2), expected)
