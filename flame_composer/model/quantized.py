"""Models whose linear layers have weights of 8 or 16 bits: the layers, and putting them in.

Only a trained model is quantized, and it is never trained on. The product of the output layer is
quantized like any other. So is the table of input embeddings, since its rows are the output layer's
where the two are tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flame_composer.cpu import int8
from flame_composer.cpu.linear import Linear
from flame_composer.errors import ConfigError, one_line
from flame_composer.model.foreign import count_not_finite
from flame_composer.model.softcap import cap_logits
from flame_composer.model.work import count_parameters
from flame_composer.upstream.transformers import cache_of, with_cache

Dtype = Literal["int8", "bf16"]
SCALE = "_scale"  # after a weight's name: that of its scales
_TRIED = 80  # tokens; fla takes another way for more than 64
_LINEAR = (nn.Linear, Linear, Conv1D)  # exactly these: a subclass may compute something else


class ReadDirectlyError(Exception):
    """Raised where a model reads the weights of a quantized layer itself, with their name."""


class Unreadable(Tensor):
    """A weight whose shape, type and device are known; other use raises ReadDirectlyError.

    Models ask for the type of weights, to which they convert what they give to the layer.
    """

    layer: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cpu")
        if getattr(func, "__name__", "") in ("__get__", "size", "dim", "numel"):
            return super().__torch_function__(func, types, args, kwargs)
        used = (*args, *(kwargs or {}).values())
        raise ReadDirectlyError(next(each.layer for each in used if isinstance(each, cls)))


class Stored(NamedTuple):
    """A weight as it is stored: [O, I] numbers and, if they are int8, fp32 scales [O]."""

    numbers: Tensor
    scale: Tensor | None

    def fingerprint(self) -> Tensor:
        """Return a hash of the numbers, by which a state dict without them can be told apart."""
        plain = self.numbers.contiguous().reshape(-1).view(torch.uint8).numpy().data
        return torch.tensor(list(xxhash.xxh3_128_digest(plain)), dtype=torch.uint8)


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are int8 with scales, or bfloat16; it takes and gives fp32.

    Its weights cannot be read, only multiplied with: a model that computes with them by itself, and
    never calls the layer, raises ReadDirectlyError.
    """

    def __init__(self, name: str, stored: Stored, bias: nn.Parameter | None):
        super().__init__()
        self.name = name
        self.out_features, self.in_features = stored.numbers.shape
        self.register_parameter("bias", bias)
        self.register_buffer("fingerprint", stored.fingerprint())
        self.bytes_each = stored.numbers.element_size()  # of a weight
        self._scale = stored.scale
        if stored.scale is None:
            self._numbers = stored.numbers
        else:
            self._numbers = int8.pack_int8(stored.numbers)
            self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
            self.register_buffer("weight_scale", stored.scale)

    @property
    def weight(self) -> Unreadable:
        """A stand-in for the weight, with which nothing can be computed."""
        return _stand_in(self.name, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with x `[..., I]`, plus the bias, in the type of x."""
        if self._scale is None:
            result = F.linear(x.to(torch.bfloat16), self._numbers).to(x.dtype)
        else:
            result = int8.int8_product(x.float(), self._numbers, self._scale, self._zeros)
            result = result.to(x.dtype)
        bias: Any = self.bias
        return result if bias is None else result + bias


class QuantizedEmbedding(nn.Module):
    """A table of embeddings in int8 with a scale for each row, or in bfloat16; it gives fp32.

    As with a QuantizedLinear, a model that computes with the table itself, and not with the rows
    that the layer gives, raises ReadDirectlyError.
    """

    def __init__(self, name: str, stored: Stored):
        super().__init__()
        self.name = name
        self.num_embeddings, self.embedding_dim = stored.numbers.shape
        self.register_buffer("fingerprint", stored.fingerprint())
        self.bytes_each = stored.numbers.element_size()  # of a number
        self._numbers = stored.numbers
        self.register_buffer("weight_scale", stored.scale)

    @property
    def weight(self) -> Unreadable:
        """A stand-in for the table, with which nothing can be computed."""
        return _stand_in(self.name, self.num_embeddings, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids`, with one dimension more."""
        rows = F.embedding(ids, self._numbers).float()
        if self.weight_scale is not None:
            scale: Any = self.weight_scale
            rows = rows * scale[ids].unsqueeze(-1)
        return rows


def _stand_in(name: str, *shape: int) -> Unreadable:
    found = torch.empty(shape, device="meta").as_subclass(Unreadable)
    found.layer = name
    return found


class Quantized(NamedTuple):
    """What was quantized in a model: the weights by name, and a line that says how many."""

    stored: dict[str, Stored]
    line: str


def is_quantized(model: nn.Module) -> bool:
    """Return whether a model has a quantized layer."""
    return any(isinstance(each, QuantizedLinear) for each in model.modules())


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers that can be quantized by name, the output layer among them."""
    return {name: module for name, module in model.named_modules() if type(module) in _LINEAR}


def embedding_of(model: PreTrainedModel) -> tuple[str, nn.Embedding] | None:
    """Return the table of input embeddings and its name, or None if it is not a plain one."""
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding:
        return None
    return next(name for name, module in model.named_modules() if module is table), table


def weight_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the layers that can be quantized, each with the name that its weight is stored under.

    An output layer that is tied to the table of embeddings has the table's.
    """
    names = {name: f"{name}.weight" for name in linear_layers(model)}
    found = embedding_of(model)
    if found is not None:
        name, table = found
        tied = [each for each in names if model.get_submodule(each).weight is table.weight]
        names |= dict.fromkeys([name, *tied], f"{name}.weight")
    return names


def columns_of(model: nn.Module, weight: str) -> int:
    """Return the dimension of a layer's weight that its output channels are along."""
    return int(type(model.get_submodule(weight.rpartition(".")[0])) is Conv1D)


def call_down_proj(model: nn.Module) -> None:
    """Have fla's MLPs call their last layer, instead of computing with its weights themselves."""
    for module in model.modules():
        if getattr(module, "fuse_swiglu", False) and hasattr(module, "down_proj"):
            module.fuse_swiglu = False  # type: ignore[assignment]


def put_in(model: PreTrainedModel, stored_of: Callable[[str], Stored | None]) -> dict[str, Stored]:
    """Replace layers by quantized ones, and return the weights by the names of their parameters.

    `stored_of` says what the parameter of a name becomes; a layer for which it gives None stays.
    Tied layers get the same numbers.
    """
    call_down_proj(model)
    known: dict[str, Stored] = {}
    for name, weight in weight_names(model).items():
        stored = known.get(weight) or stored_of(weight)
        if stored is None:
            continue
        known[weight] = stored
        module: Any = model.get_submodule(name)
        new: nn.Module
        if isinstance(module, nn.Embedding):
            new = QuantizedEmbedding(name, stored)
        else:
            is_turned = type(module) is Conv1D
            numbers = stored.numbers.t().contiguous() if is_turned else stored.numbers
            new = QuantizedLinear(name, Stored(numbers, stored.scale), module.bias)
        model.set_submodule(name, new.train(module.training))
    cap_logits(model)
    return known


def quantize(model: PreTrainedModel, dtype: Dtype, place: str) -> Quantized:
    """Quantize the linear layers and the input embeddings of a model that is on the CPU.

    With bf16, all other weights are rounded to it as well, as in a folder of that type. Layers
    whose weights the model reads without calling them stay as they are: a few tokens are computed
    to find them. Raise ConfigError if no layer is left, or if a weight is infinite or not a number.
    """
    total = count_parameters(model)
    for name, parameter in model.named_parameters():
        if count_not_finite(parameter.data):
            raise ConfigError(
                f"{place}: {name} holds values that are infinite or not a number, which cannot be"
                " quantized; take another checkpoint"
            )
        if dtype == "bf16":
            parameter.data = parameter.data.to(torch.bfloat16).float()
    layers = linear_layers(model)

    def stored_of(name: str) -> Stored:
        weight: Any = model.get_parameter(name).data
        if dtype == "bf16":
            return Stored(weight.to(torch.bfloat16), None)
        if not columns_of(model, name):
            return Stored(*int8.quantize_rows(weight))
        numbers, scale = int8.quantize_rows(weight.t())
        return Stored(numbers.t().contiguous(), scale)

    names = weight_names(model)
    originals = {name: model.get_submodule(name) for name in names}
    stored = put_in(model, stored_of)
    back = _put_back_unused(model, originals, names, place)
    passed_by = [name for name in back if name in layers]
    kept = {name for name in layers if isinstance(model.get_submodule(name), QuantizedLinear)}
    if not kept:
        raise ConfigError(
            f"{place}: a {model.config.model_type} model has no linear layer that could be"
            f" quantized{f' ({len(passed_by)} are never called)' if passed_by else ''}"
        )
    left = {names[name] for name in back}
    stored = {name: each for name, each in stored.items() if name not in left}
    share = sum(each.numbers.numel() for each in stored.values()) / total
    table = " and the embeddings" if isinstance(
        model.get_input_embeddings(), QuantizedEmbedding
    ) else ""  # fmt: skip
    line = f"{dtype}: {len(kept)} of {len(layers)} linear layers{table}, {share:.1%} of the weights"
    if passed_by:
        line += (
            f"; {model.config.model_type} reads the weights of {passed_by[0]}"
            f"{f' and {len(passed_by) - 1} more' if len(passed_by) > 1 else ''} without calling"
            " the layer, which stays as it is"
        )
    return Quantized(stored, line)


def _put_back_unused(
    model: PreTrainedModel, originals: Mapping[str, nn.Module], names: Mapping[str, str], place: str
) -> list[str]:
    """Put back the layers whose weights the model reads directly, and return their names.

    With them go the layers of that name in other blocks, which are read in the same way, and those
    that are tied to them. `names` are those of the weights.
    """
    back: list[str] = []
    while True:
        try:
            try_out(model)
            return back
        except ReadDirectlyError as error:
            ending = str(error).rpartition(".")[2]
            read = {names[each] for each in originals if each.rpartition(".")[2] == ending}
            same = [each for each in originals if names[each] in read]
            for each in same:
                model.set_submodule(each, originals[each])
            back += same
        except Exception as error:  # whatever a model raises
            raise ConfigError(
                f"{place}: cannot be computed with quantized layers: {one_line(error)}"
            ) from None


@torch.no_grad()
def try_out(model: PreTrainedModel) -> None:
    """Compute a prompt, and a token after it, as in use: any layer's weights that are read are."""
    is_training = model.training
    model.eval()
    longest = getattr(model.config, "max_position_embeddings", None) or _TRIED
    ids = torch.arange(min(_TRIED, longest)).remainder(model.config.vocab_size).unsqueeze(0)
    try:
        model(input_ids=ids, use_cache=False)
        state = model(input_ids=ids[:, :8], use_cache=True)
        cache = cache_of(state)
        if cache is not None:
            model(input_ids=ids[:, :1], **with_cache(model, cache))
    finally:
        model.train(is_training)
