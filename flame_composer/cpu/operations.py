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

from flame_composer.cpu import gla
from flame_composer.cpu.convolution import (
    causal_conv1d_bwd,
    causal_conv1d_fwd,
    causal_conv1d_update,
)
from flame_composer.cpu.linear import product, weight_gradient
from flame_composer.cpu.losses import (
    cross_entropy_forward,
    cross_entropy_loss,
    fused_linear_cross_entropy_backward,
    fused_linear_cross_entropy_forward,
)

_aten: Any = torch.ops.aten


def _plain_rms_norm(is_rms_norm: bool, bias: Tensor | None, num_groups: int = 1) -> None:
    if not is_rms_norm or bias is not None or num_groups != 1:
        raise NotImplementedError("on a CPU, only RMSNorm without bias and groups is available")


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and weight; the latter is None if there is no weight.

    With xhat = x * rstd and wdy = weight * dy: dx = (wdy - xhat * mean(xhat * wdy)) * rstd.
    """
    xhat = x * rstd.unsqueeze(-1)
    product = dy * xhat
    dw = None if weight is None else product.sum(0).to(weight.dtype)
    mean = (product.sum(-1) if weight is None else product @ weight.to(product.dtype)).div_(
        x.shape[-1]
    )
    dx = dy.clone() if weight is None else torch.mul(dy, weight, out=product)
    return dx.addcmul_(xhat, mean.unsqueeze(-1), value=-1).mul_(rstd.unsqueeze(-1)), dw


def layer_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> tuple[Tensor, None, Tensor, Tensor]:
    _plain_rms_norm(is_rms_norm, bias, num_groups)
    total = x.float() if residual is None else x.float() + residual.float()
    rstd = _rstd(total, eps)
    y = total * rstd.unsqueeze(-1)
    if weight is not None:
        y *= weight
    residual_dtype = residual.dtype if residual is not None else residual_dtype or x.dtype
    return y.to(out_dtype or x.dtype), None, rstd, total.to(residual_dtype)


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: None,
    rstd: Tensor,
    dres: Tensor | None = None,
    has_residual: bool = False,
    is_rms_norm: bool = False,
    x_dtype: torch.dtype | None = None,
    recompute_output: bool = False,
    num_groups: int = 1,
) -> tuple[Tensor | None, ...]:
    _plain_rms_norm(is_rms_norm, bias, num_groups)
    dx, dw = _rms_norm_backward(dy.float(), x.float(), weight, rstd)
    if dres is not None:
        dx += dres
    result = dx.to(x_dtype or x.dtype), dw, None, dx.to(x.dtype) if has_residual else None
    if not recompute_output:
        return result
    y = x * rstd.unsqueeze(-1) * (1 if weight is None else weight)
    return *result, y.to(dy.dtype)


def _gate(g: Tensor, activation: str) -> Tensor:
    return g.sigmoid() if activation == "sigmoid" else F.silu(g)


def layer_norm_gated_fwd(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
) -> tuple[Tensor, None, Tensor, Tensor]:
    y, _, rstd, total = layer_norm_fwd(
        x, weight, bias, eps, residual, torch.float32, residual_dtype, is_rms_norm
    )
    y *= _gate(g.float(), activation)
    return y.to(out_dtype or x.dtype), None, rstd, total


def layer_norm_gated_bwd(
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    eps: float = 1e-5,
    mean: None = None,
    rstd: Tensor | None = None,
    dresidual: Tensor | None = None,
    has_residual: bool = False,
    is_rms_norm: bool = False,
    x_dtype: torch.dtype | None = None,
    recompute_output: bool = False,
) -> tuple[Tensor | None, ...]:
    _plain_rms_norm(is_rms_norm, bias)
    assert rstd is not None
    dy_f, x_f, g_f = dy.float(), x.float(), g.float()
    y = x_f * rstd.unsqueeze(-1)
    if weight is not None:
        y *= weight
    dgate = y * dy_f
    is_sigmoid = activation == "sigmoid"
    dg = (
        _aten.sigmoid_backward(dgate, g_f.sigmoid())
        if is_sigmoid
        else _aten.silu_backward(dgate, g_f)
    )
    dx, dw = _rms_norm_backward(_gate(g_f, activation).mul_(dy_f), x_f, weight, rstd)
    if dresidual is not None:
        dx += dresidual
    dx_dtype, dg_dtype = x_dtype or x.dtype, x_dtype or g.dtype
    result = dx.to(dx_dtype), dg.to(dg_dtype), dw, None, dx.to(x.dtype) if has_residual else None
    return (*result, y.to(dy.dtype)) if recompute_output else result


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
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y, weight)
        return product(swiglu_fwd(x, y).reshape(-1, x.shape[-1]), weight, bias).view(
            *x.shape[:-1], -1
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight = ctx.saved_tensors
        (dout,) = gradients
        dout = dout.reshape(-1, dout.shape[-1])
        dx, dy, z = swiglu_fwdbwd(x, y, product(dout, weight.t()).view_as(x), use_weight=True)
        dweight = weight_gradient(dout, z.reshape(-1, z.shape[-1]))
        return dx, dy, dweight, dout.sum(0) if ctx.needs_input_grad[3] else None


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = _SwiGLULinear.apply(x, y, weight, bias)
    return result


def _fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Stand in for `fused_recurrent_gla`, which fla calls for T <= 64.

    One token per sequence (decoding) takes the recurrence, anything longer the chunkwise form.
    """
    if gk is None or gv is not None or reverse:
        raise NotImplementedError(
            "on a CPU, GLA runs only forwards (reverse=False) and with gates on the keys only"
            " (gk, not gv)"
        )
    num_sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    one_token_each = q.shape[0] * q.shape[1] == num_sequences
    run = gla.recurrent_gla if one_token_each else gla.chunk_gla
    return run(q, k, v, gk, scale, initial_state, output_final_state, state_v_first, cu_seqlens)


# Operations that fla itself dispatches to a backend (`fla.modules.backends`).
OPERATIONS: tuple[Callable[..., Any], ...] = (
    layer_norm_fwd,
    layer_norm_bwd,
    layer_norm_gated_fwd,
    layer_norm_gated_bwd,
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
)

# fla 0.5.2 does not dispatch these, so they are replaced: (module, attribute, CPU version).
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.gla", "chunk_gla", gla.chunk_gla),
    ("fla.layers.gla", "fused_recurrent_gla", _fused_recurrent_gla),
    ("fla.modules.fused_cross_entropy", "FusedCrossEntropyLoss.forward", cross_entropy_forward),
)
