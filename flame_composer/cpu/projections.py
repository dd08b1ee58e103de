"""Linear layers whose inputs are cheap to compute, and computed again in the backward pass.

A layer keeps its input for the gradient of its weight. RWKV mixes each token with the one before it
in half a dozen ways, each for a linear layer of its own, and these mixtures would be most of what a
training step keeps. What they are computed from is kept instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flame_composer.cpu.linear import (
    Linear,
    backward_in_fp32,
    forward_in_fp32,
    layer_product,
    weight_gradient,
)

Make = Callable[..., Iterable[Tensor]]


def are_plain(x: Tensor, *layers: nn.Module) -> bool:
    """Return whether linear layers do nothing but multiply x by their weights.

    Those that have a bias or hooks, or that an adapter took the place of, must be called.
    """
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return False
    return all(
        type(layer) in (nn.Linear, Linear)
        and layer.bias is None
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
        for layer in layers
    )


def projected(
    make: Make, given: Sequence[Tensor | None], layers: Sequence[nn.Module]
) -> tuple[Tensor, ...]:
    """Return what each linear layer gives for its input; `make(*given)` yields these inputs.

    For the backward pass, `given` and the weights are kept. `make` computes by operations that
    autograd knows; what it yields twice goes into two layers.
    """
    weights = [layer.weight for layer in layers]
    result: Any = _Projected.apply(make, len(given), *given, *weights)
    return result


class _Projected(torch.autograd.Function):
    @staticmethod
    @forward_in_fp32
    def forward(
        ctx: Any, make: Make, num_given: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.make, ctx.num_given = make, num_given
        given, weights = tensors[:num_given], tensors[num_given:]
        outputs = []
        for x, weight in zip(make(*given), weights, strict=True):
            assert weight is not None
            y = layer_product(x.reshape(-1, x.shape[-1]), weight)
            outputs.append(y.view(*x.shape[:-1], -1))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    @backward_in_fp32
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given, weights = ctx.saved_tensors[: ctx.num_given], ctx.saved_tensors[ctx.num_given :]
        needed = ctx.needs_input_grad[2:]
        leaves = leaves_of(given, needed[: ctx.num_given])
        with torch.enable_grad():
            made = list(ctx.make(*leaves))
        dmade, dweights = [], []
        weighted = zip(made, weights, gradients, needed[ctx.num_given :], strict=True)
        for x, weight, dy, needs_weight in weighted:
            dy = dy.reshape(-1, dy.shape[-1])
            rows = x.detach().reshape(-1, x.shape[-1])
            dweights.append(weight_gradient(dy, rows) if needs_weight else None)
            dmade.append(layer_product(dy, weight.t()).view_as(x) if x.requires_grad else None)
        return None, None, *gradients_of(leaves, made, dmade), *dweights


def leaves_of(given: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Return the tensors as leaves of a new graph; those that are `needed` get gradients."""
    return [
        None if x is None else x.detach().requires_grad_(is_needed)
        for x, is_needed in zip(given, needed, strict=True)
    ]


def gradients_of(
    leaves: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    doutputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of the leaves that the outputs were computed from, None for others."""
    pairs = [
        (x, dx)
        for x, dx in zip(outputs, doutputs, strict=True)
        if x is not None and x.requires_grad
    ]
    inputs = [x for x in leaves if x is not None and x.requires_grad]
    found: dict[int, Tensor] = {}
    if inputs:
        results, dresults = zip(*pairs, strict=True)
        found = dict(
            zip(map(id, inputs), torch.autograd.grad(results, inputs, dresults), strict=True)
        )
    return [found.get(id(x)) for x in leaves]
