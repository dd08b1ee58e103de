"""Muon: matrices are moved by their momentum, made orthogonal; all else is trained by AdamW.

For a matrix W [A, B] with gradient G (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/, and torch.optim.Muon, which torch 2.7 lacks):

    M <- mu M + (1 - mu) G          U = mu M + (1 - mu) G  (Nesterov)
    W <- (1 - lr wd) W - lr s orthogonal(U)

orthogonal(U) has U's singular vectors, and singular values near 1. The scale s makes updates as
large as AdamW's, so that its rates and its weight decay suit: 0.2 sqrt(max(A, B)) (Liu et al. 2025,
arXiv:2502.16982). Jordan's own is sqrt(max(1, A / B)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flame_composer.upstream.fsdp import part_of
from flame_composer.upstream.transformers import block_names

# The quintic's coefficients, chosen to raise small singular values fast
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
EPS = 1e-7

SCALES: dict[str, Callable[[int, int], float]] = {
    "adamw_rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}


class Muon(torch.optim.Optimizer):
    """An optimizer that trains groups with a `momentum` by Muon, and those where it is 0 by AdamW.

    Sharded matrices (FSDP2) are gathered to be made orthogonal, on every rank; momenta stay
    sharded. Replicas (DDP) each compute the same.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        update_scale: str = "adamw_rms",
    ):
        """Take groups that may each have settings of their own.

        `betas` and `eps` are AdamW's, `momentum` and `update_scale` (a key of SCALES) Muon's.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "update_scale": update_scale,
            # torch then keeps the counts of steps in fp32 when it loads a state.
            "fused": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:  # type: ignore[override]
        """Take a step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            if group["momentum"]:
                self._step_by_muon(group, parameters)
            elif parameters:
                self._step_by_adamw(group, parameters)
        return loss

    def _step_by_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        momentum, lr = group["momentum"], float(group["lr"])
        for parameter in parameters:
            state, gradient = self._state_of(parameter, "momentum_buffer"), parameter.grad
            assert gradient is not None
            buffer = state["momentum_buffer"]
            state["step"] += 1
            buffer.lerp_(gradient, 1 - momentum)
            update = _orthogonal_part(gradient.lerp(buffer, momentum))
            scale = SCALES[group["update_scale"]](*parameter.shape)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.mul_(1 - lr * group["weight_decay"])
            local.add_(update, alpha=-lr * scale)

    def _step_by_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state_of(each, "exp_avg", "exp_avg_sq") for each in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [each.grad for each in parameters if each.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state_of(self, parameter: Tensor, *moments: str) -> dict[str, Any]:
        """Return a parameter's state, which begins at step 0 with moments of zeros."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in moments:
                state[name] = torch.zeros_like(parameter)
        return state


def weights_in_blocks(model: torch.nn.Module) -> set[int]:
    """Return the ids of the weights of linear layers inside the blocks of the models in `model`."""
    models = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    names = {name for each in models for name in block_names(each)}
    return {
        id(layer.weight)
        for block in model.modules()
        # FSDP2 gives a module a class of its own, which inherits from the given one.
        if names & {each.__name__ for each in type(block).__mro__}
        for layer in block.modules()
        if isinstance(layer, torch.nn.Linear | Conv1D)
    }


def _orthogonal_part(update: Tensor) -> Tensor:
    """Return this rank's part of `orthogonal(update)`: all, unless `update` is sharded."""
    if not isinstance(update, DTensor):
        return orthogonal(update)
    return orthogonal(update.full_tensor())[part_of(update)]


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix [A, B] with the same singular vectors, and singular values around 1.

    Five steps of a quintic iteration of Newton and Schulz bring all but the smallest to between 0.6
    and 1.3. It is computed in bf16 on a GPU, and in fp32 on a CPU, which has no fast bf16.
    """
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.mT
    x = x / x.norm().clamp(min=EPS)  # so that no singular value is above 1
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if is_tall else x).to(matrix.dtype)
