"""Linear layers of CPU models that compute with oneDNN instead of MKL.

PyTorch chooses MKL, which leaves AMD's wide vectors unused. With oneDNN the fp32 products of a
training step take half the time on an AMD EPYC with AVX-512 (docs/benchmarks.md). The results are
the same, up to the order in which fp32 sums are added up.
"""

from __future__ import annotations

import faulthandler
import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# With fewer multiplications than this, oneDNN's overhead of some 15 microseconds for each call
# outweighs its speed.
MIN_PRODUCTS = 1 << 19
# With fewer weights than this, a layer takes so little time that it need not be laid out.
MIN_WEIGHTS = 1 << 18

_uses_bf16 = False  # whether `layer_product` rounds to bf16; a process has one precision


def multiplies_bf16() -> bool:
    """Return whether this processor multiplies bf16 in hardware: AVX512_BF16 or AMX, on x86.

    oneDNN emulates it on others, more slowly than it computes in fp32.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def use_bf16(on: bool) -> None:
    """Make this process's linear layers multiply in bf16, or in fp32 again.

    This is what autocast does to linear layers: input, weight and result are rounded to bf16 and
    sums are fp32. All other operations, weights, gradients and activations stay fp32. It holds for
    both passes, and for layers that are computed a second time in the backward pass.
    """
    global _uses_bf16
    _uses_bf16 = on


def forward_in_fp32(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the forward pass of an autograd function ignore autocast, and take what it rounded.

    What autocast rounded in a function would meet what it does not in its backward pass.
    """

    @functools.wraps(forward)
    def run(ctx: Any, *args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return forward(ctx, *args)
        with torch.autocast("cpu", enabled=False):
            return forward(ctx, *(as_fp32(each) for each in args))

    return run


def backward_in_fp32(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward pass of an autograd function ignore autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return backward(ctx, *gradients)
        with torch.autocast("cpu", enabled=False):
            return backward(ctx, *gradients)

    return run


def as_fp32(value: Any) -> Any:
    """Return a tensor of half the precision in fp32, and all else as it is."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def keep_signals_off_the_heap() -> None:
    """Give this thread a separate stack for signal handlers, if torch's oneDNN needs it.

    While oneDNN's fp32 kernels compute, the stack pointer points into the heap (before 3.11.2;
    uxlfoundation/oneDNN issue 4845). A SIGTERM then overwrites what lies there, and the process
    aborts some time later. Python's handlers run on the alternate stack if there is one, and
    enabling faulthandler makes one. Signals are delivered to the main thread if it accepts them.
    """
    version = re.search(r"MKL-DNN v(\d+)\.(\d+)\.(\d+)", torch.__config__.show())
    is_mended = version is not None and tuple(map(int, version.groups())) >= (3, 11, 2)
    if not is_mended and not faulthandler.is_enabled():
        faulthandler.enable(file=2)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` for x `[N, I]` and weight `[O, I]`.

    Either may be a transposed view.

    Upstream: torch 2.7.0, `torch.ops.mkldnn._linear_pointwise`.
    Mends: F.linear does not use oneDNN for large products, for which oneDNN is faster.
    """
    if weight.is_mkldnn or _is_for_onednn(x, weight):  # laid out by `pack`, or plain
        weight = weight if weight.is_mkldnn else _dense(weight)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


def layer_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `product` as linear layers compute it: in bf16 if `use_bf16` said so, and it is large.

    Products inside of other operations, such as those with a state, stay fp32.
    """
    if not _uses_bf16 or weight.is_mkldnn or not _is_for_onednn(x, weight):
        return product(x, weight, bias)
    bf16 = torch.bfloat16
    bias = None if bias is None else bias.to(bf16)
    return F.linear(x.to(bf16), weight.to(bf16), bias).float()


def _dense(x: Tensor) -> Tensor:
    """Return x without gaps between its rows, for which oneDNN can take a thousand times as long.

    Such are the gradients of projections that were concatenated (Gated DeltaNet).
    """
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return `dy.T @ x`, `[O, I]`, for dy `[N, O]` and x `[N, I]`."""
    # oneDNN copies its first operand if it is transposed, so let that be the smaller of the two.
    if x.shape[1] < dy.shape[1]:
        return layer_product(x.t(), dy.t()).t().contiguous()
    return layer_product(dy.t(), x.t())


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return bool(
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[0] * weight.numel() >= MIN_PRODUCTS
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `F.linear` returns for x `[..., I]`; it can be differentiated once."""
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    @forward_in_fp32
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        result = layer_product(x.reshape(-1, x.shape[-1]), weight, bias)
        return result.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    @backward_in_fp32
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (dy,) = gradients
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        dx = layer_product(dy, weight.t()).view_as(x) if needs_x else None
        dweight = weight_gradient(dy, x.reshape(-1, x.shape[-1])) if needs_weight else None
        return dx, dweight, dy.sum(0) if needs_bias else None


class Linear(nn.Linear):
    """An nn.Linear that uses `linear` for fp32 on a CPU, and PyTorch for everything else."""

    def forward(self, input: Tensor) -> Tensor:
        is_plain = (
            input.device.type == "cpu"
            and input.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
        )
        if not is_plain or torch.compiler.is_compiling():
            return super().forward(input)
        return linear(input, self.weight, self.bias)


def through_onednn(model: nn.Module) -> None:
    """Turn every nn.Linear of a model into a `Linear`; its parameters are not touched."""
    keep_signals_off_the_heap()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def pack(model: nn.Module, rows: int) -> Callable[[], None]:
    """Lay out a model's large weights as oneDNN needs them for `rows` rows; return the way back.

    In products of a few rows, oneDNN otherwise spends more time on the layout than on the product.
    The model can then be run, but neither trained nor saved. It takes no more memory than before,
    and one layer's more meanwhile; the way back lays the same numbers out as they were. Weights
    that several layers share stay as they are.

    Upstream: torch 2.7.0, `torch.ops.mkldnn._reorder_linear_weight`.
    Mends: torch lays weights out in advance for compiled models only.
    """
    uses = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    changed: dict[Any, bool] = {}  # the layers, and whether their weights are trained
    is_there = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    for module in model.modules():
        if type(module) is not Linear or not is_there:
            continue
        weight = module.weight
        is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
        if not is_plain or weight.numel() < MIN_WEIGHTS or uses[id(weight)] > 1:
            continue
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        changed[module] = weight.requires_grad
        module.weight = nn.Parameter(laid_out, requires_grad=False)

    def restore() -> None:
        for module, is_trained in changed.items():
            plain = module.weight.detach().to_dense()
            module.weight = nn.Parameter(plain, requires_grad=is_trained)

    return restore
