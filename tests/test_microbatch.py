"""That what is learned does not depend on how a batch is divided, and that a GPU's share is found by trying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from tests.conftest import make_run
from tests.runs import Corpus, last_json, read_log, run_script


class Gradients(Callback):
    """Keeps every step's gradient, as one vector, and how many labels each row of the batch had."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.labels: list[list[int]] = []

    def after_train_batch(self, state: State, logger: Logger) -> None:
        parameters = [parameter for parameter in state.model.parameters() if parameter.grad is not None]
        self.seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))  # pyright: ignore
        self.labels.append((state.batch["labels"] != -100).sum(dim=1).tolist())


def test_gradients_do_not_depend_on_microbatches(dataset: Path, eval_dataset: Path, tmp_path: Path) -> None:
    """Through the Trainer, on rows with unequal numbers of labels; norm-wise, below 1e-5."""
    runs: list[Gradients] = []
    for size in (1, 2, 4):
        (tmp_path / str(size)).mkdir()
        runs.append(gradients := Gradients())
        run = make_run(tmp_path / str(size), dataset, eval_dataset, microbatch_size=size, watchers=(gradients,), lr=1e-3,
                       loss_across_documents=False)
        run.trainer.fit()
        run.trainer.close()
    whole = runs[-1]
    assert any(len(set(rows)) > 1 for rows in whole.labels), "unequal"
    for run in runs[:-1]:
        assert run.labels == whole.labels
        for ours, theirs in zip(run.seen, whole.seen, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is tried out on a GPU only")
def test_auto_finds_a_share_that_fits(corpus: Corpus, tmp_path: Path) -> None:
    auto, given = tmp_path / "auto", tmp_path / "given"
    keys = ("max_duration=4ba", "eval_data=null", "global_batch_size=8")
    runs: dict[str, Any] = {"auto": auto, "2": given}
    for size, run in runs.items():
        last_json(run_script("recipes/train.py", *corpus.keys(run, *keys, f"microbatch_size={size}")))
    for ours, theirs in zip(read_log(auto), read_log(given), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
