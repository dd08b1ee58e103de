"""Soft-capping of logits, for models that have it not (Gemma 2; Bello et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from flame_composer.errors import InvalidField
from flame_composer.upstream.hf_configs import parameters_of

KEY = "final_logit_softcapping"  # as in the configs of models that have it
LEAST, MOST = 1e-3, 1e6  # beyond, fp32 has no logits left that differ, or none that are finite
# Keys by which models change what their output layer gives
_SCALES = (
    *("logits_scaling", "logit_scale"),  # Granite, Cohere
    *("logits_soft_cap", "output_logit_soft_cap"),  # RecurrentGemma, xLSTM
    "lm_head_multiplier",  # Falcon-H1
)


class _SoftCap:
    """A forward hook that returns cap * tanh(output / cap)."""

    def __init__(self, cap: float):
        self.cap = cap

    def __call__(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(output / self.cap)


def has_its_own(config_class: type[PretrainedConfig]) -> bool:
    """Return whether models of a config class cap their logits by themselves."""
    return KEY in parameters_of(config_class)


def require_cap(hf_config: PretrainedConfig) -> None:
    """Raise InvalidField for a cap that is no number above 0, or that the loss would pass by."""
    cap = getattr(hf_config, KEY, None)
    if cap is None:
        return
    is_number = isinstance(cap, int | float) and not isinstance(cap, bool)
    if not (is_number and LEAST <= cap <= MOST):
        raise InvalidField(
            f"model.config.{KEY}",
            f"must be a number from {LEAST:g} to {MOST:g}, or null; Gemma 2 has 30",
        )
    if scale := next((key for key in _SCALES if getattr(hf_config, key, None) is not None), None):
        raise InvalidField(
            f"model.config.{KEY}",
            f"must be null: a {hf_config.model_type} model scales or caps its logits by {scale}",
        )
    if not has_its_own(type(hf_config)) and getattr(hf_config, "fuse_linear_cross_entropy", False):
        raise InvalidField(
            f"model.config.{KEY}",
            "needs the logits, which model.config.fuse_linear_cross_entropy=true does not make;"
            " set that to false",
        )


def cap_logits(model: PreTrainedModel) -> None:
    """Make a model's output layer give cap * tanh(logits / cap), if its config says so.

    That holds in training, in evaluation and in use. Models that cap their logits by themselves
    are left as they are, and so is an output layer that is capped already. Raise InvalidField if
    there is no output layer.
    """
    cap = getattr(model.config, KEY, None)
    head: Any = model.get_output_embeddings()
    if cap is None or has_its_own(type(model.config)):
        return
    if head is None:
        raise InvalidField(
            f"model.config.{KEY}",
            f"must be null: transformers names no output layer of {model.config.model_type} models",
        )
    if not any(isinstance(hook, _SoftCap) for hook in head._forward_hooks.values()):
        head.register_forward_hook(_SoftCap(cap))
