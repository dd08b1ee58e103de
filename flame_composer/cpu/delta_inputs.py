"""What comes before the delta rule: norms, gates and strengths, packed rows, states.

fla computes these in its kernels. Here `prepare` makes the operands of `delta_chunks` of what a
layer gives; gradients go back through it.

Shapes: B batch, T tokens, H heads of q and k, HV heads of v (a multiple of H), K key channels, V
value channels, N sequences.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_composer.cpu.chunks import Rows, check_sequences, segments_of
from flame_composer.cpu.delta_chunks import DELTA_RULE, Operands, Prepare, Rule, chunkwise
from flame_composer.cpu.linear import backward_in_fp32, forward_in_fp32

NORM_EPS = 1e-6
# Rows of so few tokens go token by token where a recurrence is asked for: those of one new token,
# for which DeltaProduct takes several steps.
MAX_STEPS = 4


class Options(NamedTuple):
    """What is computed on the way into the delta rule."""

    normalize: bool = False  # divide each q and k by its length
    gate: bool = False  # g is not yet a log gate, but what A_log and dt_bias make one of
    lower_bound: float | None = None  # of the log gate, which is a sigmoid then
    sigmoid: bool = False  # beta is not yet a strength, but the logit of one
    beta_scale: float = 1.0  # 2 allows negative eigenvalues


class _L2Norm(torch.autograd.Function):
    """The function x / |x|, over the last dimension."""

    @staticmethod
    @forward_in_fp32
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, rstd = l2norm_fwd(x)
        ctx.save_for_backward(y, rstd)
        return y

    @staticmethod
    @once_differentiable
    @backward_in_fp32
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return l2norm_bwd(*ctx.saved_tensors, *gradients)


def normalized(x: Tensor) -> Tensor:
    """Return x / |x|, over the last dimension."""
    y: Tensor = _L2Norm.apply(x)
    return y


def l2norm_fwd(
    x: Tensor, eps: float = NORM_EPS, output_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(|x|^2 + eps), over the last dimension, and the factor by which x grows."""
    wide = x if x.dtype == torch.float64 else x.float()
    rstd = torch.linalg.vector_norm(wide, dim=-1).square_().add_(eps).rsqrt_()
    return (wide * rstd.unsqueeze(-1)).to(output_dtype or x.dtype), rstd


def l2norm_bwd(
    y: Tensor,
    rstd: Tensor,
    dy: Tensor,
    eps: float = NORM_EPS,  # noqa: ARG001
) -> Tensor:
    """Return the gradient of x for the output y and the factor of `l2norm_fwd`."""
    wide = y.to(rstd.dtype)
    dot = (dy * wide).sum(-1, keepdim=True)
    return (dy - wide * dot).mul_(rstd.unsqueeze(-1)).to(y.dtype)


def log_gate(
    g: Tensor, A_log: Tensor, dt_bias: Tensor | None, lower_bound: float | None = None
) -> Tensor:
    """Return -exp(A_log) * softplus(g + dt_bias) for g `[B, T, HV]` or `[B, T, HV, K]`.

    With a lower bound it is lower_bound * sigmoid(exp(A_log) * (g + dt_bias)) instead.
    """
    g = g if g.dtype == torch.float64 else g.float()
    if dt_bias is not None:
        g = g + dt_bias.to(g.dtype).view(g.shape[2:])
    A = A_log.to(g.dtype).exp().view(-1, *(1 for _ in g.shape[3:]))
    return -A * F.softplus(g) if lower_bound is None else lower_bound * torch.sigmoid(A * g)


def prepare(
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> Operands:
    dtype = torch.promote_types(v.dtype, torch.float32)
    if options.normalize:
        q, k = normalized(q.to(dtype)), normalized(k.to(dtype))
    q, k = (_to_heads(x.to(dtype), v.shape[2]) for x in (q, k))
    beta = beta.to(dtype)
    if options.sigmoid:
        beta = beta.sigmoid() * options.beta_scale
    if options.gate:
        assert g is not None
        assert A_log is not None
        g = log_gate(g, A_log, dt_bias, options.lower_bound)
    return Operands(q, k, k * beta.unsqueeze(-1), v, g)


def _to_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeat the heads of q or k, each for the neighbouring heads of v that share it."""
    group = num_heads // x.shape[2]
    return x if group == 1 else x.repeat_interleave(group, 2)


def delta_rule(
    make: Prepare,
    given: tuple[Tensor | None, ...],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
    *,
    recurrent: bool = False,
    num_steps: int = 1,
    rule: Rule = DELTA_RULE,
) -> tuple[Tensor, Tensor | None]:
    """Return the output `[B, T, HV, V]` in v's dtype, and the final state or None.

    `given` is what `make` takes: q `[B, T, ...]`, k, v and others of as many tokens or a multiple,
    then parameters, of two dimensions at most. `make` returns operands of `num_steps` steps for
    each token. With `recurrent`, sequences of one length and few steps go step by step.
    """
    q, _, v = given[:3]
    assert q is not None
    assert v is not None
    B, T = q.shape[:2]
    check_sequences(q, initial_state, cu_seqlens)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if initial_state is not None and state_v_first:
        initial_state = initial_state.mT
    length = _common_length(B, T, cu_seqlens) * num_steps
    if recurrent and length <= MAX_STEPS:
        o, state = _steps(make(*given), length, scale, initial_state)
        o = o[:, num_steps - 1 :: num_steps].reshape(B, T, *o.shape[2:]).to(v.dtype)
        return o, _state(state, output_final_state, state_v_first)
    segments = rows = None
    if cu_seqlens is not None and initial_state is None and not output_final_state:
        # Training: the packed row is cut into chunks as it is; masks keep the sequences apart.
        segments = segments_of(cu_seqlens * num_steps, T * num_steps)
    elif cu_seqlens is not None:
        # Prefill of a batch of prompts: each sequence has a state, so each gets its own row.
        rows = Rows(cu_seqlens)
        make = functools.partial(_in_rows, make, Rows(cu_seqlens * num_steps))
    whole = rows is not None
    o, state = chunkwise(rule, make, given, scale, initial_state, segments, num_steps, whole=whole)
    if rows is not None:
        o = rows.join(o)
    return o, _state(state, output_final_state, state_v_first)


def _state(state: Tensor, wanted: bool, state_v_first: bool) -> Tensor | None:
    if not wanted:
        return None
    return state.mT if state_v_first else state


def _in_rows(make: Prepare, rows: Rows, *given: Tensor | None) -> Any:
    """Prepare operands, and give each sequence a row of its own."""
    return make(*given).each(rows.split)


def _common_length(num_rows: int, num_tokens: int, cu_seqlens: Tensor | None) -> int:
    """Return the number of tokens that every sequence has, or that of all if they differ."""
    if cu_seqlens is None:
        return num_tokens
    lengths = cu_seqlens.diff()
    return int(lengths[0]) if bool((lengths == lengths[0]).all()) else num_rows * num_tokens


def _steps(
    operands: Operands, length: int, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output `[N, length, H, V]` token by token, and the states after it."""
    dtype = torch.promote_types(operands.v.dtype, torch.float32)
    q, p, w, v = (x.to(dtype).reshape(-1, length, *x.shape[2:]) for x in operands[:4])
    g = None if operands.g is None else operands.g.to(dtype).reshape(*v.shape[:3], -1)
    N, _, H, K = q.shape
    state = v.new_zeros(N, H, K, v.shape[3]) if state is None else state.to(dtype)
    outputs = []
    for t in range(length):
        decayed = state if g is None else state * g[:, t].exp().unsqueeze(-1)
        erased_from = state if operands.erases_before else decayed
        error = v[:, t].unsqueeze(2) - p[:, t].unsqueeze(2) @ erased_from
        state = decayed + w[:, t].unsqueeze(3) @ error
        outputs.append((q[:, t] * scale).unsqueeze(2) @ state)
    return torch.cat(outputs, 2).transpose(1, 2), state
