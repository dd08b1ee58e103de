"""fla's models whose state decays, on CPU tensors, against fla's own Triton kernels
(tests/fixtures/decay).

"Relative error" is norm-wise throughout: ||a - b|| / ||b||.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flame_composer import cpu
from flame_composer.model.causal_lm import WITHOUT_VARLEN
from tests.cpu.agreement import relative_error
from tests.fixtures.decay import make_fixtures
from tests.fixtures.decay.make_fixtures import CASES, make_model, run_model
from tests.fixtures.gla.make_fixtures import tokens

cpu.enable()

from fla.layers.mamba2 import Mamba2  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURES = Path(make_fixtures.__file__).parent
# For very negative gates, the Triton kernel's own gate gradient is off by 5e-4 from float64.
# test_extreme_gates_agree_with_float64 holds ours to 2e-5.
OFF = {"rwkv6_extreme": "w_proj"}


def hidden_weight_gradient(case: dict, name: str) -> Tensor:
    """The gradient of a weight by a central difference along the gradient that we compute."""
    model = make_model(case).double()
    weight = dict(model.named_parameters())[name]
    input_ids = tokens(case["shape"])
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    direction = weight.grad / weight.grad.norm()
    losses = []
    with torch.no_grad():
        for step in (1e-2, -2e-2):
            weight += step * direction
            losses.append(float(model(input_ids=input_ids, labels=input_ids).loss))
    return torch.tensor([(losses[0] - losses[1]) / 2e-2, float(weight.grad.norm())])


@pytest.mark.parametrize("name", CASES)
def test_model_agrees_with_the_triton_kernels(name):
    case = CASES[name]
    model = make_model(case)
    got = run_model(case, model)
    with np.load(FIXTURES / f"{name}.npz") as stored:
        assert list(model.state_dict()) == json.loads(str(stored["state_dict_keys"]))
        results = {key: value for key, value in stored.items() if key != "state_dict_keys"}
    assert results.keys() == got.keys()
    for key, want in results.items():
        if case["config"]["model_type"] == "lightnet" and key.endswith("o_proj.weight"):
            continue  # see test_the_output_gradient_of_lightnet
        assert np.linalg.norm(want) > 0, key
        tolerance = 1e-4 if key.startswith("grad:") else 1e-5
        if name in OFF and OFF[name] in key:
            tolerance = 1e-3
        assert relative_error(got[key], want) < tolerance, key


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("_extreme")])
def test_extreme_gates_agree_with_float64(name):
    case = CASES[name]
    single, double = make_model(case), make_model(case).double()
    input_ids = tokens(case["shape"])
    for model in (single, double):
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    for (key, a), b in zip(single.named_parameters(), double.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 2e-5, key


def test_the_output_gradient_of_lightnet():
    """fla 0.5.2 multiplies by the norm before its gate, so its kernel's gradient of o_proj is wrong
    by as much as it is long; ours is that of the loss.
    """
    case, name = CASES["lightnet"], "model.layers.0.attn.o_proj.weight"
    with np.load(FIXTURES / "lightnet.npz") as stored:
        theirs = stored[f"grad:{name}"]
    assert relative_error(run_model(case, make_model(case))[f"grad:{name}"], theirs) > 0.5
    slope, length = hidden_weight_gradient(case, name)
    assert abs(slope / length - 1) < 1e-3


WITH_VARLEN = [
    name for name, case in CASES.items() if case["config"]["model_type"] not in WITHOUT_VARLEN
]


def test_the_models_that_cannot_keep_documents_apart_are_known():
    without = {case["config"]["model_type"] for case in CASES.values()} & set(WITHOUT_VARLEN)
    assert without == {"linear_attn", "mamba2", "lightnet"}


@pytest.mark.parametrize("name", WITH_VARLEN)
def test_packed_documents_equal_the_documents_alone(name):
    model = make_model(CASES[name]).eval()
    input_ids, offsets = tokens((1, 150)), [0, 70, 71, 150]
    cu_seqlens = torch.tensor(offsets)
    with torch.no_grad():
        logits = model(input_ids=input_ids, cu_seqlens=cu_seqlens, use_cache=False).logits
        for start, end in pairwise(offsets):
            alone = model(input_ids=input_ids[:, start:end], use_cache=False).logits
            assert relative_error(logits[:, start:end], alone) < 5e-6
        changed = input_ids.clone()
        changed[:, :70] = 5
        changed[:, 71:] = 6
        again = model(input_ids=changed, cu_seqlens=cu_seqlens, use_cache=False).logits
    assert torch.equal(again[:, 70:71], logits[:, 70:71])


@pytest.mark.parametrize("prompt_length", [1, 7, 70])
@pytest.mark.parametrize("name", CASES)
def test_generation_with_the_cache_equals_greedy_without(name, prompt_length):
    model = make_model(CASES[name]).eval()
    prompt = expected = tokens((2, prompt_length))
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=expected, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert len(expected[:, prompt_length:].unique()) > 1
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", CASES)
def test_the_cache_holds_what_the_prefill_left(name):
    """Logits, not only tokens: token by token from a cache equals one pass."""
    model = make_model(CASES[name]).eval()
    input_ids = tokens((2, 80))
    with torch.no_grad():
        whole = model(input_ids=input_ids, use_cache=False).logits
        out = model(input_ids=input_ids[:, :66], use_cache=True)
        steps = [out.logits]
        for t in range(66, 80):
            cache = out.past_key_values
            out = model(input_ids=input_ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), whole) < 5e-6


@pytest.mark.parametrize(
    "name", ["mamba2", "rwkv6_packed", "gsa", "hgrn2_packed", "linear_attn", "lightnet"]
)
def test_bfloat16_model_trains_like_float32(name):
    """Both start from the same bfloat16 numbers; activations keep 8 bits."""
    case = CASES[name]
    low, high = make_model(case).bfloat16(), make_model(case)
    high.load_state_dict(low.state_dict())
    input_ids = tokens((2, 70))
    losses = [model(input_ids=input_ids, labels=input_ids).loss for model in (low, high)]
    assert relative_error(losses[0].float(), losses[1]) < 0.02
    losses[0].backward()
    assert all(parameter.grad.isfinite().all() for parameter in low.parameters())


def test_groups_of_mamba2_are_those_of_its_decoding():
    """fla's own form for CPUs repeats B and C in another order than decoding does."""
    config = CASES["mamba2"]["config"] | {"n_groups": 2}
    model = make_model({"config": config}).eval()
    layer = model.backbone.layers[0].mixer
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    genuine = Mamba2.torch_forward.__wrapped__
    state, outputs = {}, []
    with torch.no_grad():
        state["conv_state"] = torch.zeros(2, layer.conv_dim, layer.conv_kernel_size)
        state["recurrent_state"] = torch.zeros(2, 4, layer.head_dim, layer.ssm_state_size)
        for t in range(9):
            o, state["conv_state"], state["recurrent_state"] = genuine(
                layer, x[:, t : t + 1], state
            )
            outputs.append(o)
        assert relative_error(layer.torch_forward(x)[0], torch.cat(outputs, 1)) < 1e-6
        assert relative_error(genuine(layer, x)[0], torch.cat(outputs, 1)) > 0.01


def test_padding_of_mamba2_changes_nothing():
    model = make_model(CASES["mamba2"]).eval()
    input_ids = tokens((2, 20))
    mask = torch.ones_like(input_ids)
    mask[1, :5] = 0
    with torch.no_grad():
        padded = model(input_ids=input_ids, attention_mask=mask).logits
        alone = model(input_ids=input_ids[1:, 5:]).logits
    assert relative_error(padded[1:, 5:], alone) < 1e-5
