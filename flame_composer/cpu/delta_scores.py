"""The scores of a chunk of the delta rule: how far each token sees the writes of earlier ones.

For tokens i >= j of one sequence and rows x (queries or erasing keys),

    A_ij = sum_c x_ic w_jc exp(G_ic - G_jc)

where G is the inclusive cumulative sum of the log gates g <= 0. The three classes compute it
without gates, with one gate per head, and with one per channel. No exponent is positive, apart from
those in a block whose whole decay is small; so no gates overflow, and none loses its digits.

Shapes: M = batch * heads, n chunks, C tokens in a chunk, K key channels, s tokens in a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flame_composer.cpu.gla_scores import Masks, sums

Pairs = Sequence[tuple[Tensor, Tensor]]  # tensors, each with its gradient

MIN_BLOCK_SIZE = 16
# Inside a block, rows are scaled by exp(G - r) and columns by exp(r - G) with r half the block's
# decay: factors of at most exp(MAX_DECAY / 2), whose exponents are rounded by 4e-6 at most.
MAX_DECAY = 80.0


class Ungated:
    """Scores without gates: the state never decays."""

    read = erase = write = decay = None

    def __init__(self, w: Tensor):
        self.w = w

    def product(self, x: Tensor, *, erases: bool) -> Tensor:  # noqa: ARG002
        """Return the scores `[M, n, C, C]` of the rows x `[M, n, C, K]`, not yet masked."""
        return x @ self.w.mT

    def backward(
        self,
        x: Tensor,
        dA: Tensor,
        *,
        erases: bool,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and w; `dA` must be zero where the scores are masked."""
        return dA @ self.w, dA.mT @ x


class PerHead:
    """Scores with one gate per head, `[M, n, C, 1]`: exp(G_i - G_j) weighs plain products.

    Each difference is summed by itself, so that large sums do not cost the digits of small ones.
    With `erases_before`, a token's own gate does not weigh what it erases: G_{i-1} is in place of
    G_i there.
    """

    def __init__(self, w: Tensor, g: Tensor, masks: Masks, *, erases_before: bool):
        self.w, self.masks = w, masks
        self.earlier = w.new_ones(w.shape[2], w.shape[2]).tril(-1)
        self.read, self.write, self.decay = _decays(g, masks)
        self.weights = (masks.pairs @ (g * self.earlier)).exp_()
        self.erasing, self.erase, self.erasing_weights = masks.pairs, self.read, self.weights
        if erases_before:
            self.erasing = masks.pairs.tril(-1)
            self.erase = (self.erasing @ g).exp_()
            self.erasing_weights = (self.erasing @ (g * self.earlier)).exp_()

    def product(self, x: Tensor, *, erases: bool) -> Tensor:
        """Return the scores `[M, n, C, C]` of the rows x `[M, n, C, K]`, not yet masked."""
        return (x @ self.w.mT).mul_(self.erasing_weights if erases else self.weights)

    def backward(self, x: Tensor, dA: Tensor, *, erases: bool) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and w; `dA` must be zero where the scores are masked."""
        dA = dA * (self.erasing_weights if erases else self.weights)
        return dA @ self.w, dA.mT @ x

    def gate_gradient(self, scores: Pairs, rows: Pairs, dw: Tensor) -> Tensor:  # noqa: ARG002
        """Return the gates' gradient for the gradients of scores, of rows and of w.

        g_t decays the pairs j < t <= i.
        """
        (A_q, dA_q), (A_p, dA_p) = scores
        dg = self.masks.pairs.mT @ (A_q * dA_q)
        dg += self.erasing.mT @ (A_p * dA_p)
        return dg.mul_(self.earlier).sum(-1, keepdim=True)


class PerChannel:
    """Scores with a gate per key channel, `[M, n, C, K]`.

    The chunk is halved until the decay of a block is below MAX_DECAY. Pairs in different halves
    meet at the boundary: their exponents are sums from there, and <= 0. Pairs in one block take the
    scaled product of `_Block`, or, if even the smallest block decays too much, `_ExactBlock`.
    """

    def __init__(self, w: Tensor, g: Tensor, masks: Masks, size: int, exact: bool):
        self.read, self.write, self.decay = _decays(g, masks)
        self.erase, self.erasing = self.read, masks.pairs
        self.w, self.masks, self.size = w, masks, size
        self.halves = []
        half = w.shape[2] // 2
        while half >= size:
            self.halves.append(_Halves(w, g, half))
            half //= 2
        self.block = _ExactBlock(w, g, size) if exact else _Block(w, g, masks, size)

    def product(self, x: Tensor, *, erases: bool) -> Tensor:  # noqa: ARG002
        """Return the scores `[M, n, C, C]` of the rows x `[M, n, C, K]`, not yet masked."""
        block = self.block.product(x)
        if not self.halves:
            return block.squeeze(2)
        A = x.new_zeros(*x.shape[:3], x.shape[2])
        _blocks(A, self.size).copy_(block)
        for halves in self.halves:
            _lower(A, halves.size).copy_(halves.product(x))
        return A

    def backward(
        self,
        x: Tensor,
        dA: Tensor,
        *,
        erases: bool,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and w; `dA` must be zero where the scores are masked."""
        dx, dw = self.block.backward(x, _blocks(dA, self.size))
        dx, dw = dx.flatten(2, 3), dw.flatten(2, 3)
        for halves in self.halves:
            dx_half, dw_half = halves.backward(x, _lower(dA, halves.size))
            dx.unflatten(2, (-1, 2, halves.size))[:, :, :, 1] += dx_half
            dw.unflatten(2, (-1, 2, halves.size))[:, :, :, 0] += dw_half
        return dx, dw

    def gate_gradient(self, scores: Pairs, rows: Pairs, dw: Tensor) -> Tensor:  # noqa: ARG002
        """Return the gates' gradient for the gradients of scores, of rows and of w.

        Each row carries exp(G_i) and each column exp(-G_j), and g_t is part of G from t on.
        """
        (q, dq), (p, dp) = rows
        return self.masks.pairs.mT @ (q * dq).addcmul_(p, dp).addcmul_(self.w, dw, value=-1)


class _Halves:
    """Scores of the second `size` tokens of each `2 * size` with the first."""

    def __init__(self, w: Tensor, g: Tensor, size: int):
        self.size = size
        first, second = g.unflatten(2, (-1, 2, size)).unbind(3)
        ones = g.new_ones(size, size)
        self.row_factor = (ones.tril() @ second).exp_()
        self.column_factor = (ones.triu(1) @ first).exp_()
        self.w = w.unflatten(2, (-1, 2, size))[:, :, :, 0] * self.column_factor

    def _rows(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, 2, self.size))[:, :, :, 1] * self.row_factor

    def product(self, x: Tensor) -> Tensor:
        return self._rows(x) @ self.w.mT

    def backward(self, x: Tensor, dA: Tensor) -> tuple[Tensor, Tensor]:
        dw = (dA.mT @ self._rows(x)).mul_(self.column_factor)
        return (dA @ self.w).mul_(self.row_factor), dw


class _Block:
    """Scores inside blocks of `size` tokens, by one product of scaled rows and columns.

    Above the diagonal it may overflow to inf; those entries are masked.
    """

    def __init__(self, w: Tensor, g: Tensor, masks: Masks, size: int):
        g = g.unflatten(2, (-1, size))
        G = _blocks(masks.pairs, size) @ g
        total = G[..., -1:, :] if masks.same is None else _blocks(masks.same, size) @ g
        G -= total / 2
        self.row_factor = G.exp()
        self.column_factor = G.neg_().exp_()
        self.size = size
        self.w = w.unflatten(2, (-1, size)) * self.column_factor

    def _rows(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.size)) * self.row_factor

    def product(self, x: Tensor) -> Tensor:
        return self._rows(x) @ self.w.mT

    def backward(self, x: Tensor, dA: Tensor) -> tuple[Tensor, Tensor]:
        dw = (dA.mT @ self._rows(x)).mul_(self.column_factor)
        return (dA @ self.w).mul_(self.row_factor), dw


class _ExactBlock:
    """Scores inside blocks of `size` tokens, column by column, for gates of any size."""

    def __init__(self, w: Tensor, g: Tensor, size: int):
        self.size = size
        self.w, self.g = (x.unflatten(2, (-1, size)) for x in (w, g))

    def _columns(self) -> list[Tensor]:
        """Return exp(G_i - G_j) for i >= j, column j by column: `[M, n, C / s, s - j, K]`.

        The sums grow from the diagonal on, so that no difference of large numbers is taken.
        """
        sums_below = torch.zeros_like(self.g[:, :, :, -1:])
        columns = [sums_below.exp()]
        for j in reversed(range(self.size - 1)):
            sums_below = sums_below + self.g[:, :, :, j + 1 : j + 2]
            sums_below = torch.cat([torch.zeros_like(sums_below[:, :, :, :1]), sums_below], 3)
            columns.append(sums_below.exp())
        return columns[::-1]

    def product(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, self.size))
        A = x.new_zeros(*x.shape[:4], self.size)
        for j, column in enumerate(self._columns()):
            rows = column.mul_(x[:, :, :, j:])
            A[..., j:, j] = (rows @ self.w[:, :, :, j].unsqueeze(-1)).squeeze(-1)
        return A

    def backward(self, x: Tensor, dA: Tensor) -> tuple[Tensor, Tensor]:
        x = x.unflatten(2, (-1, self.size))
        dx, dw = torch.zeros_like(x), torch.zeros_like(self.w)
        for j, column in enumerate(self._columns()):
            weighted = column.mul_(dA[..., j:, j].unsqueeze(-1))
            dw[:, :, :, j] = (weighted * x[:, :, :, j:]).sum(3)
            dx[:, :, :, j:] += weighted.mul_(self.w[:, :, :, j : j + 1])
        return dx, dw


def _decays(g: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """Return how the state decays to each token, each token to the next state, and the state."""
    same = torch.ones_like(masks.pairs) if masks.same is None else masks.same
    read = (masks.pairs @ g).exp_()
    write = (same.triu(1) @ g).exp_()
    return read, write, (same[..., -1:, :] @ g).exp_()


def _blocks(x: Tensor, size: int) -> Tensor:
    """Return a view of the square blocks on the diagonal: `[..., C, C] -> [..., C / s, s, s]`."""
    x = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return x.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _lower(x: Tensor, size: int) -> Tensor:
    """Return a view of the second halves' scores with the first: `[..., C / 2s, s, s]`."""
    return _blocks(x, 2 * size)[..., size:, :size]


def plan_blocks(g: Tensor, chunk_size: int) -> tuple[int, bool]:
    """Return the block size for gates g `[B, T, H, K]`, and whether blocks need the exact form."""
    totals = sums(g.to(torch.promote_types(g.dtype, torch.float32)), MIN_BLOCK_SIZE)
    size = chunk_size
    while sums(totals, size // MIN_BLOCK_SIZE).amin() <= -MAX_DECAY:
        if size == MIN_BLOCK_SIZE:
            return size, True
        size //= 2
    return size, False


Scores = Ungated | PerHead | PerChannel
