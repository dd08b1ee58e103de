"""RWKV-7's recurrence over chunks of tokens, forwards and backwards.

For one head, with a state S `[K, V]`, log gates w_t <= 0 and rows r, a, b, k and v of a token:

    S_t = diag(exp w_t) S_{t-1} + b_t^T u_t + k_t^T v_t          u_t = a_t S_{t-1}
    o_t = scale * r_t S_t

As in `delta_chunks`, with G the cumulative sum of w in a chunk that S enters, and G- the one
without the token's own gate, what each token looks up solves a triangular system:

    (I - A_ab) U = A_ak V + (A * exp G-) S
    O = scale * [ (R * exp G) S + A_rk V + A_rb U ]
    S' = diag(exp G_C) S + (K * exp(G_C - G))^T V + (B * exp(G_C - G))^T U

All four kinds of scores are one product of r and a, scaled by exp(G - c), with k and b, scaled by
exp(c - G), where c is half of the chunk's decay. So gates must not be below MIN_GATE; RWKV-7's are
above -0.61.

Shapes: B batch, T tokens, H heads, K key channels, V value channels, C tokens in a chunk,
M = B * H, n = number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flame_composer.cpu.chunks import chunks, tokens
from flame_composer.cpu.delta_chunks import CHUNK_SIZE, Packed, Rule, chunk_size_for
from flame_composer.cpu.delta_scores import MAX_DECAY
from flame_composer.cpu.gla_scores import Masks, masked, masks_of

MIN_GATE = -MAX_DECAY / CHUNK_SIZE


class Inputs(NamedTuple):
    """What the recurrence is computed from, floating point `[B, T, H, ...]` each."""

    r: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    w: Tensor  # [B, T, H, K] the log gates
    a: Tensor  # [B, T, H, K]
    b: Tensor  # [B, T, H, K]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self)

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Return the rows with every tensor changed."""
        return Inputs(*map(change, self))


class _Chunk(NamedTuple):
    """What forward and backward need of all chunks, `[M, n, ...]` each."""

    masks: Masks
    hidden: Tensor  # [2C, 2C] or [n, 2C, 2C] bool, True where the scores are masked
    rows: Tensor  # [.., 2C, K] r and a
    columns: Tensor  # [.., 2C, K] k and b
    row_factor: Tensor  # [.., 2C, K] exp(G - c) and exp(G- - c)
    column_factor: Tensor  # [.., 2C, K] exp(c - G), twice
    scaled_rows: Tensor
    scaled_columns: Tensor
    read: Tensor  # [.., 2C, K] exp(G) and exp(G-): how S decays on its way to a row
    write: Tensor  # [.., 2C, K] exp(G_C - G), twice: how a column decays on its way to S'
    leaving: Tensor  # [.., 2C, K] columns * write
    decay: Tensor  # [.., K, 1] exp(G_C)
    scores: Tensor  # [.., 2C, 2C] A_rk, A_rb; A_ak, A_ab
    inverse: Tensor  # [.., C, C] of I - A_ab
    looked_up: Tensor  # [.., C, K] inverse @ (a * exp G-): what U takes from S
    values: Tensor  # [.., 2C, V] V and U
    states: Tensor  # [M, n + 1, K, V]: what enters each chunk, and the final state


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x], -2)


def _hidden(masks: Masks, size: int) -> Tensor:
    """Return where scores are masked: those of r above the diagonal, those of a on it as well."""
    above = torch.eye(size, dtype=torch.bool, device=masks.hidden.device) | masks.hidden
    return torch.cat([torch.cat([x, x], -1) for x in (masks.hidden, above)], -2)


def _chunk(given: Inputs, scale: float, packed: Packed, h0: Tensor | None) -> _Chunk:
    size = chunk_size_for(given.r.shape[1])
    dtype = torch.promote_types(given.v.dtype, torch.float32)
    q, k, v, g, a, b = (chunks(x, size, dtype) for x in given)
    masks = masks_of(packed.segments, q.shape[1], size, q, packed.before)
    G = masks.pairs @ g
    total = G[:, :, -1:] if masks.same is None else masks.same @ g
    decay = masked(total[:, :, -1:].exp(), masks.keeps).mT
    centre = total / 2
    G -= centre
    row_factor = torch.cat([G, G - g], 2).exp_()
    column_factor = _twice(G.neg_().exp_())
    half = centre.exp_()
    half = half if masks.same is None else _twice(half)
    reads, writes = (None if x is None else _twice(x) for x in (masks.reads, masks.writes))
    read = masked(row_factor * half, reads)
    write = masked(column_factor * half, writes)
    rows, columns = torch.cat([q * scale, a], 2), torch.cat([k, b], 2)
    scaled_rows, scaled_columns = rows * row_factor, columns * column_factor
    hidden = _hidden(masks, size)
    scores = (scaled_rows @ scaled_columns.mT).masked_fill_(hidden, 0)
    A_ak, A_ab = scores[:, :, size:].split(size, -1)
    identity = torch.eye(size, dtype=dtype, device=q.device).expand_as(A_ab)
    inverse = torch.linalg.solve_triangular(-A_ab, identity, upper=False, unitriangular=True)
    looked_up = inverse @ (rows * read)[:, :, size:]
    leaving = columns * write
    values = torch.cat([v, inverse @ (A_ak @ v)], 2)
    states = _run(values, looked_up, leaving, decay, h0)
    return _Chunk(
        masks,
        hidden,
        rows,
        columns,
        row_factor,
        column_factor,
        scaled_rows,
        scaled_columns,
        read,
        write,
        leaving,
        decay,
        scores,
        inverse,
        looked_up,
        values,
        states,
    )


def _run(
    values: Tensor, looked_up: Tensor, leaving: Tensor, decay: Tensor, h0: Tensor | None
) -> Tensor:
    """Carry the state through the chunks; complete U, in place, and return all states."""
    M, n, size, V = values.shape
    states = values.new_empty(M, n + 1, leaving.shape[3], V)
    state = states[:, 0]
    state.copy_(torch.zeros_like(state) if h0 is None else h0.reshape(state.shape))
    for i in range(n):
        values[:, i, size // 2 :].baddbmm_(looked_up[:, i], state)
        kept = state * decay[:, i]
        state = states[:, i + 1]
        torch.baddbmm(kept, leaving[:, i].mT, values[:, i], out=state)
    return states


def _run_back(c: _Chunk, dvalues: Tensor, do: Tensor, dfinal: Tensor) -> Tensor:
    """Carry the state's gradient from the last chunk to the first; return all of them.

    The gradients of V and U are completed in place, but for what V takes from U.
    """
    size = do.shape[2]
    dread = (c.rows * c.read)[:, :, :size].mT @ do
    dstates = torch.empty_like(c.states)
    dstates[:, -1] = dfinal.reshape(dstates[:, -1].shape)
    for i in reversed(range(do.shape[1])):
        after, dvalue = dstates[:, i + 1], dvalues[:, i]
        dvalue.baddbmm_(c.leaving[:, i], after)
        kept = dread[:, i]
        kept.addcmul_(after, c.decay[:, i])
        torch.baddbmm(kept, c.looked_up[:, i].mT, dvalue[:, size:], out=dstates[:, i])
    return dstates


def _forward(
    given: Inputs, scale: float, packed: Packed, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, T, H, V]` of a piece of a row, and the state after it."""
    c = _chunk(given, scale, packed, h0)
    size = c.inverse.shape[2]
    o = c.scores[:, :, :size] @ c.values
    o += (c.rows * c.read)[:, :, :size] @ c.states[:, :-1]
    B, _, H, K = given.r.shape
    # A view would keep the states of all chunks alive in the model's cache.
    final = c.states[:, -1].clone().view(B, H, K, given.v.shape[3])
    return tokens(o, given.v.shape, given.v.dtype), final


def _backward(
    given: Inputs, scale: float, packed: Packed, h0: Tensor | None, do: Tensor, dfinal: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the rows and of the first state."""
    c = _chunk(given, scale, packed, h0)
    size = c.inverse.shape[2]
    do = chunks(do, size, c.rows.dtype)
    dvalues = c.scores[:, :, :size].mT @ do
    dstates = _run_back(c, dvalues, do, dfinal)
    # What goes into the triangular system gets the gradient of U by its transpose.
    douts = torch.cat([do, c.inverse.mT @ dvalues[:, :, size:]], 2)
    dv = dvalues[:, :, :size]
    dv += c.scores[:, :, size:, :size].mT @ douts[:, :, size:]
    dscores = (douts @ c.values.mT).masked_fill_(c.hidden, 0)
    dreads = (douts @ c.states[:, :-1].mT).mul_(c.read)
    dwrites = (c.values @ dstates[:, 1:].mT).mul_(c.write)

    # r_t k_t and r_t b_t do not depend on the gates. Without them, dg suffers no cancellation.
    own = dscores[:, :, :size].unflatten(-1, (2, size)).diagonal(dim1=2, dim2=4)
    at_k, at_b = own.clone().unsqueeze(-1).unbind(2)
    own.zero_()
    drows = (dscores @ c.scaled_columns).mul_(c.row_factor).add_(dreads)
    dcolumns = (dscores.mT @ c.scaled_rows).mul_(c.column_factor)
    dg = _gate_gradient(c, drows, dcolumns, dwrites, dstates)
    dcolumns += dwrites
    (q, _), (k, b) = (x.split(size, 2) for x in (c.rows, c.columns))
    (dq, da), (dk, db) = (x.split(size, 2) for x in (drows, dcolumns))
    dq.addcmul_(k, at_k).addcmul_(b, at_b).mul_(scale)
    dk.addcmul_(q, at_k)
    db.addcmul_(q, at_b)
    shaped = [
        tokens(dx, x.shape, x.dtype) for x, dx in zip(given, (dq, dk, dv, dg, da, db), strict=True)
    ]
    return *shaped, None if h0 is None else dstates[:, 0].reshape(h0.shape).to(h0.dtype)


def _gate_gradient(
    c: _Chunk, drows: Tensor, dcolumns: Tensor, dwrites: Tensor, dstates: Tensor
) -> Tensor:
    """Return the gradient of the gates, `[M, n, C, K]`.

    g_t decays what r reads from token t on and what a looks up after it, what tokens before t
    write, and the state that passes through the chunk.
    """
    read, looked_up = (c.rows * drows).chunk(2, 2)
    written_k, written_b = (c.columns * dcolumns).chunk(2, 2)
    left_k, left_b = (c.columns * dwrites).chunk(2, 2)
    strictly = c.masks.pairs.tril(-1)
    dg = c.masks.pairs.mT @ (read - written_k).sub_(written_b)
    dg += strictly.mT @ looked_up
    dg += strictly @ (left_k + left_b)
    kept = (c.states[:, :-1] * dstates[:, 1:]).sum(-1, keepdim=True).mul_(c.decay)
    return dg.add_(kept.mT)


ONE_STEP = Rule(_forward, _backward)
