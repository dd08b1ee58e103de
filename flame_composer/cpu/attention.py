"""Softmax attention without flash-attn, in place of the two functions of it that fla calls.

`flash_attn_func` takes rows of one length, `flash_attn_varlen_func` documents laid end to end. Both
run PyTorch's scaled_dot_product_attention, which has a fused kernel for CPUs: it never holds the
weights of all pairs of tokens. Each document is computed alone, and a sliding window in blocks of
queries with the keys they see, so the work grows with the pairs that see one another.

For CUDA tensors newer versions of torch have fused kernels themselves (`fused_flash_attn_func`,
`fused_flash_attn_varlen_func`): flash-attn's, or cuDNN's.

Shapes: B batch, T queries, S keys, H heads of the queries, G heads of keys and values (which divide
H), D channels. As in flash-attn, the last query is aligned with the last key.
"""

from __future__ import annotations

import importlib
import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What torch's fused kernels compute with
FUSED_TYPES = (torch.float16, torch.bfloat16)
# Queries of a block of a sliding window, if the window is shorter
MIN_BLOCK = 64


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Return the attention [B, T, H, D] of q [B, T, H, D] to k and v [B, S, G, D].

    A query sees the key at its place, and those before it: all of them, or `window_size[0]`. A
    query that sees none has the output 0.
    """
    window = _window(dropout_p, causal, window_size)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _attend(q, k, v, softmax_scale, window).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,  # noqa: ARG001
    max_seqlen_k: int,  # noqa: ARG001
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Return what `flash_attn_func` returns, for documents of any length laid end to end.

    q is [tokens, H, D], k and v are [tokens, G, D]; document n has the queries from
    cu_seqlens_q[n] to cu_seqlens_q[n + 1], and likewise the keys.
    """
    window = _window(dropout_p, causal, window_size)
    # The gradient of one split costs one copy; that of a slice for each document would cost one
    # copy of everything for each.
    queries = _documents(q, cu_seqlens_q)
    keys, values = _documents(k, cu_seqlens_k), _documents(v, cu_seqlens_k)
    found = [
        _attend(*document, softmax_scale, window)[0].transpose(0, 1)
        for document in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(found)


def fused_flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Return what `flash_attn_func` returns, for CUDA tensors, by a fused kernel of torch's.

    Of fp32 tensors, for which there is no such kernel, it is computed as on a CPU.

    Raises:
        NotImplementedError: as `flash_attn_func`.
    """
    if q.dtype not in FUSED_TYPES:
        return flash_attn_func(q, k, v, **options)
    (B, T), S = q.shape[:2], k.shape[1]
    of_queries = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    of_keys = torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=q.device)
    of_keys = of_queries if S == T else of_keys
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    attended = fused_flash_attn_varlen_func(q, k, v, of_queries, of_keys, T, S, **options)
    return attended.unflatten(0, (B, T))


def fused_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Return what `flash_attn_varlen_func` returns, as `fused_flash_attn_func` does.

    Needs `torch.nn.attention.varlen` with windows and grouped heads (tried with torch 2.15).

    Raises:
        NotImplementedError: as `flash_attn_func`.
    """
    borders = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if q.dtype not in FUSED_TYPES:
        options = (dropout_p, softmax_scale, causal, window_size)
        return flash_attn_varlen_func(q, k, v, *borders, *options)
    window = _window(dropout_p, causal, window_size)
    of_queries = cu_seqlens_q.int()
    # cuDNN takes the same tensor for both, or is not asked
    of_keys = of_queries if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.int()
    D = q.shape[-1]
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    # The kernels take multiples of 8 channels; zeros add nothing to a score
    q, k, v = (F.pad(x, (0, -D % 8)).contiguous() for x in (q, k, v))
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    attended: Tensor = attend(
        q,
        k,
        v,
        of_queries,
        of_keys,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=k.shape[1] < q.shape[1],
    )
    return attended[..., :D]


def has_fused() -> bool:
    """Return whether torch has the kernels of `fused_flash_attn_func`."""
    try:
        attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= inspect.signature(attend).parameters.keys()


def _window(dropout_p: float, causal: bool, window_size: tuple[int, int]) -> int | None:
    """Return how many keys a query sees, itself included, or None for all up to it."""
    if dropout_p or not causal or window_size[1] > 0:
        raise NotImplementedError(
            "without flash-attn, softmax attention is available without dropout and to earlier"
            f" tokens only: dropout_p=0, causal=True, not dropout_p={dropout_p}, causal={causal},"
            f" window_size={window_size}"
        )
    return None if window_size[0] < 0 else window_size[0] + 1


def _documents(x: Tensor, offsets: Tensor) -> list[Tensor]:
    """Return the documents in x [tokens, H, D], each as [1, H, T, D]."""
    lengths = [end - start for start, end in pairwise(offsets.tolist())]
    return [each.transpose(0, 1)[None] for each in x.split(lengths)]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Return the attention [B, H, T, D] of q [B, H, T, D] to k and v [B, G, S, D]."""
    B, H, T, D = q.shape
    S, G = k.shape[2], k.shape[1]
    blind = max(0, T - S)  # the first queries, which see no key
    if blind:
        seeing = _attend(q[:, :, blind:], k, v, scale, window)
        return torch.cat([q.new_zeros(B, H, blind, D), seeing], dim=2)
    if T == 0:
        return q
    if window is not None and window < S:
        return _in_blocks(q, k, v, scale, window)
    if T == 1:  # the queries that share a key can be rows of one product, without copies of it
        together = q.reshape(B, G, H // G, D)
        return F.scaled_dot_product_attention(together, k, v, scale=scale).reshape(B, H, 1, D)
    k, v = (x.repeat_interleave(H // G, dim=1) if G < H else x for x in (k, v))
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, _seen(T, S, None, q), scale=scale)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    """Return what `_attend` returns, for a window that is shorter than the keys."""
    T, S, size = q.shape[2], k.shape[2], max(window, MIN_BLOCK)
    if T == 1:
        return _attend(q, k[:, :, -window:], v[:, :, -window:], scale, None)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    found = []
    for start in range(0, T, size):
        rows = q[:, :, start : start + size]
        end = start + rows.shape[2] + S - T
        seen = slice(max(0, end - rows.shape[2] - window + 1), end)
        mask = _seen(rows.shape[2], end - seen.start, window, q)
        found.append(
            F.scaled_dot_product_attention(rows, k[:, :, seen], v[:, :, seen], mask, scale=scale)
        )
    return torch.cat(found, dim=2)


def _seen(num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor:
    """Return the mask [T, S] of the keys that each query sees, the last aligned with the last."""
    pairs = torch.ones(num_queries, num_keys, dtype=torch.bool, device=like.device)
    seen = pairs.tril(num_keys - num_queries)
    return seen if window is None else seen.triu(num_keys - num_queries - window + 1)
