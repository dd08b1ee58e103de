"""A run is put together in one order, and another order loses something."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from composer.core import Callback, State
from composer.loggers import Logger

from flame_composer.checkpoint.save import SaveCheckpoints
from flame_composer.train.assemble import ORDER, require_order
from flame_composer.train.log import JsonlLog
from tests.conftest import Run, make_run


class End(Exception):
    """In place of a kill."""


class EndBetween(Callback):
    """Ends the process, as it were, after one of log and saver and before the other."""

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 2:
            raise End


def place_of(callbacks: list[Callback], cls: type[Callback]) -> int:
    return next(i for i, each in enumerate(callbacks) if isinstance(each, cls))


@pytest.mark.parametrize(("earlier", "later", "why"), ORDER, ids=lambda each: str(each)[-30:])
def test_every_rule_of_the_order_is_kept(
    trained: Run, earlier: type[Callback], later: type[Callback], why: str
) -> None:
    callbacks = list(trained.trainer.state.callbacks)
    require_order(callbacks)
    if not any(isinstance(each, earlier) for each in callbacks):
        callbacks.insert(0, object.__new__(earlier))  # of a run with streams, or tasks
    wrong = list(callbacks)
    wrong.insert(place_of(wrong, earlier), wrong.pop(place_of(wrong, later)))
    with pytest.raises(AssertionError, match=rf"{earlier.__name__} comes before {later.__name__}"):
        require_order(wrong)


@pytest.mark.parametrize("build_callbacks", [True, False])
def test_a_checkpoint_finds_the_row_of_its_step(
    dataset: Path,
    eval_dataset: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    build_callbacks: bool,
) -> None:
    """A run that ends between the log and the saver: in their order nothing is missing."""
    run = make_run(tmp_path, dataset, eval_dataset)
    callbacks = list(run.trainer.state.callbacks)
    i, j = place_of(callbacks, JsonlLog), place_of(callbacks, SaveCheckpoints)
    assert j == i + 1
    pair = [callbacks[i], callbacks[j]] if build_callbacks else [callbacks[j], callbacks[i]]
    run.trainer.state.callbacks = [
        *callbacks[:i],
        pair[0],
        EndBetween(),
        pair[1],
        *callbacks[j + 1 :],
    ]
    with pytest.raises(End):
        run.trainer.fit()
    saver = callbacks[j]
    assert isinstance(saver, SaveCheckpoints)
    saver.wait()
    newest = tmp_path / f"checkpoints/ba{1 if build_callbacks else 2}.pt"
    assert newest.exists()
    restarted = make_run(tmp_path, dataset, eval_dataset, load_path=newest)
    with caplog.at_level(logging.WARNING):
        restarted.trainer.fit()
    restarted.trainer.close()
    lost = [message for message in caplog.messages if "has no row for step 2" in message]
    assert len(lost) == (0 if build_callbacks else 1)
