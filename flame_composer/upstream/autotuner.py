"""The autotuner of Triton 3.3.0, whose choices are agreed on with others and kept."""

from __future__ import annotations

import math
from typing import Any, Protocol

from triton.runtime.autotuner import Autotuner, Config


class Choices(Protocol):
    """What was chosen before, by whichever process tuned a kernel first."""

    def find(self, kernel: str, key: str) -> dict[str, Any] | None:
        """Return the configuration that was chosen for a kernel and key, or None."""
        ...

    def settle(self, kernel: str, key: str, config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration to use, after this process found `config` the fastest."""
        ...


class _Chosen(dict[tuple[Any, ...], Config]):
    """The cache of one autotuner, from tuning keys to configurations, which `choices` fills."""

    def __init__(self, tuner: Autotuner, choices: Choices):
        super().__init__()
        self.tuner = tuner
        self.choices = choices
        function = tuner.base_fn
        self.kernel = f"{function.__module__}.{function.__qualname__}"

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        chosen = self.choices.find(self.kernel, repr(key))
        config = None if chosen is None else self._candidate(chosen)
        if config is None:
            return False
        assert isinstance(key, tuple)
        super().__setitem__(key, config)
        return True

    def __setitem__(self, key: tuple[Any, ...], config: Config) -> None:
        settled = self.choices.settle(self.kernel, repr(key), config.all_kwargs())
        super().__setitem__(key, self._candidate(settled) or config)

    def _candidate(self, arguments: dict[str, Any]) -> Config | None:
        """Return the candidate of this autotuner with these launch arguments, or None."""
        return next((each for each in self.tuner.configs if each.all_kwargs() == arguments), None)


def choose_by(choices: Choices | None) -> None:
    """Make every kernel ask `choices` before it is tuned, and tell it what was then chosen.

    It is asked at the first launch for each tuning key: a kernel's key arguments and the types of
    its tensors. None sets all back as it was.

    Upstream: triton 3.3.0, `triton.runtime.autotuner.Autotuner.cache`.
    Mends: every process times the candidates of a kernel anew and keeps what it found to itself. A
    restart, or another rank, may choose another candidate, which adds up in another order.
    """
    if choices is None:
        if isinstance(vars(Autotuner).get("cache"), property):
            del Autotuner.cache
        return

    def cache(tuner: Autotuner) -> _Chosen:
        chosen = vars(tuner).get("chosen")
        if chosen is None or chosen.choices is not choices:
            chosen = vars(tuner)["chosen"] = _Chosen(tuner, choices)
        return chosen

    # A property of the class comes before the attribute of an autotuner made earlier
    Autotuner.cache = property(cache, lambda tuner, new: vars(tuner).update(cache=new))


def try_the_smallest_only() -> None:
    """Make every kernel take the candidate that asks for least, without timing any other.

    Upstream: triton 3.3.0, `Autotuner.prune_configs`.
    Mends: hundreds of candidates are compiled and timed, for minutes, where any of them will do.
    """
    prune = Autotuner.prune_configs
    if prune.__module__ != Autotuner.__module__:
        return  # done before

    def smallest(tuner: Autotuner, kwargs: dict[str, Any]) -> list[Config]:
        return [min(prune(tuner, kwargs), key=_size)]

    Autotuner.prune_configs = smallest  # type: ignore[method-assign]


def _size(config: Config) -> tuple[int, int, int]:
    sizes = [value for value in config.kwargs.values() if type(value) is int]
    return math.prod(sizes), config.num_stages, config.num_warps
