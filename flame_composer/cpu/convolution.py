"""Short convolutions of fla in plain PyTorch, for tensors on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return a depthwise causal convolution of x `[B, T, D]` and its last W inputs `[N, D, W]`.

    The weight is `[D, W]`. N is the number of sequences: B, or those packed by `cu_seqlens`.
    """
    D, W = weight.shape
    lengths = [x.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    pieces = x.float().split(lengths, 1)
    bias = None if bias is None else bias.float()
    state = x.new_zeros(x.shape[0] * len(lengths), D, W) if initial_state is None else initial_state
    outputs, finals = [], []
    for piece, before in zip(pieces, state.float().split(x.shape[0]), strict=True):
        inputs = torch.cat([before, piece.mT], -1)
        outputs.append(F.conv1d(inputs[..., 1:], weight.float().unsqueeze(1), bias, groups=D).mT)
        finals.append(inputs[..., -W:])
    y = torch.cat(outputs, 1)
    return (y if activation is None else F.silu(y)), torch.cat(finals).to(x.dtype)


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    BT: int = 64,
    layout_fallback: bool = False,
    chunk_size: int = 64,  # as fla 0.6 calls BT
) -> tuple[Tensor, Tensor | None]:
    y, final_state = _short_conv(x, weight, bias, initial_state, activation, cu_seqlens)
    if residual is not None:
        y = y + residual
    return y.to(x.dtype), final_state.contiguous() if output_final_state else None


def causal_conv1d_bwd(
    x: Tensor,
    dy: Tensor,
    dht: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    BT: int = 64,
    layout_fallback: bool = False,
    chunk_size: int = 64,  # as fla 0.6 calls BT
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, residual and initial state.

    Autograd computes them from a recomputed output, which is a small part of a model's work.
    """
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    bias, initial_state = (
        None if t is None else t.detach().requires_grad_() for t in (bias, initial_state)
    )
    with torch.enable_grad():
        y, final_state = _short_conv(x, weight, bias, initial_state, activation, cu_seqlens)
    inputs = [x, weight, bias, initial_state]
    outputs = [(y, dy.float())] if dht is None else [(y, dy.float()), (final_state, dht)]
    present = [t for t in inputs if t is not None]
    gradients = iter(torch.autograd.grad([o for o, _ in outputs], present, [d for _, d in outputs]))
    dx, dw, db, dh0 = (None if t is None else next(gradients) for t in inputs)
    return dx, dw, db, dy if residual is not None else None, dh0


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve one new token of each sequence; return the output and the cache.

    The cache `[N, D, W]` holds the last W inputs and is updated in place.
    """
    assert weight is not None
    cache.copy_(torch.cat([cache[..., 1:], x.reshape(len(cache), -1, 1).to(cache.dtype)], -1))
    y = (cache.float() * weight.float()).sum(-1)
    if bias is not None:
        y = y + bias
    y = (y if activation is None else F.silu(y)).view(x.shape)
    return (y if residual is None else y + residual).to(x.dtype), cache
