"""Integers of all ranks, added up once a step in one all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from composer.core import State
from composer.devices import Device
from composer.utils import dist

from flame_composer.model.ranks import ALL_APART, Ranks


class StepSums:
    """Named integers that every rank has at every step, and their sums over all ranks.

    All of them share one all-reduce, because each makes every rank wait for the slowest, and its
    device for the host. It happens once a step, between the backward pass and the optimizer's step:
    the ranks have to agree there whether to take the step, and nothing else needs to know earlier.
    """

    def __init__(self, ranks: Ranks = ALL_APART) -> None:
        """Sum over all ranks, of which `ranks` says which have the same rows."""
        self.counts_rows = ranks.counts_rows
        self._of_rank: dict[str, Callable[[State], Sequence[int]]] = {}
        self._sums: dict[str, list[int]] = {}

    def add(self, name: str, of_rank: Callable[[State], Sequence[int]]) -> None:
        """Have the integers that `of_rank` returns added up, at every step from now on.

        It is called after the backward pass, when `state.batch` is the rank's whole batch again.
        Every rank must add the same names in the same order, with as many integers.
        """
        assert name not in self._of_rank, name
        self._of_rank[name] = of_rank

    def add_of_rows(self, name: str, of_rank: Callable[[State], Sequence[int]]) -> None:
        """Do as `add`, for numbers of the rank's rows: of ranks with the same rows, one counts."""
        weight = int(self.counts_rows)
        self.add(name, lambda state: [weight * number for number in of_rank(state)])

    def __getitem__(self, name: str) -> list[int]:
        """Return the sums of the integers called `name`, as they were at the last `take`."""
        return self._sums[name]

    def take(self, state: State) -> None:
        """Add up the integers of this step. Every rank must call this."""
        parts = {name: list(of_rank(state)) for name, of_rank in self._of_rank.items()}
        numbers = [each for part in parts.values() for each in part]
        flat = iter(sum_over_ranks(numbers, state.device))
        self._sums = {name: [next(flat) for _ in part] for name, part in parts.items()}


def sum_over_ranks(numbers: Sequence[int], device: Device) -> list[int]:
    """Return the sum of each number over all ranks; the sums must be less than 2**63."""
    if dist.get_world_size() == 1:
        return list(numbers)
    sums = device.tensor_to_device(torch.tensor(numbers, dtype=torch.int64))
    dist.all_reduce(sums)
    return sums.tolist()
