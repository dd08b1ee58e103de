"""Rows and tokens that a run has taken from each of its streams, and those it left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from composer.core import Callback, DataSpec, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader

from flame_composer.config.train import TrainConfig
from flame_composer.dataset.open import Dataset
from flame_composer.loader.repetition import LEFT_OUT
from flame_composer.loader.rows import Rows
from flame_composer.train.sums import StepSums


class Mixture(Callback):
    """A callback that counts the rows taken from every stream, over all ranks.

    The counts are saved in checkpoints, so they survive restarts. At every step they go to the
    loggers as mixture/<stream>/rows, tokens and share, and into the step's row of the log. At the
    start it prints how many rows of each stream an epoch has.
    """

    def __init__(
        self,
        rows_per_epoch: dict[str, int],
        rows_on_disk: list[int],
        context_length: int,
        sums: StepSums,
    ):
        """Count the rows of the streams that `rows_per_epoch` names, on all ranks by `sums`.

        They are in the order of the stream numbers in batches; `rows_on_disk` is in the same order.
        """
        self.sums = sums
        sums.add_of_rows("streams", self._rows_of_batch)
        self.rows_per_epoch = rows_per_epoch
        self.rows_on_disk = rows_on_disk
        self.context_length = context_length
        self.rows = torch.zeros(len(rows_per_epoch), dtype=torch.int64)

    def achieved(self) -> dict[str, dict[str, float]]:
        """Return the rows and tokens taken from every stream, and its share of all rows."""
        total = max(1, int(self.rows.sum()))
        return {
            name: {
                "rows": rows,
                "tokens": rows * self.context_length,
                "share": round(rows / total, 6),
            }
            for name, rows in zip(self.rows_per_epoch, self.rows.tolist(), strict=True)
        }

    def part_of_row(self) -> dict[str, Any]:
        """Return `streams`: the rows, tokens and share of every stream so far."""
        return {"streams": self.achieved()}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": dict(zip(self.rows_per_epoch, self.rows.tolist(), strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = state["rows"]
        self.rows = torch.tensor([before.get(name, 0) for name in self.rows_per_epoch])

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            total = sum(self.rows_per_epoch.values())
            parts = [
                f"{name} {rows:,} ({rows / total:.1%}, {rows / there:.2f} x its {there:,})"
                for (name, rows), there in zip(
                    self.rows_per_epoch.items(), self.rows_on_disk, strict=True
                )
            ]
            print(f"rows of an epoch by stream: {', '.join(parts)}", flush=True)

    def _rows_of_batch(self, state: State) -> list[int]:
        """Return the number of rows of each stream in this rank's part of the batch."""
        return torch.bincount(state.batch["stream"].cpu(), minlength=len(self.rows)).tolist()

    def batch_end(self, state: State, logger: Logger) -> None:
        self.rows += torch.tensor(self.sums["streams"])
        logger.log_metrics(
            {
                f"mixture/{name}/{what}": value
                for name, values in self.achieved().items()
                for what, value in values.items()
            }
        )


class LeftOut(Callback):
    """A callback that counts the rows that `repetition_filter` left out of the loss.

    It counts those of all ranks. The counts are saved in checkpoints, so they survive restarts. At
    every step they go to the loggers as left_out/rows, tokens and share, and into the step's row of
    the log.
    """

    def __init__(self, context_length: int, sums: StepSums):
        self.sums = sums
        sums.add_of_rows("left_out", lambda state: left_out_and_seen(state.batch[LEFT_OUT]))
        self.context_length = context_length
        self.left_out = self.seen = 0  # rows so far

    def counts(self) -> dict[str, float]:
        """Return the rows and tokens left out so far, and their share of all rows."""
        return {
            "rows": self.left_out,
            "tokens": self.left_out * self.context_length,
            "share": round(self.left_out / max(1, self.seen), 6),
        }

    def part_of_row(self) -> dict[str, Any]:
        """Return `left_out`: the rows, tokens and share that were left out of the loss so far."""
        return {"left_out": self.counts()}

    def state_dict(self) -> dict[str, Any]:
        return {"left_out": self.left_out, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left_out, self.seen = int(state["left_out"]), int(state["seen"])

    def batch_end(self, state: State, logger: Logger) -> None:
        left_out, seen = self.sums["left_out"]
        self.left_out, self.seen = self.left_out + left_out, self.seen + seen
        logger.log_metrics({f"left_out/{what}": value for what, value in self.counts().items()})


def left_out_and_seen(is_left_out: torch.Tensor) -> tuple[int, int]:
    """Return how many rows are marked as left out, and how many there are."""
    return int(is_left_out.sum()), len(is_left_out)


def build_left_out(config: TrainConfig, sums: StepSums) -> list[LeftOut]:
    """Return a list of the callback that counts rows left out; empty if none can be."""
    return [] if config.repetition_filter is None else [LeftOut(config.context_length, sums)]


def build_mixture(
    loader: DataSpec, datasets: Mapping[str, Dataset], sums: StepSums
) -> list[Mixture]:
    """Return a list of the callback that counts the streams' rows; empty for a single dataset."""
    if len(datasets) == 1:
        return []
    order = cast(Rows, cast(DataLoader, loader.dataloader).dataset).order
    rows = dict(zip(datasets, order.choose, strict=True))
    on_disk = [dataset.manifest.totals.rows for dataset in datasets.values()]
    context_length = next(iter(datasets.values())).manifest.context_length
    return [Mixture(rows, on_disk, context_length, sums)]
