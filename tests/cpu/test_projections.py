"""What RWKV's layers compute again in the backward pass: fla's results, with less kept."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from flame_composer import cpu
from flame_composer.cpu import linear, projections
from flame_composer.cpu.rwkv_layers import REPLACEMENTS
from flame_composer.model.build import build_model
from tests.cpu.agreement import relative_error

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:According to Bo"),
]

WIDTH = 64
MODELS = {"rwkv6": {"num_heads": 2}, "rwkv7": {"head_dim": 32}}
OFFSETS = [0, 1, 63, 100, 203]


def build(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    cpu.enable()
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": 97}
    model = build_model(AutoConfig.for_model(name, **sizes, **MODELS[name], **config)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # RWKV-7 begins with weights of 0, behind which nothing would be seen
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.train()


def step(model: nn.Module, *, packed: bool) -> dict[str, Tensor]:
    """Return the logits and the gradients of all parameters that are trained."""
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (1 if packed else 2, OFFSETS[-1]))
    model.zero_grad()
    cu_seqlens = {"cu_seqlens": torch.tensor(OFFSETS)} if packed else {}
    logits = model(input_ids=ids, use_cache=False, **cu_seqlens).logits
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@contextmanager
def own_layers() -> Iterator[None]:
    """Have the layers of fla itself in the body, with all of their operations as before."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, _ in REPLACEMENTS:
            owner = getattr(import_module(module), name.partition(".")[0])
            patch.setattr(owner, "forward", owner.forward.__wrapped__)
        yield


def assert_same(model: nn.Module, tolerance: float, *, packed: bool = False) -> dict[str, Tensor]:
    """Assert that a step has the logits of fla's own layers, bit for bit, and their gradients.

    Gradients of x are added up in another order.
    """
    got = step(model, packed=packed)
    with own_layers():
        expected = step(model, packed=packed)
    assert got.keys() == expected.keys()
    assert torch.equal(got["logits"], expected["logits"])
    for key, each in expected.items():
        assert each.norm() > 0, key
        assert relative_error(got[key], each) <= tolerance, key
    return got


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_flas_own_layers(
    name: str, dtype: torch.dtype, tolerance: float, packed: bool
) -> None:
    model = build(name, dtype)
    found = assert_same(model, tolerance, packed=packed)
    assert len(found) == 1 + len(list(model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_bf16_is_that_of_flas_own_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_uses_bf16", True)
    monkeypatch.setattr(linear, "MIN_PRODUCTS", 1)
    assert_same(build(name), 5e-3)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_not_trained_get_no_gradient(name: str) -> None:
    model = build(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(bool(re.search(r"layers\.1\..*(x_k|mu|o_proj|k_proj)", key)))
    assert len(assert_same(model, 2e-6)) > 3


def kept_by(layer: nn.Module, run: Callable[[Tensor], Any], num_tokens: int) -> int:
    """Return the bytes that the backward pass of a layer keeps, without its parameters."""
    parameters = {p.data_ptr() for p in layer.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    x = torch.randn(1, num_tokens, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(x)
    tensors = (x for pointer, x in saved.items() if pointer not in parameters)
    return sum(x.untyped_storage().nbytes() for x in tensors)


# Widths of what a layer keeps: in units of the model's, and of the ranks of gates and mixtures
KEPT = {
    # x; r, k, w, all half as wide; v, g; what bonus and norm keep
    "rwkv6": (1 + 1.5 + 2 + 2.5, 5 * 32 + 64),
    # x; r, k, v, w, a, g and the gate of v; v of the first layer; what the norm keeps
    "rwkv7": (1 + 7 + 1 + 2, 32 + 32 + 32 + 32 + 64 + 64),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_mixture_of_tokens_is_kept(name: str) -> None:
    num_tokens = 512
    block = build(name).model.layers[1]
    v_first = {"v_first": torch.randn(1, num_tokens, WIDTH)} if name == "rwkv7" else {}

    def run(x: Tensor) -> None:
        block.attn(hidden_states=x, **v_first)

    kept = kept_by(block.attn, run, num_tokens) / num_tokens / 4
    widths, ranks = KEPT[name]
    small = 40  # numbers of a token that are one or two for each head
    assert kept <= widths * WIDTH + ranks + small
    with own_layers():
        assert kept_by(block.attn, run, num_tokens) / num_tokens / 4 > 2 * kept
    # Of the feed-forward part: x, what goes into its activation, and RWKV-6's gate and value
    inner = block.ffn.intermediate_size
    kept = kept_by(block.ffn, block.ffn, num_tokens) / num_tokens / 4
    assert kept <= (3 if name == "rwkv6" else 1) * WIDTH + inner + 1


@pytest.mark.parametrize("name", MODELS)
def test_what_took_the_place_of_a_layer_is_called(name: str) -> None:
    """An adapter, say, of which the weight alone would know nothing."""
    model = build(name)
    layer = model.model.layers[1].attn
    inputs: list[Tensor] = []
    layer.o_proj.register_forward_hook(lambda _module, given, _result: inputs.append(given[0]))
    assert not projections.are_plain(torch.ones(1), layer.o_proj)
    got = step(model, packed=False)
    assert [x.shape for x in inputs] == [(2, OFFSETS[-1], WIDTH)]

    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer.o_proj.__class__ = Twice
    assert not torch.equal(step(model, packed=False)["logits"], got["logits"])


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_caches_take_flas_own_layers(name: str) -> None:
    model = build(name)
    ids = torch.arange(2 * 70).view(2, 70) % 97
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def run() -> tuple[Tensor, Tensor]:
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        return out.logits, out.past_key_values[1]["recurrent_state"]

    got = run()
    with own_layers():
        expected = run()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("module", "name", "function"), REPLACEMENTS)
def test_arguments_are_those_of_fla(module: str, name: str, function: Callable[..., Any]) -> None:
    cpu.enable()
    original = attrgetter(name)(import_module(module)).__wrapped__
    theirs, ours = (
        [(each.name, each.default, each.kind) for each in signature(f).parameters.values()][1:]
        for f in (original, function)
    )
    assert ours == theirs
