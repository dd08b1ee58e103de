"""fla's rotary position embedding in plain PyTorch, for tensors on a CPU."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor

TABLE_STEP = 256  # positions that a table of angles grows by


def keep_rotary_tables(rotary: Any) -> None:
    """Make fla's RotaryEmbedding compute its tables for more positions than it is asked for.

    The angles of a position do not depend on how many there are, unless the embedding scales them.

    Upstream: fla 0.5.2, `RotaryEmbedding._update_cos_sin_cache`.
    Mends: each token that is decoded computes the tables of all positions before it anew.
    """
    original = rotary._update_cos_sin_cache
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def update(self: Any, seqlen: int, *args: Any, **kwargs: Any) -> None:
        if self.scale is None and seqlen > self._seq_len_cached:
            seqlen = -(-seqlen // TABLE_STEP) * TABLE_STEP
        original(self, seqlen, *args, **kwargs)

    rotary._update_cos_sin_cache = update


def _positions(x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return each token's position in its own sequence, shifted by the offsets: [B or 1, T]."""
    tokens = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    if cu_seqlens is None:
        shifts = seqlen_offsets
        return tokens + (shifts.unsqueeze(1) if isinstance(shifts, Tensor) else shifts)
    starts = cu_seqlens[:-1].long()
    return tokens + (seqlen_offsets - starts).repeat_interleave(
        cu_seqlens.diff().long(), output_size=x.shape[1]
    )


def rotary_embedding_fwdbwd(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
    chunk_indices: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    """Rotate the first 2 R channels of x `[B, T, H, D]` by the angles of each token's position.

    The tables `cos` and `sin` are `[positions, R]`. A pair of channels that turns together is i and
    R + i, or 2 i and 2 i + 1 if `interleaved`; `conjugate` turns them back, for the gradient.
    Each of the N sequences (rows, or what `cu_seqlens` packs into one) starts at its
    `seqlen_offsets`. Tokens whose position is not in the tables become 0 in these channels (and
    keep what they are with `inplace`), as in fla's kernel.
    """
    R = cos.shape[1]
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    is_known = (positions >= 0) & (positions < len(cos))
    all_known = bool(is_known.all())
    index = positions if all_known else positions.clamp(0, len(cos) - 1)
    cos_t, sin_t = (table[index].unsqueeze(2).float() for table in (cos, sin))
    if conjugate:
        sin_t = -sin_t
    y = x if inplace else torch.empty_like(x)
    if not inplace and x.shape[-1] > 2 * R:
        y[..., 2 * R :] = x[..., 2 * R :]
    first, second = (
        (slice(0, 2 * R, 2), slice(1, 2 * R, 2)) if interleaved else (slice(R), slice(R, 2 * R))
    )
    a, b = x[..., first].float(), x[..., second].float()
    for channels, turned in ((first, a * cos_t - b * sin_t), (second, a * sin_t + b * cos_t)):
        if not all_known:
            kept = x[..., channels] if inplace else torch.zeros_like(turned)
            turned = torch.where(is_known[..., None, None], turned, kept.to(turned.dtype))
        y[..., channels] = turned
    return y
