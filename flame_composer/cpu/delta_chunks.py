"""The delta rule over chunks of tokens, forwards and backwards.

For one head, with a state S `[K, V]`, log gates g_t <= 0, values v_t, and for each token a row q_t
that reads, p_t that erases, and w_t that writes:

    S_t = diag(exp g_t) S_{t-1} + w_t^T e_t      e_t = v_t - p_t diag(exp g_t) S_{t-1}
    o_t = scale * q_t S_t

DeltaNet has p = k and w = beta k (Yang et al. 2024, arXiv:2406.06484, section 3). In a chunk that S
enters, with the scores A of `delta_scores` (those of p strictly below the diagonal), the errors e
solve a triangular system; that is the WY representation:

    (I + A_pw) E = V - (P * exp G) S
    O = scale * [ (Q * exp G) S + A_qw E ]       S' = diag(exp G_C) S + (W * exp(G_C - G))^T E

Long rows are computed in pieces (`chunks.pieces`), one after another. In a piece, all but the
state's way from chunk to chunk is done for all chunks at once. The function saves only what it is
given and the states between pieces, and computes the rest again in the backward pass.

Shapes: B batch, T tokens, H heads, K key channels, V value channels, N sequences, C tokens in a
chunk, M = B * H, n = number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_composer.cpu.chunks import chunks, joined, part, pieces, tokens
from flame_composer.cpu.delta_scores import (
    MIN_BLOCK_SIZE,
    PerChannel,
    PerHead,
    Scores,
    Ungated,
    plan_blocks,
)
from flame_composer.cpu.gla_scores import Masks, masked, masks_of
from flame_composer.cpu.linear import backward_in_fp32, forward_in_fp32
from flame_composer.cpu.projections import gradients_of, leaves_of

CHUNK_SIZE = 64


class Operands(NamedTuple):
    """What the delta rule is computed from; all but the gates are floating point `[B, T, H, ...]`.

    g is `[B, T, H]` (one log gate per head), `[B, T, H, K]` (one per channel), or None.
    """

    q: Tensor  # [B, T, H, K] reads
    p: Tensor  # [B, T, H, K] erases
    w: Tensor  # [B, T, H, K] writes
    v: Tensor  # [B, T, H, V]
    g: Tensor | None
    # Whether p erases from the state before the token's own gate, which is one per head then
    erases_before: bool = False

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:5]

    def each(self, change: Callable[[Tensor], Tensor]) -> Operands:
        """Return the operands with every tensor changed."""
        q, p, w, v, g = (None if x is None else change(x) for x in self.tensors())
        assert q is not None
        assert p is not None
        assert w is not None
        assert v is not None
        return Operands(q, p, w, v, g, self.erases_before)


Prepare = Callable[..., Any]  # that returns `Operands`, or those of another rule


class Rule(NamedTuple):
    """A recurrence in chunks: a piece of a row, forwards and backwards.

    `forward(operands, scale, packed, h0)` returns the output `[B, T, H, V]` and the state after the
    piece, `[B, H, K, V]`. `backward` is also given their gradients, and returns those of the
    operands' tensors and of h0.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, ...]]


class _Chunk(NamedTuple):
    """What forward and backward need of all chunks, `[M, n, ...]` each."""

    q: Tensor  # [.., C, K], scaled
    p: Tensor  # [.., C, K]
    w: Tensor  # [.., C, K]
    scores: Scores
    masks: Masks
    A_q: Tensor  # [.., C, C]
    A_p: Tensor  # [.., C, C] strictly lower
    not_before: Tensor  # [C, C] or [n, C, C] bool, True where A_p is masked
    inverse: Tensor  # [.., C, C] of I + A_p
    erased: Tensor  # [.., C, K] inverse @ (p * exp G): what S takes from the errors
    leaving: Tensor  # [.., C, K] w as it arrives in the next state
    decay: Tensor | None  # [.., K or 1, 1]
    errors: Tensor  # [.., C, V] e
    states: Tensor  # [M, n + 1, K, V]: what enters each chunk, and the final state


def chunk_size_for(num_tokens: int) -> int:
    """Return the number of tokens in a chunk, which is smaller for short rows."""
    size = CHUNK_SIZE
    while size > MIN_BLOCK_SIZE and size // 2 >= num_tokens:
        size //= 2
    return size


def chunkwise(
    rule: Rule,
    prepare: Prepare,
    given: tuple[Tensor | None, ...],
    scale: float,
    h0: Tensor | None,
    segments: Tensor | None,
    num_steps: int,
    *,
    whole: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, T, H, V]` and the final state `[B, H, K, V]` of the delta rule.

    `prepare(*given)` returns the operands, by operations that autograd knows, with `num_steps`
    steps for each token; the output is read after the last one. `segments` `[T * num_steps]`
    numbers the sequences packed into one row, or is None. With `whole`, `prepare` needs all tokens
    at once.
    """
    first = given[0]
    assert first is not None
    B, T = first.shape[:2]
    spans = [(0, T)] if whole else pieces(B, T)
    result: Any = _ChunkDelta.apply(rule, prepare, scale, spans, num_steps, segments, h0, *given)
    return result


class Packed(NamedTuple):
    """The sequences in a piece of a packed row."""

    segments: Tensor | None  # [steps] the number of each step's sequence, or None
    before: int = -1  # that of the sequence whose state enters the piece, or -1


def _packed(segments: Tensor | None, start: int, end: int) -> Packed:
    if segments is None:
        return Packed(None)
    return Packed(segments[start:end], int(segments[start - 1]) if start else -1)


def _scores(operands: Operands, w: Tensor, masks: Masks) -> Scores:
    g, size = operands.g, w.shape[2]
    if g is None:
        return Ungated(w)
    if g.dim() == 3:
        g = chunks(g.unsqueeze(-1), size, w.dtype)
        return PerHead(w, g, masks, erases_before=operands.erases_before)
    return PerChannel(w, chunks(g, size, w.dtype), masks, *plan_blocks(g, size))


def _chunk(operands: Operands, scale: float, packed: Packed, h0: Tensor | None) -> _Chunk:
    size = chunk_size_for(operands.q.shape[1])
    dtype = torch.promote_types(operands.v.dtype, torch.float32)
    q, p, w, v = (chunks(x, size, dtype) for x in operands[:4])
    q = q * scale
    masks = masks_of(packed.segments, q.shape[1], size, q, packed.before)
    scores = _scores(operands, w, masks)
    A_q = scores.product(q, erases=False).masked_fill_(masks.hidden, 0)
    not_before = masks.hidden | torch.eye(size, dtype=torch.bool, device=w.device)
    A_p = scores.product(p, erases=True).masked_fill_(not_before, 0)
    identity = torch.eye(size, dtype=dtype, device=w.device).expand_as(A_p)
    inverse = torch.linalg.solve_triangular(A_p, identity, upper=False, unitriangular=True)
    erased = inverse @ _times(p, scores.erase, masks.reads)
    leaving = _times(w, scores.write, masks.writes)
    decay = scores.decay if scores.decay is None else scores.decay.mT
    if masks.keeps is not None:
        decay = masks.keeps if decay is None else decay * masks.keeps
    errors, states = _run(inverse @ v, erased, leaving, decay, h0)
    return _Chunk(
        q,
        p,
        w,
        scores,
        masks,
        A_q,
        A_p,
        not_before,
        inverse,
        erased,
        leaving,
        decay,
        errors,
        states,
    )


def _times(x: Tensor, factor: Tensor | None, mask: Tensor | None) -> Tensor:
    x = x if factor is None else x * factor
    return masked(x, mask)


def _run(
    errors: Tensor, erased: Tensor, leaving: Tensor, decay: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Carry the state through the chunks; return the errors, in place, and all states."""
    M, n, _, V = errors.shape
    states = errors.new_empty(M, n + 1, erased.shape[3], V)
    state = states[:, 0]
    state.copy_(torch.zeros_like(state) if h0 is None else h0.reshape(state.shape))
    for i in range(n):
        e = errors[:, i]
        e.baddbmm_(erased[:, i], state, alpha=-1)
        kept = state if decay is None else state * _at(decay, i)
        state = states[:, i + 1]
        torch.baddbmm(kept, leaving[:, i].mT, e, out=state)
    return errors, states


def _at(decay: Tensor, i: int) -> Tensor:
    return decay[i] if decay.dim() == 3 else decay[:, i]


class _ChunkDelta(torch.autograd.Function):
    @staticmethod
    @forward_in_fp32
    def forward(
        ctx: Any,
        rule: Rule,
        prepare: Prepare,
        scale: float,
        spans: list[tuple[int, int]],
        num_steps: int,
        segments: Tensor | None,
        h0: Tensor | None,
        *given: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.rule, ctx.prepare, ctx.scale = rule, prepare, scale
        ctx.spans, ctx.num_steps = spans, num_steps
        outputs, states = [], [h0]
        for start, end in spans:
            operands = prepare(*part(given, start, end))
            packed = _packed(segments, start * num_steps, end * num_steps)
            o, state = rule.forward(operands, scale, packed, states[-1])
            outputs.append(o[:, num_steps - 1 :: num_steps])
            states.append(state)
        ctx.save_for_backward(segments, *states[:-1], *given)
        final = states[-1]
        assert final is not None
        return torch.cat(outputs, 1), final

    @staticmethod
    @once_differentiable
    @backward_in_fp32
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        do = grad_outputs[0]
        dstate: Tensor | None = grad_outputs[1]
        num_spans, num_steps = len(ctx.spans), ctx.num_steps
        segments, *saved = ctx.saved_tensors
        states, given = saved[:num_spans], saved[num_spans:]
        needed = ctx.needs_input_grad[7:]
        gradients = []
        for (start, end), h0 in reversed(list(zip(ctx.spans, states, strict=True))):
            leaves = leaves_of(part(given, start, end), needed)
            with torch.enable_grad():
                operands = ctx.prepare(*leaves)
            plain = operands.each(torch.Tensor.detach)
            packed = _packed(segments, start * num_steps, end * num_steps)
            # Only the last step of a token is read.
            do_steps = F.pad(do[:, start:end].unsqueeze(2), (0, 0, 0, 0, num_steps - 1, 0))
            do_steps = do_steps.flatten(1, 2)
            *doperands, dstate = ctx.rule.backward(plain, ctx.scale, packed, h0, do_steps, dstate)
            gradients.append(gradients_of(leaves, operands.tensors(), doperands))
        found = [joined(each[::-1]) for each in zip(*gradients, strict=True)]
        return *(None,) * 6, None if states[0] is None else dstate, *found


def _run_back(c: _Chunk, derrors: Tensor, do: Tensor, dfinal: Tensor) -> Tensor:
    """Carry the state's gradient from the last chunk to the first; return all of them.

    The errors' gradients are completed in place.
    """
    dread = _times(c.q, c.scores.read, c.masks.reads).mT @ do
    dstates = torch.empty_like(c.states)
    dstates[:, -1] = dfinal.reshape(dstates[:, -1].shape)
    for i in reversed(range(dread.shape[1])):
        after, e = dstates[:, i + 1], derrors[:, i]
        e.baddbmm_(c.leaving[:, i], after)
        kept = dread[:, i]
        kept += after if c.decay is None else after * _at(c.decay, i)
        torch.baddbmm(kept, c.erased[:, i].mT, e, alpha=-1, out=dstates[:, i])
    return dstates


def _forward(
    operands: Operands, scale: float, packed: Packed, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output of a piece of a row, and the state after it."""
    c = _chunk(operands, scale, packed, h0)
    o = c.A_q @ c.errors
    o += _times(c.q, c.scores.read, c.masks.reads) @ c.states[:, :-1]
    B, _, H, K = operands.q.shape
    v = operands.v
    # A view would keep the states of all chunks alive in the model's cache.
    return tokens(o, v.shape, v.dtype), c.states[:, -1].clone().view(B, H, K, v.shape[3])


def _backward(
    operands: Operands,
    scale: float,
    packed: Packed,
    h0: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the operands and of the first state."""
    assert dfinal is not None
    c = _chunk(operands, scale, packed, h0)
    do = chunks(do, c.q.shape[2], c.q.dtype)
    states = c.states[:, :-1]
    derrors = c.A_q.mT @ do
    dstates = _run_back(c, derrors, do, dfinal)
    dv = c.inverse.mT @ derrors
    dA_p = (dv @ c.errors.mT).neg_().masked_fill_(c.not_before, 0)
    dA_q = (do @ c.errors.mT).masked_fill_(c.masks.hidden, 0)
    dq_read = _times(do @ states.mT, c.scores.read, c.masks.reads)
    dp_read = _times((dv @ states.mT).neg_(), c.scores.erase, c.masks.reads)
    dw_write = _times(c.errors @ dstates[:, 1:].mT, c.scores.write, c.masks.writes)

    # A_ii does not depend on the gates. Without it in the terms below, dg suffers no cancellation.
    diagonal = dA_q.diagonal(dim1=-2, dim2=-1).clone().unsqueeze(-1)
    dA_q.diagonal(dim1=-2, dim2=-1).zero_()
    dq, dw = c.scores.backward(c.q, dA_q, erases=False)
    dp, dw_p = c.scores.backward(c.p, dA_p, erases=True)
    dw += dw_p
    dg = None
    if not isinstance(c.scores, Ungated):
        dg = c.scores.gate_gradient(((c.A_q, dA_q), (c.A_p, dA_p)), ((c.q, dq), (c.p, dp)), dw)
        dg += _through_state(c, c.q * dq_read, c.p * dp_read, c.w * dw_write, dstates)
        dg = tokens(dg, torch.Size((*operands.q.shape[:3], dg.shape[-1])), dg.dtype)
        assert operands.g is not None
        dg = dg.view_as(operands.g).to(operands.g.dtype)
    dq.add_(dq_read).addcmul_(c.w, diagonal).mul_(scale)
    dp += dp_read
    dw.add_(dw_write).addcmul_(c.q, diagonal)
    dh0 = None if h0 is None else dstates[:, 0].reshape(h0.shape).to(h0.dtype)
    shaped = [
        tokens(dx, x.shape, x.dtype) for x, dx in zip(operands[:4], (dq, dp, dw, dv), strict=True)
    ]
    return *shaped, dg, dh0


def _through_state(
    c: _Chunk, dreads: Tensor, derased: Tensor, dwrites: Tensor, dstates: Tensor
) -> Tensor:
    """Return the part of the gates' gradient that comes by way of the state.

    g_t decays what tokens from t on read and erase, what tokens before t write, and the state that
    passes through the chunk.
    """
    decay = c.decay
    assert decay is not None
    assert not isinstance(c.scores, Ungated)
    kept = (c.states[:, :-1] * dstates[:, 1:]).sum(-1, keepdim=True).mul_(decay)
    if isinstance(c.scores, PerHead):
        dreads, derased, dwrites = (x.sum(3, keepdim=True) for x in (dreads, derased, dwrites))
        kept = kept.sum(2, keepdim=True)
    dg = c.masks.pairs.mT @ dreads
    dg += c.scores.erasing.mT @ derased
    dg += c.masks.pairs.tril(-1) @ dwrites
    return dg.add_(kept.mT)


DELTA_RULE = Rule(_forward, _backward)
