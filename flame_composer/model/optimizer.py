"""The optimizer of a model: its parameter groups and their settings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from composer.optim import DecoupledAdamW

from flame_composer.config.sections import OptimizerConfig

CLASS_NAMES = {"adamw": "AdamW", "decoupled_adamw": "DecoupledAdamW", "lamb": "Lamb"}


def decay_of(config: OptimizerConfig, *, is_matrix: bool) -> float:
    """Return the weight decay of a parameter; only those with two or more dimensions have one."""
    return config.weight_decay if is_matrix else 0.0


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return an optimizer that decays matrices and embeddings, but no norms and biases.

    A parameter is decayed if it has at least two dimensions. The optimizers are AdamW (Loshchilov &
    Hutter 2019), whose decay is lr x weight_decay; DecoupledAdamW (composer.optim), the same with a
    decay of lr / peak lr x weight_decay; and LAMB (You et al. 2020, from torch_optimizer).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": decay_of(config, is_matrix=True),
        },
        {
            "params": [p for p in parameters if p.ndim < 2],
            "weight_decay": decay_of(config, is_matrix=False),
        },
    ]
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "decoupled_adamw":
        return DecoupledAdamW(groups, **common)
    if config.name == "lamb":
        from torch_optimizer import Lamb

        return Lamb(groups, **common)
    return torch.optim.AdamW(groups, fused=True, **common)


def settings_of(config: OptimizerConfig, *, but: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of one of the optimizer's groups by name, except those named in `but`."""
    group, *_ = build_optimizer(torch.nn.Linear(1, 1), config).param_groups
    return {name: value for name, value in group.items() if name not in ("params", *but)}
