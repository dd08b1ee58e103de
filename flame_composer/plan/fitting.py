"""The microbatches of a run that fit into a device's memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

from flame_composer.config.plan import PlanConfig
from flame_composer.plan.figures import Memory
from flame_composer.plan.memory import FILL, Size, device_memory, memory

Count = Callable[[int], Memory]  # of a step with so many rows at a time


def estimate(config: PlanConfig, size: Size) -> Count:
    """Return the function that estimates the memory of a step by formula."""
    return functools.partial(memory, config, size)


def largest_microbatch(config: PlanConfig, count: Count) -> int | None:
    """Return the largest microbatch that fits into memory, or None if not even one row does.

    Only sizes that divide a device's share of the global batch are considered. Few of them are
    counted: the peak is the largest of several amounts that grow in proportion to the rows, so a
    line through two counts is never above a third beyond them, and never below one between them.
    The size that is returned has been counted.
    """
    batch, places = config.global_batch_size, config.places
    sizes = [rows for rows in range(1, batch // places + 1) if batch % (places * rows) == 0]
    there = FILL * device_memory(config)
    if count(1).total > there:
        return None
    fits, counted, too_large = 1, [1], len(sizes)  # the last one: an index
    if isinstance(config.microbatch_size, int) and config.microbatch_size in sizes[1:]:
        counted.append(config.microbatch_size)
    elif len(sizes) > 1:
        counted.append(sizes[1])
    for rows in counted[1:]:
        if count(rows).total <= there:
            fits = rows
        else:
            too_large = sizes.index(rows)
    while left := sizes[sizes.index(fits) + 1 : too_large]:
        beyond = too_large == len(sizes)
        first, second = sorted(counted)[-2:] if beyond else (fits, sizes[too_large])
        limit = _where(count(first).total, count(second).total, there, first, second)
        candidates = [rows for rows in left if rows <= limit]
        if beyond and not candidates:
            break
        rows = candidates[-1] if candidates else left[0]
        counted.append(rows)
        if count(rows).total <= there:
            fits = rows
        else:
            too_large = sizes.index(rows)
    return fits


def _where(low: int, high: int, there: float, first: int, second: int) -> float:
    """Return where the line through (first, low) and (second, high) reaches `there`."""
    if high <= low:
        return float("inf")
    return first + (there - low) * (second - first) / (high - low)
