"""The cost of interruptions, and how often to save because of them (Daly 2006)."""

from __future__ import annotations

import math


def best_interval(save: float, between: float) -> float:
    """Return the seconds of training between checkpoints that lose the least time.

    `save` is the time to save a checkpoint and `between` the mean time between interruptions, in
    seconds. This is equation 37 of Daly 2006, about sqrt(2 x save x between).
    """
    if save >= 2 * between:
        return between
    x = save / (2 * between)
    return math.sqrt(2 * save * between) * (1 + math.sqrt(x) / 3 + x / 9) - save


def goodput(
    interval: float, save: float, restart: float, between: float, behind: float = 0.0
) -> float:
    """Return the share of time that counts when a run is killed at random.

    All times are in seconds: `interval` between checkpoints, `save` that training waits for one,
    `restart` from a kill to the next step, `between` two kills on average, and `behind` from the
    moment that training goes on until the checkpoint is whole. This is equation 20 of Daly 2006.
    There `behind` is 0; a kill within it costs one more interval, which is the same as a restart
    that takes so much longer: no checkpoint is whole in that time of a start, and all later ones
    are late by it.
    """
    late = restart + behind
    exponent = (late + interval + save) / between
    if exponent > 500:
        return 0.0
    return interval / (between * math.exp(late / between) * math.expm1((interval + save) / between))


def goodput_with_notice(
    interval: float, save: float, restart: float, between: float, behind: float = 0.0
) -> float:
    """Return the share of time that counts when each interruption is announced.

    It then costs a whole save and the restart, but no training is lost. Arguments as in `goodput`.
    """
    return interval / (interval + save) * between / (between + save + behind + restart)
