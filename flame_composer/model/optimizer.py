"""The optimizer of a model: its parameter groups and their settings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from composer.optim import DecoupledAdamW

from flame_composer.config.sections import OptimizerConfig

CLASS_NAMES = {"adamw": "AdamW", "decoupled_adamw": "DecoupledAdamW", "lamb": "Lamb"}


def kinds_of(model: torch.nn.Module) -> dict[str, str]:
    """Return the kind of every parameter, by all of its names: one of `config.sections.KINDS`.

    The weights of an embedding module are embeddings, also where the output layer shares them. All
    other parameters are matrices if they have at least two dimensions, and else vectors.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    kinds = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kind = "embeddings" if id(parameter) in embeddings else "matrices"
        kinds[name] = "vectors" if parameter.ndim < 2 else kind
    return kinds


def decay_of(config: OptimizerConfig, kind: str) -> float:
    """Return the weight decay of a parameter of a kind that `kinds_of` names."""
    return config.weight_decay if kind in config.decay else 0.0


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return an optimizer that decays the kinds of parameters in `config.decay`, and no others.

    Its first group is what is decayed, its second the rest; a group without parameters is left out.
    The optimizers are AdamW (Loshchilov & Hutter 2019), whose decay is lr x weight_decay;
    DecoupledAdamW (composer.optim), the same with a decay of lr / peak lr x weight_decay; and LAMB
    (You et al. 2020, from torch_optimizer).
    """
    kinds = kinds_of(model)
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {
            "params": [each for name, each in trained if (kinds[name] in config.decay) == decays],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
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
