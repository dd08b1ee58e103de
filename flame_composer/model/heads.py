"""Numbers of heads that make a model; fla and transformers notice others at the first batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

from transformers import PretrainedConfig

from flame_composer.errors import InvalidField
from flame_composer.upstream.hf_configs import rotates


class _Attention(NamedTuple):
    """Layers of softmax attention as a config describes them."""

    name: str  # of the key with the number of heads, below model.config
    heads: Any
    kv_name: str
    kv_heads: Any
    size: int | None  # channels of a head; the width is divided among the heads if None
    rotates: bool


def require_heads(hf_config: PretrainedConfig) -> None:
    """Raise InvalidField for numbers of heads that do not fit each other or the width."""
    heads, v_heads = (getattr(hf_config, name, None) for name in ("num_heads", "num_v_heads"))
    if _is_count(heads) and _is_count(v_heads) and (heads < 1 or v_heads % heads):
        raise InvalidField("model.config.num_v_heads", f"must be a multiple of num_heads={heads}")
    for attention in _attentions(hf_config):
        _require_fits(attention, getattr(hf_config, "hidden_size", None))


def _attentions(hf_config: PretrainedConfig) -> Iterator[_Attention]:
    attn = getattr(hf_config, "attn", None)
    if isinstance(attn, dict):  # layers of a hybrid
        kv_heads = attn.get("num_kv_heads")
        yield _Attention(
            "attn.num_heads", attn.get("num_heads"), "attn.num_kv_heads", kv_heads, None, True
        )
    if hf_config.model_type == "transformer":
        yield _Attention(
            "num_heads", hf_config.num_heads, "num_kv_heads", hf_config.num_kv_heads, None, True
        )
    heads = getattr(hf_config, "num_attention_heads", None)
    if _is_count(heads):
        width = getattr(hf_config, "hidden_size", None)
        size = getattr(hf_config, "head_dim", None)
        if size is None and _is_count(width):
            size = width // max(1, heads)  # transformers rounds down
        whole = getattr(hf_config, "partial_rotary_factor", 1) == 1
        has_rotary = rotates(hf_config) and whole
        kv_heads = getattr(hf_config, "num_key_value_heads", None)
        yield _Attention(
            "num_attention_heads", heads, "num_key_value_heads", kv_heads, size, has_rotary
        )


def _require_fits(attention: _Attention, width: Any) -> None:
    name, heads, kv_name, kv_heads, size, has_rotary = attention
    if not _is_count(heads):
        return
    if heads < 1:
        raise InvalidField(f"model.config.{name}", "must be 1 or more")
    if size is None and _is_count(width):
        if width % heads:
            raise InvalidField(f"model.config.{name}", f"must divide hidden_size={width}")
        size = width // heads
    if _is_count(kv_heads) and (kv_heads < 1 or heads % kv_heads):
        short = name.rpartition(".")[2]
        raise InvalidField(f"model.config.{kv_name}", f"must divide {short}={heads}")
    if has_rotary and _is_count(size) and size % 2:
        raise InvalidField(
            f"model.config.{name}",
            f"makes heads of {size} channels, but RoPE rotates channels in pairs; give a number"
            " that makes heads of an even size",
        )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
