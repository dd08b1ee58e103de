"""Norms of fla in plain PyTorch, for tensors on a CPU, with groups or gates, too.

A norm takes the mean away (unless it is an RMSNorm), divides by the root of the mean square, and
then applies weight and bias: y = xhat * weight + bias, with xhat = (x - mean) * rstd. All of it
is computed in float32. Gradients are written out by hand: with wdy = weight * dy,

    dx = (wdy - xhat * mean(xhat * wdy) - mean(wdy)) * rstd

where the last mean is absent from an RMSNorm.

Shapes: T rows, D channels that are normalised together, G groups. As in fla, x is [T, D] and row t
belongs to group t % G, whose weight and bias are the (t % G)-th D channels of those [G * D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten: Any = torch.ops.aten


def _statistics(x: Tensor, eps: float, is_rms_norm: bool) -> tuple[Tensor | None, Tensor]:
    """Return the mean (None for an RMSNorm) and the reciprocal standard deviation, both [T]."""
    mean = None if is_rms_norm else x.mean(-1)
    centred = x if mean is None else x - mean.unsqueeze(-1)
    square = torch.linalg.vector_norm(centred, dim=-1).square_().div_(x.shape[-1])
    return mean, square.add_(eps).rsqrt_()


def _normalised(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    if mean is None:
        return x * rstd.unsqueeze(-1)
    return (x - mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1))


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return xhat * weight + bias, in place."""
    if weight is not None:
        xhat.view(-1, weight.numel()).mul_(weight)
    if bias is not None:
        xhat.view(-1, bias.numel()).add_(bias)
    return xhat


def _times_weight(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the sum over channels of x * weight, [T]."""
    if weight is None:
        return x.sum(-1)
    weight = weight.to(x.dtype)
    if weight.numel() == x.shape[-1]:
        return x @ weight
    groups = weight.view(-1, x.shape[-1])
    return torch.einsum("tgd,gd->tg", x.view(-1, *groups.shape), groups).reshape(-1)


def _over_rows(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Return the sum over rows, in the parameter's shape and dtype, or None without a parameter."""
    if parameter is None:
        return None
    return x.reshape(-1, parameter.numel()).sum(0).to(parameter.dtype)


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias, the latter None where there is none."""
    xhat = _normalised(x, mean, rstd)
    product = dy * xhat
    dw, db = _over_rows(product, weight), _over_rows(dy, bias)
    along = _times_weight(product, weight).div_(x.shape[-1])
    if weight is None:
        dx = dy.clone()
    else:
        torch.mul(dy.view(-1, weight.numel()), weight, out=product.view(-1, weight.numel()))
        dx = product
    if mean is not None:
        dx -= _times_weight(dy, weight).div_(x.shape[-1]).unsqueeze(-1)
    dx.addcmul_(xhat, along.unsqueeze(-1), value=-1).mul_(rstd.unsqueeze(-1))
    return dx, dw, db


def layer_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
    num_groups: int = 1,  # noqa: ARG001
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the norm of x + residual, its mean and rstd, and x + residual."""
    total = x.float() if residual is None else x.float() + residual.float()
    mean, rstd = _statistics(total, eps, is_rms_norm)
    y = _affine(_normalised(total, mean, rstd), weight, bias)
    residual_dtype = residual.dtype if residual is not None else residual_dtype or x.dtype
    return y.to(out_dtype or x.dtype), mean, rstd, total.to(residual_dtype)


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    dres: Tensor | None = None,
    has_residual: bool = False,
    is_rms_norm: bool = False,  # noqa: ARG001
    x_dtype: torch.dtype | None = None,
    recompute_output: bool = False,
    num_groups: int = 1,  # noqa: ARG001
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and residual, and on request the output."""
    assert rstd is not None
    dx, dw, db = _norm_backward(dy.float(), x.float(), weight, bias, mean, rstd)
    if dres is not None:
        dx += dres
    result = dx.to(x_dtype or x.dtype), dw, db, dx.to(x.dtype) if has_residual else None
    if not recompute_output:
        return result
    return *result, _affine(_normalised(x.float(), mean, rstd), weight, bias).to(dy.dtype)


def _gate(g: Tensor, activation: str) -> Tensor:
    return g.sigmoid() if activation == "sigmoid" else F.silu(g)


def _gate_backward(dgate: Tensor, g: Tensor, activation: str) -> Tensor:
    if activation == "sigmoid":
        return _aten.sigmoid_backward(dgate, g.sigmoid())
    return _aten.silu_backward(dgate, g)


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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return what `layer_norm_fwd` does, the output times the activation of g."""
    y, mean, rstd, total = layer_norm_fwd(
        x, weight, bias, eps, residual, torch.float32, residual_dtype, is_rms_norm
    )
    y *= _gate(g.float(), activation)
    return y.to(out_dtype or x.dtype), mean, rstd, total


def layer_norm_gated_bwd(
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    eps: float = 1e-5,  # noqa: ARG001
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    dresidual: Tensor | None = None,
    has_residual: bool = False,
    is_rms_norm: bool = False,  # noqa: ARG001
    x_dtype: torch.dtype | None = None,
    recompute_output: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, g, weight, bias and residual, and on request the output.

    fla 0.5.2 returns the norm before its gate in place of the output, so that on a GPU the gradient
    of the weight of a linear layer that follows (LightNet's `o_proj`) is wrong.
    """
    assert rstd is not None
    dy_f, x_f, g_f = dy.float(), x.float(), g.float()
    y = _affine(_normalised(x_f, mean, rstd), weight, bias)
    dg = _gate_backward(y * dy_f, g_f, activation)
    gate = _gate(g_f, activation)
    output = y.mul_(gate).to(dy.dtype) if recompute_output else None
    dx, dw, db = _norm_backward(gate.mul_(dy_f), x_f, weight, bias, mean, rstd)
    if dresidual is not None:
        dx += dresidual
    dx_dtype, dg_dtype = x_dtype or x.dtype, x_dtype or g.dtype
    result = dx.to(dx_dtype), dg.to(dg_dtype), dw, db, dx.to(x.dtype) if has_residual else None
    return (*result, output) if recompute_output else result


def _layer_norm_gated_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    z: Tensor | None = None,
    out: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Stand in for `fla.modules.layernorm_gated.layer_norm_fwd`, of Mamba-2's norm.

    Compute norm(x) * silu(z), or norm(x * silu(z)) unless `norm_before_gate`. x, z and the output
    are [rows, G * D], with D = group_size; mean and rstd [rows * G].
    """
    x_f = x.float()
    gate = None if z is None else F.silu(z.float())
    if gate is not None and not norm_before_gate:
        x_f = x_f * gate
    groups = x_f.reshape(-1, group_size or x.shape[-1])
    mean, rstd = _statistics(groups, eps, is_rms_norm)
    y = _affine(_normalised(groups, mean, rstd), weight, bias).view(x.shape)
    if gate is not None and norm_before_gate:
        y *= gate
    return (y.to(x.dtype) if out is None else out.copy_(y)), mean, rstd


def _layer_norm_gated_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,  # noqa: ARG001
    mean: Tensor | None,
    rstd: Tensor,
    z: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,  # noqa: ARG001
    recompute_output: bool = False,
    dz: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and z, and on request the output."""
    shape = (-1, group_size or x.shape[-1])
    dnorm, x_f = dy.float(), x.float()
    z_f = None if z is None else z.float()
    gated_x = x_f if z_f is None or norm_before_gate else x_f * F.silu(z_f)
    groups = gated_x.reshape(shape)

    y = dz_f = None
    if recompute_output or (z_f is not None and norm_before_gate):
        y = _affine(_normalised(groups, mean, rstd), weight, bias).view(x.shape)
        if z_f is not None and norm_before_gate:
            dz_f = _gate_backward(dnorm * y, z_f, "silu")
            gate = F.silu(z_f)
            dnorm, y = dnorm * gate, y.mul_(gate)
        y = y.to(x.dtype) if out is None else out.copy_(y)
    dgroups, dw, db = _norm_backward(dnorm.reshape(shape), groups, weight, bias, mean, rstd)
    dx = dgroups.view(x.shape)
    if z_f is not None and not norm_before_gate:
        dz_f = _gate_backward(dx * x_f, z_f, "silu")
        dx *= F.silu(z_f)
    if z is not None and dz_f is not None:
        dz = dz_f.to(z.dtype) if dz is None else dz.copy_(dz_f)
    result = dx.to(x.dtype), dw, db, dz
    return (*result, y) if recompute_output else result


# Operations that fla dispatches to a backend.
OPERATIONS: tuple[Callable[..., Any], ...] = (
    layer_norm_fwd,
    layer_norm_bwd,
    layer_norm_gated_fwd,
    layer_norm_gated_bwd,
)

# Those that it does not: (module, attribute, CPU version).
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.modules.layernorm_gated", "layer_norm_fwd", _layer_norm_gated_fwd),
    ("fla.modules.layernorm_gated", "layer_norm_bwd", _layer_norm_gated_bwd),
)
