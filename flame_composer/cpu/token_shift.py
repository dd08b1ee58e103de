"""fla's token shift in plain PyTorch: the difference of each token from the one before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def starts_of(cu_seqlens: Tensor) -> Tensor:
    """Return where the sequences begin that are not empty."""
    return cu_seqlens[:-1][cu_seqlens.diff() > 0].long()


def _firsts(cu_seqlens: Tensor | None) -> tuple[Any, ...]:
    """Return the index of each sequence's first token in a tensor `[B, T, D]`."""
    return (slice(None), 0) if cu_seqlens is None else (0, starts_of(cu_seqlens))


def token_shift_fwd(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    chunk_indices: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, int, int, bool, Tensor | None]:
    """Return x_{t-1} - x_t, and what fla keeps for the backward pass.

    The token before a sequence's first one is that of `cache` `[N, D]`, or 0. With `output_cache`,
    the last thing returned is each sequence's last token.
    """
    y = x.neg()
    y[:, 1:] += x[:, :-1]
    firsts = _firsts(cu_seqlens)
    y[firsts] = -x[firsts]
    if cache is not None:
        kept = cache if cu_seqlens is None else cache[cu_seqlens.diff() > 0]
        y[firsts] += kept.to(y.dtype)
    last = None
    if output_cache:
        last = x[:, -1].clone() if cu_seqlens is None else x[0, cu_seqlens[1:].long() - 1]
    num_sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return y, num_sequences, x.shape[1], True, last


def token_shift_bwd(
    dy: Tensor,
    N: int,
    T: int,  # noqa: ARG001
    dcache: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_short_kernel: bool = True,  # noqa: ARG001
    has_init_cache: bool = False,
    chunk_indices: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and of the cache; `dcache` is that of the last tokens."""
    dx = dy.neg()
    following = dy[:, 1:].clone()
    if cu_seqlens is not None:
        borders = starts_of(cu_seqlens)
        following[:, borders[borders > 0] - 1] = 0
    dx[:, :-1] += following
    if dcache is not None:
        lasts = (slice(None), -1) if cu_seqlens is None else (0, cu_seqlens[1:].long() - 1)
        dx[lasts] += dcache
    if not has_init_cache:
        return dx, None
    if cu_seqlens is None:
        return dx, dy[:, 0].clone()
    first = torch.zeros(N, dy.shape[2], dtype=dy.dtype, device=dy.device)
    first[cu_seqlens.diff() > 0] = dy[0, starts_of(cu_seqlens)]
    return dx, first


# (module, attribute, CPU version)
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.modules.token_shift", "token_shift_fwd", token_shift_fwd),
    ("fla.modules.token_shift", "token_shift_bwd", token_shift_bwd),
)
