"""Optimizer with parameter groups, and the learning rate over a run."""

from __future__ import annotations

import math

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from flame_composer.train_config import OptimizerConfig, SchedulerConfig


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


def rate_factor(config: SchedulerConfig, batch: int, *, warmup_batches: int, total_batches: int) -> float:
    """The learning rate of the batch after `batch` earlier ones, as a fraction of the peak.

    Linear warmup from 0, then the named shape, which falls to `min_lr_ratio` at the end of the run; constant stays at 1.
    """
    if batch < warmup_batches:
        return batch / warmup_batches
    progress = (batch - warmup_batches) / max(1, total_batches - warmup_batches)
    shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[config.name]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class Schedule(Callback):
    """Sets every batch's learning rate from its place in the run, so a restart needs no state to go on exactly.

    Composer's schedulers step before the clock does, so that a batch trains at the rate meant for the one before it.
    """

    def __init__(self, config: SchedulerConfig, peak: float, warmup_batches: int, total_batches: int):
        self.config = config
        self.peak = peak
        self.lengths = {"warmup_batches": warmup_batches, "total_batches": total_batches}

    def batch_start(self, state: State, logger: Logger) -> None:
        rate = self.peak * rate_factor(self.config, state.timestamp.batch.value, **self.lengths)
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate
