"""Optimizer with parameter groups, and learning-rate schedules in batches."""

from __future__ import annotations

import torch
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)


def build_optimizer(
    model: torch.nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices and embeddings but no vector: norms, biases, gates' biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def build_scheduler(name: str, *, warmup_batches: int, total_batches: int, min_lr_ratio: float) -> ComposerScheduler:
    """Linear warmup from 0 over `warmup_batches`, then the named shape, down to `min_lr_ratio` of the peak at the end."""
    warmup, total = f"{warmup_batches}ba", f"{total_batches}ba"
    if name == "cosine":
        return CosineAnnealingWithWarmupScheduler(t_warmup=warmup, t_max=total, alpha_f=min_lr_ratio)
    if name == "linear":
        return LinearWithWarmupScheduler(t_warmup=warmup, t_max=total, alpha_i=1.0, alpha_f=min_lr_ratio)
    assert name == "constant", name
    return ConstantWithWarmupScheduler(t_warmup=warmup)
