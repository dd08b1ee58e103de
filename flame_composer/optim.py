"""Optimizer with parameter groups, and learning-rate schedules in batches."""

from __future__ import annotations

import torch
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)

from flame_composer.config import OptimizerConfig, SchedulerConfig


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices and embeddings but no vector, so no norm and no bias."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True,
    )


def build_scheduler(config: SchedulerConfig, *, warmup_batches: int, total_batches: int) -> ComposerScheduler:
    """Linear warmup from 0 over `warmup_batches`, then the named shape, down to `min_lr_ratio` of the peak at the end."""
    warmup, total = f"{warmup_batches}ba", f"{total_batches}ba"
    if config.name == "cosine":
        return CosineAnnealingWithWarmupScheduler(t_warmup=warmup, t_max=total, alpha_f=config.min_lr_ratio)
    if config.name == "linear":
        return LinearWithWarmupScheduler(t_warmup=warmup, t_max=total, alpha_i=1.0, alpha_f=config.min_lr_ratio)
    return ConstantWithWarmupScheduler(t_warmup=warmup)
