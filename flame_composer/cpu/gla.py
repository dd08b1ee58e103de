"""Gated linear attention (GLA) in plain PyTorch: a chunkwise form and the recurrence.

The chunkwise form trains GLA on a CPU; the recurrence decodes.

For one head, with log gates g_t <= 0 per key channel (Yang et al. 2023, arXiv:2312.06635, section
4):

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

The chunkwise form cuts the sequence into chunks of C tokens. Let G be the inclusive cumulative sum
of g inside a chunk, and G_C its last row. A chunk reads the state S that enters it and leaves S':

    O  = scale * [ (Q * exp G) S + tril(A) V ]       A_ij = sum_k q_ik k_jk exp(G_ik - G_jk)
    S' = diag(exp G_C) S + (K * exp(G_C - G))^T V

`chunk_gla` is one autograd function that saves only its inputs and recomputes the rest in the
backward pass: on a CPU this arithmetic is a few per cent of a model's, but the intermediate results
would take most of its memory.

Shapes: B batch, T tokens, H heads, K key channels, V value channels, N sequences, C tokens in a
chunk, M = B * H, n = number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    transposed,
)
from flame_composer.cpu.gla_scores import (
    ExactScores,
    FastScores,
    Masks,
    Scores,
    masked,
    masks_of,
    sums,
)
from flame_composer.cpu.linear import backward_in_fp32, forward_in_fp32
from flame_composer.cpu.projections import gradients_of, leaves_of

CHUNK_SIZE = 64
MIN_CHUNK_SIZE = 16
# The fast form multiplies q by exp(G - G_C/2) and k by exp(G_C/2 - G). With |G| below MAX_DECAY,
# these factors are at most exp(MAX_DECAY / 2), far from fp32's limit, and the rounding of G
# (relative 6e-8) gives exp(G) a relative error below 5e-6.
MAX_DECAY = 80.0


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor | None]:
    """Compute chunkwise GLA; the signature is that of `fla.ops.gla.chunk_gla` (0.5.2).

    Args:
        q, k, g: `[B, T, H, K]`; g holds log gates, <= 0.
        v: `[B, T, H, V]`.
        scale: factor on the scores; `K ** -0.5` when None.
        initial_state: `[N, H, K, V]`, or `[N, H, V, K]` with `state_v_first`, for N sequences.
        output_final_state: also return the state after the last token of each sequence.
        cu_seqlens: `[N + 1]` offsets of N sequences packed into one row (B is 1); they do not see
            one another.
        cu_seqlens_cpu: ignored; it saves fla a device synchronisation.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and the final state or None. The state is float32,
        or float64 if the inputs are.

    Raises:
        ValueError: if shapes or offsets do not fit together.
    """
    _check(q, k, v, g)
    check_sequences(q, initial_state, cu_seqlens)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if cu_seqlens is None:
        return _dense(q, k, v, g, scale, initial_state, output_final_state, state_v_first)
    if initial_state is None and not output_final_state:
        # Training: the packed row is cut into chunks as it is; masks keep the sequences apart.
        o, _ = _chunkwise(q, k, v, g, scale, None, segments_of(cu_seqlens, q.shape[1]))
        return o, None
    # Prefill of a batch of prompts: each sequence has a state, so each gets its own row.
    rows = Rows(cu_seqlens)
    q, k, v, g = map(rows.split, (q, k, v, g))
    o, state = _dense(q, k, v, g, scale, initial_state, output_final_state, state_v_first)
    return rows.join(o), state


def recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute GLA by the recurrence, token by token, which suits decoding.

    Arguments, results and errors are those of `chunk_gla`.
    """
    _check(q, k, v, gk)
    check_sequences(q, initial_state, cu_seqlens)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if cu_seqlens is not None:
        rows = Rows(cu_seqlens)
        q, k, v, gk = map(rows.split, (q, k, v, gk))
        o, state = recurrent_gla(
            q, k, v, gk, scale, initial_state, output_final_state, state_v_first
        )
        return rows.join(o), state
    dtype = torch.promote_types(q.dtype, torch.float32)
    if initial_state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    else:
        state = transposed(initial_state.to(dtype), state_v_first)
    outputs = []
    for q_t, k_t, v_t, g_t in zip(*(x.to(dtype).unbind(1) for x in (q, k, v, gk)), strict=True):
        state = state * g_t.exp().unsqueeze(-1)
        state += k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append(((q_t * scale).unsqueeze(-2) @ state).squeeze(-2))
    o = torch.stack(outputs, 1).to(v.dtype)
    return o, transposed(state, state_v_first) if output_final_state else None


def fused_recurrent_gla(
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
    run = recurrent_gla if one_token_each(q, cu_seqlens) else chunk_gla
    return run(q, k, v, gk, scale, initial_state, output_final_state, state_v_first, cu_seqlens)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> None:
    if not q.shape == k.shape == g.shape or v.shape[:3] != q.shape[:3]:
        shapes = [list(x.shape) for x in (q, k, g, v)]
        raise ValueError(f"q, k, g must be [B, T, H, K] and v [B, T, H, V], got {shapes}")


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
) -> tuple[Tensor, Tensor | None]:
    if initial_state is not None:
        initial_state = transposed(initial_state, state_v_first)
    o, state = _chunkwise(q, k, v, g, scale, initial_state, None)
    return o, transposed(state, state_v_first) if output_final_state else None


def plan_of(g: Tensor) -> tuple[int, bool]:
    """Return the chunk size for these gates, and whether the scores need the exact form.

    Strong decay would overflow the fast form, so the chunk shrinks until its total decay is below
    MAX_DECAY. Gates that are too negative even for the smallest chunk take the exact form, whose
    exponents are never positive.
    """
    size = CHUNK_SIZE
    while size > MIN_CHUNK_SIZE and size // 2 >= g.shape[1]:
        size //= 2
    totals = sums(g.to(torch.promote_types(g.dtype, torch.float32)), MIN_CHUNK_SIZE)
    while sums(totals, size // MIN_CHUNK_SIZE).amin() <= -MAX_DECAY:
        if size == MIN_CHUNK_SIZE:
            return size, True
        size //= 2
    return size, False


def _states(scores: Scores, k: Tensor, v: Tensor, h0: Tensor | None, masks: Masks) -> Tensor:
    """Return the state that enters each chunk and, last, the final state: `[M, n + 1, K, V]`."""
    written = (k * masked(scores.write, masks.writes)).mT @ v
    return carried(written, masked(scores.decay, masks.keeps).mT, h0, back=False)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    h0: Tensor | None,
    segments: Tensor | None,
    plan: tuple[int, bool],
) -> tuple[Tensor, Tensor, Tensor, Scores, Masks, Tensor]:
    """Return what forward and backward need: q, k, v in chunks, scores, masks and states."""
    size, exact = plan
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_c, k_c, v_c, g_c = (chunks(x, size, dtype) for x in (q, k, v, g))
    masks = masks_of(segments, q_c.shape[1], size, q_c)
    scores = (ExactScores if exact else FastScores)(q_c, k_c, g_c, masks)
    h0_c = None if h0 is None else h0.reshape(-1, *h0.shape[2:])
    return q_c, k_c, v_c, scores, masks, _states(scores, k_c, v_c, h0_c, masks)


def _identity(*given: Tensor) -> tuple[Tensor, ...]:
    return given


class _ChunkGLA(torch.autograd.Function):
    """GLA of the q, k, v and g that `make(*given)` returns, which saves only `given`."""

    @staticmethod
    @forward_in_fp32
    def forward(
        ctx: Any,
        make: Callable[..., tuple[Tensor, ...]],
        scale: float,
        h0: Tensor | None,
        segments: Tensor | None,
        *given: Tensor,
    ) -> tuple[Tensor, Tensor]:
        q, k, v, g = make(*given)
        ctx.save_for_backward(h0, segments, *given)
        ctx.make, ctx.scale, ctx.plan = make, scale, plan_of(g)
        q_c, _, v_c, scores, masks, states = _prepare(q, k, v, g, h0, segments, ctx.plan)
        A = scores.scores().masked_fill_(masks.hidden, 0)
        o = A @ v_c
        o += (q_c * masked(scores.read, masks.reads)) @ states[:, :-1]
        o *= scale
        # A view would keep the states of all chunks alive in the model's cache.
        final = states[:, -1].clone()
        final = final.view(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        return tokens(o, v.shape, v.dtype), final

    @staticmethod
    @once_differentiable
    @backward_in_fp32
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        h0, segments, *given = ctx.saved_tensors
        leaves = leaves_of(given, ctx.needs_input_grad[4:])
        with torch.enable_grad():
            made = ctx.make(*leaves)
        plain = [x.detach() for x in made]
        *dmade, dh0 = _backward(plain, ctx.scale, h0, segments, ctx.plan, grad_outputs)
        return None, None, dh0, None, *gradients_of(leaves, made, dmade)


def _backward(
    made: Sequence[Tensor],
    scale: float,
    h0: Tensor | None,
    segments: Tensor | None,
    plan: tuple[int, bool],
    grad_outputs: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, g and h0."""
    q, k, v, g = made
    do, dfinal = grad_outputs
    q_c, k_c, v_c, scores, masks, states = _prepare(q, k, v, g, h0, segments, plan)
    do_c = chunks(do, plan[0], q_c.dtype).mul_(scale)
    A = scores.scores().masked_fill_(masks.hidden, 0)
    dA = (do_c @ v_c.mT).masked_fill_(masks.hidden, 0)

    # The gradient of the state is carried from the last chunk to the first.
    read = masked(scores.read, masks.reads)
    write = masked(scores.write, masks.writes)
    decay = masked(scores.decay, masks.keeps).mT
    dread = (q_c * read).mT @ do_c
    dstates = carried(dread, decay, dfinal.reshape(-1, *dfinal.shape[2:]), back=True)
    dleaving = dstates[:, 1:]

    dv = A.mT @ do_c
    dv += (k_c * write) @ dleaving

    # A_ii does not depend on the gates. Without it in the terms below, dg suffers no
    # cancellation.
    dA_diagonal = dA.diagonal(dim1=-2, dim2=-1).clone().unsqueeze(-1)
    dA.diagonal(dim1=-2, dim2=-1).zero_()
    dq, dk = scores.backward(dA)
    dk_write = (v_c @ dleaving.mT).mul_(write)
    dq += (do_c @ states[:, :-1].mT).mul_(read)

    # g_t occurs in exp(G_i - G_j) for j < t <= i. So dg sums over tokens from t on (pairs and
    # reads), over tokens before t (writes), and over the state that passes through the chunk.
    dg = q_c * dq
    dg -= k_c * dk
    dg = masks.pairs.mT @ dg
    dg += masks.pairs.tril(-1) @ (k_c * dk_write)
    dg += (states[:, :-1] * dleaving).sum(-1, keepdim=True).mul_(decay).mT

    dq += k_c * dA_diagonal
    dk += dk_write
    dk += q_c * dA_diagonal
    dh0 = None if h0 is None else dstates[:, 0].reshape(h0.shape).to(h0.dtype)
    return (
        tokens(dq, q.shape, q.dtype),
        tokens(dk, k.shape, k.dtype),
        tokens(dv, v.shape, v.dtype),
        tokens(dg, g.shape, g.dtype),
        dh0,
    )


def _chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    h0: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, T, H, V]` and the final state `[B, H, K, V]`.

    `segments` `[T]` numbers the sequences packed into one row, or is None.
    """
    result: Any = _ChunkGLA.apply(_identity, scale, h0, segments, q, k, v, g)
    return result


def gla_of(
    make: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor], cu_seqlens: Tensor | None
) -> Tensor:
    """Return GLA's output `[B, T, H, V]`, unscaled, for the q, k, v and g of `make(*given)`.

    `make` computes them by operations that autograd knows, and again in the backward pass, for
    which only `given` is kept. The first of `given` is `[B, T, ...]`.
    """
    check_sequences(given[0], None, cu_seqlens)
    segments = None if cu_seqlens is None else segments_of(cu_seqlens, given[0].shape[1])
    result: Any = _ChunkGLA.apply(make, 1.0, None, segments, *given)
    o: Tensor = result[0]
    return o


# Names that these operations are used by: (module, attribute, CPU version).
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = tuple(
    (f"fla.layers.{layer}", operation.__name__, operation)
    for layer in ("gla", "hgrn2", "lightnet")
    for operation in (chunk_gla, fused_recurrent_gla)
)
