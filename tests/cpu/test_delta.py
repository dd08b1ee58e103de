"""The delta rule's family on CPU tensors, against its definition in float64 and against what fla's
own Triton kernels gave (tests/fixtures/delta).

"Relative error" is norm-wise throughout: ||a - b|| / ||b||.
"""

import importlib
import importlib.util
import inspect
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_composer import cpu
from flame_composer.cpu import delta, delta_variants, rwkv7
from flame_composer.cpu.coverage import ON_CPU
from flame_composer.cpu.delta_inputs import l2norm_bwd, l2norm_fwd
from flame_composer.cpu.delta_scores import MAX_DECAY, plan_blocks
from tests.cpu.agreement import relative_error
from tests.fixtures.delta import make_fixtures
from tests.stack import FLA

cpu.enable()

import fla.models  # noqa: E402

# Comba warns of its own default, and RWKV-7 of fla's implementation.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The correction_factor is set to 1 by default"),
    pytest.mark.filterwarnings("ignore:According to Bo"),
]

FIXTURES = Path(__file__).parents[1] / "fixtures" / "delta"

# Log gates from standard normal numbers: from no decay at all to states forgotten within a token.
GATES = {
    "zero": lambda x: 0 * x,
    "near_zero": lambda x: -1e-6 * x.abs(),
    "usual": lambda x: F.logsigmoid(x) / 16,
    "strong": lambda x: 3 * F.logsigmoid(x),
    "mixed": lambda x: torch.where(x > 0, -1e-3 * x, 80 * x),
    "very_negative": lambda x: -80 - x.abs(),
}
B, H, HV, K, V = 2, 2, 4, 5, 7


# The definition


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    h0: Tensor,
    offsets: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one sequence and one token after the other; states `[N, HV, K, V]`."""
    rows, T = q.shape[:2]
    spans = (
        [(row, 0, T) for row in range(rows)]
        if offsets is None
        else [(0, *span) for span in pairwise(offsets)]
    )
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    outputs, states = [], []
    for (row, start, end), state in zip(spans, h0, strict=True):
        for t in range(start, end):
            if g is not None:
                decay = g[row, t].exp()
                state = state * decay.view(len(decay), -1, 1)
            error = v[row, t] - torch.einsum("hk,hkv->hv", k[row, t], state)
            error = error * beta[row, t].unsqueeze(-1)
            state = state + torch.einsum("hk,hv->hkv", k[row, t], error)
            outputs.append(torch.einsum("hk,hkv->hv", q[row, t], state) * q.shape[-1] ** -0.5)
        states.append(state)
    return torch.stack(outputs).view(rows, T, *v.shape[2:]), torch.stack(states)


CHUNKED = {
    "none": delta.chunk_delta_rule,
    "head": delta.chunk_gated_delta_rule,
    "channel": delta.chunk_kda,
}
RECURRENT = {
    "none": delta.fused_recurrent_delta_rule,
    "head": delta.fused_recurrent_gated_delta_rule,
    "channel": delta.fused_recurrent_kda,
}


def draw(form: str, gates: str, T: int, offsets: list[int] | None) -> dict[str, Tensor]:
    """q, k, v, g, beta, h0 and the gradients do and dht, in float64; strengths reach 2."""
    rows, N = (B, B) if offsets is None else (1, len(offsets) - 1)
    shapes = {
        "q": (rows, T, H, K),
        "k": (rows, T, H, K),
        "v": (rows, T, HV, V),
        "beta": (rows, T, HV),
        "h0": (N, HV, K, V),
        "do": (rows, T, HV, V),
        "dht": (N, HV, K, V),
        "g": (rows, T, HV, K) if form == "channel" else (rows, T, HV),
    }
    random = torch.Generator().manual_seed(T)
    x = {
        name: torch.randn(shape, generator=random, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    x["k"] = F.normalize(x["k"], dim=-1)
    x["beta"] = 2 * x["beta"].sigmoid()
    gate = x.pop("g")
    return x if form == "none" else x | {"g": GATES[gates](gate)}


def check_against_definition(
    form: str, gates: str, T: int, offsets: list[int] | None, with_states: bool
) -> None:
    x = draw(form, gates, T, offsets)
    names = [name for name in ("q", "k", "v", "g", "beta", "h0") if name in x]
    if not with_states:
        x["h0"] = torch.zeros_like(x["h0"])
        names.remove("h0")
    exact = x | {name: x[name].clone().requires_grad_() for name in names}
    o, ht = naive(
        exact["q"], exact["k"], exact["v"], exact.get("g"), exact["beta"], exact["h0"], offsets
    )
    loss = (o * x["do"]).sum() + ((ht * x["dht"]).sum() if with_states else 0)
    expected = torch.autograd.grad(loss, [exact[name] for name in names])

    single = {name: x[name].float().requires_grad_() for name in names}
    given = dict(single)
    states = {"initial_state": given.pop("h0"), "output_final_state": True} if with_states else {}
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    got, got_ht = CHUNKED[form](**given, **states, cu_seqlens=cu_seqlens)
    loss = (got * x["do"].float()).sum()
    assert relative_error(got, o) < 3e-6
    if with_states:
        loss = loss + (got_ht * x["dht"].float()).sum()
        assert relative_error(got_ht, ht) < 3e-6
    else:
        assert got_ht is None
    gradients = torch.autograd.grad(loss, list(single.values()))
    for name, gradient, want in zip(names, gradients, expected, strict=True):
        # A vanishing gradient (all gates at -80) is compared with the size of the numbers it comes
        # from.
        assert (gradient - want).norm() < 6e-6 * max(float(want.norm()), 1e-6), name


@pytest.mark.parametrize("with_states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("offsets", [None, [0, 1, 70, 71, 150]], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("form", "gates"),
    [("none", "zero"), *((form, gates) for form in ("head", "channel") for gates in GATES)],
)
def test_agrees_with_the_definition(form, gates, offsets, with_states):
    check_against_definition(form, gates, 150, offsets, with_states)


@settings(deadline=None, max_examples=30)
@given(
    data=st.data(),
    form=st.sampled_from(sorted(CHUNKED)),
    gates=st.sampled_from(sorted(GATES)),
    with_states=st.booleans(),
)
def test_any_shape_agrees_with_the_definition(data, form, gates, with_states):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    offsets = [0, *np.cumsum(lengths).tolist()]
    check_against_definition(form, gates, offsets[-1], offsets, with_states)
    check_against_definition(form, gates, lengths[0], None, with_states)


def test_the_gates_choose_the_blocks():
    planned = {
        name: plan_blocks(gate(torch.full((2, 100, 2, 5), -0.5)), 64)
        for name, gate in GATES.items()
    }
    assert planned["usual"] == (64, False)
    assert planned["strong"] == (16, False)
    assert planned["mixed"] == planned["very_negative"] == (16, True)
    g = torch.full((2, 90, 2, 5), -0.01)
    g[1, 70, 1, 3] = -0.9 * MAX_DECAY
    assert plan_blocks(g, 64) == (64, False)
    g[1, 85, 1, 3] = -0.9 * MAX_DECAY
    assert plan_blocks(g, 64) == (16, False)
    g[1, 71, 1, 3] = -0.9 * MAX_DECAY
    assert plan_blocks(g, 64) == (16, True)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("with_gates", [True, False], ids=["gates", ""])
def test_delta_product_takes_several_steps_a_token(gates, with_gates):
    steps, T = 3, 50
    x = {name: value.float() for name, value in draw("head", gates, T * steps, None).items()}
    q, g = x["q"][:, ::steps], x["g"][:, ::steps] if with_gates else None
    q, k = (y.repeat_interleave(HV // H, 2) for y in (q, x["k"]))
    padded_q, padded_g = torch.zeros_like(k), torch.zeros_like(x["g"])
    padded_q[:, steps - 1 :: steps] = q
    if g is not None:
        padded_g[:, ::steps] = g
    o, state = naive(
        *(y.double() for y in (padded_q, k, x["v"], padded_g, x["beta"], x["h0"])), None
    )
    got, got_state = delta_variants.chunk_gated_delta_product(
        q, k, x["v"], g, x["beta"], steps, initial_state=x["h0"], output_final_state=True
    )
    assert relative_error(got, o[:, steps - 1 :: steps]) < 3e-6
    assert relative_error(got_state, state) < 3e-6


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("T", [1, 90])
def test_comba_erases_by_other_keys_before_the_state_decays(gates, T):
    x = draw("head", gates, T, None)
    q, k = (x[name].repeat_interleave(HV // H, 2) for name in ("q", "k"))
    leaves = [y.clone().requires_grad_() for y in (q, k, x["v"], k.roll(1, -1), x["g"], x["beta"])]
    q, k, v, p, g, beta = leaves
    state, outputs = x["h0"], []
    for t in range(T):
        error = (v[:, t] - torch.einsum("bhk,bhkv->bhv", p[:, t], state)) * beta[:, t].unsqueeze(-1)
        state = state * g[:, t].exp()[..., None, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * K**-0.5)
    o = torch.stack(outputs, 1)
    expected = torch.autograd.grad((o * x["do"]).sum() + (state * x["dht"]).sum(), leaves)
    single = [y.detach().float().requires_grad_() for y in leaves]
    for operation, order in (
        (delta_variants.chunk_comba, (0, 1, 2, 3, 4, 5)),
        (delta_variants.fused_recurrent_comba, (0, 1, 3, 2, 4, 5)),
    ):
        got, got_state = operation(
            *(single[i] for i in order), initial_state=x["h0"].float(), output_final_state=True
        )
        assert relative_error(got, o) < 3e-6
        assert relative_error(got_state, state) < 3e-6
        loss = (got * x["do"].float()).sum() + (got_state * x["dht"].float()).sum()
        for a, b in zip(torch.autograd.grad(loss, single), expected, strict=True):
            assert (a - b).norm() < 6e-6 * max(float(b.norm()), 1e-6)


@pytest.mark.parametrize("T", [1, 90])
def test_rwkv7_erases_and_writes_by_different_keys(T):
    x = draw("channel", "zero", T, None)
    random = torch.Generator().manual_seed(0)
    r, k, kk, v = (torch.randn(B, T, H, K, generator=random, dtype=torch.float64) for _ in range(4))
    w, a = (torch.rand(B, T, H, K, generator=random, dtype=torch.float64) for _ in range(2))
    leaves = [y.requires_grad_() for y in (r, -0.6 * w, k, v, F.normalize(kk, dim=-1), a)]
    r, w, k, v, kk, a = leaves
    first = state = x["h0"][:, :H, :, :K]
    outputs = []
    for t in range(T):
        found = torch.einsum("bhk,bhkv->bhv", -kk[:, t], state)
        state = state * w[:, t].exp().unsqueeze(-1)
        state = state + torch.einsum("bhk,bhv->bhkv", (kk * a)[:, t], found)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
    o = torch.stack(outputs, 1)
    expected = torch.autograd.grad(o.square().sum() + state.square().sum(), leaves)
    single = [y.detach().float().requires_grad_() for y in leaves]
    r, w, k, v, kk, a = single
    states = {"initial_state": first.float(), "output_final_state": True}
    for got, got_state in (
        rwkv7.chunk_rwkv7(r, w, k, v, -kk, kk * a, **states),
        rwkv7.fused_mul_recurrent_rwkv7(r, w, k, v, kk, a, **states),
    ):
        assert relative_error(got, o) < 3e-6
        assert relative_error(got_state, state) < 3e-6
        loss = got.square().sum() + got_state.square().sum()
        for gradient, want in zip(torch.autograd.grad(loss, single), expected, strict=True):
            assert relative_error(gradient, want) < 6e-6


@pytest.mark.parametrize("strongest", [-1.2, -30.0])
@pytest.mark.parametrize("offsets", [None, [0, 1, 70, 71, 150]], ids=["", "packed"])
@pytest.mark.parametrize("with_states", [False, True], ids=["", "states"])
def test_rwkv7_takes_one_step_for_usual_gates_and_two_for_strong_ones(
    strongest, offsets, with_states, monkeypatch
):
    """Both are the same function; `test_rwkv7_erases_and_writes_by_different_keys` defines it."""
    random = torch.Generator().manual_seed(0)
    size = 1 if offsets else 2, 150, 2, 16
    r, k, v, kk = (torch.randn(size, generator=random, dtype=torch.float64) for _ in range(4))
    w, a = (torch.rand(size, generator=random, dtype=torch.float64) for _ in range(2))
    kk = F.normalize(kk, dim=-1)
    rows = [x.requires_grad_() for x in (r, strongest * w, k, v, -kk, kk * a)]
    first = torch.randn(4 if offsets else 2, 2, 16, 16, generator=random, dtype=torch.float64)
    states = {"initial_state": first.requires_grad_(), "output_final_state": True}
    cu_seqlens = {"cu_seqlens": torch.tensor(offsets)} if offsets else {}
    rules = []
    inner = rwkv7.delta_rule

    def noted(make, *args, **kwargs):
        rules.append(make)
        return inner(make, *args, **kwargs)

    monkeypatch.setattr(rwkv7, "delta_rule", noted)
    results = []
    for least in (rwkv7.MIN_GATE, torch.inf):
        monkeypatch.setattr(rwkv7, "MIN_GATE", least)
        o, state = rwkv7.chunk_rwkv7(*rows, 0.3, **(states if with_states else {}), **cu_seqlens)
        total = o.sin().sum() + (state.sin().sum() if with_states else 0)
        leaves = [*rows, first] if with_states else rows
        results.append((o, *((state,) if with_states else ()), *torch.autograd.grad(total, leaves)))
    assert (rules[0] is rwkv7.two_steps) == (strongest < -1.25)
    assert rules[1] is rwkv7.two_steps
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-11


def test_token_shift_keeps_documents_apart_and_goes_on_from_its_cache():
    from fla.modules.token_shift import token_shift

    x = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 1, 5, 9])
    delta, last = token_shift(x, cu_seqlens, output_cache=True)
    assert torch.equal(last, x[0, [0, 4, 8]])
    for start, end in pairwise(cu_seqlens.tolist()):
        assert torch.equal(delta[:, start:end], token_shift(x[:, start:end]))
        before = F.pad(x[:, start : end - 1], (0, 0, 1, 0))
        assert torch.equal(delta[:, start:end], before - x[:, start:end])
    whole = token_shift(x)
    first, cache = token_shift(x[:, :4], output_cache=True)
    assert torch.equal(torch.cat([first, token_shift(x[:, 4:], cache=cache)], 1), whole)


# Sequences, states and single tokens


@pytest.mark.parametrize("gates", ["usual", "mixed"])
@pytest.mark.parametrize("form", CHUNKED)
@pytest.mark.parametrize("cut", [1, 50, 64, 99])
def test_a_sequence_in_two_pieces_equals_the_whole(form, gates, cut):
    x = {name: value.float() for name, value in draw(form, gates, 100, None).items()}
    inputs = {name: x[name] for name in ("q", "k", "v", "g", "beta") if name in x}
    whole, final = CHUNKED[form](**inputs, initial_state=x["h0"], output_final_state=True)
    state, pieces = x["h0"], []
    for part in (slice(0, cut), slice(cut, None)):
        piece = {name: value[:, part] for name, value in inputs.items()}
        o, state = CHUNKED[form](**piece, initial_state=state, output_final_state=True)
        pieces.append(o)
    assert relative_error(torch.cat(pieces, 1), whole) < 2e-6
    assert relative_error(state, final) < 2e-6


@pytest.mark.parametrize("gates", ["usual", "mixed"])
@pytest.mark.parametrize("form", RECURRENT)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_token_by_token_equals_the_whole(form, gates, packed):
    """With one token per sequence, in rows or packed into one row, the recurrence runs."""
    x = {name: value.float() for name, value in draw(form, gates, 20, None).items()}
    inputs = {name: x[name] for name in ("q", "k", "v", "g", "beta") if name in x}
    whole, final = CHUNKED[form](**inputs, initial_state=x["h0"], output_final_state=True)
    state, pieces = x["h0"], []
    cu_seqlens = torch.arange(B + 1) if packed else None
    for t in range(20):
        token = {name: value[:, t : t + 1] for name, value in inputs.items()}
        if packed:
            token = {name: value.transpose(0, 1) for name, value in token.items()}
        o, state = RECURRENT[form](
            **token, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
        )
        pieces.append(o.transpose(0, 1) if packed else o)
    assert relative_error(torch.cat(pieces, 1), whole) < 2e-6
    assert relative_error(state, final) < 2e-6


@pytest.mark.parametrize("gates", ["usual", "mixed"])
@pytest.mark.parametrize("form", CHUNKED)
def test_a_document_does_not_see_its_neighbours(form, gates):
    """To the last bit, whatever the neighbours' tokens and gates."""
    offsets = [0, 30, 31, 80, 100]
    x = {name: value.float() for name, value in draw(form, gates, 100, offsets).items()}
    inputs = {name: x[name] for name in ("q", "k", "v", "g", "beta") if name in x}
    others = torch.ones(100, dtype=torch.bool)
    others[31:80] = False

    def outcome(values):
        leaves = [value.clone().requires_grad_() for value in values]
        o, _ = CHUNKED[form](
            **dict(zip(inputs, leaves, strict=True)), cu_seqlens=torch.tensor(offsets)
        )
        gradients = torch.autograd.grad((o * x["do"])[:, 31:80].sum(), leaves)
        return [y[:, 31:80] for y in (o, *gradients)], [y[:, others] for y in gradients]

    mine, theirs = outcome(inputs.values())
    changed = []
    for value in inputs.values():
        mask = others.view(-1, *(1 for _ in value.shape[2:]))
        changed.append(torch.where(mask, value.roll(7, 1), value))
    mine_again, _ = outcome(changed)
    assert all(torch.equal(a, b) for a, b in zip(mine, mine_again, strict=True))
    assert all(not y.any() for y in theirs)


@pytest.mark.parametrize("form", ["head", "channel"])
def test_state_v_first_only_transposes_the_states(form):
    x = {name: value.float() for name, value in draw(form, "usual", 70, None).items()}
    inputs = {name: x[name] for name in ("q", "k", "v", "g", "beta")}
    for operation, T in ((CHUNKED[form], 70), (RECURRENT[form], 1)):
        part = {name: value[:, :T] for name, value in inputs.items()}
        o, state = operation(**part, initial_state=x["h0"], output_final_state=True)
        o_v, state_v = operation(
            **part, initial_state=x["h0"].mT, output_final_state=True, state_v_first=True
        )
        assert torch.equal(o, o_v)
        assert torch.equal(state, state_v.mT)


def test_scale():
    x = {name: value.float() for name, value in draw("none", "zero", 20, None).items()}
    inputs = {name: x[name] for name in ("q", "k", "v", "beta")}
    for operation, T in ((CHUNKED["none"], 20), (RECURRENT["none"], 1)):
        part = {name: value[:, :T] for name, value in inputs.items()}
        assert relative_error(operation(**part, scale=1.0)[0], operation(**part)[0] * K**0.5) < 1e-6


@pytest.mark.parametrize("form", CHUNKED)
def test_bfloat16_is_computed_in_float32(form):
    x = {name: value.float() for name, value in draw(form, "usual", 70, None).items()}
    inputs = {name: x[name] for name in ("q", "k", "v", "g", "beta") if name in x}
    low = inputs | {name: x[name].bfloat16() for name in ("q", "k", "v")}
    o, state = CHUNKED[form](**low, output_final_state=True)
    want, want_state = CHUNKED[form](
        **{name: value.float() for name, value in low.items()}, output_final_state=True
    )
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, want.bfloat16())
    assert state.dtype == torch.float32
    assert torch.equal(state, want_state)


@pytest.mark.parametrize("form", CHUNKED)
def test_inputs_are_left_alone(form):
    x = {name: value.float() for name, value in draw(form, "usual", 70, None).items()}
    copies = {name: value.clone() for name, value in x.items()}
    leaves = {
        name: x[name].requires_grad_() for name in ("q", "k", "v", "g", "beta", "h0") if name in x
    }
    h0 = leaves.pop("h0")
    o, ht = CHUNKED[form](**leaves, initial_state=h0, output_final_state=True)
    torch.autograd.backward([o, ht], [x["do"], x["dht"]])
    assert all(torch.equal(x[name], copies[name]) for name in x)


# What fla computes in its kernels


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("form", ["head", "channel"])
def test_gates_norms_and_strengths_are_computed_on_the_way_in(form, lower_bound):
    x = {name: value.float() for name, value in draw(form, "usual", 40, None).items()}
    random = torch.Generator().manual_seed(0)
    g = torch.randn(x["g"].shape, generator=random)
    A_log = torch.randn(HV, generator=random)
    dt_bias = torch.randn(HV * (K if form == "channel" else 1), generator=random)
    leaves = [x["q"], 3 * x["k"], x["v"], g, x["beta"], A_log, dt_bias]
    leaves = [value.detach().requires_grad_() for value in leaves]
    q, k, v, g, beta, A_log, dt_bias = leaves
    kernel: dict[str, Any] = {
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": True,
        "A_log": A_log,
        "dt_bias": dt_bias,
    }
    plain = g + dt_bias.view(g.shape[2:])
    A = A_log.exp().view(HV, *(1 for _ in g.shape[3:]))
    gate = -A * F.softplus(plain)
    if lower_bound is not None and form == "channel":
        kernel["lower_bound"] = lower_bound
        gate = lower_bound * (A * plain).sigmoid()
    q_hat, k_hat = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
    for operation, T in ((CHUNKED[form], 40), (RECURRENT[form], 1)):
        got, _ = operation(*(y[:, :T] for y in (q, k, v)), g=g[:, :T], beta=beta[:, :T], **kernel)
        want, _ = CHUNKED[form](
            *(y[:, :T] for y in (q_hat, k_hat, v)), gate[:, :T], 2 * beta.sigmoid()[:, :T]
        )
        assert relative_error(got, want) < 2e-6
        gradients = [
            torch.autograd.grad(
                (o * x["do"][:, :T]).sum(), leaves, retain_graph=True, allow_unused=True
            )
            for o in (got, want)
        ]
        for a, b in zip(*gradients, strict=True):
            assert (a - b).norm() < 1e-5 * max(float(b.norm()), 1e-3)


def test_l2norm():
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    want = x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    y, rstd = l2norm_fwd(x.detach())
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    assert relative_error(y, want) < 1e-6
    assert relative_error(l2norm_bwd(y, rstd, dy), torch.autograd.grad(want, x, dy)[0]) < 1e-6


def test_what_only_a_gpu_can_do_is_refused():
    x = draw("head", "usual", 10, None)
    inputs = {name: x[name] for name in ("q", "k", "v", "g", "beta")}
    with pytest.raises(NotImplementedError, match="no context parallelism"):
        delta.chunk_gated_delta_rule(**inputs, cp_context=object())
    with pytest.raises(NotImplementedError, match="no gates on values"):
        delta.fused_recurrent_gated_delta_rule(**inputs, gv=x["v"])
    with pytest.raises(NotImplementedError, match="no intermediate states"):
        delta.chunk_kda(**inputs, return_intermediate_states=True)
    with pytest.raises(ValueError, match="set use_beta_sigmoid_in_kernel as well"):
        delta.chunk_gated_delta_rule(**inputs, allow_neg_eigval=True)
    with pytest.raises(ValueError, match="must run from 0 to T=10, got 0 to 9"):
        delta.chunk_gated_delta_rule(
            **{name: value[:1] for name, value in inputs.items()},
            cu_seqlens=torch.tensor([0, 4, 9]),
        )
    with pytest.raises(ValueError, match="2 sequences need one initial state each, got 3"):
        delta.chunk_gated_delta_rule(**inputs, initial_state=torch.zeros(3, HV, K, V))


# fla's own kernels


@pytest.mark.parametrize("name", make_fixtures.OPERATIONS)
def test_agrees_with_the_triton_kernels(name):
    operation = getattr(delta, name.removesuffix("_packed"))
    got = make_fixtures.run_operation(make_fixtures.OPERATIONS[name], operation)
    with np.load(FIXTURES / f"{name}.npz") as stored:
        assert set(stored) == set(got)
        for key, want in stored.items():
            tolerance = 1e-4 if key.startswith("grad:") else 1e-5
            assert relative_error(got[key], want) < tolerance, key


def make_model(name: str) -> Any:
    case = make_fixtures.MODELS[name]
    config, model = (getattr(fla.models, each) for each in make_fixtures.class_names(name))
    return model(config(**case["config"]))


# With gates of -1100 a token, these gradients are nearly zero, and in the Triton kernels
# differences of two large sums; Comba's of one long document lose digits of its scores, too. The
# tests against the definition hold ours to 3e-6 and 6e-6 of float64.
TOLERANCES = {
    ("gated_deltanet_extreme", "grad:model.layers.0.attn.A_log"): 1e-2,
    ("gated_deltanet_extreme", "grad:model.layers.0.attn.dt_bias"): 1e-2,
    ("gated_deltanet_extreme", "grad:model.layers.0.attn.a_proj.weight"): 1e-3,
    ("comba_extreme", "logits"): 1e-4,
    ("comba_extreme", "grad:model.layers.0.attn.A_log"): 5e-2,
    ("comba_extreme", "grad:model.layers.0.attn.dt_bias"): 1e-2,
    ("comba_extreme", "grad:model.layers.0.attn.a_proj.weight"): 1e-3,
}


@pytest.mark.parametrize("name", make_fixtures.MODELS)
def test_model_agrees_with_the_triton_kernels(name):
    model = make_model(name)
    got = make_fixtures.run_model(make_fixtures.MODELS[name], model)
    with np.load(FIXTURES / f"{name}.npz") as stored:
        assert list(model.state_dict()) == json.loads(str(stored["state_dict_keys"]))
        results = {key: value for key, value in stored.items() if key != "state_dict_keys"}
    assert results.keys() == got.keys()
    for key, want in results.items():
        assert np.linalg.norm(want) > 0, key
        tolerance = 1e-4 if key.startswith("grad:") else 1e-5
        assert relative_error(got[key], want) < TOLERANCES.get((name, key), tolerance), key


# Models as they are used

TYPES = sorted(make_fixtures.TYPES)


def generating(name: str) -> Any:
    model = make_model(name).eval()
    make_fixtures.fill(model)
    return model


@pytest.mark.parametrize("name", TYPES)
def test_packed_documents_equal_the_documents_alone(name):
    model = generating(name)
    input_ids, offsets = make_fixtures.tokens((1, 150)), [0, 70, 71, 150]
    with torch.no_grad():
        logits = model(
            input_ids=input_ids, cu_seqlens=torch.tensor(offsets), use_cache=False
        ).logits
        for start, end in pairwise(offsets):
            alone = model(input_ids=input_ids[:, start:end], use_cache=False).logits
            assert relative_error(logits[:, start:end], alone) < 5e-6
        changed = input_ids.clone()
        changed[:, : offsets[1]] = 5
        again = model(input_ids=changed, cu_seqlens=torch.tensor(offsets), use_cache=False).logits
    # The gates of all documents choose the size of KDA's blocks, so the rounding may differ.
    assert relative_error(again[:, offsets[1] :], logits[:, offsets[1] :]) < (
        2e-6 if name == "kda" else 1e-30
    )


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt_length", [1, 7, 70])
@pytest.mark.parametrize("name", TYPES)
def test_generation_with_the_cache_equals_greedy_without(name, prompt_length, batch_size):
    model = generating(name)
    prompt = expected = make_fixtures.tokens((batch_size, prompt_length))
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=expected, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert len(expected[:, prompt_length:].unique()) > 1
    assert torch.equal(generate(model, prompt, torch.ones_like(prompt), 8), expected)


def generate(model: Any, prompt: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    result: Tensor = model.generate(
        prompt,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return result


@pytest.mark.parametrize("prompt_length", [7, 70])
@pytest.mark.parametrize("name", TYPES)
def test_left_padded_prompts_generate_what_they_would_alone(name, prompt_length):
    model = generating(name)
    prompts = make_fixtures.tokens((3, prompt_length))
    mask = torch.ones_like(prompts)
    paddings = [0, 3, prompt_length - 1]
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    together = generate(model, prompts * mask, mask, 6)
    for row, padding in enumerate(paddings):
        alone = prompts[row : row + 1, padding:]
        assert torch.equal(
            together[row, padding:], generate(model, alone, torch.ones_like(alone), 6)[0]
        )


@pytest.mark.parametrize("name", TYPES)
def test_the_cache_holds_what_the_prefill_left(name):
    """Logits, not only tokens: token by token from a cache equals one pass."""
    model = generating(name)
    input_ids = make_fixtures.tokens((2, 80))
    with torch.no_grad():
        whole = model(input_ids=input_ids, use_cache=False).logits
        out = model(input_ids=input_ids[:, :66], use_cache=True)
        steps = [out.logits]
        for t in range(66, 80):
            token, cache = input_ids[:, t : t + 1], out.past_key_values
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), whole) < 5e-6


@pytest.mark.parametrize("name", TYPES)
def test_bfloat16_model_trains_like_float32(name):
    """Both start from the same bfloat16 numbers; activations keep 8 bits."""
    low, high = (make_model(name) for _ in range(2))
    make_fixtures.fill(low)
    low.bfloat16()
    high.load_state_dict(low.state_dict())
    input_ids = make_fixtures.tokens((2, 70))
    for model in (low, high):
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    for (key, a), b in zip(low.named_parameters(), high.parameters(), strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert relative_error(a.grad, b.grad) < 0.2, key


def test_every_model_of_the_family_is_covered():
    assert set(TYPES) <= set(ON_CPU)
    for name in TYPES:
        assert cpu.missing(getattr(fla.models, make_fixtures.class_names(name)[0])()) is None


@pytest.mark.parametrize(
    ("module", "name", "function"),
    [*delta.REPLACEMENTS, *delta_variants.REPLACEMENTS, *rwkv7.REPLACEMENTS],
)
def test_arguments_are_those_of_fla(module, name, function):
    """Names and order, for those that are passed by position and for defaults."""
    original = getattr(importlib.import_module(module), name).__wrapped__
    theirs = [
        (each.name, each.default)
        for each in inspect.signature(original).parameters.values()
        if each.kind is not each.VAR_KEYWORD
    ]
    ours = [
        (each.name, each.default)
        for each in inspect.signature(function).parameters.values()
        if FLA >= (0, 6) or each.name != "chunk_indices"  # which comes before the last one in 0.6
    ]
    assert ours[: len(theirs)] == theirs
