"""muP: a learning rate found on a narrow model suits wide ones, by rules for each of the weights.

The maximal update parametrization is from Yang et al. 2022 (Tensor Programs V, arXiv:2203.03466).
docs/mup.md says which of its forms this is, and why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from flame_composer.config.sections import ModelConfig
from flame_composer.errors import InvalidField

# The model types with a rule for each of their weights, and the keys that count the heads of
# softmax attention.
HEADS: Mapping[str, tuple[str, ...]] = {
    "gla": (),
    "llama": ("num_attention_heads", "num_key_value_heads"),
    "transformer": ("num_heads", "num_kv_heads"),
}
# What these models may have beside it, by key with the value that leaves it out.
NO_RULES = {"attn": None, "attnres_block_size": None, "use_short_conv": False}

HIDDEN = re.compile(r"\.layers\.\d+\.(attn|self_attn|mlp)\.(q|k|v|g|o|gate|up|down)_proj\.weight")
TO_FEW = re.compile(r"\.layers\.\d+\.attn\.gk_proj\.0\.weight")  # from all channels to 16
LAST_NORM = re.compile(r"(^|\.)model\.norm\.weight")


class Factors(NamedTuple):
    """The factors of a weight by which muP differs from the same model without it."""

    init: float
    """Factor of the initial value."""
    lr: float
    """Factor of the learning rate."""
    gradient: float
    """Factor of the gradient, before all gradients' norm is taken."""


def require_rules(config: ModelConfig, hf_config: PretrainedConfig) -> None:
    """Raise InvalidField if muP is asked for and a part of the new model has no rule."""
    if config.mup_base_width is None:
        return
    kind, base = hf_config.model_type, config.mup_base_width
    if kind not in HEADS:
        raise InvalidField(
            "model.mup_base_width",
            f"there are no rules for {kind} models, but for {', '.join(HEADS)}; leave it out",
        )
    for key, value in NO_RULES.items():
        if getattr(hf_config, key, value) != value:
            raise InvalidField(
                f"model.config.{key}",
                "must be left out with model.mup_base_width, which has no rules for it"
                " (docs/mup.md)",
            )
    for key in HEADS[kind]:
        count, width = getattr(hf_config, key), hf_config.hidden_size
        if count is not None and count * base % width:
            raise InvalidField(
                f"model.config.{key}",
                f"must be a multiple of {width // math.gcd(width, base)} with model.mup_base_width:"
                f" heads keep their size, so a base of width {base} would have {count} x {base} /"
                f" {width} = {count * base / width:.4g} of them",
            )


def factors_of(name: str, times_wider: float) -> Factors | None:
    """Return the factors of the weight of that name, or None if it stays as it is without muP.

    `times_wider` is the ratio of the model's width to its base's. The logits must become smaller by
    that ratio. No model of these types has a multiplier for that, so the weight of the last norm
    takes its place: with its value, its learning rate and its gradient divided by the ratio, it
    trains exactly as the multiplier and an ordinary norm would.
    """
    if HIDDEN.search(name):
        return Factors(times_wider**-0.5, 1 / times_wider, 1.0)
    if TO_FEW.search(name):
        return Factors(1 / times_wider, 1 / times_wider, 1.0)
    if LAST_NORM.search(name):
        return Factors(1 / times_wider, 1 / times_wider, 1 / times_wider)
    return None


def weights_with_factors(
    model: torch.nn.Module, base_width: int
) -> Iterator[tuple[str, torch.Tensor, Factors]]:
    """Yield name, weight and factors of each weight that muP changes; none at the base's width."""
    config: Any = model.config
    if config.hidden_size == base_width:
        return
    # Unlike the names of parameters, these are the same around recomputed blocks.
    for name, weight in model.state_dict(keep_vars=True).items():
        factors = factors_of(name, config.hidden_size / base_width)
        if factors is not None:
            yield name, weight, factors


@torch.no_grad()
def scale_weights(model: PreTrainedModel, base_width: int) -> None:
    """Scale the initial weights of a new model as muP does."""
    for _, weight, factors in weights_with_factors(model, base_width):
        weight.mul_(factors.init)
