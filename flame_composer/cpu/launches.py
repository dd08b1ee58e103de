"""fla's own code for GPUs, run on tensors that have no memory: everything but its kernels.

Around every kernel, fla allocates what the kernel fills, and keeps what the backward pass needs.
With `without_launches` and fake tensors all of that happens as on a GPU, and only the kernels do
not run. So the memory of a training step can be counted on any machine (`plan.step`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch._subclasses.fake_tensor import unset_fake_temporarily

from flame_composer.cpu.enable import own_kernels
from flame_composer.cpu.losses import genuine_cross_entropy_forward


@contextmanager
def without_launches() -> Iterator[None]:
    """Make fla run as on a GPU in the body, without launching a kernel; `cpu.enable` comes first.

    The results hold nothing. Offsets of documents (`cu_seqlens`) must be real tensors, because the
    sizes of buffers depend on them.

    Upstream: fla 0.5.2 and Triton 3.3.0, `JITFunction.run`, `Autotuner.run`, `Heuristics.run`,
    `fla.ops.utils.index.prepare_...` and `FusedCrossEntropyLoss.forward`.
    Mends: a launch needs a GPU, offsets must be read although tensors are fake, and the loss
    refuses tensors of other devices.
    """
    from fla.modules.fused_cross_entropy import FusedCrossEntropyLoss
    from triton.runtime.autotuner import Autotuner, Heuristics
    from triton.runtime.jit import JITFunction

    launchers = {JITFunction, Autotuner, Heuristics, *Autotuner.__subclasses__()}
    with ExitStack() as stack:
        stack.enter_context(own_kernels())
        for launcher in launchers:
            if "run" in vars(launcher):
                stack.enter_context(patch.object(launcher, "run", _nothing))
        for module, name, function in list(_index_functions()):
            stack.enter_context(patch.object(module, name, _on_real_tensors(function)))
        loss = patch.object(FusedCrossEntropyLoss, "forward", genuine_cross_entropy_forward)
        stack.enter_context(loss)
        yield


def _nothing(*_: Any, **__: Any) -> None:
    return None


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
