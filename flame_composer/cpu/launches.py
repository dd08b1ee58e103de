"""fla's own code for GPUs, run on tensors that have no memory: everything but its kernels.

Around every kernel, fla allocates what the kernel fills, and keeps what the backward pass needs.
With `code_for_gpus` and fake tensors all of that happens as on a GPU; whether a kernel is noted
or skipped is up to `upstream.triton`. So a step can be followed on any machine (`plan.step`).
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from flame_composer.cpu.enable import find, own_kernels
from flame_composer.cpu.losses import genuine_cross_entropy_forward


@contextmanager
def code_for_gpus(shared_memory: int) -> Iterator[None]:
    """Make fla run in the body as on a GPU with `shared_memory` bytes a block.

    It launches its kernels, which the caller has to see to. The results hold nothing. Offsets of
    documents (`cu_seqlens`) must be real tensors, because the sizes of buffers depend on them.
    `cpu.enable` comes first.

    Upstream: fla 0.5.2, `fla.ops.utils.index.prepare_...`, `FusedCrossEntropyLoss.forward`,
    `fla.utils._device.get_all_max_shared_mem`, and flash-attn in `fla.layers.attn`.
    Mends: offsets must be read although tensors are fake, the loss refuses tensors of other
    devices, the shared memory of their device is not found, and flash-attn needs a GPU.
    """
    from fla.layers import attn

    loss_of = find("fla.modules.fused_cross_entropy", "FusedCrossEntropyLoss").FusedCrossEntropyLoss
    device = find("fla.utils._device", "get_all_max_shared_mem")

    every = defaultdict[Any, int](lambda: shared_memory)  # for any device index, and None
    with ExitStack() as stack:
        stack.enter_context(own_kernels())
        stack.enter_context(patch.object(device, "get_all_max_shared_mem", lambda: every))
        for module, name, function in list(_index_functions()):
            stack.enter_context(patch.object(module, name, _on_real_tensors(function)))
        stack.enter_context(patch.object(loss_of, "forward", genuine_cross_entropy_forward))
        # fla leaves the name of the second undefined if flash-attn is not installed.
        for name, made in (("flash_attn_func", _flash_attn), ("flash_attn_varlen_func", _varlen)):
            stack.enter_context(patch.object(attn, name, made, create=True))
        yield


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Allocate and keep what flash-attn does, by torch's own build of it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Take all documents for one: what is allocated depends on the number of tokens only."""
    return _flash_attn(q[None], k[None], v[None])[0]


def _index_functions() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yield each module of fla that holds a function of `fla.ops.utils.index`, its name and it."""
    from fla.ops.utils import index

    found: dict[str, Any] = {
        name: each for name, each in vars(index).items() if name.startswith("prepare_")
    }
    plain = {name: each for name, each in found.items() if not hasattr(each, "fn")}  # no kernels
    modules: list[Any] = list(sys.modules.values())
    for module in modules:
        if getattr(module, "__name__", "").startswith("fla."):
            for name, function in plain.items():
                if vars(module).get(name) is function:
                    yield module, name, function


def _on_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call
