"""That what is learned does not depend on how a batch is divided, and that a GPU's share is
found by trying.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from flame_composer.train.kernels import KERNELS
from tests.conftest import make_dataset, make_run
from tests.data_fixtures import byte_tokenizer
from tests.runs import ROOT, Corpus, Ranks, last_json, read_log, run_script

slow = pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes a minute: make test-faults"
)


class Gradients(Callback):
    """Keeps every step's gradient, as one vector, and how many labels each row of the batch had."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.labels: list[list[int]] = []

    def after_train_batch(self, state: State, logger: Logger) -> None:
        gradients = [parameter.grad for parameter in state.model.parameters()]
        self.seen.append(torch.cat([each.flatten() for each in gradients if each is not None]))
        self.labels.append((state.batch["labels"] != -100).sum(dim=1).tolist())


def test_gradients_do_not_depend_on_microbatches(
    dataset: Path, eval_dataset: Path, tmp_path: Path
) -> None:
    """Through the Trainer, on rows with unequal numbers of labels; norm-wise, below 1e-5."""
    runs: list[Gradients] = []
    for size in (1, 2, 4):
        (tmp_path / str(size)).mkdir()
        runs.append(gradients := Gradients())
        run = make_run(
            tmp_path / str(size),
            dataset,
            eval_dataset,
            microbatch_size=size,
            watchers=(gradients,),
            lr=1e-3,
            loss_across_documents=False,
        )
        run.trainer.fit()
        run.trainer.close()
    whole = runs[-1]
    assert any(len(set(rows)) > 1 for rows in whole.labels), "unequal"
    for run in runs[:-1]:
        assert run.labels == whole.labels
        for ours, theirs in zip(run.seen, whole.seen, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def recipe(
    folder: Path, ranks: int, rows: int, recompute: bool, steps: int
) -> list[dict[str, Any]]:
    """The log of yamls/gla_tiny.yaml but for its length and the data, whose rows have unequal
    numbers of labels.

    The rows come in the order for which it was seen how far rounding grows. In others the norm of
    the first steps' gradients can be so unsteady that differences of 1e-6 come to more, by the
    slope of the heads' norms at the documents' first tokens (docs/cpu.md).
    """
    run = folder / f"{ranks}-{rows}-{recompute}-{steps}"
    Ranks(
        ranks,
        f"{ROOT}/yamls/gla_tiny.yaml",
        f"tokenizer={folder / 'tokenizer'}",
        f"train_data.local={folder / 'data/out'}",
        "train_data.loss_across_documents=false",
        "train_data.shuffle_algo=py1e",
        "eval_data=null",
        "save_folder=null",
        f"log_folder={run}",
        f"max_duration={steps}ba",
        "scheduler.warmup=1ba",
        "log_batch_hash=true",
        f"microbatch_size={rows}",
        f"parallelism.activation_checkpointing={str(recompute).lower()}",
    ).finish()
    return read_log(run)


def assert_same_trajectory(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """To fp32 rounding, which is 6e-8: sums are added up in another order. AdamW makes a whole
    step of the sign of an entry whose gradient is all rounding, so that after some steps losses
    were seen to differ by 3e-6 and norms by 5e-4.
    """
    for mine, row in zip(ours, theirs, strict=True):
        assert mine["batch_hash"] == row["batch_hash"]
        assert mine["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(row["grad_norm"], rel=2e-3)
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=3e-7)
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-5)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.3, "it learns"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recipe")
    byte_tokenizer().save_pretrained(made / "tokenizer")
    make_dataset(made / "data", num_documents=900, context_length=512, shard_size=200_000)
    return made


def test_the_tiny_recipe_divided_otherwise_learns_the_same(folder: Path) -> None:
    whole = recipe(folder, ranks=1, rows=8, recompute=False, steps=3)
    assert_same_trajectory(recipe(folder, ranks=2, rows=1, recompute=True, steps=3), whole)


@slow
@pytest.mark.faults
def test_the_tiny_recipe_divided_in_every_way_learns_the_same(folder: Path) -> None:
    """A microbatch of 8 rows on one device is one of 4 on each of two: the recipe's global batch
    has 8.
    """
    whole = recipe(folder, ranks=1, rows=8, recompute=False, steps=8)
    for ranks, rows in ((1, 8), (1, 1), (2, 4), (2, 1)):
        plain = (
            whole
            if (ranks, rows) == (1, 8)
            else recipe(folder, ranks, rows, recompute=False, steps=8)
        )
        assert_same_trajectory(plain, whole)
        assert recipe(folder, ranks, rows, recompute=True, steps=8) == plain, (
            "recomputing changes no bit"
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is tried out on a GPU only")
def test_auto_finds_a_share_that_fits(corpus: Corpus, tmp_path: Path) -> None:
    auto, given = tmp_path / "auto", tmp_path / "given"
    keys = ("max_duration=4ba", "eval_data=null", "global_batch_size=8")
    runs: dict[str, Any] = {"auto": auto, "2": given}
    for size, run in runs.items():
        if run is given:  # the same kernels, which are then tuned once
            (run / "checkpoints").mkdir(parents=True)
            shutil.copy(auto / "checkpoints" / KERNELS, run / "checkpoints")
        last_json(
            run_script("recipes/train.py", *corpus.keys(run, *keys, f"microbatch_size={size}"))
        )
    for ours, theirs in zip(read_log(auto), read_log(given), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
