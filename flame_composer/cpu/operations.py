"""fla's operations in plain PyTorch, for tensors on a CPU.

Each function without an underscore stands in for the function of that name in fla 0.5.2 and has the
same arguments, in the same order, and the same results: fla calls them by position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_composer.cpu import (
    delta,
    delta_variants,
    gla,
    gsa,
    mamba2,
    norms,
    rwkv6,
    rwkv7,
    rwkv_layers,
    simple_gla,
    token_shift,
)
from flame_composer.cpu.convolution import (
    causal_conv1d_bwd,
    causal_conv1d_fwd,
    causal_conv1d_update,
)
from flame_composer.cpu.delta_inputs import l2norm_bwd, l2norm_fwd
from flame_composer.cpu.linear import (
    backward_in_fp32,
    forward_in_fp32,
    layer_product,
    weight_gradient,
)
from flame_composer.cpu.losses import (
    cross_entropy_forward,
    cross_entropy_loss,
    fused_linear_cross_entropy_backward,
    fused_linear_cross_entropy_forward,
)
from flame_composer.cpu.rotary import rotary_embedding_fwdbwd

_aten: Any = torch.ops.aten


def sigmoid_fwd(x: Tensor, output_contiguous: bool = False) -> Tensor:
    return x.sigmoid()


def sigmoid_bwd(x: Tensor, dy: Tensor, output_contiguous: bool = False) -> Tensor:
    return _aten.sigmoid_backward(dy, x.sigmoid())


def logsigmoid_fwd(x: Tensor, temperature: float = 1.0, output_contiguous: bool = False) -> Tensor:
    return F.logsigmoid(x) / temperature


def logsigmoid_bwd(
    x: Tensor, dy: Tensor, temperature: float = 1.0, output_contiguous: bool = False
) -> Tensor:
    return dy * (-x).sigmoid() / temperature


def swish_fwd(x: Tensor, output_contiguous: bool = False) -> Tensor:
    return F.silu(x)


def swish_bwd(x: Tensor, dy: Tensor, output_contiguous: bool = False) -> Tensor:
    return _aten.silu_backward(dy, x)


def swiglu_fwd(x: Tensor, y: Tensor, output_contiguous: bool = False) -> Tensor:
    return F.silu(x).mul_(y)


def swiglu_fwdbwd(
    x: Tensor, y: Tensor, g: Tensor, use_weight: bool = False, output_contiguous: bool = False
) -> tuple[Tensor, ...]:
    """Return dx and dy of silu(x) * y for the output's gradient g.

    With `use_weight`, return the output as well.
    """
    silu = F.silu(x)
    output = silu * y if use_weight else None
    dx, dy = _aten.silu_backward(g * y, x), silu.mul_(g)
    return (dx, dy) if output is None else (dx, dy, output)


class _SwiGLULinear(torch.autograd.Function):
    """The function linear(silu(x) * y), which recomputes the product instead of saving it."""

    @staticmethod
    @forward_in_fp32
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y, weight)
        return layer_product(swiglu_fwd(x, y).reshape(-1, x.shape[-1]), weight, bias).view(
            *x.shape[:-1], -1
        )

    @staticmethod
    @once_differentiable
    @backward_in_fp32
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight = ctx.saved_tensors
        (dout,) = gradients
        dout = dout.reshape(-1, dout.shape[-1])
        dx, dy, z = swiglu_fwdbwd(x, y, layer_product(dout, weight.t()).view_as(x), use_weight=True)
        dweight = weight_gradient(dout, z.reshape(-1, z.shape[-1]))
        return dx, dy, dweight, dout.sum(0) if ctx.needs_input_grad[3] else None


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = _SwiGLULinear.apply(x, y, weight, bias)
    return result


# fla compiles these by torch.compile, which on a CPU takes a C++ compiler and minutes


def gelu_fwd(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward(g, x, approximate="tanh")


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    return gelu_fwd(bias + y)


def bias_gelu_bwd(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad_y = gelu_bwd(g, bias + y)
    return grad_y, grad_y.sum(dim=0, dtype=bias.dtype)


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    return F.relu(x).square_()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    return F.relu(x.float()).mul_(g).mul_(2).to(x.dtype)


def _l2_wrap_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Stand in for `L2Wrap.backward`, which fails if the logits are bf16 and the loss is fp32."""
    largest, ids = ctx.saved_tensors
    logits = largest.new_zeros(ctx.logits_shape)
    return grad_output, logits.scatter_(-1, ids, largest * grad_output), None


# Operations that fla itself dispatches to a backend (`fla.modules.backends`).
OPERATIONS: tuple[Callable[..., Any], ...] = (
    *norms.OPERATIONS,
    rotary_embedding_fwdbwd,
    sigmoid_fwd,
    sigmoid_bwd,
    logsigmoid_fwd,
    logsigmoid_bwd,
    swish_fwd,
    swish_bwd,
    swiglu_fwd,
    swiglu_fwdbwd,
    swiglu_linear,
    cross_entropy_loss,
    fused_linear_cross_entropy_forward,
    fused_linear_cross_entropy_backward,
    causal_conv1d_fwd,
    causal_conv1d_bwd,
    causal_conv1d_update,
    l2norm_fwd,
    l2norm_bwd,
)

# fla 0.5.2 does not dispatch these, so they are replaced: (module, attribute, CPU version).
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    *norms.REPLACEMENTS,
    *gla.REPLACEMENTS,
    *simple_gla.REPLACEMENTS,
    *gsa.REPLACEMENTS,
    *mamba2.REPLACEMENTS,
    *token_shift.REPLACEMENTS,
    *rwkv6.REPLACEMENTS,
    *delta.REPLACEMENTS,
    *delta_variants.REPLACEMENTS,
    *rwkv7.REPLACEMENTS,
    *rwkv_layers.REPLACEMENTS,
    ("fla.modules.fused_cross_entropy", "FusedCrossEntropyLoss.forward", cross_entropy_forward),
    *(
        ("fla.modules.activations", each.__name__, each)
        for each in (
            gelu_fwd,
            gelu_bwd,
            bias_gelu,
            bias_gelu_bwd,
            relu_bwd,
            sqrelu_fwd,
            sqrelu_bwd,
        )
    ),
    ("fla.modules.l2warp", "L2Wrap.backward", _l2_wrap_backward),
)
