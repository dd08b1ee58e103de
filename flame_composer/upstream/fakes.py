"""torch 2.7.0 with tensors that have a shape but no memory, which behave as on a GPU if asked."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from composer.distributed import activation_checkpointing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl
from torch.utils._pytree import tree_leaves

# Real tensors are computed with for real as long as they are small: token ids, offsets, masks.
LARGEST_REAL = 1 << 24  # elements


class Fakes(FakeTensorMode):
    """A FakeTensorMode in which a training step runs whose token ids are real.

    Operations on real tensors alone are carried out. What depends on the values of fake tensors,
    such as whether a gradient is finite, takes them for 0.

    Upstream: torch 2.7.0, `torch._subclasses.fake_tensor.FakeTensorMode.dispatch`.
    Mends: it raises when the value of a tensor is asked for, even if a real tensor is all it takes.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        is_fake = any(isinstance(each, FakeTensor) for each in tensors)
        if tensors and not is_fake and _broadcast_size(tensors) <= LARGEST_REAL:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and is_fake:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").numpy().item()
        return super().dispatch(func, types, args, kwargs)


def _broadcast_size(tensors: list[Tensor]) -> int:
    try:
        return torch.Size(torch.broadcast_shapes(*(each.shape for each in tensors))).numel()
    except RuntimeError:  # no operation by elements
        return max(each.numel() for each in tensors)


@contextmanager
def fakes_as_on_gpus() -> Iterator[None]:
    """Give fake tensors addresses, and make them say that they are on a GPU.

    The address is that within a tensor's storage, as if storages began at 0: what matters is
    whether it is aligned.

    Upstream: torch 2.7.0, `FakeTensor.data_ptr` and `is_cuda`.
    Mends: a fake tensor has no address, by which Triton chooses how a kernel is compiled.
    """

    def address(tensor: Tensor) -> int:
        return int(tensor.storage_offset()) * tensor.element_size()

    with (
        patch.object(FakeTensor, "data_ptr", address),
        patch.object(FakeTensor, "is_cuda", True),
    ):
        yield


# AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE of torch's autocast_mode.h: what models compute
# in fp32 under autocast on a GPU. On a CPU most of it stays in half precision, and of
# AT_FORALL_LOWER_PRECISION_FP, what is computed in half on a GPU, some in fp32.
_IN_FP32 = """
    acos asin cosh sinh tan erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm group_norm cosine_similarity
    nll_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss binary_cross_entropy_with_logits dist
    logsumexp pdist renorm rms_norm
"""
_IN_HALF = "mv addmv addr"
_TO_FP32 = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
    sum sum.dim_IntList
"""


@contextmanager
def autocast_as_on_gpus() -> Iterator[None]:
    """Make autocast choose the precision of operations on CPU tensors as it does on GPUs.

    Upstream: torch 2.7.0, the `AutocastCPU` kernels of ATen/autocast_mode.cpp.
    Mends: its rules for CPUs are others, so that a step on CPU tensors would keep other bytes.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for names, wrap in (
            (_IN_FP32, _on_fp32),
            (_IN_HALF, _on_half),
            (_TO_FP32, _giving_fp32),
        ):
            for name in filter(_is_of_autocast, names.split()):
                base, _, overload = name.partition(".")
                operation = getattr(getattr(torch.ops.aten, base), overload or "default")
                library.impl(operation, wrap(operation), "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


def _is_of_autocast(name: str) -> bool:
    """Return whether autocast on a GPU knows an operation; rms_norm is new in later versions."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _on_fp32(operation: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return operation(*(x.float() if _is_half(x) else x for x in args), **kwargs)

    return call


def _on_half(operation: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        half = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return operation(
                *(
                    x.to(half) if isinstance(x, Tensor) and x.is_floating_point() else x
                    for x in args
                ),
                **kwargs,
            )

    return call


def _giving_fp32(operation: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        has_dtype = any(isinstance(each, torch.dtype) for each in (*args, *kwargs.values()))
        if _is_half(args[0]) and not has_dtype:
            kwargs["dtype"] = torch.float32
        with torch.autocast("cpu", enabled=False):
            return operation(*args, **kwargs)

    return call


@contextmanager
def attention_as_on_gpus() -> Iterator[None]:
    """Make attention on CPU tensors take the kernels of a GPU: flash, or efficient with a mask.

    Upstream: torch 2.7.0, the choice of a kernel in `scaled_dot_product_attention`.
    Mends: on CPU tensors with a mask it keeps all scores, on a GPU only their logsumexp.
    """
    given = F.scaled_dot_product_attention
    with patch.object(F, given.__name__, functools.wraps(given)(_attend)):
        yield


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten = torch.ops.aten
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        if attn_mask is None and query.dtype != torch.float32:
            flash = aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        bias = None
        if attn_mask is not None:
            bias = attn_mask
            if attn_mask.dtype == torch.bool:  # becomes a sum with -inf, for each layer anew
                bias = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device)
            bias = bias.expand(*query.shape[:2], query.shape[2], key.shape[2])
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def offloading_as_on_gpus() -> Iterator[None]:
    """Make activations that are offloaded to the machine's memory leave the device that is counted.

    Upstream: torch 2.7.0, `checkpoint_wrapper.save_on_cpu`.
    Mends: it moves tensors to the CPU, which is where fake ones are already, so that they count.
    """

    def away(pin_memory: bool = False, device_type: str = "cuda") -> Any:  # noqa: ARG001
        return torch.autograd.graph.saved_tensors_hooks(
            lambda kept: torch.empty_like(kept, device="meta"),
            lambda kept: torch.empty_like(kept, device="cpu"),
        )

    with patch.object(checkpoint_wrapper, "save_on_cpu", away):
        yield


@contextmanager
def recomputing_of_fakes() -> Iterator[None]:
    """Make Composer's activation checkpointing recompute blocks in a way that fake tensors survive.

    Both ways keep the same: the inputs of each block, and of one block what it keeps.

    Upstream: composer 0.32.1, `activation_checkpointing.CheckpointImpl.NO_REENTRANT`.
    Mends: with torch 2.7.0 it makes C++ hold fake tensors that custom autograd functions save.
    With 2.15 it does not.
    """
    if torch.__version__ >= "2.15":  # compared as versions
        yield
        return
    ways = types.SimpleNamespace(NO_REENTRANT=CheckpointImpl.REENTRANT)
    with patch.object(activation_checkpointing, "CheckpointImpl", ways):
        yield
