"""Mamba-2's layer in plain PyTorch: the form of attention that its state space model is.

fla's own form for CPUs holds the scores of 256 tokens for each channel of the state, and repeats B
and C in another order than its form for GPUs if there is more than one group. This one has the
state decay by a number per head (`decay`), with C, B and dt * x for queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_composer.cpu.decay import chunk_simple_gla, recurrent_simple_gla


def _convolved(
    layer: Any, x: Tensor, before: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the convolution of x `[B, T, D]` and its last inputs, `[B, D, W]`.

    `before` holds the last W inputs before x, or is None at the beginning. Tokens that are padding
    by the mask are 0 before and after.
    """
    width = layer.conv_kernel_size
    mask = None if attention_mask is None else attention_mask[:, :, None].to(x.dtype)
    x = (x if mask is None else x * mask).transpose(1, 2)
    inputs = F.pad(x, (width, 0)) if before is None else torch.cat([before.to(x.dtype), x], -1)
    y = F.conv1d(inputs[..., 1:], layer.conv1d.weight, layer.conv1d.bias, groups=x.shape[1])
    y = layer.act(y.transpose(1, 2))
    return (y if mask is None else y * mask), inputs[..., -width:].detach()


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
    size = layer.n_groups * layer.ssm_state_size
    gate, mixed, dt = layer.in_proj(input_states).split(
        [layer.intermediate_size, layer.conv_dim, layer.num_heads], -1
    )
    before = None if last_state is None else last_state["conv_state"]
    mixed, conv_state = _convolved(layer, mixed, before, attention_mask if is_padded else None)
    x, B, C = mixed.split([layer.intermediate_size, size, size], -1)
    x = x.unflatten(-1, (layer.num_heads, layer.head_dim))
    B, C = (each.unflatten(-1, (layer.n_groups, layer.ssm_state_size)) for each in (B, C))
    dt = F.softplus(dt + layer.dt_bias).clamp(*layer.dt_limit)
    g = -layer.A_log.float().exp() * dt
    run = chunk_simple_gla if last_state is None else recurrent_simple_gla
    y, state = run(
        C,
        B,
        x * dt.unsqueeze(-1),
        g,
        scale=1.0,
        initial_state=None if last_state is None else last_state["recurrent_state"],
        output_final_state=use_cache or last_state is not None,
        state_v_first=True,
    )
    y = (y + layer._get_D(expand_to_head_dim=True) * x).flatten(2)
    y = layer.norm(y, gate) if layer.rmsnorm else y * layer.act(gate)
    is_kept = use_cache or last_state is not None
    out = layer.out_proj(y.to(input_states.dtype))
    return out, conv_state if is_kept else None, state


# (module, attribute, CPU version)
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.mamba2", "Mamba2.torch_forward", mamba2_forward),
)
