"""Soft-capping of logits, for models that have it not (Gemma 2; Bello et al. 2016)."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from flame_composer.errors import InvalidField

KEY = "final_logit_softcapping"  # as in the configs of models that have it


class _SoftCap:
    """A forward hook that returns cap * tanh(output / cap)."""

    def __init__(self, cap: float):
        self.cap = cap

    def __call__(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(output / self.cap)


def has_its_own(config_class: type[PretrainedConfig]) -> bool:
    """Return whether models of a config class cap their logits by themselves."""
    return KEY in inspect.signature(config_class.__init__).parameters


def require_cap(hf_config: PretrainedConfig) -> None:
    """Raise InvalidField for a cap that is no number above 0, or that the loss would pass by."""
    cap = getattr(hf_config, KEY, None)
    if cap is None:
        return
    is_number = isinstance(cap, int | float) and not isinstance(cap, bool)
    if not (is_number and 0 < cap < math.inf):
        raise InvalidField(
            f"model.config.{KEY}", "must be a number above 0, or null; Gemma 2 has 30"
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
    are left as they are, and so is an output layer that is capped already.
    """
    cap = getattr(model.config, KEY, None)
    head: Any = model.get_output_embeddings()
    if cap is None or head is None or has_its_own(type(model.config)):
        return
    if not any(isinstance(hook, _SoftCap) for hook in head._forward_hooks.values()):
        head.register_forward_hook(_SoftCap(cap))
