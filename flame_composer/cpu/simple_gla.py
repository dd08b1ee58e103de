"""Simple GLA, retention and linear attention under the names by which fla calls them.

All of them are `decay.chunk_simple_gla`, or the recurrence for one token of each sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flame_composer.cpu.chunks import one_token_each
from flame_composer.cpu.decay import chunk_simple_gla, recurrent_simple_gla


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    states = initial_state, output_final_state
    return chunk_simple_gla(q, k, v, g, g_gamma, scale, *states, cu_seqlens=cu_seqlens)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Stand in for what fla calls for T <= 64: the recurrence only if it is the faster form."""
    if reverse:
        raise NotImplementedError("on a CPU, attention runs only forwards (reverse=False)")
    run = recurrent_simple_gla if one_token_each(q, cu_seqlens) else chunk_simple_gla
    states = initial_state, output_final_state, state_v_first
    return run(q, k, v, g, g_gamma, scale, *states, cu_seqlens)


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, None]:
    if output_attentions:
        raise NotImplementedError("on a CPU, the scores of all tokens are never held at once")
    return chunk_simple_gla(q, k, v, g, scale=scale, cu_seqlens=cu_seqlens)[0], None


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute retention, whose head h forgets 2^(-5 - h) of its state with each token."""
    heads = torch.arange(q.shape[2], dtype=torch.float, device=q.device)
    g_gamma = (1 - torch.exp2(-5 - heads)).log()
    states = initial_state, output_final_state
    return chunk_simple_gla(q, k, v, None, g_gamma, scale, *states, cu_seqlens=cu_seqlens)


def chunk_global_cumsum(
    s: Tensor,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    head_first: bool = False,
    output_dtype: torch.dtype | None = torch.float,
) -> Tensor:
    """Sum s over the tokens of each sequence up to each token, or from it on with `reverse`."""
    if head_first:
        raise NotImplementedError("on a CPU, sums run over tokens in dimension 1")
    lengths = [s.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    sums = []
    for piece in s.to(torch.promote_types(s.dtype, torch.float32)).split(lengths, 1):
        sums.append(piece.flip(1).cumsum(1).flip(1) if reverse else piece.cumsum(1))
    total = torch.cat(sums, 1)
    return (total if scale is None else total * scale).to(output_dtype or s.dtype)


# (module, attribute, CPU version)
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.simple_gla", "chunk_simple_gla", chunk_simple_gla),
    ("fla.layers.simple_gla", "fused_recurrent_simple_gla", fused_recurrent_simple_gla),
    ("fla.layers.multiscale_retention", "chunk_retention", chunk_retention),
    ("fla.ops.retention.fused_chunk", "fused_chunk_simple_gla", fused_chunk_simple_gla),
    ("fla.ops.retention.fused_recurrent", "fused_recurrent_simple_gla", fused_recurrent_simple_gla),
    ("fla.ops.retention.parallel", "parallel_simple_gla", parallel_simple_gla),
    ("fla.ops.linear_attn.chunk", "chunk_simple_gla", chunk_simple_gla),
    ("fla.ops.linear_attn.fused_chunk", "fused_chunk_simple_gla", fused_chunk_simple_gla),
    (
        "fla.ops.linear_attn.fused_recurrent",
        "fused_recurrent_simple_gla",
        fused_recurrent_simple_gla,
    ),
    ("fla.ops.linear_attn.utils", "chunk_global_cumsum", chunk_global_cumsum),
)
