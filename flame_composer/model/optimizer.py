"""The optimizer of a model: its parameter groups and their settings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from composer.optim import DecoupledAdamW
from transformers import PreTrainedModel

from flame_composer.config.sections import OptimizerConfig
from flame_composer.errors import InvalidField
from flame_composer.model.muon import Muon, weights_in_blocks
from flame_composer.model.mup import Factors, weights_with_factors

CLASS_NAMES = {
    "adamw": "AdamW",
    "decoupled_adamw": "DecoupledAdamW",
    "lamb": "Lamb",
    "muon": "Muon",
}


MOMENTUM = 0.95  # of Muon, unless another is set


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


def muon_names(model: torch.nn.Module, config: OptimizerConfig) -> frozenset[str]:
    """Return all names of the weights that Muon trains; none if the optimizer is another.

    They are those of linear layers inside the blocks: no embedding, output layer, norm, bias or
    convolution. Raise InvalidField if a model has none; a single layer may have none.
    """
    if config.name != "muon":
        return frozenset()
    matrices, kinds = weights_in_blocks(model), kinds_of(model)
    names = frozenset(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in matrices and kinds[name] == "matrices"
    )
    if not names and any(isinstance(each, PreTrainedModel) for each in model.modules()):
        raise InvalidField(
            "optimizer.name", "must not be muon: the model has no blocks with matrices"
        )
    return names


def _muon_settings(config: OptimizerConfig, *, by_muon: bool) -> dict[str, Any]:
    """Return the settings of a group that Muon or AdamW trains, which AdamW alone has not."""
    if config.name != "muon":
        return {}
    settings: dict[str, Any] = {
        "momentum": (config.momentum or MOMENTUM) if by_muon else 0.0,
        "update_scale": config.update_scale or "adamw_rms",
    }
    if not by_muon and config.adamw_lr_ratio is not None:
        settings["lr_factor"] = config.adamw_lr_ratio
    return settings


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
    """Return an optimizer that decays the kinds of parameters in `config.decay`, and no others.

    Its first group is what is decayed, its second the rest; a group without parameters is left out.
    The optimizers are AdamW (Loshchilov & Hutter 2019), whose decay is lr x weight_decay;
    DecoupledAdamW (composer.optim), the same with a decay of lr / peak lr x weight_decay; LAMB
    (You et al. 2020, from torch_optimizer); and Muon (`model.muon`), whose groups of what it trains
    come before those of what AdamW does.

    With `mup_base_width`, weights that muP trains otherwise are in groups of their own, which hold
    the factors of the learning rate (`lr_factor`) and of the gradient (`gradient_factor`).
    """
    kinds, muons = kinds_of(model), muon_names(model, config)
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {
            "params": [
                each
                for name, each in trained
                if (name in muons, kinds[name] in config.decay) == (by_muon, decays)
            ],
            "weight_decay": config.weight_decay if decays else 0.0,
            **_muon_settings(config, by_muon=by_muon),
        }
        for by_muon in (True, False)
        for decays in (True, False)
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
    if config.name == "muon":
        return Muon(groups, **common)
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
    model: torch.nn.Module, config: OptimizerConfig, base_width: int | None
) -> dict[str, dict[str, Any]]:
    """Return the settings that Muon or muP gives the groups of weights, by the weights' names."""
    kinds = kinds_of(model)
    if base_width is None:
        muons = muon_names(model, config)
        return {name: _muon_settings(config, by_muon=name in muons) for name in kinds}
    return {
        name: _own_settings(config, factors, decay_of(config, kinds[name]))
        for name, _, factors in weights_with_factors(model, base_width)
    }


def settings_of(config: OptimizerConfig, *, but: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of one of the optimizer's groups by name, except those named in `but`."""
    group, *_ = build_optimizer(torch.nn.Linear(1, 1), config).param_groups
    return {name: value for name, value in group.items() if name not in ("params", *but)}
