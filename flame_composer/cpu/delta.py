"""The delta rule of DeltaNet, Gated DeltaNet and Kimi Delta Attention in plain PyTorch.

The chunkwise form (`delta_chunks`) trains, the recurrence decodes. For one head, with keys k_t,
values v_t, strengths beta_t and log gates g_t <= 0 (none, one per head, or one per key channel):

    S_t = diag(exp g_t) S_{t-1} + beta_t k_t^T (v_t - k_t diag(exp g_t) S_{t-1})
    o_t = scale * q_t S_t

Each function stands in for fla's function of that name (0.5.2) and has the same arguments. Where
fla computes gates, norms and sigmoids in its kernels, they are computed here on the way in.

Shapes: B batch, T tokens, H heads of q and k, HV heads of v (a multiple of H), K key channels, V
value channels, N sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flame_composer.cpu.delta_inputs import Options, delta_rule, prepare


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the ungated delta rule over chunks; states are `[N, H, K, V]`.

    fla's kernel wants bfloat16. Here float32 is computed in float32, and bfloat16 as well.
    """
    _refuse(kwargs)
    make = functools.partial(prepare, Options(normalize=use_qk_l2norm_in_kernel))
    given = (q, k, v, beta, None, None, None)
    return delta_rule(make, given, scale, initial_state, output_final_state, False, cu_seqlens)


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the ungated delta rule, which fla calls for T <= 64.

    One token per sequence (decoding) takes the recurrence, anything longer the chunkwise form.
    """
    beta = torch.ones_like(q[..., 0]) if beta is None else beta
    make = functools.partial(prepare, Options(normalize=use_qk_l2norm_in_kernel))
    given = (q, k, v, beta, None, None, None)
    return delta_rule(
        make, given, scale, initial_state, output_final_state, False, cu_seqlens, recurrent=True
    )


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
    chunk_indices: Tensor | None = None,  # noqa: ARG001 - fla 0.6
    cp_context: Any = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the delta rule with one gate per head, over chunks.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        g: `[B, T, HV]` log gates, or what `A_log` and `dt_bias` make them of.
        beta: `[B, T, HV]` strengths, or their logits.
        initial_state: `[N, HV, K, V]`, or `[N, HV, V, K]` with `state_v_first`.

    Returns:
        The output `[B, T, HV, V]` in v's dtype, and the final state or None. The state is float32,
        or float64 if v is.

    Raises:
        ValueError: if offsets and states do not fit.
    """
    _refuse(kwargs, cp_context)
    options = _options(
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    make, given = functools.partial(prepare, options), (q, k, v, beta, g, A_log, dt_bias)
    return delta_rule(
        make, given, scale, initial_state, output_final_state, state_v_first, cu_seqlens
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the delta rule with one gate per head; one token per sequence by the recurrence.

    Arguments and results are those of `chunk_gated_delta_rule`.
    """
    _refuse(kwargs, gk, gv)
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    options = _options(
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    make, given = functools.partial(prepare, options), (q, k, v, beta, g, A_log, dt_bias)
    return delta_rule(
        make,
        given,
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        cu_seqlens,
        recurrent=True,
    )


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,  # noqa: ARG001
    lower_bound: float | None = None,
    disable_recompute: bool = False,  # noqa: ARG001
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001
    cp_context: Any = None,
    use_graph: bool = False,  # noqa: ARG001 - fla 0.6
    max_num_seqs: int | None = None,  # noqa: ARG001 - fla 0.6
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute Kimi Delta Attention over chunks: the delta rule with a gate per key channel.

    g is `[B, T, HV, K]`; the rest is as in `chunk_gated_delta_rule`. `safe_gate` chooses another
    kernel on a GPU and changes nothing here.
    """
    _refuse(kwargs, cp_context, return_intermediate_states or None)
    options = _options(
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )._replace(lower_bound=lower_bound)
    make, given = functools.partial(prepare, options), (q, k, v, beta, g, A_log, dt_bias)
    return delta_rule(
        make, given, scale, initial_state, output_final_state, state_v_first, cu_seqlens
    )


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute Kimi Delta Attention; one token per sequence by the recurrence.

    Arguments and results are those of `chunk_kda`.
    """
    _refuse(kwargs)
    options = _options(
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )._replace(lower_bound=lower_bound)
    make, given = functools.partial(prepare, options), (q, k, v, beta, g, A_log, dt_bias)
    return delta_rule(
        make,
        given,
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        cu_seqlens,
        recurrent=True,
    )


def _options(normalize: bool, gate: bool, sigmoid: bool, allow_neg_eigval: bool) -> Options:
    if allow_neg_eigval and not sigmoid:
        raise ValueError(
            "allow_neg_eigval doubles the strengths that are made of logits: set"
            " use_beta_sigmoid_in_kernel as well"
        )
    return Options(normalize, gate, None, sigmoid, 2.0 if allow_neg_eigval else 1.0)


def _refuse(named: dict[str, Any], *others: Any) -> None:
    """Refuse what only fla's kernels can do; the chunk size is theirs, and changes no result."""
    unknown = sorted(set(named) - {"chunk_size"})
    if unknown or any(x is not None for x in others):
        raise NotImplementedError(
            "on a CPU, the delta rule has no gates on values, no context parallelism and no"
            f" intermediate states{f', and no {unknown}' if unknown else ''}"
        )


# fla 0.5.2 does not dispatch these, so they are replaced: (module, attribute, CPU version).
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.delta_net", "chunk_delta_rule", chunk_delta_rule),
    ("fla.layers.delta_net", "fused_recurrent_delta_rule", fused_recurrent_delta_rule),
    ("fla.layers.gated_deltanet", "chunk_gated_delta_rule", chunk_gated_delta_rule),
    (
        "fla.layers.gated_deltanet",
        "fused_recurrent_gated_delta_rule",
        fused_recurrent_gated_delta_rule,
    ),
    (
        "fla.layers.gated_deltaproduct",
        "fused_recurrent_gated_delta_rule",
        fused_recurrent_gated_delta_rule,
    ),
    ("fla.layers.kda", "chunk_kda", chunk_kda),
    ("fla.layers.kda", "fused_recurrent_kda", fused_recurrent_kda),
)
