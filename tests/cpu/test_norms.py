"""Every norm of fla and its rotary embedding on CPU tensors, against plain autograd."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flame_composer import cpu
from tests.cpu.agreement import assert_same, leaves, relative_error

cpu.enable()

from fla.modules import (  # noqa: E402
    FusedLayerNormGated,
    FusedRMSNormGated,
    GroupNorm,
    GroupNormLinear,
    LayerNorm,
    LayerNormLinear,
    RMSNorm,
    RMSNormLinear,
)
from fla.modules.fused_norm_gate import (  # noqa: E402
    FusedLayerNormSwishGateLinear,
    FusedRMSNormSwishGateLinear,
)
from fla.modules.layernorm_gated import LayerNormGated, RMSNormGated  # noqa: E402
from fla.modules.rotary import RotaryEmbedding, rotary_embedding  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-3
ACTIVATIONS = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}


def plain_norm(x: Tensor, norm: torch.nn.Module, is_rms_norm: bool, num_groups: int = 1) -> Tensor:
    groups = x.float().unflatten(-1, (num_groups, -1))
    if not is_rms_norm:
        groups = groups - groups.mean(-1, keepdim=True)
    y = (groups * (groups.square().mean(-1, keepdim=True) + EPS).rsqrt()).flatten(-2)
    y = y if norm.weight is None else y * norm.weight
    return y if norm.bias is None else y + norm.bias


def drawn(norm: torch.nn.Module) -> torch.nn.Module:
    """Draw the parameters, because those of a new norm hide mistakes."""
    for seed, parameter in enumerate(norm.parameters()):
        random = torch.Generator().manual_seed(seed)
        parameter.data = torch.randn(parameter.shape, generator=random)
    return norm


NORMS = {
    "rms": (lambda **options: RMSNorm(12, **options), True, 1),
    "layer": (lambda **options: LayerNorm(12, **options), False, 1),
    "groups": (lambda **options: GroupNorm(3, 12, **options), False, 3),
    "rms_groups": (lambda **options: GroupNorm(3, 12, is_rms_norm=True, **options), True, 3),
}
AFFINE = {
    "plain": {"elementwise_affine": False},
    "weight": {},
    "bias": {"bias": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, affine, dtype):
    make, is_rms_norm, num_groups = NORMS[name]
    norm = drawn(make(eps=EPS, **AFFINE[affine]))
    x, residual = leaves((2, 9, 12), (2, 9, 12), dtype=dtype)
    inputs = [x, *norm.parameters()]
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    want = plain_norm(x, norm, is_rms_norm, num_groups).to(dtype)
    assert_same(norm(x), want, inputs, tolerance)
    # A block's second norm: it adds the residual, and returns the sum for the next one.
    total = x.float() + residual.float()
    want = plain_norm(total, norm, is_rms_norm, num_groups).to(dtype), total.to(dtype)
    assert_same(norm(x, residual, True), want, [*inputs, residual], tolerance)
    assert_same(norm(x, residual), want[0], [*inputs, residual], tolerance)


def test_a_residual_in_float32_stays_so():
    norm = RMSNorm(12, eps=EPS)
    x = leaves((2, 9, 12), dtype=torch.bfloat16)[0]
    y, total = norm(x, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, x.float())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
def test_gated_norms(is_rms_norm, affine, activation):
    options = {"eps": EPS, "activation": activation, **AFFINE[affine]}
    if is_rms_norm and options.pop("bias", False):
        pytest.skip("FusedRMSNormGated has no bias")
    norm = drawn((FusedRMSNormGated if is_rms_norm else FusedLayerNormGated)(12, **options))
    x, g, residual = leaves((2, 9, 3, 12), (2, 9, 3, 12), (2, 9, 3, 12))
    gate = ACTIVATIONS[activation](g)
    inputs = [x, g, *norm.parameters()]
    assert_same(norm(x, g), plain_norm(x, norm, is_rms_norm) * gate, inputs)
    want = plain_norm(x + residual, norm, is_rms_norm) * gate, x + residual
    assert_same(norm(x, g, residual, True), want, [*inputs, residual])


LINEAR_NORMS = {
    "rms": (lambda: RMSNormLinear(12, bias=True, eps=EPS), True, 1),
    "layer": (lambda: LayerNormLinear(12, bias=True, eps=EPS), False, 1),
    "groups": (lambda: GroupNormLinear(3, 12, bias=True, eps=EPS), False, 3),
}


@pytest.mark.parametrize("name", LINEAR_NORMS)
def test_norms_before_a_linear_layer(name):
    """Their backward pass computes the output again."""
    make, is_rms_norm, num_groups = LINEAR_NORMS[name]
    norm = drawn(make())
    x, weight, bias = leaves((2, 9, 12), (5, 12), (5,))
    want = F.linear(plain_norm(x, norm, is_rms_norm, num_groups), weight, bias)
    assert_same(norm(x, weight, bias), want, [x, weight, bias, *norm.parameters()])


@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
def test_gated_norms_before_a_linear_layer(is_rms_norm):
    make = FusedRMSNormSwishGateLinear if is_rms_norm else FusedLayerNormSwishGateLinear
    norm = drawn(make(12, eps=EPS))
    x, g, weight, bias = leaves((2, 9, 12), (2, 9, 12), (5, 12), (5,))
    want = F.linear(plain_norm(x, norm, is_rms_norm) * F.silu(g), weight, bias)
    assert_same(norm(x, g, weight, bias), want, [x, g, weight, bias, *norm.parameters()])


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
def test_norms_of_mamba2(is_rms_norm, group_size, norm_before_gate):
    make = RMSNormGated if is_rms_norm else LayerNormGated
    norm = drawn(make(12, EPS, group_size, norm_before_gate))
    x, z = leaves((2, 9, 12), (2, 9, 12))
    num_groups = 1 if group_size is None else 3
    if norm_before_gate:
        want = plain_norm(x, norm, is_rms_norm, num_groups) * F.silu(z)
    else:
        want = plain_norm(x * F.silu(z), norm, is_rms_norm, num_groups)
    assert_same(norm(x, z), want, [x, z, *norm.parameters()])
    want = plain_norm(x, norm, is_rms_norm, num_groups)
    assert_same(norm(x), want, [x, *norm.parameters()])


def turned(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Pairs of channels of x [..., D] as complex numbers, times exp(i angles); the rest as is."""
    R = angles.shape[-1]
    pairs = x[..., : 2 * R].unflatten(-1, (R, 2) if interleaved else (2, R))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    number = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles)
    pairs = torch.view_as_real(number)
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    return torch.cat([pairs.flatten(-2), x[..., 2 * R :]], -1)


POSITIONS = {
    "dense": (0, None, [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]),
    "shifted": (3, None, [[3, 4, 5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9]]),
    "shifts": ([2, 0], None, [[2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6]]),
    "packed": (0, [0, 1, 4, 7], [[0, 0, 1, 2, 0, 1, 2]]),
    "packed_shifted": (2, [0, 1, 4, 7], [[2, 2, 3, 4, 2, 3, 4]]),
    "packed_shifts": ([5, 0, 1], [0, 1, 4, 7], [[5, 0, 1, 2, 1, 2, 3]]),
}


@pytest.mark.parametrize("rotated", [6, 4])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", POSITIONS)
def test_rotary_embedding(name, interleaved, rotated):
    shifts, offsets, positions = POSITIONS[name]
    (x,) = leaves((len(positions), 7, 3, 6))
    frequencies = torch.rand(rotated // 2, generator=torch.Generator().manual_seed(0))
    table = torch.outer(torch.arange(10.0), frequencies)
    got = rotary_embedding(
        x,
        table.cos(),
        table.sin(),
        interleaved,
        seqlen_offsets=torch.tensor(shifts) if isinstance(shifts, list) else shifts,
        cu_seqlens=None if offsets is None else torch.tensor(offsets),
    )
    want = turned(x, table[torch.tensor(positions)].unsqueeze(2), interleaved)
    assert_same(got, want, [x])


def test_rotary_embedding_in_place_and_of_padding():
    """A position below 0, of padding on the left, is in no table."""
    x = leaves((2, 5, 1, 4))[0].detach()
    table = torch.outer(torch.arange(6.0), torch.ones(2))
    shifts = torch.tensor([0, -2])
    y = rotary_embedding(x, table.cos(), table.sin(), seqlen_offsets=shifts)
    assert not y[1, :2].any()
    assert relative_error(y[1, 2:], turned(x[1, 2:], table[:3].unsqueeze(1), False)) < 1e-6
    z = x.clone()
    again = rotary_embedding(z, table.cos(), table.sin(), inplace=True, seqlen_offsets=shifts)
    assert torch.equal(again, z)
    assert torch.equal(z[1, :2], x[1, :2])
    assert torch.equal(torch.cat([z[0], z[1, 2:]]), torch.cat([y[0], y[1, 2:]]))


def test_packed_rows_are_rotated_like_the_documents_alone():
    rotary = RotaryEmbedding(6)
    q, k = (x.detach() for x in leaves((1, 9, 2, 6), (1, 9, 2, 6)))
    offsets = [0, 2, 3, 9]
    packed = rotary(q, k, cu_seqlens=torch.tensor(offsets))
    for start, end in pairwise(offsets):
        alone = rotary(q[:, start:end], k[:, start:end])
        for a, b in zip(packed, alone, strict=True):
            assert torch.equal(a[:, start:end], b)
