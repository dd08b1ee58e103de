"""Products of fp32 activations and int8 weights, on a CPU.

Weights are rounded to 8 bits with a scale for each output channel. Activations keep 14 bits: each
row is scaled by its largest value and split into two halves of 7 bits, which are two rows of one
product of integers. Of what torch 2.7 has for int8 weights on a CPU (AMD EPYC with AVX-512 VNNI):

- `aten._weight_int8pack_mm` is quick for one row of bfloat16, but has no fast path for fp32 and
  slows down with the number of rows;
- `quantized.linear_dynamic` is as quick as this, but gives all rows of a batch one scale of 8 bits,
  so that what a row gets depends on the others;
- a product with weights turned back into fp32 or bfloat16 reads them several times.

The sums are those of integers, and exact: a row's result does not depend on how many others there
are. With halves of 7 bits, sums of two products fit into 16 bits, as processors without VNNI need.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref

import torch
from torch import Tensor

MOST = 127  # the largest int8 weight; -128 is not used
_HALF = 63  # the largest number of a half, which is stored with _HALF + 1 added
_FEW = 64  # rows; what is split is kept for no more, since it takes memory until the next
_NARROW = 64  # channels; what is split is kept for more only, as it takes no time for so few
_last = threading.local()
_SMALLEST = 1e-30  # a row of activations below it is taken for zeros


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 numbers, [O, I], and fp32 scales, [O], whose product is nearest to `weight`.

    A row of zeros has scale 1. The weights must be finite.
    """
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / MOST).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.where(weight.any(dim=1), scale, 1.0)
    return (weight / scale.unsqueeze(1)).round_().clamp_(-MOST, MOST).to(torch.int8), scale


def pack_int8(numbers: Tensor) -> Tensor:
    """Return int8 weights [O, I] in the order in which oneDNN reads them, of the same size.

    Upstream: torch 2.7.0, `torch.ops.onednn.qlinear_prepack`.
    Mends: torch has no public product of packed int8 weights and activations of known scale.
    """
    packed: Tensor = torch.ops.onednn.qlinear_prepack(numbers, None)
    return packed


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the halves of activations [N, ..., I], uint8 [2 N, ..., I], and the rows' largest.

    Several layers are given the same activations one after another: what was split last in this
    thread is not split again. Whether a tensor was changed since is seen by a copy of its numbers,
    since in torch.inference_mode changes are not counted.
    """
    kept: tuple[weakref.ref[Tensor], Tensor, tuple[Tensor, Tensor]] | None
    kept = getattr(_last, "split", None)
    if kept is not None and kept[0]() is x and torch.equal(kept[1], x):
        return kept[2]
    # linalg.vector_norm gives the same, and takes ten times as long for many rows.
    top = x.abs().amax(-1, keepdim=True).clamp_min_(_SMALLEST)
    y = x / top
    # The second half is what the first leaves over, which is at most half a step of it.
    _hear_its_warning()
    upper = torch.quantize_per_tensor(y, 1 / _HALF, _HALF + 1, torch.quint8)
    rest = y.sub_(upper.dequantize())
    lower = torch.quantize_per_tensor(rest, 0.5 / _HALF**2, _HALF + 1, torch.quint8)
    split = torch.cat([upper.int_repr(), lower.int_repr()]), top
    # Narrow ones in between (in a gate of low rank) do not take the place of a wide one.
    if x.numel() <= _FEW * x.shape[-1] and x.shape[-1] > _NARROW:
        _last.split = weakref.ref(x), x.detach().clone(), split
    return split


@functools.cache
def _hear_its_warning() -> None:
    """Have torch 2.15 say now, unheard, what it says once: that such tensors will go away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


def int8_product(x: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """Return x times the transpose of packed int8 weights with scales [O]; x is fp32 `[N, ..., I]`.

    `zeros` are the weights' zero points, int32 [O], all 0. A row that is not finite gives no finite
    numbers.

    Upstream: torch 2.7.0, `torch.ops.onednn.qlinear_pointwise`.
    Mends: as `pack_int8`.
    """
    num_rows = x.shape[0]
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], scale.shape[0])
    halves, top = _split(x)
    sums = torch.ops.onednn.qlinear_pointwise.default(
        halves,
        1 / _HALF,  # the scale of the activations
        _HALF + 1,
        packed,
        scale,
        zeros,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    result: Tensor = torch.add(sums[:num_rows], sums[num_rows:], alpha=0.5 / _HALF).mul_(top)
    return result
