"""RWKV-6's attention in plain PyTorch (Peng et al. 2024, arXiv:2404.05892), by way of GLA.

For one head, with log gates w_t <= 0 per key channel and a bonus u for the token itself:

    o_t = scale * r_t (S_{t-1} + diag(u) k_t^T v_t)          S_t = diag(exp w_t) S_{t-1} + k_t^T v_t

The state that token t reads is the one before it. So o_t is GLA's output for keys, values and gates
of one token earlier, plus the bonus.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_composer.cpu.chunks import check_sequences, one_token_each
from flame_composer.cpu.gla import chunk_gla, gla_of
from flame_composer.cpu.linear import backward_in_fp32, forward_in_fp32
from flame_composer.cpu.token_shift import starts_of


class _Earlier(torch.autograd.Function):
    """The token before each token of x `[B, T, ...]`, 0 before the first of a sequence."""

    @staticmethod
    @forward_in_fp32
    def forward(ctx: Any, x: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(starts)
        y = torch.empty_like(x)
        y[:, 1:] = x[:, :-1]
        y[:, starts] = 0
        return y

    @staticmethod
    @once_differentiable
    @backward_in_fp32
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (starts,) = ctx.saved_tensors
        (dy,) = gradients
        dx = torch.empty_like(dy)
        dx[:, :-1] = dy[:, 1:]
        dx[:, starts - 1] = 0  # index -1, before the row's first token, is its last one
        return dx, None


def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor | None]:
    """Compute RWKV-6's attention; the signature is that of `fla.ops.rwkv6.chunk_rwkv6` (0.5.2).

    Args:
        r, k, w: `[B, T, H, K]`; w holds log gates, <= 0.
        v: `[B, T, H, V]`.
        u: `[H, K]`.
        scale: factor on the scores; `K ** -0.5` when None.
        initial_state: `[N, H, K, V]` for N sequences.
        output_final_state: also return the state after the last token of each sequence.
        cu_seqlens: `[N + 1]` offsets of N sequences packed into one row (B is 1); they do not see
            one another.
        cu_seqlens_cpu: ignored; it saves fla a device synchronisation.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and the final state in float32 (float64 if the
        inputs are), or None.

    Raises:
        ValueError: if shapes or offsets do not fit together.
    """
    check_sequences(r, initial_state, cu_seqlens)
    scale = float(r.shape[-1] ** -0.5) if scale is None else scale
    if one_token_each(r, cu_seqlens):
        return _one_token_each(r, k, v, w, u, scale, initial_state, output_final_state)
    k_t, v_t, w_t = (_Earlier.apply(x, _starts(r, cu_seqlens)) for x in (k, v, w))
    states = initial_state, output_final_state
    o, state = chunk_gla(r, k_t, v_t, w_t, scale, *states, cu_seqlens=cu_seqlens)
    o = o + _bonus(r, k, v, u, scale)
    if state is None:
        return o, None
    # The state above is that before the last token.
    if cu_seqlens is None:
        return o, _after(state, k[:, -1], v[:, -1], w[:, -1])
    lasts = cu_seqlens[1:].long() - 1
    after = _after(state, k[0, lasts], v[0, lasts], w[0, lasts])
    return o, torch.where((cu_seqlens.diff() > 0)[:, None, None, None], after, state)


def _starts(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_zeros(1, dtype=torch.long) if cu_seqlens is None else starts_of(cu_seqlens)


def attend(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Return what `chunk_rwkv6` does for log gates -exp(w), a scale of 1 and no states.

    For the backward pass, it keeps hardly more than it is given.
    """
    make = functools.partial(_one_earlier, _starts(r, cu_seqlens))
    return gla_of(make, (r, k, v, w), cu_seqlens) + _bonus(r, k, v, u, 1.0)


def _one_earlier(starts: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Return GLA's queries, keys, values and log gates."""
    k, v, w = (_Earlier.apply(x, starts) for x in (k, v, -w.exp()))
    return r, k, v, w


def _bonus(r: Tensor, k: Tensor, v: Tensor, u: Tensor, scale: float) -> Tensor:
    return ((r * k * (u * scale)).sum(-1, keepdim=True) * v).to(v.dtype)


def _after(state: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return the state `[N, H, K, V]` after one more token, `[N, H, K]` and `[N, H, V]`."""
    k, v, w = (x.to(state.dtype) for x in (k, v, w))
    return state * w.exp().unsqueeze(-1) + k.unsqueeze(-1) * v.unsqueeze(-2)


def _one_token_each(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the recurrence, which suits decoding, for one token of each sequence."""
    shape = v.shape
    r, k, v, w = (x.reshape(-1, 1, *x.shape[2:]) for x in (r, k, v, w))
    if initial_state is None:
        dtype = torch.promote_types(r.dtype, torch.float32)
        state = r.new_zeros(len(r), *r.shape[2:], v.shape[3], dtype=dtype)
    else:
        state = initial_state.to(torch.promote_types(initial_state.dtype, torch.float32))
    read = (r[:, 0].to(state.dtype) * scale).unsqueeze(-2) @ state
    o = read.transpose(1, 2).to(v.dtype) + _bonus(r, k, v, u, scale)
    final = _after(state, k[:, 0], v[:, 0], w[:, 0]) if output_final_state else None
    return o.reshape(shape), final


def fused_recurrent_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Stand in for what fla calls for T <= 64."""
    if reverse:
        raise NotImplementedError("on a CPU, attention runs only forwards (reverse=False)")
    return chunk_rwkv6(r, k, v, w, u, scale, initial_state, output_final_state, cu_seqlens)


# (module, attribute, CPU version)
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.rwkv6", "chunk_rwkv6", chunk_rwkv6),
    ("fla.layers.rwkv6", "fused_recurrent_rwkv6", fused_recurrent_rwkv6),
)
