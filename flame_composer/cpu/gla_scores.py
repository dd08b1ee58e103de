"""The scores within a chunk of GLA, who may see whom in it, and the gates added up."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Masks(NamedTuple):
    """Who may see whom within a chunk. All but the first two are None for one sequence per row."""

    pairs: Tensor  # [n, C, C] 1 where j <= i, and both are of the same sequence
    hidden: Tensor  # [n, C, C] bool, the opposite
    same: Tensor | None  # [n, C, C] 1 where both are of the same sequence
    reads: Tensor | None  # [n, C, 1] 1 where the token's sequence entered the chunk: it reads S
    writes: Tensor | None  # [n, C, 1] 1 where the token's sequence leaves the chunk: it writes S'
    # [n, 1, 1] 1 where the sequence that enters is the one that leaves: S survives
    keeps: Tensor | None


def masks_of(segments: Tensor | None, num_chunks: int, size: int, like: Tensor) -> Masks:
    causal = like.new_ones(size, size).tril()
    if segments is None:
        return Masks(causal, causal == 0, None, None, None, None)
    padding = num_chunks * size - len(segments)
    ids = torch.cat([segments, segments[-1:].expand(padding)]).view(num_chunks, size)
    entering = F.pad(ids[:-1, -1:], (0, 0, 1, 0), value=-1)
    leaving = ids[:, -1:]
    same = (ids[:, :, None] == ids[:, None, :]).to(like.dtype)
    return Masks(
        causal * same,
        causal * same == 0,
        same,
        (ids == entering).to(like.dtype).unsqueeze(-1),
        (ids == leaving).to(like.dtype).unsqueeze(-1),
        (entering == leaving).to(like.dtype).unsqueeze(-1),
    )


def sums(g: Tensor, group: int) -> Tensor:
    """`[B, T, H, K] -> [B, T / group, H, K]`, the sums of neighbours."""
    return F.pad(g, (0, 0, 0, 0, 0, -g.shape[1] % group)).unflatten(1, (-1, group)).sum(2)


def _cumulative(g: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
    """G, and the total decay at each token's end of the chunk (G_C), both within the token's own
    sequence.

    A product with the mask, not cumsum: not even the rounding of a sequence depends on its
    neighbours.
    """
    G = masks.pairs.to(g.dtype) @ g
    return G, G[:, :, -1:] if masks.same is None else masks.same.to(g.dtype) @ g


class FastScores:
    """A_ij = (q_i exp(G_i - r)) . (k_j exp(r - G_j)) with r = G_C / 2: one matrix product.

    Above the diagonal the product may overflow to inf; those entries are masked.
    """

    def __init__(self, q: Tensor, k: Tensor, g: Tensor, masks: Masks):
        G, total = _cumulative(g, masks)
        self.decay = total[:, :, -1:].exp()
        half = total / 2
        G -= half
        half.exp_()
        self.q_factor = G.exp()
        self.k_factor = G.neg_().exp_()
        self.q, self.k = q * self.q_factor, k * self.k_factor
        self.read = self.q_factor * half  # exp(G): how S decays on its way to a token
        self.write = self.k_factor * half  # exp(G_C - G): how a token decays on its way to S'

    def scores(self) -> Tensor:
        return self.q @ self.k.mT

    def backward(self, dA: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients to q and k of the scores, for dA that is zero where the scores are masked."""
        return (dA @ self.k).mul_(self.q_factor), (dA.mT @ self.q).mul_(self.k_factor)


class ExactScores:
    """A_ij = sum_k q_ik k_jk exp(G_ik - G_jk), column by column: every exponent is <= 0, for any
    gates.
    """

    def __init__(self, q: Tensor, k: Tensor, g: Tensor, masks: Masks):
        # float64, since a difference of two sums in the thousands would lose float32's digits.
        self.G, total = _cumulative(g.double(), masks)
        self.q, self.k = q, k
        self.decay = total[:, :, -1:].exp().to(q.dtype)
        self.read = self.G.exp().to(q.dtype)
        self.write = (total - self.G).exp().to(q.dtype)

    def _column(self, j: int) -> Tensor:
        # Below zero but for pairs of different sequences, which are masked.
        return (self.G[:, :, j:] - self.G[:, :, j : j + 1]).clamp_(max=0).to(self.q.dtype).exp_()

    def scores(self) -> Tensor:
        A = self.q.new_zeros(*self.q.shape[:3], self.q.shape[2])
        for j in range(A.shape[-1]):
            A[..., j:, j] = (
                (self.q[:, :, j:] * self._column(j)) @ self.k[:, :, j].unsqueeze(-1)
            ).squeeze(-1)
        return A

    def backward(self, dA: Tensor) -> tuple[Tensor, Tensor]:
        dq, dk = torch.zeros_like(self.q), torch.zeros_like(self.k)
        for j in range(dA.shape[-1]):
            weighted = self._column(j).mul_(dA[..., j:, j].unsqueeze(-1))
            dk[:, :, j] = (weighted * self.q[:, :, j:]).sum(2)
            dq[:, :, j:] += weighted.mul_(self.k[:, :, j : j + 1])
        return dq, dk


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


Scores = FastScores | ExactScores
