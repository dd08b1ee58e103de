"""Sequences packed into one row: cut into chunks as they are, or given a row each.

Shapes: B batch, T tokens, H heads, D channels, N sequences, C tokens in a chunk, n chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_packing(num_rows: int, num_tokens: int, h0: Tensor | None, cu: Tensor | None) -> None:
    """Refuse offsets `cu` that do not cover the one row, and too few or too many first states."""
    if cu is not None:
        if num_rows != 1:
            raise ValueError(
                f"cu_seqlens needs batch size 1, got {num_rows}; flatten the batch into one row"
            )
        if int(cu[0]) != 0 or int(cu[-1]) != num_tokens:
            raise ValueError(
                f"cu_seqlens must run from 0 to T={num_tokens}, got {cu[0]:d} to {cu[-1]:d}"
            )
    num_sequences = num_rows if cu is None else len(cu) - 1
    if h0 is not None and h0.shape[0] != num_sequences:
        raise ValueError(
            f"{num_sequences} sequences need one initial state each, got {h0.shape[0]}"
        )


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
    B, T, H, D = shape
    return x.view(B, H, -1, D)[:, :, :T].transpose(1, 2).to(dtype).contiguous()
