"""Gated slot attention (GSA) in plain PyTorch (Zhang et al. 2024, arXiv:2409.07146).

A head has M slots, each with log gates g_t <= 0, in which it keeps keys and values:

    K_t = K_{t-1} diag(exp g_t) + k_t^T s_t        p_t = softmax(scale * q_t K_t)
    V_t = diag(exp g_t) V_{t-1} + s_t^T v_t        o_t = p_t V_t

The second line is GLA with queries p and keys s. The first is linear attention whose gates are
those of the values s: in chunks, with G and G_C as in `gla`,

    O  = (Q S) * exp G + O'         O'_im = sum_{j <= i} (q_i . k_j) s_jm exp(G_im - G_jm)
    S' = S diag(exp G_C) + K^T (s * exp(G_C - G))

`_ChunkSlots` is one autograd function that saves only its inputs.

Shapes: B batch, T tokens, H heads, K key channels, V value channels, M slots, N sequences, C tokens
in a chunk, n chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_composer.cpu.chunks import (
    Rows,
    carried,
    check_sequences,
    chunks,
    one_token_each,
    segments_of,
    tokens,
)
from flame_composer.cpu.gla import chunk_gla, plan_of
from flame_composer.cpu.gla_scores import Masks, cumulative, masked, masks_of
from flame_composer.cpu.linear import backward_in_fp32, forward_in_fp32


class _FastSlots:
    """O' by one matrix product: exp(G - r) * (A (s * exp(r - G))) with r = G_C / 2."""

    def __init__(self, s: Tensor, g: Tensor, masks: Masks):
        G, total = cumulative(g, masks)
        self.decay = total[:, :, -1:].exp()
        half = total / 2
        G -= half
        half.exp_()
        self.after = G.exp()
        self.before = G.neg_().exp_()
        self.s = s * self.before
        self.read = self.after * half  # exp(G): how S decays on its way to a token
        self.write = self.before * half  # exp(G_C - G): how a token decays on its way to S'

    def mix(self, A: Tensor) -> Tensor:
        return (A @ self.s).mul_(self.after)

    def backward(self, A: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of A, before it is masked, and of s."""
        do = do * self.after
        return do @ self.s.mT, (A.mT @ do).mul_(self.before)


class _ExactSlots:
    """O' token by token, with exponents that are <= 0 for any gates."""

    def __init__(self, s: Tensor, g: Tensor, masks: Masks):
        # A difference of two sums in the thousands would lose float32's digits, hence float64.
        self.G, total = cumulative(g.double(), masks)
        self.s = s
        self.decay = total[:, :, -1:].exp().to(s.dtype)
        self.read = self.G.exp().to(s.dtype)
        self.write = (total - self.G).exp().to(s.dtype)

    def _column(self, j: int) -> Tensor:
        # Positive only for pairs of different sequences, which are masked.
        return (self.G[:, :, j:] - self.G[:, :, j : j + 1]).clamp_(max=0).to(self.s.dtype).exp_()

    def mix(self, A: Tensor) -> Tensor:
        o = torch.zeros_like(self.s)
        for j in range(A.shape[-1]):
            o[:, :, j:] += A[..., j:, j : j + 1] * (self.s[:, :, j : j + 1] * self._column(j))
        return o

    def backward(self, A: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
        dA, ds = torch.zeros_like(A), torch.zeros_like(self.s)
        for j in range(A.shape[-1]):
            weighted = self._column(j).mul_(do[:, :, j:])
            dA[..., j:, j] = (weighted * self.s[:, :, j : j + 1]).sum(-1)
            ds[:, :, j] = (weighted * A[..., j:, j : j + 1]).sum(2)
        return dA, ds


class _Chunks(NamedTuple):
    q: Tensor
    k: Tensor
    s: Tensor
    slots: _FastSlots | _ExactSlots
    masks: Masks
    states: Tensor  # [B * H, n + 1, K, M]
    A: Tensor  # [B * H, n, C, C] below the diagonal, where gates matter
    diagonal: Tensor  # [B * H, n, C, 1]


def _prepare(
    q: Tensor,
    k: Tensor,
    s: Tensor,
    g: Tensor,
    h0: Tensor | None,
    segments: Tensor | None,
    plan: tuple[int, bool],
) -> _Chunks:
    """Return what forward and backward need."""
    size, exact = plan
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, s, g = (chunks(x, size, dtype) for x in (q, k, s, g))
    masks = masks_of(segments, q.shape[1], size, q)
    slots = (_ExactSlots if exact else _FastSlots)(s, g, masks)
    first = None if h0 is None else h0.to(dtype).flatten(0, 1)
    step = k.mT @ (s * masked(slots.write, masks.writes))
    states = carried(step, masked(slots.decay, masks.keeps), first, back=False)
    A = (q @ k.mT).masked_fill_(masks.hidden, 0)
    diagonal = A.diagonal(dim1=-2, dim2=-1).clone().unsqueeze(-1)
    A.diagonal(dim1=-2, dim2=-1).zero_()
    return _Chunks(q, k, s, slots, masks, states, A, diagonal)


class _ChunkSlots(torch.autograd.Function):
    @staticmethod
    @forward_in_fp32
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        s: Tensor,
        g: Tensor,
        scale: float,
        h0: Tensor | None,
        segments: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, s, g, h0, segments)
        ctx.scale = scale
        ctx.plan = plan_of(g)
        c = _prepare(q, k, s, g, h0, segments, ctx.plan)
        o = c.slots.mix(c.A)
        o += c.diagonal * c.s
        o += (c.q @ c.states[:, :-1]).mul_(masked(c.slots.read, c.masks.reads))
        o *= scale
        # A view would keep the states of all chunks alive in the model's cache.
        final = c.states[:, -1].clone().unflatten(0, (q.shape[0], q.shape[2]))
        return tokens(o, s.shape, s.dtype), final

    @staticmethod
    @once_differentiable
    @backward_in_fp32
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        do, dfinal = grad_outputs
        q, k, s, g, h0, segments = ctx.saved_tensors
        c = _prepare(q, k, s, g, h0, segments, ctx.plan)
        do = chunks(do, ctx.plan[0], c.q.dtype).mul_(ctx.scale)
        read = masked(c.slots.read, c.masks.reads)
        decay = masked(c.slots.decay, c.masks.keeps)
        do_read = do * read
        dstates = carried(c.q.mT @ do_read, decay, dfinal.flatten(0, 1), back=True)
        states, dleaving = c.states[:, :-1], dstates[:, 1:]
        dwritten = (c.k @ dleaving).mul_(masked(c.slots.write, c.masks.writes))
        written = c.s * masked(c.slots.write, c.masks.writes)

        dA, ds = c.slots.backward(c.A, do)
        # g_t occurs in exp(G_i - G_j) for j < t <= i. So dg sums over tokens from t on (pairs and
        # reads), over tokens before t (writes), and over the state that passes through the chunk.
        dg = c.slots.mix(c.A).mul_(do)
        dg -= c.s * ds
        dg += (c.q @ states).mul_(do_read)
        dg = c.masks.pairs.mT @ dg
        dg += c.masks.pairs.tril(-1) @ (c.s * dwritten)
        dg += (states * dleaving).sum(2, keepdim=True).mul_(decay)

        dA.masked_fill_(c.masks.hidden, 0)
        dA.diagonal(dim1=-2, dim2=-1).copy_((do * c.s).sum(-1))
        dq = dA @ c.k
        dq += do_read @ states.mT
        dk = dA.mT @ c.q
        dk += written @ dleaving.mT
        ds += c.diagonal * do
        ds += dwritten
        dh0 = None if h0 is None else dstates[:, 0].reshape(h0.shape).to(h0.dtype)
        gradients = (
            tokens(x, like.shape, like.dtype) for x, like in ((dq, q), (dk, k), (ds, s), (dg, g))
        )
        return (*gradients, None, dh0, None)


def chunk_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool | None = False,
    checkpoint_level: int | None = 2,  # noqa: ARG001
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Compute chunkwise GSA; the signature is that of `fla.ops.gsa.chunk_gsa` (0.5.2).

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        s, g: `[B, T, H, M]`: what a token writes into each slot, and log gates, <= 0.
        scale: factor on the scores of slots; `K ** -0.5` when None.
        initial_state: `[N, H, K, M]` and `[N, H, M, V]` for N sequences.
        output_final_state: also return the states after the last token of each sequence.
        checkpoint_level: ignored; the backward pass computes everything again.
        cu_seqlens: `[N + 1]` offsets of N sequences packed into one row (B is 1); they do not see
            one another.
        cu_seqlens_cpu: ignored; it saves fla a device synchronisation.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and two final states, or two times None.

    Raises:
        ValueError: if shapes or offsets do not fit together.
    """
    _check(q, k, s, g)
    assert g is not None
    keys, values = (None, None) if initial_state is None else initial_state
    check_sequences(q, keys, cu_seqlens)
    with_states = bool(output_final_state)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if cu_seqlens is not None and (keys is not None or with_states):
        # Each sequence has a state, so each gets its own row.
        rows = Rows(cu_seqlens)
        q, k, v, s, g = map(rows.split, (q, k, v, s, g))
        o, final = chunk_gsa(q, k, v, s, g, scale, initial_state, output_final_state)
        return rows.join(o), final
    if one_token_each(q, cu_seqlens):
        return _one_token_each(q, k, v, s, g, scale, initial_state, with_states)
    segments = None if cu_seqlens is None else segments_of(cu_seqlens, q.shape[1])
    result: Any = _ChunkSlots.apply(q, k, s, g, scale, keys, segments)
    scores, final_keys = result
    p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(s.dtype)
    o, final_values = chunk_gla(p, s, v, g, 1.0, values, with_states, cu_seqlens=cu_seqlens)
    return o, (final_keys if with_states else None, final_values)


def _check(q: Tensor, k: Tensor, s: Tensor, g: Tensor | None) -> None:
    if g is None:
        raise NotImplementedError("on a CPU, gsa needs gates (g)")
    if q.shape != k.shape or s.shape != g.shape or s.shape[:3] != q.shape[:3]:
        shapes = [list(x.shape) for x in (q, k, s, g)]
        raise ValueError(f"q and k must be [B, T, H, K], s and g [B, T, H, M], got {shapes}")


def _one_token_each(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    scale: float,
    initial_state: tuple[Tensor, Tensor] | None,
    output_final_state: bool,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Compute the recurrence, which suits decoding, for one token of each sequence."""
    shape, dtype = v.shape, torch.promote_types(q.dtype, torch.float32)
    q, k, v, s, g = (x.reshape(-1, *x.shape[2:]).to(dtype) for x in (q, k, v, s, g))
    keys, values = k.unsqueeze(-1) * s.unsqueeze(-2), s.unsqueeze(-1) * v.unsqueeze(-2)
    if initial_state is not None:
        decay = g.exp()
        keys = keys + initial_state[0] * decay.unsqueeze(-2)
        values = values + initial_state[1] * decay.unsqueeze(-1)
    p = ((q * scale).unsqueeze(-2) @ keys).softmax(-1)
    o = (p @ values).squeeze(-2).reshape(shape).to(v.dtype)
    return o, (keys, values) if output_final_state else (None, None)


def fused_recurrent_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool | None = False,
    reverse: bool | None = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Stand in for what fla calls for T <= 64."""
    if reverse:
        raise NotImplementedError("on a CPU, attention runs only forwards (reverse=False)")
    states = initial_state, output_final_state
    return chunk_gsa(q, k, v, s, g, scale, *states, cu_seqlens=cu_seqlens)


# (module, attribute, CPU version)
def fused_additive_gate(
    x: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    gate_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys exp(x - z), log decays and the last z, for x and results `[B, T, H, K]`.

    z is the logarithm of the sum of exp(x) so far, from `initial_state`, `[N, 1, H, K]`, on. The
    signature is that of `fla.ops.gsa.gate.fused_additive_gate` (0.6), which LightNet uses.
    """
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    texts = x.float().split(1) if bounds is None else _documents_of(x.float(), bounds)
    states = [None] * len(texts) if initial_state is None else initial_state.split(1)
    sums, before, last = [], [], []
    for text, state in zip(texts, states, strict=True):
        parts = [text] if state is None else [state.float(), text]
        z = torch.cat(parts, 1).logcumsumexp(1)
        if state is None:
            z = torch.cat((z[:, :1], z), 1)
        sums.append(z[:, 1:])
        before.append(z[:, :-1])
        no_sum = z.new_full((1, 1, *x.shape[2:]), -torch.inf)
        last.append(z[:, -1:] if z.shape[1] else no_sum)
    axis = 0 if bounds is None else 1
    z = torch.cat(sums, axis)
    start = torch.cat(before, axis)
    decay = torch.where(start.isneginf(), z, start) - z  # none of what is not there
    key = (x.float() - z).exp()
    return key.to(output_dtype or x.dtype), decay.to(gate_dtype or x.dtype), torch.cat(last)


def _documents_of(x: Tensor, bounds: list[int]) -> list[Tensor]:
    return [x[:, start:end] for start, end in itertools.pairwise(bounds)]


REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.gsa", "chunk_gsa", chunk_gsa),
    ("fla.layers.gsa", "fused_recurrent_gsa", fused_recurrent_gsa),
)
