"""Softmax attention on CPU tensors, against a naive form in fp64 and fla's Triton kernels."""

import copy
import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_composer import cpu
from flame_composer.cpu import attention
from flame_composer.cpu.attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    fused_flash_attn_func,
    fused_flash_attn_varlen_func,
)
from flame_composer.cpu.coverage import missing

cpu.enable()

import fla.layers.attn  # noqa: E402
from fla.models import GLAConfig, TransformerConfig  # noqa: E402
from transformers.utils import is_flash_attn_2_available  # noqa: E402

from flame_composer.cpu.enable import _supply_flash_attention  # noqa: E402
from tests import stack  # noqa: E402
from tests.fixtures.attention import make_fixtures  # noqa: E402

TORCH_HAS_KERNELS = stack.TORCH >= (2, 15)

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "attention"


def naive(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Return softmax(q k / sqrt(D)) v, [B, T, H, D], over the keys that each query sees."""
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    ahead = torch.arange(T)[:, None] + S - T - torch.arange(S)[None]
    sees = (ahead >= 0) & (ahead < (window or S + T))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def sides(window: int | None) -> tuple[int, int]:
    """Return flash-attn's `window_size`, as fla passes it."""
    return (-1, -1) if window is None else (window - 1, 0)


def draw(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=dtype).requires_grad_() for shape in shapes]


def assert_same(got: Tensor, want: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    """Same output, and same gradients of the inputs under the same random weights."""
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    ours, theirs = (torch.autograd.grad((each * weights).sum(), inputs) for each in (got, want))
    for a, b in zip((got, *ours), (want, *theirs), strict=True):
        assert (a - b).abs().max() <= tolerance


heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)])
windows = st.none() | st.integers(1, 130)


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 200),
    S=st.integers(1, 200),
    B=st.integers(1, 2),
    heads=heads,
    window=windows,
    seed=st.integers(0, 9),
)
def test_rows_equal_the_naive_form(T, S, B, heads, window, seed):
    """S > T is decoding and a prompt in pieces; T > S is a piece longer than what is kept."""
    H, G = heads
    q, k, v = draw(seed, (B, T, H, 8), (B, S, G, 8), (B, S, G, 8))
    got = flash_attn_func(q, k, v, causal=True, window_size=sides(window))
    assert_same(got, naive(q, k, v, window), [q, k, v], 1e-12)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    kept=st.integers(0, 40),
    heads=heads,
    window=windows,
    seed=st.integers(0, 9),
)
def test_documents_equal_the_naive_form_of_each(lengths, kept, heads, window, seed):
    """`kept` keys precede the queries of each document, as in a prompt that is read in pieces."""
    H, G = heads
    of_keys = [length + kept for length in lengths]
    q, k, v = draw(seed, (sum(lengths), H, 8), (sum(of_keys), G, 8), (sum(of_keys), G, 8))
    borders = [torch.tensor([0, *each]).cumsum(0).int() for each in (lengths, of_keys)]
    got = flash_attn_varlen_func(
        q, k, v, *borders, max(lengths), max(of_keys), causal=True, window_size=sides(window)
    )
    documents = zip(*map(pairwise, (borders[0].tolist(), borders[1].tolist())), strict=True)
    each = [
        naive(q[None, a:b], k[None, c:d], v[None, c:d], window)[0] for (a, b), (c, d) in documents
    ]
    assert_same(got, torch.cat(each), [q, k, v], 1e-12)


@pytest.mark.parametrize("window", [None, 20])
def test_a_document_has_the_same_bits_alone_and_packed(window):
    borders = torch.tensor([0, 70, 71, 150])
    q, k, v = draw(0, (150, 4, 8), (150, 2, 8), (150, 2, 8), dtype=torch.float32)
    options = {"causal": True, "window_size": sides(window)}
    packed = flash_attn_varlen_func(q, k, v, borders, borders, 79, 79, **options)
    gradients = torch.autograd.grad(packed.sum(), (q, k, v))
    for a, b in pairwise(borders.tolist()):
        own = [x[a:b].detach().requires_grad_() for x in (q, k, v)]
        alone = flash_attn_func(*(x[None] for x in own), **options)[0]
        assert torch.equal(alone, packed[a:b])
        for x, y in zip(torch.autograd.grad(alone.sum(), own), gradients, strict=True):
            assert torch.equal(x, y[a:b])


def pairs_computed(step) -> int:
    """Return the pairs of queries and keys that PyTorch's attention is asked for in a step."""
    counted = []
    original = torch.nn.functional.scaled_dot_product_attention

    def count(q, k, *args, **kwargs):
        counted.append(q.shape[-2] * k.shape[-2])
        return original(q, k, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = count
    try:
        step()
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    return sum(counted)


def test_the_work_is_that_of_the_documents_and_of_the_window():
    """Measured in pairs, not in seconds: 16 documents of 64 tokens, and a window of 64 in 1024."""
    q, k, v = draw(0, (1024, 2, 8), (1024, 2, 8), (1024, 2, 8))
    borders = torch.arange(0, 1025, 64)

    def documents():
        flash_attn_varlen_func(q, k, v, borders, borders, 64, 64, causal=True)

    def window():
        flash_attn_func(q[None], k[None], v[None], causal=True, window_size=(63, 0))

    assert pairs_computed(documents) == 1024 * 64
    assert pairs_computed(window) <= 1024 * 2 * 64


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "dropout_p": 0.1}, {"causal": True, "window_size": (3, 3)}]
)
def test_what_no_model_asks_for_is_refused(options):
    q, k, v = draw(0, (1, 3, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8))
    with pytest.raises(NotImplementedError, match="without dropout and to earlier tokens only"):
        flash_attn_func(q, k, v, **options)


@pytest.mark.parametrize("name", make_fixtures.MODELS)
def test_models_agree_with_the_triton_kernels(name):
    case = make_fixtures.MODELS[name]
    model = make_fixtures.make_model(case)
    got = make_fixtures.run_model(case, model)
    with np.load(FIXTURES / f"{name}.npz") as stored:
        assert list(model.state_dict()) == json.loads(str(stored["state_dict_keys"]))
        results = {key: value for key, value in stored.items() if key != "state_dict_keys"}
    assert results.keys() == got.keys()
    for key, want in results.items():
        error = np.linalg.norm(got[key] - want) / np.linalg.norm(want)
        assert error < (1e-4 if key.startswith("grad:") else 1e-5), key


def shaped(kind: str, **changes) -> torch.nn.Module:
    """Return a model whose last layer of four is attention (`gla`), or all are (`transformer`)."""
    size = make_fixtures.SMALL | {"num_hidden_layers": 4, "num_heads": 2}
    if kind == "gla":
        changes = {"attn": {"layers": [3], "num_heads": 4, **changes}}
    case = {"type": kind, "config": size | changes}
    return make_fixtures.make_model(case).eval()


@pytest.mark.parametrize("kind", ["gla", "transformer"])
@pytest.mark.parametrize("window", [None, 16])
def test_packed_documents_equal_the_documents_alone(kind, window):
    model, borders = shaped(kind, window_size=window), [0, 70, 71, 150]
    input_ids = make_fixtures.tokens((1, 150))
    packed = torch.tensor(borders)
    with torch.no_grad():
        logits = model(input_ids=input_ids, cu_seqlens=packed, use_cache=False).logits
        for a, b in pairwise(borders):
            alone = model(input_ids=input_ids[:, a:b], use_cache=False).logits
            assert (logits[:, a:b] - alone).norm() < 3e-6 * alone.norm()
        changed = input_ids.clone()
        changed[:, : borders[1]] = 5
        changed[:, borders[2] :] = 6
        again = model(input_ids=changed, cu_seqlens=packed, use_cache=False).logits
    assert torch.equal(again[:, borders[1] : borders[2]], logits[:, borders[1] : borders[2]])


def generate(model, prompt: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    mask = torch.ones_like(prompt) if mask is None else mask
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=mask, **settings, **options)


@pytest.mark.parametrize("kind", ["gla", "transformer"])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("length", [1, 10, 70])
def test_generation_with_the_cache_equals_greedy_without(kind, window, length):
    """A window of 16 is longer than the first prompts, but shorter than what is written."""
    model = shaped(kind, window_size=window, num_kv_heads=2)
    prompt = make_fixtures.tokens((2, length))
    expected = prompt
    with torch.no_grad():
        for _ in range(12):
            logits = model(input_ids=expected, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert len(expected[:, length:].unique()) > 1
    assert torch.equal(generate(model, prompt), expected)


@pytest.mark.parametrize("kind", ["gla", "transformer"])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("length", [7, 40])
def test_left_padded_prompts_generate_what_they_would_alone(kind, window, length):
    model, paddings = shaped(kind, window_size=window), [0, 3, length - 1]
    prompts = make_fixtures.tokens((3, length))
    mask = torch.ones_like(prompts)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    together = generate(model, prompts * mask, mask)
    for row, padding in enumerate(paddings):
        alone = generate(model, prompts[row : row + 1, padding:])
        assert torch.equal(together[row, padding:], alone[0])


@pytest.mark.parametrize("kind", ["gla", "transformer"])
def test_a_few_steps_learn_a_row(kind):
    model = shaped(kind, num_kv_heads=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    input_ids = make_fixtures.tokens((1, 80))
    losses = []
    for _ in range(30):
        loss = model(
            input_ids=input_ids, labels=input_ids, cu_seqlens=torch.tensor([0, 50, 80])
        ).loss
        loss.backward()
        assert all(each.grad is not None for each in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_bfloat16_trains_like_float32():
    low = shaped("transformer").bfloat16().train()
    high = copy.deepcopy(low).float()
    input_ids = make_fixtures.tokens((2, 70))
    for model in (low, high):
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    for (key, a), b in zip(low.named_parameters(), high.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 0.1 * b.grad.norm(), key


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has flash-attn, or no such layer")
def test_flash_attn_is_not_claimed_to_be_there():
    assert fla.layers.attn.flash_attn_func is flash_attn_func
    assert fla.layers.attn.flash_attn_varlen_func is flash_attn_varlen_func
    assert importlib.util.find_spec("flash_attn") is None
    assert not is_flash_attn_2_available()


def test_with_a_gpu_flash_attn_or_torch_has_the_kernel(monkeypatch):
    """Without flash-attn CUDA tensors take torch's, or nothing; CPU tensors alone come here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fla.layers.attn, "flash_attn_func", None)
    monkeypatch.setattr(fla.layers.attn, "flash_attn_varlen_func", None)
    with monkeypatch.context() as older:
        older.setattr(attention, "has_fused", lambda: False)
        _supply_flash_attention()
    assert fla.layers.attn.flash_attn_func is None
    with pytest.raises(ImportError, match="flash-attn"):
        fla.layers.attn.Attention(hidden_size=8, num_heads=2)
    _supply_flash_attention()
    supplied = fla.layers.attn.flash_attn_func
    assert (supplied is not None) == attention.has_fused() == TORCH_HAS_KERNELS
    if supplied is not None:
        assert supplied.__wrapped__ is fused_flash_attn_func
    monkeypatch.setattr(fla.layers.attn, "flash_attn_func", lambda *_, **__: "flash-attn's")
    _supply_flash_attention()
    chosen = fla.layers.attn.flash_attn_func
    q, k, v = draw(0, (1, 3, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8))
    assert torch.equal(chosen(q, k, v, causal=True), flash_attn_func(q, k, v, causal=True))
    assert chosen(*(x.to("meta") for x in (q, k, v))) == "flash-attn's"


@pytest.mark.skipif(not TORCH_HAS_KERNELS, reason="this torch has no attention over documents")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("S", [70, 90])
def test_torch_is_asked_for_what_fla_asks_for(S, window, monkeypatch):
    """What torch computes there needs a GPU; what it is asked for, and returns, does not."""
    from torch.nn.attention import varlen

    asked, attend = [], varlen.varlen_attn

    def noting(*args: object, **options: object) -> Tensor:
        asked.append((args, options))
        return attend(*args, **options)

    monkeypatch.setattr(varlen, "varlen_attn", noting)
    options = {"causal": True, "window_size": sides(window)}
    made = {"dtype": torch.bfloat16, "device": "meta"}
    q = torch.empty(2, 70, 4, 60, **made, requires_grad=True)
    k, v = (torch.empty(2, S, 2, 60, **made) for _ in range(2))
    got = fused_flash_attn_func(q, k, v, **options)
    assert (got.shape, got.dtype) == (q.shape, q.dtype)
    assert torch.autograd.grad(got.sum(), q)[0].shape == q.shape
    (((q8, k8, v8, of_queries, of_keys, longest_q, longest_k), keys),) = asked
    assert [x.shape for x in (q8, k8, v8)] == [(140, 4, 64), (2 * S, 2, 64), (2 * S, 2, 64)]
    assert (longest_q, longest_k) == (70, S)
    assert (of_queries is of_keys) == (S == 70)
    assert keys == {
        "scale": 60**-0.5,
        "window_size": (-1 if window is None else window - 1, 0),
        "enable_gqa": True,
    }
    with pytest.raises(NotImplementedError, match="without dropout"):
        fused_flash_attn_func(q, k, v, dropout_p=0.1, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(not TORCH_HAS_KERNELS, reason="this torch has no attention over documents")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kept", [0, 30])
def test_torch_and_this_agree_on_a_gpu(window, kept):
    lengths, options = [70, 1, 79], {"causal": True, "window_size": sides(window)}
    of_queries = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    of_keys = of_queries + kept * torch.arange(4, device="cuda").int() if kept else of_queries
    tokens = int(of_keys[-1])
    exact = [x.cuda() for x in draw(0, (150, 4, 60), (tokens, 2, 60), (tokens, 2, 60))]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    borders = (of_queries, of_keys, 79, 79 + kept)
    want = flash_attn_varlen_func(*exact, *borders, **options)
    got = fused_flash_attn_varlen_func(*rounded, *borders, **options)
    of_exact = torch.autograd.grad(want.square().sum(), exact)
    of_rounded = torch.autograd.grad(got.square().sum(), rounded)
    for a, b in zip((got, *of_rounded), (want, *of_exact), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()
    # in fp32 it is computed here
    single = [x.detach().float() for x in exact]
    same = fused_flash_attn_varlen_func(*single, *borders, **options)
    assert (same - want).norm() < 1e-5 * want.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs all models")
def test_which_models_run_on_a_cpu():
    attn = {"layers": [1], "num_heads": 2}
    assert missing(TransformerConfig(num_hidden_layers=2)) is None
    assert missing(GLAConfig(num_hidden_layers=2, attn=attn)) is None
    for key, value in (("attnres_block_size", 2), ("hidden_act", "powglu")):
        found = missing(TransformerConfig(num_hidden_layers=2, **{key: value}))
        assert found == (key, "needs a GPU, and there is none here; leave it out")
