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


class _Convolution(torch.autograd.Function):
    """A depthwise convolution of tokens: `[B, T + W - 1, D]` with weight `[D, W]` to `[B, T, D]`.

    It takes W products and sums, without the copies to and from the layout of oneDNN.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.t().contiguous()
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        W = len(weight)
        T = x.shape[1] - W + 1
        y = x[:, :T] * weight[0] if bias is None else bias.addcmul(x[:, :T], weight[0])
        for i in range(1, W):
            y.addcmul_(x[:, i : i + T], weight[i])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight = ctx.saved_tensors
        T, W = dy.shape[1], len(weight)
        dx = torch.zeros_like(x)
        dweight = []
        for i in range(W):
            dx[:, i : i + T].addcmul_(dy, weight[i])
            dweight.append((dy * x[:, i : i + T]).sum((0, 1)))
        return dx, torch.stack(dweight, 1), dy.sum((0, 1)) if ctx.has_bias else None


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
    inputs = torch.cat([carry.inputs.to(mixed.dtype), mixed], 1)
    y: Any = _Convolution.apply(inputs[:, 1:], layer.conv1d.weight.squeeze(1), layer.conv1d.bias)
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
    return y.to(gate.dtype), _Carry(inputs[:, -layer.conv_kernel_size :].clone(), state)


def _split(layer: Any, projected: Tensor) -> tuple[Tensor, ...]:
    """Return the gate, the convolution's input and dt, which the first linear layer gives."""
    return projected.split([layer.intermediate_size, layer.conv_dim, layer.num_heads], -1)


def _parameters(layer: Any) -> list[Tensor]:
    """Return the parameters that `_mixed` uses."""
    norm = layer.norm.parameters() if layer.rmsnorm else ()
    return [layer.dt_bias, layer.A_log, layer.D, *layer.conv1d.parameters(), *norm]


class _Mixed(torch.autograd.Function):
    """`_mixed` of long rows, piece by piece; it saves its input, and what pieces carry over."""

    @staticmethod
    def forward(
        ctx: Any, layer: Any, mask: Tensor | None, first: _Carry, x: Tensor, *_: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.layer, ctx.mask, ctx.spans = layer, mask, pieces(*x.shape[:2])
        outputs, carries = [], [first]
        for start, end in ctx.spans:
            masked = None if mask is None else mask[:, start:end]
            y, carry = _mixed(layer, _split(layer, x[:, start:end]), carries[-1], masked)
            outputs.append(y)
            carries.append(carry)
        ctx.save_for_backward(x, *(each for carry in carries[:-1] for each in carry))
        return torch.cat(outputs, 1), *carries[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy, layer = gradients[0], ctx.layer
        dcarry = gradients[1:]
        x, *carried = ctx.saved_tensors
        parameters = _parameters(layer)
        needed = [p for p in parameters if p.requires_grad]
        dx, found = torch.empty_like(x), []
        for i, (start, end) in reversed(list(enumerate(ctx.spans))):
            leaves = [
                each.detach().requires_grad_()
                for each in (*_split(layer, x[:, start:end]), *carried[2 * i : 2 * i + 2])
            ]
            masked = None if ctx.mask is None else ctx.mask[:, start:end]
            with torch.enable_grad():
                y, carry = _mixed(layer, leaves[:3], _Carry(*leaves[3:]), masked)
            dleaves = torch.autograd.grad(
                (y, *carry), (*leaves, *needed), (dy[:, start:end], *dcarry)
            )
            for whole, piece in zip(_split(layer, dx[:, start:end]), dleaves[:3], strict=True):
                whole.copy_(piece)
            dcarry = dleaves[3:5]
            found.append(dleaves[5:])
        sums = iter([torch.stack(each).sum(0) for each in zip(*found, strict=True)])
        return None, None, None, dx, *(next(sums) if p.requires_grad else None for p in parameters)


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
        first = _Carry(nothing, projected.new_zeros(shape, dtype=torch.float32))
        result: Any = _Mixed.apply(layer, mask, first, projected, *_parameters(layer))
        y, carry = result[0], _Carry(*result[1:])
    out = layer.out_proj(y)
    if last_state is None and not use_cache:
        return out, None, None
    return out, carry.inputs.mT, carry.state


# (module, attribute, CPU version)
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.mamba2", "Mamba2.torch_forward", mamba2_forward),
)
