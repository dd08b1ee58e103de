"""Linear layers through oneDNN: PyTorch's results to fp32 rounding, at every size, and nothing
else changed.
"""

from __future__ import annotations

import copy
import faulthandler
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from flame_composer import cpu
from flame_composer.cpu.chunks import MIN_WIDE_PRODUCT
from flame_composer.cpu.decay import chunk_simple_gla
from flame_composer.cpu.linear import (
    MIN_PRODUCTS,
    MIN_WEIGHTS,
    Linear,
    keep_signals_off_the_heap,
    layer_product,
    linear,
    pack,
    product,
    through_onednn,
    use_bf16,
    weight_gradient,
)
from flame_composer.model.build import build_model

SIZES = st.integers(1, 130)


@given(SIZES, SIZES, SIZES, st.booleans(), st.integers(0, 2**31))
@example(1024, 512, 96, True, 0)
@example(2, 1024, 1024, False, 1)
def test_results_and_gradients_are_pytorchs(
    n: int, inputs: int, outputs: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    given = [
        torch.randn(2, n, inputs),
        torch.randn(outputs, inputs),
        *([torch.randn(outputs)] if bias else []),
    ]
    results = []
    for compute in (linear, F.linear):
        x, weight, *rest = (
            tensor.double() if compute is F.linear else tensor.clone() for tensor in given
        )
        leaves = [tensor.requires_grad_() for tensor in (x, weight, *rest)]
        y = compute(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        scale = theirs.abs().max().clamp(min=1e-3)
        assert (ours - theirs).abs().max() <= 2e-6 * scale * max(n, inputs, outputs) ** 0.5


@pytest.fixture
def in_bf16() -> Iterator[None]:
    use_bf16(True)
    yield
    use_bf16(False)


@pytest.mark.parametrize("bias", [True, False])
def test_bf16_is_what_autocast_computes(in_bf16: None, bias: bool) -> None:
    """Input, weight and result are rounded as under autocast; gradients likewise."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(96, 160, bias), nn.Linear(96, 160, bias)
    theirs.load_state_dict(ours.state_dict())
    through_onednn(ours)
    results = []
    for model in (ours, theirs):
        x = torch.randn(1024, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=model is theirs):
            y = model(x)
        y.float().square().sum().backward()
        results.append([y.float(), x.grad, *(each.grad for each in model.parameters())])
    for mine, other in zip(*results, strict=True):
        # The gradient of a bias is summed up in fp32 here, and in bf16 by autocast
        torch.testing.assert_close(
            mine, other, rtol=2e-2, atol=2e-2 * float(other.detach().abs().max())
        )
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], F.linear(x, ours.weight, ours.bias))


@pytest.mark.parametrize("shape", [(0, 96), (3, 0, 96)])
def test_no_rows_at_all(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(96, 160)
    through_onednn(layer)
    x = torch.randn(*shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 160)
    assert x.grad is not None
    assert x.grad.shape == shape


def test_products_with_states_stay_in_fp32(in_bf16: None) -> None:
    """Those that take oneDNN as layers do: of Mamba-2's wide states, for example."""
    heads, size = 64, 64
    assert 64 * size * heads * size >= MIN_WIDE_PRODUCT >= MIN_PRODUCTS
    torch.manual_seed(0)
    q, k = (torch.randn(1, 128, 1, size) for _ in range(2))
    v, g = torch.randn(1, 128, heads, size), -torch.rand(1, 128, heads)

    def computed() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, g)]
        o, _ = chunk_simple_gla(*leaves)
        return [o, *torch.autograd.grad(o.square().sum(), leaves)]

    found = computed()
    use_bf16(False)
    for x, y in zip(found, computed(), strict=True):
        assert torch.equal(x, y)


def test_few_products_stay_in_fp32(in_bf16: None) -> None:
    x, weight = torch.randn(4, 64), torch.randn(64, 64)
    assert 4 * weight.numel() < MIN_PRODUCTS
    assert torch.equal(layer_product(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("shape", [(4096, 64, 300), (4096, 300, 64)])
def test_weight_gradients_are_contiguous(shape: tuple[int, int, int]) -> None:
    n, inputs, outputs = shape
    x, dy = torch.randn(n, inputs), torch.randn(n, outputs)
    assert n * inputs * outputs >= MIN_PRODUCTS
    found = weight_gradient(dy, x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, dy.t() @ x, rtol=1e-3, atol=1e-3)


def test_rows_with_gaps_take_no_longer() -> None:
    """oneDNN took ten seconds for this product of a slice's, and 14 ms for its copy's."""
    gradients, x = torch.randn(512, 1536)[:, 768:], torch.randn(512, 512)
    start = time.perf_counter()
    found = weight_gradient(gradients, x)
    assert time.perf_counter() - start < 2
    assert torch.equal(found, weight_gradient(gradients.contiguous(), x))


def test_the_same_call_gives_the_same_bits() -> None:
    x, weight = torch.randn(4096, 512), torch.randn(1408, 512)
    assert torch.equal(product(x, weight), product(x.clone(), weight.clone()))


def test_a_model_keeps_its_parameters_and_other_layers() -> None:
    class Scaled(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Scaled(8, 8), nn.Linear(8, 4, bias=False))
    plain = copy.deepcopy(model)
    through_onednn(model)
    assert [type(module) for module in model] == [Linear, nn.ReLU, Scaled, Linear]
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), plain(x))
    assert [type(module) for module in copy.deepcopy(model)] == [Linear, nn.ReLU, Scaled, Linear]
    half = model.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def build_wide(*, tied: bool) -> Any:
    """A GLA with weights that are large enough to be laid out."""
    cpu.enable()
    from fla.models import GLAConfig

    torch.manual_seed(0)
    config = GLAConfig(
        vocab_size=600,
        hidden_size=512,
        num_hidden_layers=1,
        num_heads=4,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return build_model(config).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_laid_out_change_nothing(tied: bool) -> None:
    """But the rounding; shared and small ones stay, and the way back gives the same bits."""
    model = build_wide(tied=tied)
    ids = torch.randint(600, (8, 40), generator=torch.Generator().manual_seed(0))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        plain = {rows: model(ids[:rows, :length]).logits for rows, length in ((1, 1), (8, 40))}
        restore = pack(model, 8)
        laid_out = {name for name, value in model.named_parameters() if value.is_mkldnn}
        assert "model.layers.0.mlp.down_proj.weight" in laid_out
        assert "model.layers.0.attn.o_proj.weight" in laid_out
        assert ("lm_head.weight" in laid_out) is not tied
        assert not model.get_input_embeddings().weight.is_mkldnn
        assert all(weights[name].numel() >= MIN_WEIGHTS for name in laid_out)
        for rows, expected in plain.items():
            found = model(ids[:rows, : expected.shape[1]]).logits
            assert (found - expected).abs().max() < 1e-4 * expected.std()
        restore()
        assert (model(ids).logits == plain[8]).all()
    assert all((weights[name] == value).all() for name, value in model.state_dict().items())


def test_no_weight_is_held_twice() -> None:
    """Though the way back is kept."""
    model = build_wide(tied=False)
    model.lm_head.weight.requires_grad_(False)
    before = {name: weakref.ref(weight) for name, weight in model.named_parameters()}
    trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    restore = pack(model, 8)
    laid_out = {name for name, weight in model.named_parameters() if weight.is_mkldnn}
    assert len(laid_out) > 3
    assert {name for name, each in before.items() if each() is None} == laid_out
    restore()
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == trained


def test_nothing_is_laid_out_where_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_wide(tied=False)
    with monkeypatch.context() as within:
        within.setattr(torch.backends.mkldnn, "enabled", False)
        pack(model, 8)
    pack(model.bfloat16(), 8)
    assert not any(value.is_mkldnn for value in model.parameters())


def test_switched_off_with_mkldnn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4096, 64), torch.randn(64, 64)
    with monkeypatch.context() as within:
        within.setattr(torch.backends.mkldnn, "enabled", False)
        assert torch.equal(product(x, weight), F.linear(x, weight))


SIGNALS = """
import signal, sys, time
import torch
from flame_composer.cpu import linear
if sys.argv[1:] == ["guarded"]:
    linear.keep_signals_off_the_heap()
heard, kept = [], []
signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
x, weight = torch.randn(128, 256), torch.randn(300, 256)
end = time.monotonic() + 3
while time.monotonic() < end:
    y = linear.product(x, weight)
    kept = [*kept[-50:], linear.weight_gradient(y, x).sum(1)]
signal.setitimer(signal.ITIMER_REAL, 0)
print(len(heard))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_signal_in_the_middle_of_a_product_does_no_harm(threads: int) -> None:
    """Without the guard this aborts with `corrupted size vs. prev_size` on CPUs with AVX2 or
    AVX-512, if oneDNN is older than 3.11.2.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": f"{threads}"}
    environment.pop("PYTHONFAULTHANDLER", None)
    command = [sys.executable, "-c", SIGNALS, "guarded"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (process.returncode, process.stderr) == (0, "")
    assert int(process.stdout) > 100


@pytest.mark.parametrize(("version", "needs_it"), [("3.7.1", True), ("3.11.2", False)])
def test_the_guard_is_for_versions_that_need_it(
    version: str, needs_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[int] = []
    shown = f"  - Intel(R) MKL-DNN v{version} (Git Hash"
    monkeypatch.setattr(torch.__config__, "show", lambda: shown)
    monkeypatch.setattr(faulthandler, "is_enabled", lambda: False)
    monkeypatch.setattr(faulthandler, "enable", lambda file: enabled.append(file))
    keep_signals_off_the_heap()
    assert enabled == ([2] if needs_it else [])


def test_models_on_a_cpu_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(
        "flame_composer.cpu.linear.keep_signals_off_the_heap", lambda: calls.append(True)
    )
    through_onednn(nn.Linear(2, 2))
    assert calls == [True]
    monkeypatch.setitem(
        cpu.enable.__globals__, "keep_signals_off_the_heap", lambda: calls.append(True)
    )
    cpu.enable()
    assert calls == [True, True]
