"""Mamba-2's layer in plain PyTorch: the form of attention that its state space model is.

fla's own form for CPUs holds the scores of 256 tokens for each channel of the state, and repeats B
and C in another order than its form for GPUs if there is more than one group. This one has the
state decay by a number per head (`decay`), with C, B and dt * x for queries, keys and values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_composer.cpu.chunks import pieces
from flame_composer.cpu.decay import chunk_simple_gla, recurrent_simple_gla
from flame_composer.cpu.linear import backward_in_fp32, forward_in_fp32


class _Convolution(torch.autograd.Function):
    """A depthwise convolution of tokens `[B, T, D]` after W others, with weight `[D, W]`.

    It takes W products and sums, without the copies to and from the layout of oneDNN. It returns
    the result and the last W tokens of both, `[B, W, D]`.
    """

    @staticmethod
    @forward_in_fp32
    def forward(
        ctx: Any, before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight = weight.t().contiguous()
        ctx.save_for_backward(before, x, weight)
        ctx.has_bias = bias is not None
        W, T = len(weight), x.shape[1]
        y = torch.zeros_like(x) if bias is None else bias.repeat(*x.shape[:2], 1)
        for lag in reversed(range(W)):
            num = min(lag, T)  # of the tokens before
            y[:, :num].addcmul_(before[:, W - lag : W - lag + num], weight[W - 1 - lag])
            y[:, num:].addcmul_(x[:, : T - num], weight[W - 1 - lag])
        return y, torch.cat([before, x[:, -W:]], 1)[:, -W:].clone()

    @staticmethod
    @once_differentiable
    @backward_in_fp32
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy, dlast = gradients
        before, x, weight = ctx.saved_tensors
        W, T = len(weight), x.shape[1]
        dx, dbefore = dy * weight[-1], torch.zeros_like(before)
        dweight = [(dy * x).sum((0, 1))]
        for lag in range(1, W):
            num, tap = min(lag, T), weight[W - 1 - lag]
            old = slice(W - lag, W - lag + num)
            dbefore[:, old].addcmul_(dy[:, :num], tap)
            dx[:, : T - num].addcmul_(dy[:, num:], tap)
            dtap = (dy[:, num:] * x[:, : T - num]).sum((0, 1))
            dweight.append(dtap + (dy[:, :num] * before[:, old]).sum((0, 1)))
        num = min(W, T)
        dx[:, T - num :] += dlast[:, W - num :]
        dbefore[:, num:] += dlast[:, : W - num]
        dbias = dy.sum((0, 1)) if ctx.has_bias else None
        return dbefore, dx, torch.stack(dweight[::-1], 1), dbias


class _Carry(NamedTuple):
    """What a piece of a row takes over from the one before it."""

    inputs: Tensor  # [B, W, D] the last inputs of the convolution
    state: Tensor  # [B, H, P, S]


def _mixed(
    layer: Any,
    parts: Sequence[Tensor],
    carry: _Carry,
    mask: Tensor | None,
    *,
    recurrent: bool = False,
) -> tuple[Tensor, _Carry]:
    """Return what goes into the last linear layer for what comes out of the first, `[B, T, ...]`.

    The parts are those of `_split`. The mask `[B, T]` is 0 for padding, whose inputs to convolution
    and state are 0.
    """
    gate, mixed, dt = parts
    size = layer.n_groups * layer.ssm_state_size
    mask = None if mask is None else mask[:, :, None].to(mixed.dtype)
    mixed = mixed if mask is None else mixed * mask
    result: Any = _Convolution.apply(
        carry.inputs.to(mixed.dtype), mixed, layer.conv1d.weight.squeeze(1), layer.conv1d.bias
    )
    y, last = result
    mixed = layer.act(y)
    mixed = mixed if mask is None else mixed * mask
    x, B, C = mixed.split([layer.intermediate_size, size, size], -1)
    x = x.unflatten(-1, (layer.num_heads, layer.head_dim))
    B, C = (each.unflatten(-1, (layer.n_groups, layer.ssm_state_size)) for each in (B, C))
    dt = F.softplus(dt + layer.dt_bias).clamp(*layer.dt_limit)
    g = -layer.A_log.float().exp() * dt
    run = recurrent_simple_gla if recurrent else functools.partial(chunk_simple_gla, keep=True)
    y, state = run(
        C,
        B,
        x * dt.unsqueeze(-1),
        g,
        scale=1.0,
        initial_state=carry.state,
        output_final_state=True,
        state_v_first=True,
    )
    assert state is not None
    y = y.addcmul(layer._get_D(expand_to_head_dim=True), x).flatten(2)
    y = layer.norm(y, gate) if layer.rmsnorm else y * layer.act(gate)
    return y.to(gate.dtype), _Carry(last, state)


def _split(layer: Any, projected: Tensor) -> tuple[Tensor, ...]:
    """Return the gate, the convolution's input and dt, which the first linear layer gives."""
    return projected.split([layer.intermediate_size, layer.conv_dim, layer.num_heads], -1)


def mamba2_forward(
    layer: Any,
    input_states: Tensor,
    last_state: dict[str, Any] | None = None,
    use_cache: bool = False,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Stand in for `fla.layers.mamba2.Mamba2.torch_forward`.

    Args:
        layer: the `Mamba2`.
        input_states: `[B, T, hidden]`; T is 1 if there is a last state.
        last_state: `conv_state` `[B, D, W]` and `recurrent_state` `[B, H, P, S]`, or None.
        use_cache: also return both states after these tokens.
        attention_mask: `[B, T]`, 0 for padding; ignored in a batch of one row.

    Returns:
        The output `[B, T, hidden]`, and the states of convolution and recurrence or None.

    Raises:
        ValueError: if there are several tokens after a last state, which fla does not do either.
    """
    batch_size, T, _ = input_states.shape
    if last_state is not None and T != 1:
        raise ValueError("Mamba2 cached decoding only supports a single new token per step.")
    is_padded = attention_mask is not None and last_state is None and batch_size > 1 and T > 1
    mask = attention_mask if is_padded else None
    projected = layer.in_proj(input_states)
    if last_state is not None:
        carry = _Carry(last_state["conv_state"].mT, last_state["recurrent_state"])
        y, carry = _mixed(layer, _split(layer, projected), carry, None, recurrent=True)
    else:
        nothing = projected.new_zeros(batch_size, layer.conv_kernel_size, layer.conv_dim)
        shape = batch_size, layer.num_heads, layer.head_dim, layer.ssm_state_size
        carry = _Carry(nothing, projected.new_zeros(shape, dtype=torch.float32))
        outputs = []
        sizes = [end - start for start, end in pieces(batch_size, T)]
        masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
        for piece, masked in zip(projected.split(sizes, 1), masks, strict=True):
            y, carry = _mixed(layer, _split(layer, piece), carry, masked)
            outputs.append(y)
        y = torch.cat(outputs, 1)
    out = layer.out_proj(y)
    if last_state is None and not use_cache:
        return out, None, None
    return out, carry.inputs.mT, carry.state


# (module, attribute, CPU version)
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.mamba2", "Mamba2.torch_forward", mamba2_forward),
)
