"""RWKV-7 in plain PyTorch.

Peng et al. 2025 (arXiv:2503.14456). For one head, with rows r, a, b, k and values v of a token and
log gates w in [-0.61, 0):

    S_t = diag(exp w_t) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t        o_t = scale * r_t S_t

`rwkv7_chunks` computes it. Few tokens, and gates far below RWKV-7's, take two steps of the delta
rule for each token: the first decays the state and erases by -a_t exp(-w_t), so that the state
before the decay is looked up; the second one writes k_t^T v_t.

Each function stands in for fla's function of that name (0.5.2) and has the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flame_composer.cpu.delta_chunks import Operands
from flame_composer.cpu.delta_inputs import delta_rule
from flame_composer.cpu.rwkv7_chunks import MIN_GATE, ONE_STEP, Inputs


def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
    safe_gate: bool = False,  # noqa: ARG001
    chunk_size: int | None = None,  # noqa: ARG001
    disable_recompute: bool = False,  # noqa: ARG001
    cp_context: Any = None,
    lower_bound: float | None = None,  # noqa: ARG001 - fla 0.6
    *,
    recurrent: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute RWKV-7 over chunks: r, w, k, a, b `[B, T, H, K]`, v `[B, T, H, V]`.

    States are `[N, H, K, V]`.
    """
    if cp_context is not None:
        raise NotImplementedError("on a CPU, RWKV-7 has no context parallelism")
    given = (r, k, v, w, a, b), scale, initial_state, output_final_state, False, cu_seqlens
    if recurrent or bool(w.amin() < MIN_GATE):
        return delta_rule(two_steps, *given, recurrent=recurrent, num_steps=2)
    return delta_rule(Inputs, *given, rule=ONE_STEP)


def fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute RWKV-7 with -kk in place of a, and kk * a in place of b; one token by the recurrence.

    fla calls it for T < 64 in evaluation and decoding.
    """
    if reverse:
        raise NotImplementedError("on a CPU, RWKV-7 runs only forwards (reverse=False)")
    scale = float(r.shape[-1] ** -0.5) if scale is None else scale
    return chunk_rwkv7(
        r,
        w,
        k,
        v,
        -kk,
        kk * a,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        recurrent=True,
    )


def two_steps(r: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Operands:
    """Return the operands of two steps a token."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    r, k, w, a, b = (x.to(dtype) for x in (r, k, w, a, b))
    nothing, no_value = torch.zeros_like(r), torch.zeros_like(v)

    def steps(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], 2).flatten(1, 2)

    return Operands(
        steps(nothing, r),
        steps(-a * (-w).exp(), nothing),
        steps(b, k),
        steps(no_value, v),
        steps(w, nothing),
    )


def fused_addcmul_rwkv7(
    hidden_states: Tensor,
    delta: Tensor,
    xr: Tensor,
    xw: Tensor,
    xk: Tensor,
    xv: Tensor,
    xa: Tensor,
    xg: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return hidden_states + delta * x for each x."""
    parts = (xr, xw, xk, xv, xa, xg)
    return tuple(None if x is None else hidden_states.addcmul(delta, x) for x in parts)


def fused_k_rwkv7(
    k: Tensor,
    a: Tensor,
    ka: Tensor,
    cu_seqlens: Tensor | None = None,  # noqa: ARG001
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    """Return k * (1 + (a - 1) * ka)."""
    return k.addcmul(k * (a - 1), ka)


def gate_output_correction(
    o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor
) -> Tensor:
    """Return (o + (r * k * r_k summed over a head's channels) * v) * g."""
    return (o + ((r * k * r_k).sum(-1, keepdim=True) * v).view_as(o)) * g


# fla 0.5.2 does not dispatch these, so they are replaced: (module, attribute, CPU version).
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.rwkv7", "chunk_rwkv7", chunk_rwkv7),
    ("fla.layers.rwkv7", "fused_mul_recurrent_rwkv7", fused_mul_recurrent_rwkv7),
    ("fla.layers.rwkv7", "fused_addcmul_rwkv7", fused_addcmul_rwkv7),
    ("fla.layers.rwkv7", "fused_k_rwkv7", fused_k_rwkv7),
    ("fla.layers.rwkv7", "gate_output_correction", gate_output_correction),
)
