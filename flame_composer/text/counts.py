"""Limits on the number of layers, experts and heads that a config may ask for.

Layers are built one by one, and some configs list them all, so a config that asks for ten million
keeps a process busy for an hour. This module does without torch because tokenizers are loaded
without it, and a tokenizer's folder may contain such a config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flame_composer.errors import ConfigError

MOST_PARTS = 10_000  # the limit where there are no weights to compare with; no model has as many
FEW_PARTS = 128  # so few are quick to build, and so allowed whatever the weights are

# Keys that count parts built one by one, and keys that divide a size.
_PARTS = re.compile(
    r"(\w+_)?(num|n)_(\w+_)?(layers?|experts?|blocks|stages|codebooks)|(encoder|decoder)_layers"
    r"|(\w+_)?expert_num|depths?"
)
_HEADS = re.compile(r"(num|n)_(\w+_)?heads?|n_head_kv")


def require_counts(
    content: Any, place: str, weights: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Raise ConfigError if a config asks for more layers, experts or heads than there can be.

    `content` is the parsed config, `place` names it in the error. `weights` maps the names of the
    model's tensors to their shapes; without it, the limit is `MOST_PARTS`.
    """
    most_parts = most_heads = MOST_PARTS
    if weights is not None:
        stacked = max(
            (shape[0] for shape in weights.values() if len(shape) > 2), default=0
        )  # all experts of a layer may be stacked in one tensor
        most_parts = max(FEW_PARTS, len(weights), stacked)
        most_heads = max([FEW_PARTS, *(size for shape in weights.values() for size in shape)])
    for key, value in _numbers(content):
        most = (
            most_parts if _PARTS.fullmatch(key) else most_heads if _HEADS.fullmatch(key) else None
        )
        if most is not None and value > most:
            why = (
                "more than any model has"
                if weights is None
                else f"its weights are {len(weights):,} tensors, too few for it"
            )
            shown = f"{value:.10g}" if value < 1e300 else "1e300 or more"  # no float is so large
            raise ConfigError(
                f"{place}: its config says {key}={shown}, {why}; get the model again, or correct"
                " the config"
            )


def is_beyond_any_model(content: Any) -> bool:
    """Return whether a config asks for more than `MOST_PARTS` layers, experts or heads."""
    return any(
        value > MOST_PARTS and (_PARTS.fullmatch(key) or _HEADS.fullmatch(key))
        for key, value in _numbers(content)
    )


def _numbers(content: Any) -> Iterable[tuple[str, float]]:
    nested = [("", content)]
    while nested:
        key, each = nested.pop()
        if isinstance(each, dict):
            nested += [(str(name), value) for name, value in each.items()]
        elif isinstance(each, list):
            nested += [(key, value) for value in each]
        elif isinstance(each, int | float) and not isinstance(each, bool):
            yield key, each
