"""Rows whose tokens are divided over ranks: context parallelism.

Every rank of a group runs the whole model on its part of a row's tokens. Where a layer looks back,
it is given what it needs of the parts before (`passing`): a recurrence its state, a short
convolution its last inputs, softmax attention the keys and values, a rotary embedding its position.
All else of a model looks at one token at a time.

The functions and modules of fla through which its layers look back are wrapped here, for the models
in MODELS. Outside the forward and backward pass of a divided row they do what they always did.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame_composer.batch import IGNORE, Batch, labels_after, part_of_rows
from flame_composer.config.parallelism import LEAST_TOKENS
from flame_composer.cpu.enable import find
from flame_composer.errors import InvalidField
from flame_composer.model.passing import (
    Division,
    divide,
    entering,
    inputs_before,
    with_before,
    written_by_gates,
)
from flame_composer.model.ranks import Ranks

MODELS = ("delta_net", "gated_deltanet", "gla", "hgrn2", "kda", "transformer")
Kernel = Callable[..., tuple[Tensor, Tensor | None]]
Written = Callable[[Kernel, dict[str, Any], bool], tuple[Tensor, Tensor]]

# The part of a row that is in the forward or backward pass now. Layers that are recomputed in the
# backward pass, in a thread of autograd's, need it as well.
_now: list[Division | None] = [None]


class Part(NamedTuple):
    """What the model is given of a batch, for this rank's part of its row."""

    input_ids: Tensor  # [1, T]
    labels: Tensor | None  # [1, T], as a model expects them, which shifts them; without the last
    is_void: bool  # it has no labels, but one of which the loss counts as 0
    after: Tensor | None  # the label of what follows each token [1, T]
    offsets: Tensor  # of the documents [N + 1]


class Context:
    """The division of a model's rows over this rank's group."""

    def __init__(self, model: PreTrainedModel, ranks: Ranks, device: str):
        """Make an fla model compute its part of a row where one is entered.

        Every rank must do so: the groups of ranks meet.
        """
        self.part, self.parts = ranks.part, ranks.context
        self.group = ranks.mesh(device)["context"].get_group()
        self.last_label: Tensor | None = None  # of the part that is in the forward pass, [1]
        self._is_entered = False
        model.register_forward_pre_hook(self._begin)
        _spread_rows(model, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        """Return this one: a copy of the model is divided over the same ranks."""
        return self

    def _begin(self, *_: Any) -> None:
        """Have the model work on whole rows when it is called without `enter`, as to generate."""
        if not self._is_entered:
            leave()
        self._is_entered = False

    def tokens_of(self, length: int) -> slice:
        """Return which tokens of a row of this length are this rank's."""
        return part_of_rows(length, self.part, self.parts)

    def enter(self, batch: Batch, offsets: Tensor) -> Part:
        """Return this rank's part of a batch of one row whose documents have these offsets.

        The wrapped functions work on it until the model is called without this.
        """
        input_ids, labels = batch["input_ids"], batch.get("labels")
        assert len(input_ids) == 1, "a division is of one row"
        length = input_ids.shape[1]
        tokens = self.tokens_of(length)
        division = divide(offsets, self.group, part=self.part, parts=self.parts, length=length)
        _now[0], self._is_entered = division, True
        input_ids = input_ids[:, tokens]
        if labels is None:
            return Part(input_ids, None, False, None, division.offsets)
        after = labels_after(labels, tokens)
        is_void = not bool((after != IGNORE).any())
        if is_void:
            after = torch.cat([after[:, :-1], input_ids[:, -1:]], dim=1)
        self.last_label = after[0, -1:]
        labels = torch.cat([torch.full_like(after[:, :1], IGNORE), after[:, :-1]], dim=1)
        return Part(input_ids, labels, is_void, after, division.offsets)


def leave() -> None:
    """Have the wrapped functions work on whole rows again."""
    _now[0] = None


def require_divisible(hf_config: PretrainedConfig) -> None:
    """Raise InvalidField if a model's rows cannot be divided."""
    name = hf_config.model_type
    if name not in MODELS:
        raise InvalidField(
            "parallelism.context",
            f"must be 1 for {name}: rows are divided for {', '.join(MODELS)} (fla's) only",
        )
    mode = getattr(hf_config, "attn_mode", "chunk")
    if mode != "chunk":
        raise InvalidField(
            "parallelism.context", f"needs model.config.attn_mode=chunk, not {mode}, to pass states"
        )
    size = getattr(hf_config, "conv_size", 0)
    if size > LEAST_TOKENS:
        raise InvalidField(
            "parallelism.context",
            f"must be 1 with model.config.conv_size={size}: parts may have {LEAST_TOKENS} tokens",
        )


def _spread_rows(model: PreTrainedModel, context: Context) -> None:
    from fla.modules import RotaryEmbedding, ShortConvolution

    owner: Any = model
    owner.criterion = _LastLabel(model.config, context)
    for module in model.modules():
        if isinstance(module, ShortConvolution):
            module.forward = functools.partial(_convolved, module, module.forward)
        elif isinstance(module, RotaryEmbedding):
            module.forward = functools.partial(_rotated, module.forward)
    for layer, names, written in _KERNELS:
        for name in names:
            _wrap(f"fla.layers.{layer}", name, functools.partial(_spread, written=written))
    _wrap("fla.layers.attn", "flash_attn_varlen_func", _attended)


def _wrap(module: str, name: str, wrapper: Callable[[Any], Any]) -> None:
    owner = find(module, name)
    given = getattr(owner, name)
    if given is not None and not hasattr(given, "of_whole_rows"):
        wrapped: Any = functools.wraps(given)(wrapper(given))
        wrapped.of_whole_rows = given
        # So that `cpu.enable` does not put it aside, when it is called again
        wrapped.cpu_version = getattr(given, "cpu_version", given)
        setattr(owner, name, wrapped)


def _spread(kernel: Kernel, *, written: Written) -> Kernel:
    """Return a recurrence that goes on from one part of a row to the next.

    `written` returns what a document writes into the state, and what it leaves of it (`entering`).
    """
    signature = inspect.signature(kernel)

    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        division = _now[0]
        if division is None or not division.passes or kwargs.get("cu_seqlens") is None:
            return kernel(*args, **kwargs)
        given = _by_name(signature, args, kwargs)
        assert given.get("initial_state") is None
        assert not given.get("output_final_state")
        k, v = given["k"], given["v"]
        H, K, V = v.shape[2], k.shape[3], v.shape[3]
        if division.leaves:
            last = _tokens(given, slice(division.last, None))
            inside = division.is_inside[division.part]
            state, decay = written(kernel, last, inside)
        else:
            wide = torch.promote_types(v.dtype, torch.float32)
            state = torch.zeros(H, K, V, dtype=wide, device=v.device)
            decay = state.new_zeros(H, K, 1 if written is _by_gates else K)
        anchor = next((x for x in _tensors(given) if x.requires_grad), k)
        state = entering(division, anchor, state, decay)[None]
        if given.get("state_v_first"):
            state = state.mT.contiguous()
        first = _tokens(given, slice(division.first))
        o, _ = kernel(**first | {"initial_state": state, "cu_seqlens": None})
        if division.first < k.shape[1]:
            rest = _tokens(given, slice(division.first, None)) | {"cu_seqlens": division.rest}
            o = torch.cat([o, kernel(**rest)[0]], dim=1)
        return o, None

    return call


def _by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


_OF_TOKENS = frozenset({"q", "k", "v", "g", "gk", "beta"})  # arguments [1, T, ...] of kernels


def _tensors(given: dict[str, Any]) -> list[Tensor]:
    return [each for each in given.values() if isinstance(each, Tensor)]


def _tokens(given: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """Return the arguments for some of the tokens."""
    return {
        name: value[:, tokens] if name in _OF_TOKENS and value is not None else value
        for name, value in given.items()
    }


def _by_gates(_: Kernel, given: dict[str, Any], __: bool) -> tuple[Tensor, Tensor]:
    """Return what a document writes, by a sum over its tokens, and its decay by key channel."""
    gates = given["g"] if "g" in given else given["gk"]
    written, log_decay = written_by_gates(given["k"][0], given["v"][0], gates[0])
    return written, log_decay.exp().unsqueeze(-1)


def _by_kernel(kernel: Kernel, given: dict[str, Any], is_inside: bool) -> tuple[Tensor, Tensor]:
    """Return what a document writes, and its transition, as the final states of the kernel.

    With values of 0, a state of the identity becomes the product of all transitions.
    """
    k, v = given["k"], given["v"]
    H, K, V = v.shape[2], k.shape[3], v.shape[3]
    wide = torch.promote_types(v.dtype, torch.float32)
    start = torch.zeros(1, H, K, V, dtype=wide, device=v.device)
    if is_inside:
        unit = torch.eye(K, dtype=wide, device=v.device).expand(1, H, K, K)
        start = torch.cat([start, unit], dim=-1)
    names = [name for name, value in given.items() if isinstance(value, Tensor)]

    def final(*tensors: Tensor) -> Tensor:
        own = given | dict(zip(names, tensors, strict=True))
        if is_inside:
            own["v"] = torch.cat([own["v"], own["v"].new_zeros(*v.shape[:3], K)], dim=-1)
        own |= {"initial_state": start, "output_final_state": True, "cu_seqlens": None}
        state = kernel(**own | ({"state_v_first": False} if "state_v_first" in own else {}))[1]
        assert state is not None
        return state[0].to(wide)

    state: Any = torch.utils.checkpoint.checkpoint(
        final,
        *(given[name] for name in names),
        use_reentrant=False,
        preserve_rng_state=False,
    )
    if not is_inside:
        return state, state.new_zeros(H, K, K)
    return state[..., :V], state[..., V:]


_KERNELS: tuple[tuple[str, tuple[str, ...], Written], ...] = (
    ("gla", ("chunk_gla", "fused_recurrent_gla"), _by_gates),
    ("hgrn2", ("chunk_gla", "fused_recurrent_gla"), _by_gates),
    ("delta_net", ("chunk_delta_rule", "fused_recurrent_delta_rule"), _by_kernel),
    (
        "gated_deltanet",
        ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
        _by_kernel,
    ),
    ("kda", ("chunk_kda", "fused_recurrent_kda"), _by_kernel),
)


def _convolved(
    convolution: Any, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Convolve a part of a row, whose first document has inputs in the part before."""
    division, offsets = _now[0], kwargs.get("cu_seqlens")
    if division is None or not division.passes or offsets is None:
        return forward(x, *args, **kwargs)
    D, W = x.shape[2], convolution.kernel_size[0]
    before = inputs_before(x, division, W - 1)
    first = torch.nn.functional.pad(before.mT, (1, 0))  # the kernels look at W - 1 of W inputs
    others = x.new_zeros(len(offsets) - 2, D, W)
    return forward(x, *args, **kwargs | {"cache": torch.cat([first, others])})


def _rotated(forward: Callable[..., Any], q: Tensor, k: Tensor, **kwargs: Any) -> Any:
    """Rotate a part of a row, whose first document has begun in a part before."""
    division, offsets = _now[0], kwargs.get("cu_seqlens")
    if division is None or not division.passes or offsets is None:
        return forward(q, k, **kwargs)
    positions = torch.zeros_like(offsets[1:])
    positions[0] = division.before
    most = max(kwargs.get("max_seqlen") or 0, division.before + division.first, q.shape[1])
    return forward(q, k, **kwargs | {"seqlen_offset": positions, "max_seqlen": most})


def _attended(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return flash-attn's function for documents, of which the first has keys in parts before."""

    def call(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        division = _now[0]
        if division is None or not division.passes:
            return attend(q, k, v, **kwargs)
        window = kwargs.get("window_size", (-1, -1))[0]
        number = division.before if window < 0 else min(division.before, window)
        k, v = (with_before(x, division, number) for x in (k, v))
        offsets = kwargs["cu_seqlens_k"].clone()
        offsets[1:] += number
        most = max(kwargs["max_seqlen_k"], number + division.first)
        return attend(q, k, v, **kwargs | {"cu_seqlens_k": offsets, "max_seqlen_k": most})

    return call


class _LastLabel(nn.Module):
    """The loss of fla's causal models (0.5.2, `modeling_*`), with the label of the next part.

    The models shift labels by one, and have none for the last token: here it is that of the next
    part's first one.
    """

    def __init__(self, config: Any, context: Context):
        super().__init__()
        from fla.modules import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss

        self.context, self.ignore_index = context, IGNORE
        is_fused = config.fuse_cross_entropy
        self.of_logits = FusedCrossEntropyLoss(inplace_backward=True) if is_fused else None
        self.of_states = FusedLinearCrossEntropyLoss(use_l2warp=config.use_l2warp)

    def forward(self, given: Tensor, labels: Tensor, *head: Tensor | None) -> Tensor:
        """Return the loss of logits, or of hidden states with the weight and bias of a `head`."""
        assert self.context.last_label is not None
        labels = torch.cat([labels.flatten()[:-1], self.context.last_label]).view_as(labels)
        if head:
            loss = self.of_states(given, labels, *head)
        elif self.of_logits is not None:
            loss = self.of_logits(given, labels)
        else:
            loss = nn.functional.cross_entropy(given, labels)
        result: Tensor = loss
        return result
