"""The optimizer of a model: its parameter groups and their settings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from composer.optim import DecoupledAdamW

from flame_composer.config.sections import OptimizerConfig
from flame_composer.model.mup import Factors, weights_with_factors

CLASS_NAMES = {"adamw": "AdamW", "decoupled_adamw": "DecoupledAdamW", "lamb": "Lamb"}


def decay_of(config: OptimizerConfig, *, is_matrix: bool) -> float:
    """Return the weight decay of a parameter; only those with two or more dimensions have one."""
    return config.weight_decay if is_matrix else 0.0


def _own_settings(config: OptimizerConfig, factors: Factors, weight_decay: float) -> dict[str, Any]:
    """Return the settings of a group whose weights have `factors`; `weight_decay` is without them.

    AdamW's decay is lr x weight_decay. What a smaller lr takes from it, weight_decay gives back, so
    that the decay is the same at every width (microsoft/mup's MuAdamW; Wang & Aitchison 2024). The
    decay of DecoupledAdamW does not depend on the group's lr.
    """
    is_coupled = config.name == "adamw"
    return {
        "lr_factor": factors.lr,
        "gradient_factor": factors.gradient,
        "weight_decay": weight_decay / factors.lr if is_coupled else weight_decay,
    }


def build_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, mup_base_width: int | None = None
) -> torch.optim.Optimizer:
    """Return an optimizer that decays matrices and embeddings, but no norms and biases.

    A parameter is decayed if it has at least two dimensions. The optimizers are AdamW (Loshchilov &
    Hutter 2019), whose decay is lr x weight_decay; DecoupledAdamW (composer.optim), the same with a
    decay of lr / peak lr x weight_decay; and LAMB (You et al. 2020, from torch_optimizer).

    With `mup_base_width`, weights that muP trains otherwise are in groups of their own, which hold
    the factors of the learning rate (`lr_factor`) and of the gradient (`gradient_factor`).
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
    if mup_base_width is not None:
        groups = _divided(groups, model, config, mup_base_width)
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "decoupled_adamw":
        return DecoupledAdamW(groups, **common)
    if config.name == "lamb":
        from torch_optimizer import Lamb

        return Lamb(groups, **common)
    return torch.optim.AdamW(groups, fused=True, **common)


def _divided(
    groups: list[dict[str, Any]], model: torch.nn.Module, config: OptimizerConfig, base_width: int
) -> list[dict[str, Any]]:
    """Return the groups divided by the factors of muP, first those that train as without it."""
    factors = {id(weight): each for _, weight, each in weights_with_factors(model, base_width)}
    plain, others = [], []
    for group in groups:
        kinds: dict[Factors | None, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            kinds.setdefault(factors.get(id(parameter)), []).append(parameter)
        for kind, parameters in kinds.items():
            if kind is None:
                plain.append({**group, "params": parameters})
                continue
            own = _own_settings(config, kind, group["weight_decay"])
            others.append({**group, "params": parameters, "lr": config.lr * kind.lr, **own})
    return plain + others


def settings_by_weight(
    model: torch.nn.Module, config: OptimizerConfig, base_width: int
) -> dict[str, dict[str, Any]]:
    """Return the settings that muP gives the groups of some weights, by the weights' names."""
    return {
        name: _own_settings(config, factors, decay_of(config, is_matrix=weight.ndim >= 2))
        for name, weight, factors in weights_with_factors(model, base_width)
    }


def settings_of(config: OptimizerConfig, *, but: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of one of the optimizer's groups by name, except those named in `but`."""
    group, *_ = build_optimizer(torch.nn.Linear(1, 1), config).param_groups
    return {name: value for name, value in group.items() if name not in ("params", *but)}
