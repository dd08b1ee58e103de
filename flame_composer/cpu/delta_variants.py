"""DeltaProduct and Comba in plain PyTorch: the delta rule with other rows in the same chunks.

Each function stands in for fla's function of that name (0.5.2) and has the same arguments; shapes
are those of `delta`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_composer.cpu.delta_chunks import Operands
from flame_composer.cpu.delta_inputs import Options, delta_rule, prepare


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
    cp_context: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute DeltaProduct: several steps of the delta rule for each token.

    Siems et al. 2025 (arXiv:2502.10297). k, v and beta hold the steps of a token side by side,
    `[B, T * num_householder, ...]`. The gate `[B, T, H]`, or None, comes before a token's first
    step, and q `[B, T, H, K]` reads after its last.
    """
    if cp_context is not None:
        raise NotImplementedError("on a CPU, DeltaProduct has no context parallelism")
    options = Options(normalize=use_qk_l2norm_in_kernel)
    make = functools.partial(_prepare_product, options, num_householder)
    given = (q, k, v, beta, g, None, None)
    return delta_rule(
        make,
        given,
        scale,
        initial_state,
        output_final_state,
        False,
        cu_seqlens,
        num_steps=num_householder,
    )


def _prepare_product(
    options: Options, num_steps: int, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None
) -> Operands:
    beta, g, *rest = given
    assert beta is not None
    q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, num_steps - 1, 0)).flatten(1, 2)
    if g is not None:
        g = F.pad(g.unsqueeze(2), (0, 0, 0, num_steps - 1)).flatten(1, 2)
    return prepare(options, q, k, v, beta, g, *rest)


def chunk_comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor | None,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
    *,
    recurrent: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute Comba over chunks: the delta rule that erases by p `[B, T, H, K]` in place of k.

    Hu et al. 2025 (arXiv:2506.02475). As in fla's kernels, what is erased is looked up before the
    state decays; fla's naive form decays first.
    """
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    options = Options(normalize=use_qk_l2norm_in_kernel)
    given = (q, k, v, beta, g, k if p is None else p)
    return delta_rule(
        functools.partial(_prepare_comba, options),
        given,
        scale,
        initial_state,
        output_final_state,
        False,
        cu_seqlens,
        recurrent=recurrent,
    )


def fused_recurrent_comba(
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute Comba; one token per sequence by the recurrence."""
    return chunk_comba(
        q,
        k,
        v,
        p,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        recurrent=True,
    )


def _prepare_comba(
    options: Options, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, p: Tensor
) -> Operands:
    operands = prepare(options, q, k, v, beta, g, None, None)
    _, erasing, *_ = prepare(options, p, p, v, beta, g, None, None)
    return operands._replace(p=erasing, erases_before=True)


# fla 0.5.2 does not dispatch these, so they are replaced: (module, attribute, CPU version).
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.comba", "chunk_comba", chunk_comba),
    ("fla.layers.comba", "fused_recurrent_comba", fused_recurrent_comba),
    ("fla.layers.gated_deltaproduct", "chunk_gated_delta_product", chunk_gated_delta_product),
)
