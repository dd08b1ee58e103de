"""What kills cost a run, and how often it should save: Daly 2006."""

from __future__ import annotations

import math


def best_interval(save: float, between: float) -> float:
    """Seconds of training between checkpoints that lose the least: Daly 2006, equation 37; about
    sqrt(2 x save x between).

    `save` is what a checkpoint takes, `between` the mean time between interruptions.
    """
    if save >= 2 * between:
        return between
    x = save / (2 * between)
    return math.sqrt(2 * save * between) * (1 + math.sqrt(x) / 3 + x / 9) - save


def goodput(interval: float, save: float, restart: float, between: float) -> float:
    """The share of time that counts when a run is killed at random: Daly 2006, equation 20."""
    exponent = (restart + interval + save) / between
    if exponent > 500:
        return 0.0
    return interval / (
        between * math.exp(restart / between) * math.expm1((interval + save) / between)
    )


def goodput_with_notice(interval: float, save: float, restart: float, between: float) -> float:
    """The share where each interruption is announced, so that it costs a save and the restart,
    and nothing is lost.
    """
    return interval / (interval + save) * between / (between + save + restart)
