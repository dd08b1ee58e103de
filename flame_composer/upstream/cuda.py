"""torch 2.7.0's ways of telling a GPU, answered on a machine that has none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# The lists that torch tests autocast on CUDA with (torch.testing._internal.autocast_test_lists),
# and the operators and functions of Python that call what they name. What is in neither list takes
# its inputs as they are.
_IN_HALF = (
    "addbmm addmm addmv addr baddbmm bmm conv1d conv2d conv3d conv_tbc"
    " conv_transpose1d conv_transpose2d conv_transpose3d convolution einsum linear matmul mm mv"
    " prelu scaled_dot_product_attention __matmul__ __rmatmul__"
)
_IN_FULL = (
    "acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss cosine_similarity"
    " cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss kl_div"
    " l1_loss layer_norm log log10 log1p log2 log_softmax logsumexp margin_ranking_loss mse_loss"
    " multi_margin_loss multilabel_margin_loss nll_loss norm normalize pdist poisson_nll_loss pow"
    " __pow__ __rpow__ prod reciprocal renorm rsqrt sinh smooth_l1_loss soft_margin_loss softmax"
    " softmin softplus sum tan triplet_margin_loss"
)
_OWNERS: Sequence[Any] = (torch, torch.Tensor, F)


class PretendedCuda(TorchFunctionMode):
    """A mode in which meta tensors, which have no memory, pass for tensors of a GPU.

    They say that they are on `cuda:0`, what is made on `cuda` is made on `meta`, and autocast casts
    by the rules of CUDA. Nothing is computed. Tensors on the CPU keep their values until they meet
    one without any. Autocast is entered as on a GPU, which takes `claim_device`.

    Upstream: torch 2.7.0, `torch.Tensor.device`, `is_cuda`; autocast of CUDA.
    Mends: fake tensors on `cuda` end the process without a driver as soon as they need a gradient,
    and meta tensors are no ground for autocast.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_half, self.in_full = _functions(_IN_HALF), _functions(_IN_FULL)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cuda", 0) if args[0].is_meta else func(*args)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].is_meta
        # An index needs its values, but nothing else does that meets a tensor without any.
        given = (*args, *(kwargs or {}).values())
        to_meta = func != torch.Tensor.__getitem__ and any(map(_is_meta, given))
        args = [_on_meta(each, to_meta) for each in args]
        kwargs = {name: _on_meta(each, to_meta) for name, each in (kwargs or {}).items()}
        if torch.is_autocast_enabled("cuda"):
            dtype = None
            if func in self.in_half:
                dtype = torch.get_autocast_dtype("cuda")
            elif func in self.in_full and kwargs.get("dtype") is None:
                dtype = torch.float32
            if dtype is not None:
                args = [_cast(each, dtype) for each in args]
                kwargs = {name: _cast(each, dtype) for name, each in kwargs.items()}
        return func(*args, **kwargs)


def claim_device(capability: int) -> None:
    """Make torch say, for the rest of the process, that it has one GPU, such as 90 for sm_90.

    Upstream: torch 2.7.0, `torch.cuda.is_available`, `get_device_capability` and other questions.
    Mends: fla decides by their answers, at import, which kernels and configurations there are.
    """
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda *_: f"NVIDIA sm_{capability}"
    cuda.get_device_capability = lambda *_: divmod(capability, 10)
    cuda.device = lambda *_: contextlib.nullcontext()


def _functions(names: str) -> set[Any]:
    return {
        getattr(owner, name) for owner in _OWNERS for name in names.split() if hasattr(owner, name)
    }


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _on_meta(value: Any, with_tensors: bool) -> Any:
    if with_tensors and isinstance(value, torch.Tensor) and value.ndim > 0:
        return value.to("meta")
    is_cuda = (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )
    return torch.device("meta") if is_cuda else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_cast(each, dtype) for each in value)
    is_cast = (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.is_meta
        and value.dtype != torch.float64
    )
    return value.to(dtype) if is_cast else value
