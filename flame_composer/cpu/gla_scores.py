"""The parts of a GLA chunk: the scores of its tokens, the masks, and the cumulative gates."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Masks(NamedTuple):
    """Masks of the tokens in each chunk, for sequences packed into one row.

    If each row is one sequence, all but `pairs` and `hidden` are None, and these two are [C, C].
    """

    pairs: Tensor  # [n, C, C] 1 if j <= i and both tokens are of the same sequence
    hidden: Tensor  # [n, C, C] bool, True where `pairs` is 0
    same: Tensor | None  # [n, C, C] 1 if both tokens are of the same sequence
    reads: Tensor | None  # [n, C, 1] 1 if the token's sequence enters the chunk: it reads S
    writes: Tensor | None  # [n, C, 1] 1 if the token's sequence is the chunk's last: it writes S'
    # [n, 1, 1] 1 if the sequence that enters the chunk is also its last: S survives
    keeps: Tensor | None


def masks_of(
    segments: Tensor | None, num_chunks: int, size: int, like: Tensor, before: int = -1
) -> Masks:
    """Return the masks for chunks of `size` tokens, with the dtype and device of `like`.

    `segments` [T] numbers the sequences packed into one row; None if each row is one sequence.
    `before` is the number of the sequence whose state enters the first chunk, or -1.
    """
    causal = like.new_ones(size, size).tril()
    if segments is None:
        return Masks(causal, causal == 0, None, None, None, None)
    padding = num_chunks * size - len(segments)
    ids = torch.cat([segments, segments[-1:].expand(padding)]).view(num_chunks, size)
    entering = F.pad(ids[:-1, -1:], (0, 0, 1, 0), value=before)
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
    """Sum each `group` of neighbouring tokens: `[B, T, H, K] -> [B, T / group, H, K]`."""
    return F.pad(g, (0, 0, 0, 0, 0, -g.shape[1] % group)).unflatten(1, (-1, group)).sum(2)


def cumulative(g: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
    """Return G and, for each token, G_C, both summed within the token's own sequence.

    They are products with a mask instead of cumsum, so that not even the rounding of a sequence
    depends on its neighbours.
    """
    G = masks.pairs.to(g.dtype) @ g
    return G, G[:, :, -1:] if masks.same is None else masks.same.to(g.dtype) @ g


class FastScores:
    """Scores computed by one matrix product.

    A_ij = (q_i exp(G_i - r)) . (k_j exp(r - G_j)) with r = G_C / 2. Above the diagonal the product
    may overflow to inf; those entries are masked.
    """

    def __init__(self, q: Tensor, k: Tensor, g: Tensor, masks: Masks):
        G, total = cumulative(g, masks)
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
        """Return the gradients of q and k; `dA` must be zero where the scores are masked."""
        return (dA @ self.k).mul_(self.q_factor), (dA.mT @ self.q).mul_(self.k_factor)


class ExactScores:
    """Scores computed column by column, with exponents that are <= 0 for any gates.

    A_ij = sum_k q_ik k_jk exp(G_ik - G_jk).
    """

    def __init__(self, q: Tensor, k: Tensor, g: Tensor, masks: Masks):
        # A difference of two sums in the thousands would lose float32's digits, hence float64.
        self.G, total = cumulative(g.double(), masks)
        self.q, self.k = q, k
        self.decay = total[:, :, -1:].exp().to(q.dtype)
        self.read = self.G.exp().to(q.dtype)
        self.write = (total - self.G).exp().to(q.dtype)

    def _column(self, j: int) -> Tensor:
        # Positive only for pairs of different sequences, which are masked.
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
    """Return `x * mask`, or `x` itself if the mask is None."""
    return x if mask is None else x * mask


Scores = FastScores | ExactScores
