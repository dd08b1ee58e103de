"""What ranks pass on to one another that hold consecutive parts of the same row.

A recurrence S_t = A_t S_{t-1} + k_t^T v_t goes on from one part to the next by a state of fixed
size. Each rank computes, from its own tokens, what it writes into the state (W, from a state of 0)
and the product of its transitions (D); all ranks gather these, and each combines those before its
own: S = W_p + D_p S_p, part by part (the LASP-2 of Sun et al. 2025, arXiv:2502.07563, with gates
and general transitions). The bytes that are sent do not depend on how long the row is. A document
that begins in a part cuts the chain: its state begins from 0.

Gradients go the same way back, from the last part to the first. All functions here that gather take
part in the backward pass of every rank, in the same order.

Shapes: T tokens of a part, P parts, H heads, K key channels, V value channels, N documents, D
channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 4096  # tokens of which weights [BLOCK, H, K] are in memory at once


@dataclass(frozen=True)
class Division:
    """A rank's part of a row, and how the row's documents lie in all parts."""

    group: dist.ProcessGroup
    part: int
    goes_on: tuple[bool, ...]  # for each part: its first token is not the first of a document
    is_inside: tuple[bool, ...]  # for each part: no document begins in it
    offsets: Tensor  # of the documents in this part, as it cuts them off [N + 1]
    rest: Tensor  # offsets of those after the first, from the end of that [N]
    first: int  # tokens of the first document in this part
    last: int  # the place in this part of the first token of the last document
    before: int  # tokens of the first document in the parts before

    @property
    def passes(self) -> bool:
        """Whether any document goes on from one part to the next."""
        return any(self.goes_on)

    @property
    def leaves(self) -> bool:
        """Whether the last document of this part goes on in the next."""
        return self.part + 1 < len(self.goes_on) and self.goes_on[self.part + 1]


def divide(
    offsets: Tensor, group: dist.ProcessGroup, *, part: int, parts: int, length: int
) -> Division:
    """Return a part of a row of `length` tokens whose documents have these `offsets` [N + 1]."""
    size = length // parts
    starts = offsets[:-1].tolist()
    at = set(starts)
    goes_on = tuple(number * size not in at for number in range(parts))
    holders = {start // size for start in starts}
    is_inside = tuple(number not in holders for number in range(parts))
    begin, end = part * size, (part + 1) * size
    own = [0, *(start - begin for start in starts if begin < start < end), size]
    before = begin - max(start for start in starts if start <= begin)
    borders = offsets.new_tensor(own)
    return Division(
        group,
        part,
        goes_on,
        is_inside,
        borders,
        rest=borders[1:] - own[1],
        first=own[1],
        last=own[-2],
        before=before,
    )


def _in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of an autograd function compute as its tensors are, whatever is autocast."""

    @functools.wraps(method)
    def call(ctx: Any, *args: Any) -> Any:
        device = next(each for each in args if isinstance(each, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return method(ctx, *args)

    return call


def gathered(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the tensors of this shape that the ranks of a group have, in their order."""
    x = x.contiguous()
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x, group=group)
    return found


class _Entering(torch.autograd.Function):
    @staticmethod
    @_in_fp32
    def forward(
        ctx: Any, division: Division, _anchor: Tensor, written: Tensor, decay: Tensor
    ) -> Tensor:
        everything = gathered(written, division.group)
        decays = gathered(decay, division.group) if any(division.is_inside) else []
        state = torch.zeros_like(written)
        for part in range(division.part):
            leaving = everything[part]
            if division.is_inside[part]:
                leaving = leaving + _passed(decays[part], state)
            state = leaving if division.goes_on[part + 1] else torch.zeros_like(written)
        ctx.division = division
        ctx.save_for_backward(state, decay, *decays)
        return state.clone()

    @staticmethod
    @once_differentiable
    @_in_fp32
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        division: Division = ctx.division
        state, decay, *decays = ctx.saved_tensors
        everything = gathered(gradients[0], division.group)
        leaving = torch.zeros_like(state)  # the gradient of the state that leaves a part
        for part in range(len(everything) - 1, division.part, -1):
            entering = everything[part]
            if division.is_inside[part]:
                entering = entering + _passed_back(decays[part], leaving)
            leaving = entering if division.goes_on[part] else torch.zeros_like(state)
        ddecay = torch.zeros_like(decay)
        if division.is_inside[division.part]:
            is_diagonal = decay.shape[-1] == 1
            ddecay = (leaving * state).sum(-1, keepdim=True) if is_diagonal else leaving @ state.mT
        return None, None, leaving, ddecay


def _passed(decay: Tensor, state: Tensor) -> Tensor:
    return decay * state if decay.shape[-1] == 1 else decay @ state


def _passed_back(decay: Tensor, gradient: Tensor) -> Tensor:
    return decay * gradient if decay.shape[-1] == 1 else decay.mT @ gradient


def entering(division: Division, anchor: Tensor, written: Tensor, decay: Tensor) -> Tensor:
    """Return the state [H, K, V] that enters this part: 0 if a document begins with it.

    `written` is what the part's last document writes into a state [H, K, V]. `decay` is what it
    leaves of the state before, which counts only if no document begins in the part: a factor for
    each key channel [H, K, 1], or a matrix [H, K, K]. `anchor` is any tensor that needs a gradient
    whenever one of the model is computed: without it, a rank on which neither of the others does
    would not take part in the backward pass.
    """
    result: Tensor = _Entering.apply(division, anchor, written, decay)
    return result


class _Written(torch.autograd.Function):
    @staticmethod
    @_in_fp32
    def forward(ctx: Any, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(k, v, g)
        dtype = torch.promote_types(g.dtype, torch.float32)
        later = torch.zeros(k.shape[1:], dtype=dtype, device=k.device)
        written = torch.zeros(*k.shape[1:], v.shape[-1], dtype=dtype, device=k.device)
        for tokens in reversed(_blocks(len(k))):
            weight, later = _weights(g[tokens], later)
            weighted = (k[tokens] * weight.exp_()).transpose(0, 1)
            written += weighted.mT @ v[tokens].to(dtype).transpose(0, 1)
        return written, later

    @staticmethod
    @once_differentiable
    @_in_fp32
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        k, v, g = ctx.saved_tensors
        dwritten, dlater = gradients
        later = torch.zeros_like(dlater)
        blocks, laters = _blocks(len(k)), []
        for tokens in reversed(blocks):
            laters.append(later)
            later = later + g[tokens].to(later.dtype).sum(0)
        dk, dv, dg = (torch.empty_like(x) for x in (k, v, g))
        earlier = dlater  # what all tokens before add to the gradient of a gate
        for tokens, later in zip(blocks, reversed(laters), strict=True):
            weight = _weights(g[tokens], later)[0].exp_()
            k_c, v_c = (x[tokens].to(later.dtype).transpose(0, 1) for x in (k, v))
            weighted = k_c * weight.transpose(0, 1)
            dv[tokens] = (weighted @ dwritten).transpose(0, 1).to(dv.dtype)
            dk_c = (v_c @ dwritten.mT).transpose(0, 1).mul_(weight)
            dk[tokens] = dk_c.to(dk.dtype)
            sums = (dk_c * k[tokens]).cumsum(0)
            dg[tokens] = (F.pad(sums[:-1], (0, 0, 0, 0, 1, 0)) + earlier).to(dg.dtype)
            earlier = earlier + sums[-1]
        return dk, dv, dg


def _blocks(length: int) -> list[slice]:
    return [slice(at, min(at + BLOCK, length)) for at in range(0, length, BLOCK)]


def _weights(g: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the log gates after each token [T, H, K], and that of all gates.

    They are added up from the last token on: those near 0, which count, are then exact.
    """
    sums = g.to(later.dtype).flip(0).cumsum(0).flip(0)
    return F.pad(sums[1:], (0, 0, 0, 0, 0, 1)) + later, later + sums[0]


def written_by_gates(k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return what tokens write into a state with a gate for each key channel, and their log decay.

    `k` and the log gates `g` are [T, H, K], `v` is [T, H, V]: the state is [H, K, V], the sum of
    diag(exp(g_{t+1} + ... + g_T)) k_t^T v_t, and the log decay [H, K], that of all gates. Both are
    computed in fp32, in blocks of tokens, and once more in the backward pass.
    """
    result: tuple[Tensor, Tensor] = _Written.apply(k, v, g)
    return result


class _FromBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, division: Division, last: Tensor) -> Tensor:
        ctx.division = division
        everything = gathered(last, division.group)
        if not division.goes_on[division.part]:
            return torch.zeros_like(last)
        return everything[division.part - 1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        division: Division = ctx.division
        everything = gathered(gradients[0], division.group)
        if not division.leaves:
            return None, torch.zeros_like(gradients[0])
        return None, everything[division.part + 1]


def inputs_before(x: Tensor, division: Division, number: int) -> Tensor:
    """Return the `number` inputs before this part in its first document: [1, number, D].

    `x` is this part's, [1, T, D]. What was before the document is 0.
    """
    own = x[:, max(division.last, x.shape[1] - number) :]
    own = F.pad(own, (0, 0, number - own.shape[1], 0))
    result: Tensor = _FromBefore.apply(division, own)
    return result


class _WithBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, division: Division, number: int, x: Tensor) -> Tensor:
        ctx.division, ctx.number = division, number
        before = torch.cat(gathered(x, division.group)[: division.part + 1])
        return before[len(before) - len(x) - number :].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        division: Division = ctx.division
        (gradient,) = gradients
        size = len(gradient) - ctx.number
        end = (division.part + 1) * size
        whole = gradient.new_zeros(len(division.goes_on) * size, *gradient.shape[1:])
        whole[end - len(gradient) : end] = gradient
        own = torch.empty_like(gradient[ctx.number :])
        dist.reduce_scatter_tensor(own, whole, group=division.group)
        return None, None, own


def with_before(x: Tensor, division: Division, number: int) -> Tensor:
    """Return this part's `x` [T, ...] after the `number` rows of it in the parts before."""
    result: Tensor = _WithBefore.apply(division, number, x)
    return result
