"""fla's GLA models on CPU tensors, against what fla's own Triton kernels gave (tests/fixtures/gla).

"Relative error" is norm-wise throughout: ||a - b|| / ||b||.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flame_composer import cpu
from flame_composer.cpu import operations
from flame_composer.cpu.coverage import ON_CPU
from flame_composer.cpu.enable import _by_device, find
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.upstream.autotuner import try_the_smallest_only
from tests.conftest import small_fla
from tests.cpu.agreement import assert_same, leaves, relative_error
from tests.data_fixtures import byte_tokenizer
from tests.fixtures.gla import make_fixtures
from tests.stack import FLA, backends_on_cpu

cpu.enable()

from fla.layers import gla as fla_layer  # noqa: E402
from fla.models import GLAConfig, GLAForCausalLM  # noqa: E402
from fla.modules import (  # noqa: E402
    FusedCrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    ShortConvolution,
)
from fla.modules.activations import ACT2FN, swiglu, swiglu_linear  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "gla"


def make_model(config: dict, gates: list[float] | None = None) -> GLAForCausalLM:
    model = GLAForCausalLM(GLAConfig(**config))
    make_fixtures.fill(model, gates)
    return model


@pytest.mark.filterwarnings("ignore:`fuse_linear_cross_entropy` is enabled")
@pytest.mark.parametrize("name", make_fixtures.MODELS)
def test_model_agrees_with_the_triton_kernels(name):
    case = make_fixtures.MODELS[name]
    model = GLAForCausalLM(GLAConfig(**case["config"]))
    got = make_fixtures.run_model(case, model)
    with np.load(FIXTURES / f"{name}.npz") as stored:
        assert list(model.state_dict()) == json.loads(str(stored["state_dict_keys"]))
        results = {key: value for key, value in stored.items() if key != "state_dict_keys"}
    assert results.keys() == got.keys()
    for key, want in results.items():
        assert np.linalg.norm(want) > 0, key
        assert relative_error(got[key], want) < (1e-4 if key.startswith("grad:") else 1e-5), key


@pytest.mark.filterwarnings("ignore:According to Bo")  # fla's word on its RWKV
@pytest.mark.filterwarnings("ignore:The correction_factor is set to 1 by default")  # Comba's
@pytest.mark.parametrize("name", sorted({*ON_CPU} - {"gsa", "hgrn2", "lightnet"}))
def test_models_train_under_autocast(name: str) -> None:
    """Kernels compute in fp32 there, going forward and back. (Those three have a norm and linear
    layer in one function of fla's own, whose backward pass knows autocast on GPUs only.)
    """
    torch.manual_seed(0)
    model = build_model(build_hf_config(small_fla(name), byte_tokenizer(), 128)).train()
    ids = torch.randint(0, 200, (2, 70))
    found = []
    for is_on in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            logits = model(input_ids=ids, use_cache=False).logits
        logits.float().square().mean().backward()
        grads = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
        found.append((logits.detach().float(), torch.cat(grads)))
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.1 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to compare with")
@pytest.mark.parametrize(
    "name", ["like_340m", "like_7b", "packed", "extreme_gates", "short_sequence"]
)
def test_cpu_and_cuda_agree(name):
    try_the_smallest_only()
    case = make_fixtures.MODELS[name]
    model = make_model(case["config"], case.get("gates"))
    on_cpu = make_fixtures.run_model(case, model)
    model.zero_grad()
    model.cuda()
    input_ids = make_fixtures.tokens(case["shape"]).cuda()
    packed = {"cu_seqlens": torch.tensor(case["cu_seqlens"]).cuda()} if "cu_seqlens" in case else {}
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False, **packed).logits
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False, **packed).loss
    loss.backward()
    # Triton multiplies float32 matrices in TF32, which keeps 10 bits of each factor.
    assert relative_error(logits, on_cpu["logits"]) < 5e-3
    assert relative_error(loss, on_cpu["loss"]) < 1e-3
    for key, parameter in model.named_parameters():
        assert relative_error(parameter.grad, on_cpu[f"grad:{key}"]) < 3e-2, key


def test_packed_documents_equal_the_documents_alone():
    case = make_fixtures.MODELS["packed"]
    model = make_model(case["config"]).eval()
    input_ids, offsets = make_fixtures.tokens(case["shape"]), case["cu_seqlens"]
    with torch.no_grad():
        logits = model(
            input_ids=input_ids, cu_seqlens=torch.tensor(offsets), use_cache=False
        ).logits
        for start, end in pairwise(offsets):
            alone = model(input_ids=input_ids[:, start:end], use_cache=False).logits
            assert relative_error(logits[:, start:end], alone) < 2e-6
        changed = input_ids.clone()
        changed[:, : offsets[1]] = 5
        changed[:, offsets[2] :] = 6
        again = model(input_ids=changed, cu_seqlens=torch.tensor(offsets), use_cache=False).logits
    assert torch.equal(again[:, offsets[1] : offsets[2]], logits[:, offsets[1] : offsets[2]])


def greedy_without_cache(model: GLAForCausalLM, input_ids: Tensor, num_tokens: int) -> Tensor:
    for _ in range(num_tokens):
        logits = model(input_ids=input_ids, use_cache=False).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
    return input_ids


def generate(
    model: GLAForCausalLM, input_ids: Tensor, num_tokens: int, mask: Tensor | None = None
) -> Tensor:
    mask = torch.ones_like(input_ids) if mask is None else mask
    options = {
        "do_sample": False,
        "max_new_tokens": num_tokens,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return model.generate(input_ids, attention_mask=mask, **options)


# Untied: a random model with tied embeddings repeats one token for ever.
UNTIED = make_fixtures.LIKE_340M | {"tie_word_embeddings": False}
GENERATING = {
    "like_340m": UNTIED,
    "like_7b": make_fixtures.LIKE_7B,
    "short_conv": UNTIED | {"use_short_conv": True},
    "unfused": UNTIED | {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False},
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt_length", [1, 7, 70])
@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_the_cache_equals_greedy_without(name, prompt_length, batch_size):
    model = make_model(GENERATING[name]).eval()
    prompt = make_fixtures.tokens((batch_size, prompt_length))
    with torch.no_grad():
        expected = greedy_without_cache(model, prompt, 8)
    assert len(expected[:, prompt_length:].unique()) > 1
    assert torch.equal(generate(model, prompt, 8), expected)


@pytest.mark.parametrize("prompt_length", [7, 70])
@pytest.mark.parametrize("name", ["like_340m", "short_conv"])
def test_left_padded_prompts_generate_what_they_would_alone(name, prompt_length):
    model = make_model(GENERATING[name]).eval()
    prompts = make_fixtures.tokens((3, prompt_length))
    mask = torch.ones_like(prompts)
    paddings = [0, 3, prompt_length - 1]
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    together = generate(model, prompts * mask, 6, mask)
    for row, padding in enumerate(paddings):
        assert torch.equal(
            together[row, padding:], generate(model, prompts[row : row + 1, padding:], 6)[0]
        )


def test_the_cache_holds_what_the_prefill_left():
    """Logits, not only tokens: token by token from a cache equals one pass."""
    model = make_model(make_fixtures.LIKE_7B).eval()
    input_ids = make_fixtures.tokens((2, 80))
    with torch.no_grad():
        whole = model(input_ids=input_ids, use_cache=False).logits
        out = model(input_ids=input_ids[:, :66], use_cache=True)
        steps = [out.logits]
        for t in range(66, 80):
            token, cache = input_ids[:, t : t + 1], out.past_key_values
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), whole) < 2e-6


@pytest.mark.parametrize("expand_k", [0.5, 1])
@pytest.mark.parametrize("expand_v", [0.5, 1, 2])
def test_every_expand_ratio_and_gate_form_trains(expand_k, expand_v):
    """The fused norm and gate equals the separate one on the same weights, in loss and
    gradients.
    """
    config = make_fixtures.LIKE_340M | {"expand_k": expand_k, "expand_v": expand_v}
    fused, separate = make_model(config), make_model(config | {"fuse_norm": False})
    renamed = {k.replace("g_norm_swish_gate", "g_norm"): v for k, v in fused.state_dict().items()}
    separate.load_state_dict(renamed)
    input_ids = make_fixtures.tokens((2, 70))
    losses = [model(input_ids=input_ids, labels=input_ids).loss for model in (fused, separate)]
    assert relative_error(losses[0], losses[1]) < 1e-6
    for loss in losses:
        loss.backward()
    gradients = {
        k.replace("g_norm_swish_gate", "g_norm"): p.grad for k, p in fused.named_parameters()
    }
    for key, parameter in separate.named_parameters():
        assert relative_error(gradients[key], parameter.grad) < 1e-4, key


@pytest.mark.parametrize("name", GENERATING)
def test_bfloat16_model_trains_like_float32(name):
    """Both start from the same bfloat16 numbers; activations keep 8 bits, and relu may flip."""
    low = make_model(GENERATING[name]).bfloat16()
    high = make_model(GENERATING[name])
    high.load_state_dict(low.state_dict())
    input_ids = make_fixtures.tokens((2, 70))
    for model in (low, high):
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    for (key, a), b in zip(low.named_parameters(), high.parameters(), strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert relative_error(a.grad, b.grad) < 0.1, key


@pytest.mark.parametrize(
    ("name", "plain"), [("swish", F.silu), ("sigmoid", torch.sigmoid), ("logsigmoid", F.logsigmoid)]
)
def test_activations(name, plain):
    (x,) = leaves((5, 6))
    assert_same(ACT2FN[name](x), plain(x), [x])


def test_swiglu():
    x, y, weight, bias = leaves((2, 5, 6), (2, 5, 6), (4, 6), (4,))
    assert_same(swiglu(x, y), F.silu(x) * y, [x, y])
    z = F.silu(x) * y
    assert_same(swiglu_linear(x, y, weight, bias), F.linear(z, weight, bias), [x, y, weight, bias])
    assert_same(swiglu_linear(x, y, weight, None), F.linear(z, weight), [x, y, weight])


TARGET = torch.tensor([3, 0, -100, 6, 1, -100, 2])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy(reduction, label_smoothing):
    (logits,) = leaves((7, 8))
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    criterion = FusedCrossEntropyLoss(inplace_backward=True, **options)
    before = logits.detach().clone()
    assert_same(criterion(logits, TARGET), F.cross_entropy(logits, TARGET, **options), [logits])
    assert torch.equal(logits, before)


def test_cross_entropy_scale_cap_and_z_loss():
    (logits,) = leaves((7, 8))
    criterion = FusedCrossEntropyLoss(
        logit_scale=2.0, logit_softcapping=3.0, lse_square_scale=0.1, return_z_loss=True
    )
    capped = 3.0 * torch.tanh(2.0 * logits / 3.0)
    z_loss = 0.1 * capped.logsumexp(-1).square()[TARGET != -100].mean()
    loss, got_z_loss = criterion(logits, TARGET)
    assert_same(loss, F.cross_entropy(capped, TARGET) + z_loss, [logits])
    assert relative_error(got_z_loss, z_loss) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fused_linear_cross_entropy(with_bias, reduction):
    x, weight, bias = leaves((7, 5), (8, 5), (8,))
    criterion = FusedLinearCrossEntropyLoss(reduction=reduction, num_chunks=3)
    got = criterion(x.unsqueeze(0), TARGET.unsqueeze(0), weight, bias if with_bias else None)
    want = F.cross_entropy(
        F.linear(x, weight, bias if with_bias else None), TARGET, reduction=reduction
    )
    assert_same(3 * got, 3 * want, [x, weight, bias] if with_bias else [x, weight])


@pytest.mark.parametrize("offsets", [None, [0, 1, 3, 20]], ids=["dense", "packed"])
@pytest.mark.parametrize("bias", [True, False])
def test_short_convolution(bias, offsets):
    conv = ShortConvolution(6, 4, bias=bias)
    B, N = (2, 2) if offsets is None else (1, 3)
    x, state = leaves((B, 20, 6), (N, 6, 4))
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    y, final = conv(x, cache=state, output_final_state=True, cu_seqlens=cu_seqlens)
    rows = list(x) if offsets is None else [x[0, a:b] for a, b in pairwise(offsets)]
    want, want_final = [], []
    for row, before in zip(rows, state, strict=True):
        history = torch.cat([before.T, row])
        taps = torch.stack([history[t + 1 : t + 5] for t in range(len(row))])  # [t, W, D]
        sums = torch.einsum("twd,dw->td", taps, conv.weight[:, 0])
        want.append(F.silu(sums if conv.bias is None else sums + conv.bias))
        want_final.append(history[-4:].T)
    want = torch.stack(want) if offsets is None else torch.cat(want)[None]
    assert_same((y, final), (want, torch.stack(want_final)), [x, state, *conv.parameters()])
    with torch.no_grad():
        token, cache = torch.ones(N, 1, 6), final.clone()
        stepped, _ = conv.step(token, None, cache, output_final_state=True)
        longer = conv(torch.cat([token, token], 1), cache=final, output_final_state=True)[0][:, :1]
    assert relative_error(stepped, longer) < 1e-6
    assert torch.equal(cache, torch.cat([final[..., 1:], token.mT], -1))


def test_a_fresh_process_needs_the_one_line_only(tmp_path):
    """Nothing happens at import; then fla imports, its models are registered, and a batch
    trains.
    """
    script = """
import sys
from flame_composer import cpu
from flame_composer.cpu.enable import _by_device, find
assert "fla" not in sys.modules and "triton" not in sys.modules
cpu.enable()
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
sizes = dict(hidden_size=32, num_hidden_layers=1, num_heads=2, vocab_size=50, intermediate_size=32)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gla", **sizes))
input_ids = torch.arange(40).view(1, 40)
model(input_ids=input_ids, labels=input_ids).loss.backward()
assert all(p.grad.norm() > 0 for p in model.parameters())
from fla.models.bitnet import BitNetConfig
assert isinstance(BitNetConfig.__doc__, str)
print(type(model).__module__, BitNetConfig in MODEL_FOR_CAUSAL_LM_MAPPING)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::ImportWarning", "-c", script]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["fla.models.gla.modeling_gla", "True"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU fla compiles for it")
def test_nothing_is_compiled_and_nothing_said_of_gpus():
    """fla has its squared ReLU compiled by torch, which takes a C++ compiler and minutes."""
    program = """
import warnings
warnings.simplefilter("ignore")  # what fla's RWKV says of its initialisation
from flame_composer import cpu; cpu.enable()
import torch
from transformers import AutoConfig, AutoModelForCausalLM
sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16}
for name in ("rwkv6", "rwkv7", "mamba2"):
    config = AutoConfig.for_model(name, num_heads=4 if name == "mamba2" else 2, **sizes)
    ids = torch.arange(20)[None]
    AutoModelForCausalLM.from_config(config)(input_ids=ids, labels=ids).loss.backward()
from torch._dynamo.utils import counters
assert not counters["frames"], counters
"""
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_enabling_twice_changes_nothing():
    before = fla_layer.chunk_gla, fla_layer.fused_recurrent_gla, FusedCrossEntropyLoss.forward
    number = len(backends_on_cpu())
    assert number
    cpu.enable()
    assert before == (
        fla_layer.chunk_gla,
        fla_layer.fused_recurrent_gla,
        FusedCrossEntropyLoss.forward,
    )
    assert len(backends_on_cpu()) == number


def test_other_devices_take_flas_own_path():
    from fla.ops.gla import chunk_gla

    assert fla_layer.chunk_gla.__wrapped__ is chunk_gla
    backend = backends_on_cpu()[0]
    for device, ours in (("cpu", True), ("meta", False)):
        x = torch.empty(2, device=device)
        assert backend.verify("swish_fwd", x)[0] is ours
        assert backend.verify("layer_norm_gated_fwd", x=x, g=x)[0] is ours
        assert _by_device(lambda x: "fla", lambda x: "ours")(x) == ("ours" if ours else "fla")


NORMS = ("fused_norm_gate", "l2norm", "layernorm")
MODULES_OF_OPERATIONS = (
    [
        *("fla.modules.conv.triton.ops", "fla.modules.rotary"),
        *("fla.modules.activations", "fla.modules.fused_cross_entropy"),
        "fla.modules.fused_linear_cross_entropy",
        *(f"fla.modules.{name}" for name in NORMS),
    ]
    if FLA < (0, 6)
    else [
        *("fla.modules.causal_conv1d.ops", "fla.modules.rotary.ops"),
        *("fla.modules.activations.ops", "fla.modules.fused_cross_entropy.ops"),
        "fla.modules.fused_linear_cross_entropy.ops",
        *(f"fla.modules.norm.{name}" for name in NORMS),
    ]
)


def test_the_operations_have_flas_signatures():
    """fla calls them by position, so parameter names and order must be its own."""
    modules = list(map(importlib.import_module, MODULES_OF_OPERATIONS))
    for operation in operations.OPERATIONS:
        theirs = next(
            getattr(m, operation.__name__) for m in modules if hasattr(m, operation.__name__)
        )
        ours = list(inspect.signature(operation).parameters)
        names = list(inspect.signature(theirs).parameters)
        # In fla 0.6 convolutions have another name for it
        assert ["chunk_size" if each == "BT" else each for each in ours][: len(names)] == [
            "chunk_size" if each == "BT" else each for each in names
        ], operation
        assert set(names) <= set(ours)
    for module, name, version in operations.REPLACEMENTS:
        if not name.endswith(("forward", "backward")):
            theirs = getattr(find(module, name), name).__wrapped__
            names = [p for p in inspect.signature(theirs).parameters if p != "kwargs"]
            # What one version of fla has, and what it takes out of its keyword arguments, may
            # follow by name
            ours = list(inspect.signature(version).parameters)
            assert [each for each in ours if each in names] == names, version


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU fla's own driver is active")
def test_an_operation_without_a_cpu_form_says_so():
    from fla.ops.utils import chunk_local_cumsum

    with pytest.raises(RuntimeError, match="a Triton kernel was called on a machine without a GPU"):
        chunk_local_cumsum(torch.ones(1, 4, 2), chunk_size=64)
    x = torch.ones(1, 2, 1, 4)
    with pytest.raises(NotImplementedError, match="gates on the keys only"):
        fla_layer.fused_recurrent_gla(x, x, x, gk=x, gv=x)


def test_switched_off_dispatch_is_an_error(monkeypatch):
    monkeypatch.setenv("FLA_DISABLE_BACKEND_DISPATCH", "1")
    with pytest.raises(
        ValueError, match="FLA_DISABLE_BACKEND_DISPATCH=1 keeps fla from running on a CPU"
    ):
        cpu.enable()


def test_fla_imported_with_dispatch_off_is_an_error(monkeypatch):
    module = "fla.ops.backends" if FLA < (0, 6) else "fla.backends"
    monkeypatch.setattr(f"{module}._DISPATCH_DISABLED", True)
    with pytest.raises(
        ValueError, match="FLA_DISABLE_BACKEND_DISPATCH=1: unset it and start again"
    ):
        cpu.enable()


def test_an_unknown_fla_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.7.0")
    with pytest.raises(ImportError, match=r"fla-core 0\.7\.0 is installed"):
        cpu.enable()
