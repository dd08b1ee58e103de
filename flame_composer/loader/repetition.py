"""Rows that repeat themselves: finding them, and leaving them out of the loss.

A sequence of a few tokens that is repeated over and over teaches a model nothing, and can make its
loss leap. OLMo 2 therefore leaves such rows out (OLMo et al. 2025, arXiv:2501.00656; OLMo-core's
`InstanceFilterConfig`). The row is streamed as any other, so that neither the order of rows nor the
place to resume at depends on the filter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flame_composer.batch import IGNORE, Batch
from flame_composer.config.sections import RepetitionConfig

LEFT_OUT = "left_out"  # the key of a batch that says which of its rows are, bool [B]
SAMPLES = 4  # comparisons in each stretch of tokens that could be the shortest repetition


def leave_out(batch: Batch, config: RepetitionConfig) -> Batch:
    """Return the batch with `left_out`, bool [B], and no labels in the rows that it is true for."""
    repeats = torch.from_numpy(repeat_themselves(batch["input_ids"].numpy(), config))
    labels = batch["labels"].masked_fill(repeats[:, None], IGNORE)
    return {**batch, "labels": labels, LEFT_OUT: repeats}


def repeat_themselves(tokens: NDArray[Any], config: RepetitionConfig) -> NDArray[np.bool_]:
    """Return whether each row of `tokens` [B, T] has a sequence that is repeated too often, [B].

    A sequence of p tokens occurs n times in a row where (n - 1) x p tokens in a row each equal the
    one p places before. Only some of them are compared at first: a row in which all of these are
    equal is then looked at whole.
    """
    found = np.zeros(len(tokens), np.bool_)
    for period in range(config.min_period, config.max_period + 1):
        length = (config.max_count - 1) * period  # of the shortest run of equal tokens that counts
        if length + period > tokens.shape[1]:
            break
        for row in np.flatnonzero(_may_have_run(tokens, period, length) & ~found):
            found[row] = _longest_run(tokens[row, period:] == tokens[row, :-period]) >= length
    return found


def _may_have_run(tokens: NDArray[Any], period: int, length: int) -> NDArray[np.bool_]:
    """Return whether each row may have `length` tokens in a row equal to those `period` before.

    Every `step`th token is compared. Wherever a run of `length` begins, it holds `number` of these
    comparisons, one after the other.
    """
    step = max(1, length // SAMPLES)
    number = length // step
    equal = tokens[:, period::step] == tokens[:, :-period:step]
    last = equal.shape[1] - number + 1
    all_equal = equal[:, :last].copy()
    for shift in range(1, number):
        all_equal &= equal[:, shift : shift + last]
    return all_equal.any(axis=1)


def _longest_run(equal: NDArray[np.bool_]) -> int:
    """Return the length of the longest run of true values."""
    borders = np.flatnonzero(~equal)
    return int(np.diff(borders, prepend=-1, append=len(equal)).max()) - 1
