"""Optimizer with parameter groups, and the learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.optim import DecoupledAdamW

from flame_composer.train_config import OptimizerConfig, RunPlan, SchedulerConfig


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer that decays matrices and embeddings but no vector, so no norm and no bias.

    AdamW: Loshchilov & Hutter 2019, whose decay is lr x weight_decay; DecoupledAdamW: the same with a decay of
    lr / peak lr x weight_decay (composer.optim); LAMB: You et al. 2020 (torch_optimizer).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "decoupled_adamw":
        return DecoupledAdamW(groups, **common)
    if config.name == "lamb":
        from torch_optimizer import Lamb

        return Lamb(groups, **common)
    return torch.optim.AdamW(groups, fused=True, **common)


def rate_factor(config: SchedulerConfig, batch: int, plan: RunPlan) -> float:
    """The learning rate of the batch after `batch` earlier ones, as a fraction of the peak.

    Linear warmup from 0, then the named shape, which falls to `min_lr_ratio` at the end of the run; constant stays at 1.
    """
    if batch < plan.warmup:
        return batch / plan.warmup
    is_wsd = config.name == "wsd"
    name = config.decay_shape if is_wsd else config.name
    start = max(plan.warmup, plan.total - plan.decay) if is_wsd else plan.warmup
    progress = max(0, batch - start) / max(1, plan.total - start)
    shape = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "1-sqrt": 1 - math.sqrt(progress),
        "constant": 1.0,
    }[name]  # fmt: skip
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class Schedule(Callback):
    """Sets every batch's learning rate from its place in the run, so a restart needs no state to go on exactly.

    Composer's schedulers step before the clock does, so that a batch trains at the rate meant for the one before it.
    """

    def __init__(self, config: SchedulerConfig, peak: float, plan: RunPlan):
        self.config = config
        self.peak = peak
        self.plan = plan

    def batch_start(self, state: State, logger: Logger) -> None:
        rate = self.peak * rate_factor(self.config, state.timestamp.batch.value, self.plan)
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate
