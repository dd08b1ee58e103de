"""RWKV-6's and RWKV-7's layers in a training step, which keep what is dear to compute only.

Peng et al. 2024 (arXiv:2404.05892) and 2025 (arXiv:2503.14456). Between their linear layers, much
is cheap: mixtures of each token with the one before it, gates, activations. They are computed again
in the backward pass (`projections`), by the operations of fla's own layers (0.5.2), so that results
are the same bits. Evaluation and decoding, masks for padding, and layers that something was done to
(adapters) take fla's layers as they are.

Shapes: B batch, T tokens, D channels, H heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flame_composer.cpu.delta_inputs import delta_rule, normalized
from flame_composer.cpu.projections import are_plain, projected
from flame_composer.cpu.rwkv6 import attend
from flame_composer.cpu.rwkv7 import (
    fused_k_rwkv7,
    gate_output_correction,
)
from flame_composer.cpu.rwkv7_chunks import ONE_STEP, Inputs


def _is_training_step(
    layer: nn.Module, x: Tensor, mask: Tensor | None, cache: Any, *linears: nn.Module
) -> bool:
    is_plain_step = layer.training and torch.is_grad_enabled() and mask is None and cache is None
    return is_plain_step and are_plain(x, *linears)


def _own(layer: Any) -> Callable[..., Any]:
    """Return fla's own forward pass of a layer."""
    own: Callable[..., Any] = functools.partial(type(layer).forward.__wrapped__, layer)
    return own


def _difference(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return x_{t-1} - x_t, by what `token_shift` replaces in fla."""
    from fla.modules.token_shift import token_shift

    difference: Tensor = token_shift(x, cu_seqlens)
    return difference


def _lerp(cu_seqlens: Tensor | None, x: Tensor, *factors: Tensor) -> Iterator[Tensor]:
    """Yield RWKV-6's mixtures of x, one for each factor `[D]`."""
    difference = _difference(x, cu_seqlens)
    for factor in factors:
        yield x + difference * factor


def _dynamic_lerp(
    cu_seqlens: Tensor | None, x: Tensor, low: Tensor, weight: Tensor, bias: Tensor
) -> Iterator[Tensor]:
    """Yield RWKV-6's five mixtures of x, by factors that low `[B, T, 5 * rank]` gives."""
    difference = _difference(x, cu_seqlens)
    low = low.unflatten(-1, (len(bias), -1))
    factors = torch.einsum("b t n r, h n r-> b t n h", low, weight.view(x.shape[-1], len(bias), -1))
    for factor in (factors + bias).unbind(-2):
        yield x + difference * factor


def _applied(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor]:
    return (function(x),)


def _gated(function: Callable[[Tensor], Tensor], o: Tensor, g: Tensor) -> tuple[Tensor]:
    return (o * function(g),)


def rwkv6_attention(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None, Any]:
    """Stand in for `fla.layers.rwkv6.RWKV6Attention.forward`, of the same signature."""
    x, (low_in, tanh, low_out) = hidden_states, layer.x_proj
    r, w, k, v, g = layer.r_proj, layer.w_proj, layer.k_proj, layer.v_proj, layer.g_proj
    decay = w.linear.lora
    linears = [r.linear, decay[0], k.linear, v.linear, g.linear]
    plain = low_in.linear, low_out, *linears, layer.o_proj
    if not _is_training_step(layer, x, attention_mask, past_key_values, *plain):
        given = attention_mask, past_key_values, use_cache, output_attentions, cu_seqlens
        result: tuple[Tensor, None, Any] = _own(layer)(x, *given, **kwargs)
        return result
    (low,) = projected(functools.partial(_lerp, cu_seqlens), (x, low_in.mu), [low_in.linear])
    r, w, k, v, g = projected(
        functools.partial(_dynamic_lerp, cu_seqlens),
        (x, tanh(low), low_out.weight, layer.x_bias),
        linears,
    )
    w = decay[2](decay[1](w))
    r, w, k, v = (y.unflatten(-1, (layer.num_heads, -1)) for y in (r, w, k, v))
    o = attend(r, k, v, w, layer.bonus, cu_seqlens)
    o = layer.g_norm(o.flatten(-2))
    (out,) = projected(functools.partial(_gated, layer.gate_fn), (o, g), [layer.o_proj])
    return out, None, past_key_values


def rwkv6_feed_forward(
    layer: Any,
    x: Tensor,
    attention_mask: Tensor | None = None,
    state: Any = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Stand in for `fla.models.rwkv6.modeling_rwkv6.RWKV6FeedForward.forward`."""
    linears = layer.key.linear, layer.receptance.linear
    if not _is_training_step(layer, x, attention_mask, state, *linears, layer.value):
        result: tuple[Tensor, Any] = _own(layer)(x, attention_mask, state, cu_seqlens, **kwargs)
        return result
    factors = layer.key.mu, layer.receptance.mu
    key, receptance = projected(functools.partial(_lerp, cu_seqlens), (x, *factors), linears)
    (value,) = projected(functools.partial(_applied, layer.act_fn), (key,), [layer.value])
    return receptance.sigmoid() * value, state


def _rwkv7_mixtures(
    cu_seqlens: Tensor | None, has_gate: bool, x: Tensor, *factors: Tensor
) -> Iterator[Tensor]:
    """Yield RWKV-7's mixtures, for r, w, k, a, g and v, and the last again if v has a gate."""
    difference = _difference(x, cu_seqlens)
    for factor in factors:
        mixture = x.addcmul(difference, factor)
        yield mixture
    if has_gate:
        yield mixture


def _values(v: Tensor, v_first: Tensor | None, gate: Tensor | None) -> Tensor:
    """Return the values: what the gate leaves of them, and the first layer's for the rest."""
    return v if v_first is None or gate is None else torch.lerp(v, v_first, gate.sigmoid())


def _rwkv7_inputs(
    num_heads: int,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    a: Tensor,
    v_first: Tensor | None,
    gate: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
) -> Inputs:
    """Return what the recurrence takes for what the linear layers give, `[B, T, D]`."""
    w, a = -0.6065306597126334 * w.sigmoid(), a.sigmoid()
    erased = normalized((k * k_k).unflatten(-1, (num_heads, -1)))
    k, v = fused_k_rwkv7(k, a, k_a), _values(v, v_first, gate)
    r, k, v, w, a = (x.unflatten(-1, (num_heads, -1)) for x in (r, k, v, w, a))
    return Inputs(r, k, v, w, -erased, erased * a)


def _rwkv7_output(
    num_heads: int,
    o: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    g: Tensor,
    v_first: Tensor | None,
    gate: Tensor | None,
    k_a: Tensor,
    r_k: Tensor,
) -> tuple[Tensor]:
    k, v = fused_k_rwkv7(k, a.sigmoid(), k_a), _values(v, v_first, gate)
    r, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (r, k, v))
    return (gate_output_correction(o, r, k, r_k, v, g),)


def rwkv7_attention(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    v_first: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None, Any, Tensor]:
    """Stand in for `fla.layers.rwkv7.RWKV7Attention.forward`, of the same signature."""
    x, is_first = hidden_states, layer.layer_idx == 0
    w, a, g = (each.lora for each in (layer.w_lora, layer.a_lora, layer.g_lora))
    gates = [] if is_first else [layer.v_lora.lora]
    linears = [layer.r_proj, w[0], layer.k_proj, a[0], g[0], layer.v_proj, *(s[0] for s in gates)]
    plain = _is_training_step(layer, x, attention_mask, past_key_values, *linears, layer.o_proj)
    if not (plain and layer.fuse_norm):
        given = attention_mask, past_key_values, use_cache, output_attentions, v_first, cu_seqlens
        result: tuple[Tensor, None, Any, Tensor] = _own(layer)(x, *given, **kwargs)
        return result
    factors = layer.x_r, layer.x_w, layer.x_k, layer.x_a, layer.x_g, layer.x_v
    mixtures = functools.partial(_rwkv7_mixtures, cu_seqlens, not is_first)
    r, w_in, k, a_in, g_in, v, *v_in = projected(mixtures, (x, *factors), linears)
    w, a, g = (s[2](s[1](y)) for s, y in ((w, w_in), (a, a_in), (g, g_in)))
    blend = (None, None) if is_first else (v_first, gates[0][2](gates[0][1](v_in[0])))
    inputs_of = functools.partial(_rwkv7_inputs, layer.num_heads)
    kept = r, k, v, w, a, *blend, layer.k_k, layer.k_a
    o, _ = delta_rule(inputs_of, kept, 1.0, None, False, False, cu_seqlens, rule=ONE_STEP)
    kept = layer.g_norm(o.flatten(-2)), r, k, v, a, g, *blend, layer.k_a, layer.r_k
    output = functools.partial(_rwkv7_output, layer.num_heads)
    (out,) = projected(output, kept, [layer.o_proj])
    return out, None, past_key_values, v if is_first or v_first is None else v_first


def rwkv7_feed_forward(
    layer: Any,
    x: Tensor,
    attention_mask: Tensor | None = None,
    state: Any = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Stand in for `fla.models.rwkv7.modeling_rwkv7.RWKV7FeedForward.forward`."""
    if not _is_training_step(layer, x, attention_mask, state, layer.key, layer.value):
        result: tuple[Tensor, Any] = _own(layer)(x, attention_mask, state, cu_seqlens, **kwargs)
        return result
    mixture = functools.partial(_rwkv7_mixtures, cu_seqlens, False)
    (key,) = projected(mixture, (x, layer.x_k), [layer.key])
    (out,) = projected(functools.partial(_applied, layer.act_fn), (key,), [layer.value])
    return out, state


# (module, attribute, CPU version)
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.layers.rwkv6", "RWKV6Attention.forward", rwkv6_attention),
    ("fla.models.rwkv6.modeling_rwkv6", "RWKV6FeedForward.forward", rwkv6_feed_forward),
    ("fla.layers.rwkv7", "RWKV7Attention.forward", rwkv7_attention),
    ("fla.models.rwkv7.modeling_rwkv7", "RWKV7FeedForward.forward", rwkv7_feed_forward),
)
