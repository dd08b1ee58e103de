"""A killed run, started again by the same command, must end as the run that nothing disturbed:
bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from flame_composer.cpu.linear import multiplies_bf16
from flame_composer.train.run_log import read_run
from tests.conftest import make_run
from tests.runs import WANDB, Corpus, check, read_log, run_script

# A model with dropout, which draws random numbers at every step.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "attention_dropout": 0.2,
}


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    last_step = read_log(run)[-1]["current_steps"]
    return torch.load(run / "checkpoints" / f"ba{last_step}.pt", weights_only=False)["state"][
        "model"
    ]


def assert_same_run(run: Path, other: Path) -> None:
    assert read_log(run) == read_log(other)
    ours, theirs = final_weights(run), final_weights(other)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(("num_workers", "kills"), [(0, (17, 33)), (2, (3, 24))])
def test_killed_run_ends_bit_identical(
    corpus: Corpus, undisturbed: Path, tmp_path: Path, num_workers: int, kills: tuple[int, ...]
) -> None:
    """Kills at 17 and 33 go on from steps 15 and 30, the ends of epochs; 3 is before the first
    checkpoint.
    """
    run = tmp_path / "killed"
    workers = f"train_data.num_workers={num_workers}"
    for step in kills:
        corpus.killed_run(run, workers, after_step=step)
    summary = corpus.train_run(run, workers)
    assert_same_run(run, undisturbed)
    starts = read_run(str(run)).starts
    assert len(starts) == len(kills) + 1
    for start in starts:  # the one after a kill before the first checkpoint begins anew
        assert start["resumed_from"] == (
            str(run / f"checkpoints/ba{start['step']}.pt") if start["step"] else None
        )
    assert starts[0]["step"] == 0 < starts[-1]["step"]
    expected = json.loads((undisturbed / "summary.json").read_text())
    for key in ("steps", "train_tokens", "eval_loss", "eval_loss_initial"):
        assert summary[key] == expected[key], key


def test_dropout_goes_on_with_the_same_random_numbers(corpus: Corpus, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    file = corpus.yaml_with(LLAMA)
    corpus.train_run(whole, file)
    corpus.killed_run(killed, file, after_step=18)
    corpus.killed_run(killed, file, after_step=23)
    corpus.train_run(killed, file)
    assert_same_run(killed, whole)
    corpus.train_run(tmp_path / "no_dropout", file, "model.config.attention_dropout=0.0")
    assert read_log(tmp_path / "no_dropout") != read_log(whole)


@pytest.mark.skipif(not multiplies_bf16(), reason="this CPU does not multiply bf16")
def test_bf16_on_a_cpu_goes_on_bit_for_bit(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    """Layers that are computed a second time, in the backward pass, are in bf16 as well."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    keys = ("precision=amp_bf16",)
    corpus.train_run(whole, *keys)
    corpus.killed_run(killed, *keys, after_step=18)
    corpus.train_run(killed, *keys, "parallelism.activation_checkpointing=true")
    assert_same_run(killed, whole)
    ours, in_fp32 = ([row["loss"] for row in read_log(run)] for run in (whole, undisturbed))
    assert ours != in_fp32
    assert ours == pytest.approx(in_fp32, rel=0.02)


def test_epochs_have_orders_of_their_own(undisturbed: Path) -> None:
    rows = read_log(undisturbed)
    assert [row["current_steps"] for row in rows if row["epoch"] in (1, 2)] == [15, 30]
    first, second = ([row["batch_hash"] for row in rows[start : start + 15]] for start in (0, 15))
    assert set(first).isdisjoint(second)


def test_finished_run_started_again_changes_nothing(corpus: Corpus, undisturbed: Path) -> None:
    def content() -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in undisturbed.rglob("*")
            if path.is_file() and "wandb" not in path.parts
        }

    before, summary = content(), str(undisturbed / "summary.json")
    assert corpus.train_run(undisturbed, *WANDB, env={"WANDB_MODE": "offline"}) == json.loads(
        before[summary]
    )
    assert content() == before


def test_damaged_checkpoint_is_named_and_the_one_before_used(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "damaged"
    corpus.killed_run(run, after_step=27)
    newest = max((run / "checkpoints").glob("ba*.pt"), key=lambda path: int(path.stem[2:]))
    newest.write_bytes(newest.read_bytes()[:-1000])
    process = check(run_script("recipes/train.py", *corpus.keys(run)))
    assert f"warning: {newest}: not a whole checkpoint" in process.stderr
    assert f"resuming from {newest.with_name(f'ba{int(newest.stem[2:]) - 5}.pt')}" in process.stdout
    assert_same_run(run, undisturbed)


def test_checkpoints_that_are_damaged_or_empty_delete_no_good_one(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    """The two newest cannot be used; what the run then saves stays, and it ends as the
    undisturbed one.
    """
    run = Path(shutil.copytree(undisturbed, tmp_path / "undisturbed"))
    folder = run / "checkpoints"
    (folder / "ba40.pt").write_bytes((folder / "ba40.pt").read_bytes()[:5000])
    torch.save({}, folder / "ba35.pt")
    for name in ("ba41.pt", "ba42.pt", "ba43.pt"):
        shutil.copy(folder / "ba40.pt", folder / name)
    log = (run / "train_log.jsonl").read_text().splitlines(keepends=True)
    log[19] = "\0" * 50 + "\n"
    (run / "train_log.jsonl").write_text("".join(log))
    process = check(
        run_script("recipes/train.py", *corpus.keys(run, "save_num_checkpoints_to_keep=2"))
    )
    assert f"resuming from {folder}/ba30.pt: step 30" in process.stdout
    assert (
        f"warning: {folder}/ba35.pt: not a checkpoint that can be used: it has no state; trying"
        in process.stderr
    )
    assert (
        f"warning: {run}/train_log.jsonl: has no row for step 20, although the checkpoint of step"
        " 30 is past it" in process.stderr
    )
    damaged = {"ba41.pt", "ba42.pt", "ba43.pt", "aside-ba35.pt", "aside-ba40.pt"}
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "ba35.pt",
        "ba40.pt",
        *damaged,
    }
    assert read_log(run) == [row for row in read_log(undisturbed) if row["current_steps"] != 20]
    for name, tensor in final_weights(undisturbed).items():
        assert torch.equal(final_weights(run)[name], tensor), name


def test_another_model_or_optimizer_is_refused_by_name(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    for key, message in (
        (
            "model.config.hidden_size=64",
            "have the shape [300, 32], and [300, 64] in this run's model",
        ),
        # No shape shows it
        ("model.config.norm_eps=0.5", "its model has norm_eps=1e-06, and this run's model.config."),
        (
            "model.config.final_logit_softcapping=30.0",
            "its model has final_logit_softcapping=null, and this run's model.config.final_logit_",
        ),
        ("optimizer.name=lamb", "its optimizer is AdamW, and this run's Lamb"),
    ):
        process = run_script("recipes/train.py", *corpus.keys(undisturbed, key))
        assert process.returncode == 2, process.stderr
        last = process.stderr.splitlines()[-1]
        assert last.startswith(f"error: {undisturbed}/checkpoints: none of its ")
        assert message in last
    assert len(read_log(undisturbed)) == 40


def test_another_data_order_is_refused(corpus: Corpus, undisturbed: Path) -> None:
    process = run_script("recipes/train.py", *corpus.keys(undisturbed, "global_batch_size=6"))
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(
        "error: the checkpoint was trained on rows in another order: global_batch_size (4 before, 6"
        " now); set back what changed"
    )
    assert len(read_log(undisturbed)) == 40


def test_a_longer_run_is_refused_where_it_would_have_had_other_rates(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    process = run_script("recipes/train.py", *corpus.keys(undisturbed, "max_duration=60ba"))
    assert process.returncode == 2
    assert re.fullmatch(
        r"error: the checkpoint was trained at other learning rates: step 6 of the 40 taken had .*:"
        r" max_duration \(40ba "
        r"before, 60ba now\); set back what changed, .*allow_schedule_change=true.*",
        process.stderr.splitlines()[-1],
    )
    assert len(read_log(undisturbed)) == 40
    run = Path(shutil.copytree(undisturbed, tmp_path / "undisturbed"))
    corpus.train_run(run, "max_duration=42ba", "allow_schedule_change=true")
    assert read_log(run)[:40] == read_log(undisturbed)
    assert len(read_log(run)) == 42


def test_a_finished_run_is_made_longer_by_any_unit_and_not_shorter(
    corpus: Corpus, tmp_path: Path
) -> None:
    """wsd without a decay is a constant rate after the warmup: what goes on is the run that was
    that long at once.
    """
    run, whole = tmp_path / "longer", tmp_path / "whole"
    wsd = ("scheduler.name=wsd", "scheduler.decay=0ba", "eval_data=null", "save_interval=3ba")
    corpus.train_run(run, *wsd, "max_duration=2000tok")  # 7.8 steps of 4 x 64 tokens
    assert len(read_log(run)) == 8
    corpus.train_run(run, *wsd, "max_duration=1ep")
    assert len(read_log(run)) == 15
    process = run_script("recipes/train.py", *corpus.keys(run, *wsd, "max_duration=14ba"))
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(
        "error: max_duration: comes to 14ba, but the checkpoint has already taken 15 steps; set it"
        " to more"
    )
    assert len(read_log(run)) == 15
    corpus.train_run(run, *wsd, "max_duration=2ep")
    corpus.train_run(whole, *wsd, "max_duration=30ba")
    keys = ("loss", "grad_norm", "learning_rate", "batch_hash")
    at_once, in_parts = (
        [[row[key] for key in keys] for row in read_log(each)] for each in (whole, run)
    )
    assert in_parts == at_once


def test_a_run_at_a_constant_rate_can_be_made_longer(
    dataset: Path, eval_dataset: Path, tmp_path: Path
) -> None:
    """And ends as the run that was that long from the beginning."""
    runs = []
    for name, total, start in (
        ("short", 3, None),
        ("long", 6, "short/checkpoints/ba3.pt"),
        ("whole", 6, None),
    ):
        (tmp_path / name).mkdir()
        load_path = tmp_path / start if start else None
        run = make_run(
            tmp_path / name,
            dataset,
            eval_dataset,
            total=total,
            eval_interval=9,
            schedule="constant",
            load_path=load_path,
        )
        run.trainer.fit()
        run.trainer.close()
        runs.append(run)
    for name, tensor in runs[2].weights.items():
        assert torch.equal(tensor, runs[1].weights[name]), name
    assert read_log(runs[1].log_folder) == read_log(runs[2].log_folder)[3:]


def test_without_autoresume_nothing_is_overwritten(corpus: Corpus, undisturbed: Path) -> None:
    process = run_script("recipes/train.py", *corpus.keys(undisturbed, "autoresume=false"))
    assert process.returncode == 2
    assert process.stderr.startswith(
        f"error: {undisturbed / 'checkpoints'}: holds checkpoints of an earlier run (ba40.pt)"
    )
    assert len(read_log(undisturbed)) == 40
