"""Linear attention whose state decays by one number per head, or not at all, in plain PyTorch.

Simple GLA, retention (a constant decay), linear attention (none) and Mamba-2 (Dao and Gu 2024,
arXiv:2405.21060) are of this kind. For one head, with a log gate g_t <= 0:

    S_t = exp(g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

As in `gla`, the sequence is cut into chunks of C tokens. Let G be the inclusive cumulative sum of g
inside a chunk, and G_C its last row. A chunk reads the state S that enters it and leaves S':

    O  = scale * [ exp(G) * (Q S) + A V ]       A_ij = (q_i . k_j) exp(G_i - G_j), j <= i
    S' = exp(G_C) S + K^T (exp(G_C - G) * V)

The decay is a factor on the scores of one matrix product, with exponents that are never positive,
so no gate is too strong. Queries and keys may be shared by R heads each, as in Mamba-2, where all
heads have the same: their scores are computed once, and the states of these heads are columns of
one matrix.

`chunk_simple_gla` is one autograd function that saves only its inputs, or, with `keep`, all that
its backward pass needs.

Shapes: B batch, T tokens, H heads, K key channels, V value channels, N sequences, C tokens in a
chunk, n chunks, R = H / (heads of q and k), M = B * H / R.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_composer.cpu.chunks import (
    Rows,
    carried,
    check_sequences,
    chunks,
    head_products,
    products,
    segments_of,
    tokens,
    transposed,
)
from flame_composer.cpu.gla_scores import Masks, masked, masks_of
from flame_composer.cpu.linear import backward_in_fp32, forward_in_fp32

CHUNK_SIZE = 64
MIN_CHUNK_SIZE = 16
# Below it, float32 has the digits for G: exp(G_i - G_j) has a relative error below 5e-6.
MAX_DECAY = 80.0


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute linear attention with a decay per head, chunk by chunk.

    The signature is that of `fla.ops.simple_gla.chunk_simple_gla` (0.5.2).

    Args, results and errors are those of `gla.chunk_gla`, but for these:
        q, k: `[B, T, H / R, K]`.
        g: log gates `[B, T, H]`, <= 0; nothing decays if both it and `g_gamma` are None.
        g_gamma: log gates `[H]` of all tokens, instead of `g`; it gets no gradient.
        keep: keep what the backward pass needs, where it would be computed again.
    """
    g = _gates(q, k, v, g, g_gamma)
    check_sequences(q, initial_state, cu_seqlens)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if initial_state is not None:
        initial_state = transposed(initial_state, state_v_first)
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        # Each sequence has a state, so each gets its own row.
        rows = Rows(cu_seqlens)
        q, k, v = map(rows.split, (q, k, v))
        padded = None if g is None else rows.split(g.unsqueeze(-1)).squeeze(-1)
        o, state = _chunkwise(q, k, v, padded, scale, initial_state, None, keep)
        o = rows.join(o)
    else:
        segments = None if cu_seqlens is None else segments_of(cu_seqlens, q.shape[1])
        o, state = _chunkwise(q, k, v, g, scale, initial_state, segments, keep)
    return o, transposed(state, state_v_first) if output_final_state else None


def recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the same by the recurrence, token by token, which suits decoding.

    Arguments, results and errors are those of `chunk_simple_gla`.
    """
    g = _gates(q, k, v, g, g_gamma)
    check_sequences(q, initial_state, cu_seqlens)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if cu_seqlens is not None:
        rows = Rows(cu_seqlens)
        q, k, v = map(rows.split, (q, k, v))
        padded = None if g is None else rows.split(g.unsqueeze(-1)).squeeze(-1)
        states = initial_state, output_final_state, state_v_first
        o, state = recurrent_simple_gla(q, k, v, padded, None, scale, *states)
        return rows.join(o), state
    dtype = torch.promote_types(q.dtype, torch.float32)
    repeats = v.shape[2] // q.shape[2]
    q, k = (x.to(dtype).repeat_interleave(repeats, 2) for x in (q * scale, k))
    if initial_state is None:
        state = q.new_zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    else:
        state = transposed(initial_state.to(dtype), state_v_first)
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * g[:, t].to(dtype).exp()[..., None, None]
        state = state + k[:, t].unsqueeze(-1) * v[:, t].to(dtype).unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    o = torch.stack(outputs, 1).to(v.dtype)
    return o, transposed(state, state_v_first) if output_final_state else None


def _gates(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None
) -> Tensor | None:
    """Return the gates `[B, T, H]`, or None; raise ValueError for shapes that do not fit."""
    fits = q.shape == k.shape and v.shape[:2] == q.shape[:2] and v.shape[2] % q.shape[2] == 0
    if not fits or (g is not None and g.shape != v.shape[:3]):
        shapes = [None if x is None else list(x.shape) for x in (q, k, v, g)]
        raise ValueError(
            "q and k must be [B, T, H / R, K], v [B, T, H, V] and g [B, T, H] or None, got"
            f" {shapes}"
        )
    return g_gamma.expand(v.shape[:3]) if g is None and g_gamma is not None else g


class _Decays(NamedTuple):
    """How states and scores decay in each chunk, for each of R heads; None if nothing does.

    Without gates, reads, writes and states are still masked at the borders of sequences; M and R
    are 1 then.
    """

    scores: Tensor | None  # [M, n, R, C, C] exp(G_i - G_j), 0 where j > i
    read: Tensor | None  # [M, n, C, R] exp(G): how S decays on its way to a token
    write: Tensor | None  # [M, n, C, R] exp(G_C - G): how a token decays on its way to S'
    state: Tensor | None  # [M, n, 1, R] exp(G_C), or 0 if S does not survive the chunk


def _decays(g: Tensor | None, masks: Masks, dtype: torch.dtype) -> _Decays:
    if g is None:
        keeps = None if masks.keeps is None else masks.keeps.unsqueeze(0)
        return _Decays(None, masks.reads, masks.writes, keeps)
    wide = g.double()
    G = masks.pairs.double() @ wide
    total = G[:, :, -1:] if masks.same is None else masks.same.double() @ wide
    high = G.to(dtype).mT.contiguous()  # whose order of dimensions the scores get
    scores = high.unsqueeze(-1) - high.unsqueeze(-2)
    if float(G.amin()) <= -MAX_DECAY:
        low = (G - G.to(dtype)).to(dtype).mT
        scores += low.unsqueeze(-1)
        scores -= low.unsqueeze(-2)
    return _Decays(
        scores.masked_fill_(masks.hidden.unsqueeze(-3), -torch.inf).exp_(),
        masked(G.exp().to(dtype), masks.reads),
        masked((total - G).exp().to(dtype), masks.writes),
        masked(total[:, :, -1:].exp().to(dtype), masks.keeps),
    )


def _times(x: Tensor, decay: Tensor | None, num_heads: int) -> Tensor:
    """Return x `[M, n, C, R * V]` with each of R heads multiplied by decay `[M, n, C, R or 1]`."""
    if decay is None:
        return x
    return (x.unflatten(-1, (num_heads, -1)) * decay.unsqueeze(-1)).flatten(-2)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Give each of R heads its own matrix: `[M, n, C, R * V] -> [M, n, R, C, V]`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


class _Chunks(NamedTuple):
    q: Tensor  # [M, n, C, K]
    k: Tensor  # [M, n, C, K]
    v: Tensor  # [M, n, C, R * V]
    masks: Masks
    decays: _Decays
    states: Tensor  # [M, n + 1, K, R * V]


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    h0: Tensor | None,
    segments: Tensor | None,
) -> _Chunks:
    """Return what forward and backward need."""
    B, T, H = v.shape[:3]
    num_groups = q.shape[2]
    size = CHUNK_SIZE
    while size > MIN_CHUNK_SIZE and size // 2 >= T:
        size //= 2
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_c, k_c = (chunks(x, size, dtype) for x in (q, k))
    v_c = chunks(v.reshape(B, T, num_groups, -1), size, dtype)
    g_c = None if g is None else chunks(g.reshape(B, T, num_groups, -1), size, dtype)
    masks = masks_of(segments, q_c.shape[1], size, q_c)
    decays = _decays(g_c, masks, dtype)
    R = H // num_groups
    step = products(k_c.mT, _times(v_c, decays.write, R))
    first = None if h0 is None else _inner_state(h0.to(dtype), num_groups)
    return _Chunks(q_c, k_c, v_c, masks, decays, carried(step, decays.state, first, back=False))


def _inner_state(state: Tensor, num_groups: int) -> Tensor:
    """Make heads that share keys columns of one matrix: `[B, H, K, V] -> [M, K, R * V]`."""
    grouped = state.unflatten(1, (num_groups, -1)).transpose(2, 3)
    return grouped.flatten(3).flatten(0, 1)


def _outer_state(state: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Undo `_inner_state`; the shape is B, H / R and R."""
    grouped = state.unflatten(0, shape[:2]).unflatten(-1, (shape[2], -1))
    return grouped.transpose(2, 3).flatten(1, 2)


def _weights(c: _Chunks, num_heads: int) -> Tensor:
    """Return A, `[M, n, R, C, C]`; the scores themselves are the same for all of R heads."""
    scores = (c.q @ c.k.mT).unsqueeze(2)
    if c.decays.scores is None:
        return scores.masked_fill_(c.masks.hidden.unsqueeze(-3), 0).expand(
            -1, -1, num_heads, -1, -1
        )
    return scores * c.decays.scores


def _added(x: Tensor, decay: Tensor | None, heads: Tensor) -> Tensor:
    """Return x `[M, n, C, R * V]`, overwritten with x * decay and the heads' own matrices."""
    result, own = x.unflatten(-1, (heads.shape[2], -1)), heads.transpose(-2, -3)
    if decay is None:
        result += own
    else:
        torch.addcmul(own, result, decay.unsqueeze(-1), out=result)
    return x


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """Sum x `[..., R * V]` over the values of each head: `[..., R]`."""
    return x.unflatten(-1, (num_heads, -1)).sum(-1)


class _ChunkDecay(torch.autograd.Function):
    @staticmethod
    @forward_in_fp32
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        scale: float,
        h0: Tensor | None,
        segments: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.scale = scale
        B, T, H = v.shape[:3]
        groups = q.shape[2]
        R = H // groups
        c = _prepare(q, k, v, g, h0, segments)
        weights = _weights(c, R)
        kept = (*c[:3], *c.masks, *c.decays, c.states, weights) if keep else ()
        ctx.save_for_backward(q, k, v, g, h0, segments, *kept)
        read = products(c.q, c.states[:, :-1])
        o = _added(read, c.decays.read, head_products(weights, _heads(c.v, R)))
        if scale != 1:
            o *= scale
        # A view would keep the states of all chunks alive in the model's cache.
        final = _outer_state(c.states[:, -1].clone(), (B, groups, R))
        return tokens(o, torch.Size((B, T, groups, R * v.shape[3])), v.dtype).view(v.shape), final

    @staticmethod
    @once_differentiable
    @backward_in_fp32
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        do, dfinal = grad_outputs
        q, k, v, g, h0, segments, *kept = ctx.saved_tensors
        B, T, H = v.shape[:3]
        groups = q.shape[2]
        R = H // groups
        if kept:
            q_c, k_c, v_c, *parts, states, weights = kept
            c = _Chunks(q_c, k_c, v_c, Masks(*parts[:6]), _Decays(*parts[6:]), states)
        else:
            c = _prepare(q, k, v, g, h0, segments)
            weights = _weights(c, R)
        size = c.q.shape[2]
        do_c = chunks(do.reshape(B, T, groups, -1), size, c.q.dtype)
        do_c = do_c if ctx.scale == 1 else do_c * ctx.scale
        do_read = _times(do_c, c.decays.read, R)
        dfinal = _inner_state(dfinal.to(c.q.dtype), groups)
        dstates = carried(products(c.q.mT, do_read), c.decays.state, dfinal, back=True)
        dleaving = dstates[:, 1:]
        written = _times(c.v, c.decays.write, R)
        dwritten = products(c.k, dleaving)

        do_h, v_h = _heads(do_c, R), _heads(c.v, R)
        dA = head_products(do_h, v_h.mT)
        if c.decays.scores is None:
            dA.masked_fill_(c.masks.hidden.unsqueeze(-3), 0)
        else:
            dA *= c.decays.scores
        dscores = dA.sum(2) if R > 1 else dA.squeeze(2)
        dq = dscores @ c.k
        dq += products(do_read, c.states[:, :-1].mT)
        dk = dscores.mT @ c.q
        dk += products(written, dleaving.mT)
        dg = None
        if ctx.needs_input_grad[3]:
            dread = _by_head(do_read.mul_(products(c.q, c.states[:, :-1])), R)
            dwrite = _by_head(written.mul_(dwritten), R)
            dg = _gate_gradient(c, dA, dread, dwrite, dleaving)
            dg = tokens(dg, torch.Size((B, T, groups, R)), g.dtype).view(g.shape)
        dv = _added(dwritten, c.decays.write, head_products(weights.mT, do_h))
        grouped = torch.Size((B, T, groups, R * v.shape[3]))
        return (
            tokens(dq, q.shape, q.dtype),
            tokens(dk, k.shape, k.dtype),
            tokens(dv, grouped, v.dtype).view(v.shape),
            dg,
            None,
            None if h0 is None else _outer_state(dstates[:, 0], (B, groups, R)).to(h0.dtype),
            None,
            None,
        )


def _gate_gradient(
    c: _Chunks, dA: Tensor, dread: Tensor, dwrite: Tensor, dleaving: Tensor
) -> Tensor:
    """Return the gradient of the gates, `[M, n, C, R]`; dA is overwritten.

    g_t occurs in exp(G_i - G_j) for j < t <= i. So it sums over tokens from t on (pairs and reads),
    over tokens before t (writes), and over the state that passes through the chunk.
    """
    pairs = dA.mul_((c.q @ c.k.mT).unsqueeze(2))
    # A_ii does not depend on the gates; without it, nothing has to cancel.
    pairs.diagonal(dim1=-2, dim2=-1).zero_()
    dG = (pairs.sum(-1) - pairs.sum(-2)).mT + dread
    dg = c.masks.pairs.mT @ dG
    dg += c.masks.pairs.tril(-1) @ dwrite
    through = _by_head((c.states[:, :-1] * dleaving).sum(-2, keepdim=True), dread.shape[-1])
    assert c.decays.state is not None
    dg += through.mul_(c.decays.state)
    return dg


def _chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    h0: Tensor | None,
    segments: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, T, H, V]` and the final state `[B, H, K, V]`.

    `segments` `[T]` numbers the sequences packed into one row, or is None.
    """
    result: Any = _ChunkDecay.apply(q, k, v, g, scale, h0, segments, keep)
    return result
