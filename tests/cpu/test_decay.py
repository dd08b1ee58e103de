"""Attention whose state decays, in chunks and token by token, against the definitions in float64.

"Relative error" is norm-wise throughout: ||a - b|| / ||b||.
"""

from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_composer import cpu
from flame_composer.cpu.decay import chunk_simple_gla, recurrent_simple_gla
from flame_composer.cpu.gsa import chunk_gsa
from flame_composer.cpu.rwkv6 import chunk_rwkv6
from flame_composer.cpu.simple_gla import (
    chunk_global_cumsum,
    chunk_retention,
    fused_recurrent_simple_gla,
)

cpu.enable()

from fla.modules.token_shift import token_shift  # noqa: E402
from fla.ops.linear_attn import chunk_linear_attn, fused_recurrent_linear_attn  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# Log gates from standard normal numbers: from no decay at all to states forgotten within a token.
GATES = {
    "zero": lambda x: 0 * x,
    "usual": lambda x: F.logsigmoid(x) / 16,
    "strong": lambda x: 3 * F.logsigmoid(x),
    "mixed": lambda x: torch.where(x > 0, -1e-3 * x, 80 * x),
    "very_negative": lambda x: -80 - x.abs(),
}
H, K, V, M = 4, 5, 7, 6


def spans_of(B: int, T: int, offsets: list[int] | None) -> list[tuple[int, int, int]]:
    """The row, start and end of each sequence."""
    if offsets is None:
        return [(row, 0, T) for row in range(B)]
    return [(0, *span) for span in pairwise(offsets)]


def naive_decay(x: dict[str, Tensor], offsets: list[int] | None):
    repeats = H // x["q"].shape[2]
    q, k = (x[name].repeat_interleave(repeats, 2) for name in "qk")
    outputs, states = [], []
    for (row, start, end), state in zip(spans_of(*q.shape[:2], offsets), x["h0"], strict=True):
        for t in range(start, end):
            if "g" in x:
                state = state * x["g"][row, t].exp()[:, None, None]
            state = state + k[row, t].unsqueeze(-1) * x["v"][row, t].unsqueeze(-2)
            outputs.append(torch.einsum("hk,hkv->hv", q[row, t], state) * 0.3)
        states.append(state)
    return torch.stack(outputs).view(x["v"].shape), torch.stack(states)


def naive_gsa(x: dict[str, Tensor], offsets: list[int] | None):
    q, k, v, s, g = (x[name] for name in ("q", "k", "v", "s", "g"))
    outputs, all_keys, all_values = [], [], []
    starts = zip(x["h0"], x["hv"], strict=True)
    for (row, start, end), (keys, values) in zip(
        spans_of(*q.shape[:2], offsets), starts, strict=True
    ):
        for t in range(start, end):
            decay = g[row, t].exp()
            keys = keys * decay.unsqueeze(-2) + k[row, t].unsqueeze(-1) * s[row, t].unsqueeze(-2)
            values = values * decay.unsqueeze(-1) + s[row, t].unsqueeze(-1) * v[row, t].unsqueeze(
                -2
            )
            p = (0.3 * torch.einsum("hk,hkm->hm", q[row, t], keys)).softmax(-1)
            outputs.append(torch.einsum("hm,hmv->hv", p, values))
        all_keys.append(keys)
        all_values.append(values)
    return torch.stack(outputs).view(v.shape), torch.stack(all_keys), torch.stack(all_values)


def naive_rwkv6(x: dict[str, Tensor], offsets: list[int] | None):
    r, k, v, w = (x[name] for name in ("q", "k", "v", "g"))
    outputs, states = [], []
    for (row, start, end), state in zip(spans_of(*r.shape[:2], offsets), x["h0"], strict=True):
        for t in range(start, end):
            new = k[row, t].unsqueeze(-1) * v[row, t].unsqueeze(-2)
            read = state + x["u"].unsqueeze(-1) * new
            outputs.append(0.3 * torch.einsum("hk,hkv->hv", r[row, t], read))
            state = state * w[row, t].exp().unsqueeze(-1) + new
        states.append(state)
    return torch.stack(outputs).view(v.shape), torch.stack(states)


def run_decay(operation):
    def run(x: dict[str, Tensor], cu_seqlens: Tensor | None, with_states: bool):
        options = {"initial_state": x["h0"], "output_final_state": True} if with_states else {}
        return operation(
            x["q"], x["k"], x["v"], x.get("g"), scale=0.3, cu_seqlens=cu_seqlens, **options
        )

    return run


def run_gsa(x: dict[str, Tensor], cu_seqlens: Tensor | None, with_states: bool):
    states = (x["h0"], x["hv"]) if with_states else None
    o, final = chunk_gsa(
        *(x[name] for name in ("q", "k", "v", "s", "g")),
        0.3,
        states,
        with_states,
        cu_seqlens=cu_seqlens,
    )
    return o, *final


def run_rwkv6(x: dict[str, Tensor], cu_seqlens: Tensor | None, with_states: bool):
    inputs = (x[name] for name in ("q", "k", "v", "g", "u"))
    return chunk_rwkv6(*inputs, 0.3, x["h0"] if with_states else None, with_states, cu_seqlens)


SHAPES = {
    "q": ("T", H, K),
    "k": ("T", H, K),
    "v": ("T", H, V),
    "h0": ("N", H, K, V),
}
SHARED = {"q": ("T", 2, K), "k": ("T", 2, K)}
# name: the definition, the operations, and the shapes of its inputs
OPERATIONS = {
    "undecayed": (naive_decay, [chunk_simple_gla, recurrent_simple_gla], SHAPES),
    "decay": (naive_decay, [chunk_simple_gla, recurrent_simple_gla], SHAPES | {"g": ("T", H)}),
    "shared_keys": (
        naive_decay,
        [chunk_simple_gla, recurrent_simple_gla],
        SHAPES | SHARED | {"g": ("T", H)},
    ),
    "gsa": (
        naive_gsa,
        [run_gsa],
        SHAPES | {"h0": ("N", H, K, M), "s": ("T", H, M), "g": ("T", H, M), "hv": ("N", H, M, V)},
    ),
    "rwkv6": (naive_rwkv6, [run_rwkv6], SHAPES | {"g": ("T", H, K), "u": (H, K)}),
}


def draw(name: str, T: int, gates: str, offsets: list[int] | None) -> dict[str, Tensor]:
    B, N = (2, 2) if offsets is None else (1, len(offsets) - 1)
    random = torch.Generator().manual_seed(T)
    drawn = {}
    for key, shape in OPERATIONS[name][2].items():
        sizes = {"T": (B, T), "N": (N,)}.get(shape[0], (shape[0],)) + shape[1:]
        drawn[key] = torch.randn(sizes, generator=random, dtype=torch.float64)
    if "g" in drawn:
        drawn["g"] = GATES[gates](drawn["g"])
    return drawn


def outcome(run, x: dict[str, Tensor], with_states: bool, dtype: torch.dtype) -> list[Tensor]:
    """The outputs that are there, and the gradients of all inputs under random weights on them."""
    leaves = {key: value.to(dtype).requires_grad_() for key, value in x.items()}
    outputs = run(leaves)[: None if with_states else 1]
    random = torch.Generator().manual_seed(1)
    loss = sum(
        (o * torch.randn(o.shape, generator=random, dtype=torch.float64).to(dtype)).sum()
        for o in outputs
    )
    used = [leaf for key, leaf in leaves.items() if with_states or key not in ("h0", "hv")]
    return [*outputs, *torch.autograd.grad(loss, used, allow_unused=True, materialize_grads=True)]


def check_against_definition(name, T, gates, offsets, with_states) -> None:
    naive, operations, _ = OPERATIONS[name]
    x = draw(name, T, gates, offsets)
    if not with_states:
        x |= {key: torch.zeros_like(x[key]) for key in ("h0", "hv") if key in x}
    want = outcome(lambda y: naive(y, offsets), x, with_states, torch.float64)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    for operation, (dtype, tolerance) in product(
        operations, ((torch.float64, 1e-11), (torch.float32, 5e-6))
    ):
        run = operation if naive is not naive_decay else run_decay(operation)
        bound = partial(run, cu_seqlens=cu_seqlens, with_states=with_states)
        got = outcome(bound, x, with_states, dtype)
        for a, b in zip(got, want, strict=True):
            # A vanishing gradient is compared with the size of the numbers it comes from.
            assert (a - b).norm() < tolerance * max(float(b.detach().norm()), 1e-3)


@pytest.mark.parametrize("with_states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("offsets", [None, [0, 1, 70, 71, 150]], ids=["dense", "packed"])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_agrees_with_the_definition(name, gates, offsets, with_states):
    check_against_definition(name, 150, gates, offsets, with_states)


@settings(max_examples=8)
@given(data=st.data(), gates=st.sampled_from(sorted(GATES)), with_states=st.booleans())
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_shape_agrees_with_the_definition(name, data, gates, with_states):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    offsets = [0, *np.cumsum(lengths).tolist()]
    check_against_definition(name, offsets[-1], gates, offsets, with_states)
    check_against_definition(name, lengths[0], gates, None, with_states)
    ones = list(range(len(lengths) + 1))  # one token of each sequence, as in decoding
    check_against_definition(name, ones[-1], gates, ones, with_states)


@pytest.mark.parametrize("gates", ["usual", "mixed"])
@pytest.mark.parametrize("cut", [1, 50, 64, 99])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_sequence_in_two_pieces_equals_the_whole(name, cut, gates):
    naive, operations, _ = OPERATIONS[name]
    x = draw(name, 100, gates, None)
    states = [key for key in ("h0", "hv") if key in x]
    for operation in operations:
        run = operation if naive is not naive_decay else run_decay(operation)
        whole, *finals = run(x, None, True)
        pieces, now = [], x
        for part in (slice(0, cut), slice(cut, None)):
            kept = (*states, "u")
            piece = {key: each if key in kept else each[:, part] for key, each in now.items()}
            o, *reached = run(piece, None, True)
            now = x | dict(zip(states, reached, strict=True))
            pieces.append(o)
        for a, b in zip((torch.cat(pieces, 1), *reached), (whole, *finals), strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gates", ["usual", "mixed"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_document_does_not_see_its_neighbours(name, gates):
    """To the last bit, whatever the neighbours' tokens and gates."""
    offsets = [0, 30, 31, 80, 100]
    x = {key: value.float() for key, value in draw(name, 100, gates, offsets).items()}
    naive, operations, _ = OPERATIONS[name]
    others = torch.ones(100, dtype=torch.bool)
    others[31:80] = False
    changed = {
        key: torch.where(others.view(-1, *[1] * (value.dim() - 2)), value.roll(7, 1), value)
        if value.shape[1] == 100
        else value
        for key, value in x.items()
    }
    for operation in operations:
        run = operation if naive is not naive_decay else run_decay(operation)
        results = []
        for inputs in (x, changed):
            leaves = {
                key: value.clone().requires_grad_()
                for key, value in inputs.items()
                if value.shape[1] == 100
            }
            o = run(inputs | leaves, torch.tensor(offsets), False)[0]
            gradients = torch.autograd.grad((o[:, 31:80] * 0.7).sum(), list(leaves.values()))
            results.append([part[:, 31:80] for part in (o, *gradients)])
            assert not any(gradient[:, others].any() for gradient in gradients)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_empty_sequence_keeps_its_state():
    offsets = torch.tensor([0, 30, 30, 60])
    x = draw("decay", 60, "usual", offsets.tolist())
    for operation in (chunk_simple_gla, recurrent_simple_gla):
        _, state = run_decay(operation)(x, offsets, True)
        assert torch.equal(state[1], x["h0"][1])
    x = draw("rwkv6", 60, "usual", offsets.tolist())
    _, state = run_rwkv6(x, offsets, True)
    assert torch.equal(state[1], x["h0"][1])


def test_state_v_first_only_transposes_the_states():
    x = draw("decay", 70, "usual", None)
    for operation in (chunk_simple_gla, recurrent_simple_gla):
        o, state = operation(x["q"], x["k"], x["v"], x["g"], None, 0.3, x["h0"], True)
        o_v, state_v = operation(x["q"], x["k"], x["v"], x["g"], None, 0.3, x["h0"].mT, True, True)
        assert torch.equal(o, o_v)
        assert torch.equal(state, state_v.mT)


def test_retention_decays_by_a_constant_per_head():
    x = draw("decay", 70, "usual", None)
    constant = (1 - torch.exp2(-5 - torch.arange(H, dtype=torch.float))).log()
    want = chunk_simple_gla(x["q"], x["k"], x["v"], constant.double().expand(2, 70, H), scale=0.3)
    assert torch.allclose(chunk_retention(x["q"], x["k"], x["v"], 0.3)[0], want[0], rtol=1e-10)


@pytest.mark.parametrize("operation", [chunk_linear_attn, fused_recurrent_linear_attn])
@pytest.mark.parametrize("offsets", [None, [0, 1, 40, 70]], ids=["dense", "packed"])
def test_normalised_linear_attention(operation, offsets):
    """Divided by q . sum of keys, which is a state, too."""
    x = draw("undecayed", 70, "zero", offsets)
    x = {key: value.abs() for key, value in x.items()}
    z0 = x["h0"].sum(-1).unsqueeze(1)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    o, (state, z) = operation(
        x["q"],
        x["k"],
        x["v"],
        0.3,
        (x["h0"], z0),
        True,
        normalize=True,
        cu_seqlens=cu_seqlens,
    )
    plain, want_state = naive_decay(x, offsets)
    ones = x | {"v": torch.ones_like(x["v"]), "h0": z0.squeeze(1).unsqueeze(-1).expand(-1, H, K, V)}
    sums, want_z = naive_decay(ones, offsets)
    assert torch.allclose(o, plain / sums, rtol=1e-6)
    assert torch.allclose(state, want_state)
    assert torch.allclose(z.squeeze(1), want_z[..., 0], rtol=1e-6)


def test_sums_of_sequences():
    x = torch.arange(1.0, 7.0).view(1, 6, 1)
    offsets = torch.tensor([0, 1, 4, 6])
    assert chunk_global_cumsum(x).flatten().tolist() == [1, 3, 6, 10, 15, 21]
    assert chunk_global_cumsum(x, False, offsets).flatten().tolist() == [1, 2, 5, 9, 5, 11]
    assert chunk_global_cumsum(x, True, offsets, 2.0).flatten().tolist() == [2, 18, 14, 8, 22, 12]


@pytest.mark.parametrize("offsets", [None, [0, 1, 4, 9]], ids=["dense", "packed"])
def test_token_shift(offsets):
    B = 2 if offsets is None else 1
    x = torch.randn(B, 9, 3, dtype=torch.float64, requires_grad=True)
    cache = torch.randn(2 if offsets is None else 3, 3, dtype=torch.float64, requires_grad=True)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    for before in (None, cache):
        got, last = token_shift(x, cu_seqlens, before, output_cache=True)
        want, lasts = [], []
        for number, (row, start, end) in enumerate(spans_of(B, 9, offsets)):
            first = torch.zeros(1, 3) if before is None else before[number : number + 1]
            piece = x[row, start:end]
            want.append(torch.cat([first.double(), piece[:-1]]) - piece)
            lasts.append(piece[-1])
        want = torch.cat(want).view(x.shape)
        weights = torch.randn(want.shape, dtype=torch.float64)
        inputs = [x] if before is None else [x, cache]
        gradients = [
            torch.autograd.grad((y * weights).sum() + z.sum(), inputs)
            for y, z in ((got, last), (want, torch.stack(lasts)))
        ]
        assert torch.allclose(got, want)
        assert torch.equal(last, torch.stack(lasts))
        assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_what_has_no_cpu_form_is_refused():
    x = draw("gsa", 20, "usual", None)
    with pytest.raises(NotImplementedError, match="runs only forwards"):
        fused_recurrent_simple_gla(x["q"], x["k"], x["v"], reverse=True)
    with pytest.raises(NotImplementedError, match="gsa needs gates"):
        chunk_gsa(x["q"], x["k"], x["v"], x["s"])
    with pytest.raises(ValueError, match=r"q and k must be \[B, T, H / R, K\], v \[B, T, H, V\]"):
        chunk_simple_gla(x["q"], x["k"], x["v"], x["g"])
    with pytest.raises(ValueError, match=r"q and k must be \[B, T, H, K\], s and g"):
        chunk_gsa(x["q"], x["k"], x["v"], x["s"], x["q"])
