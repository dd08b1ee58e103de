"""Sequences cut into chunks of tokens, and sequences packed into one row.

Shapes: B batch, T tokens, H heads, D channels, N sequences, C tokens in a chunk, n chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_composer.cpu.linear import product

# Tokens of all rows that are computed at a time. Buffers for many more are larger than caches, and
# than what the allocator keeps (32 MB): all their pages would be mapped anew in every operation.
TOKENS_AT_A_TIME = 1024
MIN_PIECE = 64
# With more multiplications, one product takes oneDNN less time than MKL, with all its calls.
MIN_WIDE_PRODUCT = 1 << 22


def check_sequences(x: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError unless offsets and initial states fit x, `[B, T, ...]`."""
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(
                f"cu_seqlens needs batch size 1, got {x.shape[0]}; flatten the batch into one row"
            )
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if (first, last) != (0, x.shape[1]):
            raise ValueError(f"cu_seqlens must run from 0 to T={x.shape[1]}, got {first} to {last}")
    num_sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if h0 is not None and h0.shape[0] != num_sequences:
        raise ValueError(
            f"{num_sequences} sequences need one initial state each, got {h0.shape[0]}"
        )


def one_token_each(x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Return whether every sequence of x, `[B, T, ...]`, has one token, as in decoding."""
    num_sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return x.shape[0] * x.shape[1] == num_sequences


def transposed(state: Tensor, state_v_first: bool) -> Tensor:
    return state.transpose(-1, -2) if state_v_first else state


class Rows:
    """A mapping between sequences packed into one row and one zero-padded row for each.

    A token whose keys, values and gates are all zero leaves the state as it is, so padding at the
    end of a row changes no output and no final state.
    """

    def __init__(self, cu_seqlens: Tensor):
        lengths = cu_seqlens.diff()
        position = torch.arange(int(lengths.max()), device=cu_seqlens.device)
        self.is_token = position < lengths[:, None]
        self.index = torch.where(self.is_token, cu_seqlens[:-1, None] + position, 0)

    def split(self, x: Tensor) -> Tensor:
        """Give each sequence its own row: `[1, T, ...] -> [N, longest, ...]`."""
        mask = self.is_token.view(*self.is_token.shape, *(1 for _ in x.shape[2:]))
        return torch.where(mask, x[0][self.index], 0)

    def join(self, x: Tensor) -> Tensor:
        """Pack the sequences into one row again: `[N, longest, ...] -> [1, T, ...]`."""
        return x[self.is_token].unsqueeze(0)


def segments_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Return the number of each token's sequence, `[T]`."""
    lengths = cu_seqlens.diff().long()
    ids = torch.arange(len(lengths), device=cu_seqlens.device)
    return ids.repeat_interleave(lengths, output_size=num_tokens)


def chunks(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Cut into zero-padded chunks of `size` tokens: `[B, T, H, D] -> [B * H, n, C, D]`."""
    B, T, H, D = x.shape
    x = x.to(dtype).transpose(1, 2)
    if T % size:
        x = F.pad(x, (0, 0, 0, size - T % size))
    return x.reshape(B * H, -1, size, D)


def tokens(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Undo `chunks`: `[B * H, n, C, D] -> [B, T, H, D]`."""
    B, T, H, _ = shape
    x = x.unflatten(0, (B, H)).permute(0, 2, 3, 1, 4).flatten(1, 2)
    return x[:, :T].to(dtype).contiguous()


def pieces(num_rows: int, num_tokens: int) -> list[tuple[int, int]]:
    """Return where the pieces of a row begin and end that are computed one after another.

    All begin at a multiple of MIN_PIECE tokens, and have as many unless the row is shorter.
    """
    size = max(MIN_PIECE, TOKENS_AT_A_TIME // num_rows // MIN_PIECE * MIN_PIECE)
    starts = list(range(0, max(1, num_tokens - size + 1), size))
    return list(zip(starts, [*starts[1:], num_tokens], strict=True))


def part(given: Sequence[Tensor | None], start: int, end: int) -> list[Tensor | None]:
    """Return the tokens from `start` to `end` of all tensors.

    Those of three dimensions or more hold tokens, `[B, T, ...]`, or several steps for each token of
    the first one, `[B, T * steps, ...]`. Those of fewer are parameters, and returned as they are.
    """
    first = given[0]
    assert first is not None

    def cut(x: Tensor | None) -> Tensor | None:
        if x is None or x.dim() < 3:
            return x
        steps = x.shape[1] // first.shape[1]
        return x[:, start * steps : end * steps]

    return [cut(x) for x in given]


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the gradient of a tensor from those of its pieces; see `part` for what has pieces."""
    found = [x for x in parts if x is not None]
    if len(found) < 2:
        return found[0] if found else None
    return torch.stack(found).sum(0) if found[0].dim() < 3 else torch.cat(found, 1)


def carried(step: Tensor, decay: Tensor | None, first: Tensor | None, *, back: bool) -> Tensor:
    """Return S_0 = first and S_{i+1} = decay_i * S_i + step_i, `[M, n + 1, K, V]`.

    With `back`, the same from the last to the first: S_n = first, S_i = decay_i S_{i+1} + step_i.
    The decay `[M or 1, n, K or 1, V / r]` is repeated r times for neighbouring columns; None is 1.
    """
    M, n, K, V = step.shape
    states = step.new_empty(M, n + 1, K, V)
    states[:, n if back else 0] = 0 if first is None else first
    if decay is not None and decay.shape[-1] > 1:
        decay = decay.repeat_interleave(V // decay.shape[-1], -1)
    for i in range(n - 1, -1, -1) if back else range(n):
        before, after = (i + 1, i) if back else (i, i + 1)
        if decay is None:
            torch.add(step[:, i], states[:, before], out=states[:, after])
        else:
            torch.addcmul(step[:, i], states[:, before], decay[:, i], out=states[:, after])
    return states


def products(x: Tensor, y: Tensor) -> Tensor:
    """Return x @ y for x `[M, n, ...]` and y `[M, n, ...]`, one by one if they are large.

    oneDNN, which takes one at a time, is faster then.
    """
    if x.shape[2] * x.shape[3] * y.shape[3] < MIN_WIDE_PRODUCT:
        return x @ y
    z = x.new_empty(*x.shape[:3], y.shape[3])
    for xs, ys, zs in zip(x, y, z, strict=True):
        for a, b, c in zip(xs, ys, zs, strict=True):
            c.copy_(product(a, b.t()))
    return z


def head_products(x: Tensor, y: Tensor) -> Tensor:
    """Return x @ y for x and y `[M, n, R, ...]`, without copying the heads' columns."""
    if x.shape[2] == 1:
        return x @ y
    z = x.new_empty(*x.shape[:-1], y.shape[-1])
    for xs, ys, zs in zip(x, y, z, strict=True):
        for a, b, c in zip(xs, ys, zs, strict=True):
            torch.bmm(a, b, out=c)
    return z
