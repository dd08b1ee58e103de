"""Support for fla's models without a GPU: `from flame_composer import cpu; cpu.enable()`.

fla computes in Triton kernels, which neither import nor run without a GPU driver. After `enable()`,
`import fla` works anywhere. Every operation of the models in `cpu.coverage` (training, prefill,
decoding) that is given a CPU tensor then runs in plain PyTorch (`cpu.operations`,
`cpu.attention`); CUDA tensors still take fla's own kernels, and flash-attn. Configs, parameter
names and checkpoints are the same on both.

With TRITON_INTERPRET=1 in the environment, fla's own kernels run in Triton's interpreter instead:
very slowly, to compare with, and for any model whose kernels the interpreter can run.

There is no CPU version of fla's other models, except Mamba, which has a plain PyTorch version of
its own. `missing` reports what needs a GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from flame_composer.cpu import attention
from flame_composer.cpu.coverage import interprets
from flame_composer.cpu.generation import pass_on_the_cache
from flame_composer.cpu.gsa import fused_additive_gate
from flame_composer.cpu.linear import keep_signals_off_the_heap
from flame_composer.cpu.losses import genuine_cross_entropy_forward
from flame_composer.cpu.operations import OPERATIONS, REPLACEMENTS
from flame_composer.cpu.rotary import keep_rotary_tables

TESTED_FLA = ("0.5.", "0.6.")
DISPATCH_SWITCH = "FLA_DISABLE_BACKEND_DISPATCH"
# Where fla 0.6 has what was in these modules of 0.5, or a single function of them
_MOVED = {
    "fla.layers.lightnet.chunk_gla": "fla.ops.lightnet.chunk",
    "fla.layers.lightnet.fused_recurrent_gla": "fla.ops.lightnet.fused_recurrent",
    "fla.models.utils": "fla.models.cache_utils",
    "fla.modules.activations": "fla.modules.activations.ops",
    "fla.modules.fused_cross_entropy": "fla.modules.fused_cross_entropy.ops",
    "fla.modules.layernorm_gated": "fla.modules.norm.layernorm_gated",
    "fla.utils._device": "fla.utils.hardware",
}
# What fla 0.6 calls operations of 0.5
_RENAMED = {
    "fused_linear_cross_entropy_forward": "fused_linear_cross_entropy_fwd",
    "fused_linear_cross_entropy_backward": "fused_linear_cross_entropy_bwd",
}


def enable() -> None:
    """Make fla importable, and the models in `cpu.coverage` runnable on CPU tensors.

    Calling it again changes nothing.

    Raises:
        ImportError: if this module was not written for the installed version of fla.
        ValueError: if fla's backend dispatch, which sends CPU tensors here, is switched off.
    """
    version = importlib.metadata.version("fla-core")
    if not version.startswith(TESTED_FLA):
        raise ImportError(
            f"fla-core {version} is installed, but flame_composer.cpu knows the internals of"
            f" {'x and '.join(TESTED_FLA)}x only: pip install"
            f" 'flash-linear-attention=={TESTED_FLA[0]}*'"
        )
    if os.environ.get(DISPATCH_SWITCH) == "1":
        raise ValueError(
            f"{DISPATCH_SWITCH}=1 keeps fla from running on a CPU: unset it and start again"
        )
    keep_signals_off_the_heap()
    install_stub_driver()
    # fla's decorators import torch's compiler, which would start a pool of compile processes at
    # once. They are not needed until something is compiled.
    os.environ.setdefault("TORCH_WARM_POOL", "0")
    with warnings.catch_warnings():
        # fla warns at import that flash-attn is missing.
        warnings.filterwarnings("ignore", "Flash Attention is not installed", ImportWarning)
        importlib.import_module("fla")
    # transformers >= 4.52 reads the docstring of every registered config, and fla's BitNetConfig
    # has none.
    bitnet = importlib.import_module("fla.models.bitnet").BitNetConfig
    bitnet.__doc__ = bitnet.__doc__ or ""
    # fla's Mamba-2 ties its embeddings to the output layer without saying so, and such a model
    # cannot be saved.
    for name in ("Mamba2", "Mamba3", "LogLinearMamba2"):
        model = getattr(importlib.import_module("fla.models"), f"{name}ForCausalLM")
        model._tied_weights_keys = model._tied_weights_keys or ["lm_head.weight"]
    _supply_flash_attention()
    if _is_there("fla.models.generation_utils"):  # fla 0.6
        pass_on_the_cache(importlib.import_module("fla.models.generation_utils").FLAGenerationMixin)
    keep_rotary_tables(importlib.import_module("fla.modules.rotary").RotaryEmbedding)
    if not torch.cuda.is_available():
        # It says in every layer that code for GPUs is missing.
        logging.getLogger("fla.layers.mamba2").setLevel(logging.ERROR)
    if interprets():
        losses = find("fla.modules.fused_cross_entropy", "FusedCrossEntropyLoss")
        losses.FusedCrossEntropyLoss.forward = genuine_cross_entropy_forward
        return
    _register_backend()
    for module, name, make in REPLACEMENTS:
        *path, name = name.split(".")
        owner = find(module, path[0] if path else name)
        for part in path:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        if not hasattr(original, "cpu_version"):
            setattr(owner, name, _by_device(original, make))


def find(module: str, name: str) -> Any:
    """Return the module of fla that defines `name`, which fla 0.5 does in `module`."""
    moved = _MOVED.get(module) or _MOVED.get(f"{module}.{name}")
    if moved is not None and _is_there(moved):
        module = moved
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ImportError(f"{module} of the installed version of fla has no {name}")
    return found


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that would hold it
        return False


def install_stub_driver() -> None:
    """Give Triton a driver that answers queries but launches nothing, if no GPU driver is active.

    Triton asks the driver for a benchmarker when a kernel is decorated. Without a driver,
    importing fla fails.
    """
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class NoGPU(DriverBase):
        @classmethod
        def is_active(cls) -> bool:  # type: ignore[override]
            return True

        def get_current_target(self) -> GPUTarget:  # type: ignore[override]
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cpu")

        def get_benchmarker(self) -> Callable[..., Any]:
            return lambda kernel, *, quantiles, **_: [0.0] * len(quantiles)

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty  # for launchers, of which there are none

        def get_current_device(self) -> int:
            raise RuntimeError(
                "a Triton kernel was called on a machine without a GPU: flame_composer.cpu has no"
                " CPU version of this operation (cpu.coverage names the models that have one)"
            )

    if any(each.driver.is_active() for each in backends.values()):
        return
    try:
        is_claimed = isinstance(driver.active, DriverBase)  # Triton 3.3 has a proxy there at first
    except RuntimeError:  # later ones have nothing there at first, and look for a GPU
        is_claimed = False
    if not is_claimed:
        driver.set_active(NoGPU())
        # fla 0.6 would look for the best form of a kernel on disk before it launches it
        os.environ.setdefault("FLA_CACHE_RESULTS", "0")


_own_kernels = ContextVar("own_kernels", default=False)


@contextmanager
def own_kernels() -> Iterator[None]:
    """Let fla take its own code for CPU tensors, too, in the body; see `cpu.launches`."""
    token = _own_kernels.set(True)
    try:
        yield
    finally:
        _own_kernels.reset(token)


def _on_cpu(*args: Any, **kwargs: Any) -> bool:
    if _own_kernels.get():
        return False
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device.type == "cpu"


def _register_backend() -> None:
    try:
        backends = importlib.import_module("fla.backends")
    except ImportError:  # fla 0.5
        backends = importlib.import_module("fla.ops.backends")
    if backends._DISPATCH_DISABLED:
        raise ValueError(f"fla was imported under {DISPATCH_SWITCH}=1: unset it and start again")

    class TorchCPU(backends.BaseBackend):  # type: ignore[name-defined, misc]
        backend_type = "torch_cpu"
        priority = 0

        def verify(self, function_name: str, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            return _on_cpu(*args, **kwargs), "not a CPU tensor"

    if not hasattr(backends, "register"):  # fla 0.5 looks operations up by their names
        for operation in OPERATIONS:
            setattr(TorchCPU, operation.__name__, staticmethod(operation))
        importlib.import_module("fla.modules.backends").modules_registry.register(TorchCPU())
        return
    known = {each.__name__: each for each in backends._function_registries}
    for operation in (*OPERATIONS, fused_additive_gate):
        name = operation.__name__
        backends.register(known[_RENAMED.get(name, name)], backend=TorchCPU)(operation)


def _supply_flash_attention() -> None:
    """Let tensors take `cpu.attention` where fla's softmax attention calls flash-attn.

    CPU tensors always do, CUDA tensors where flash-attn is not installed and torch has fused
    kernels. With a GPU and neither, fla still refuses to build such a layer.
    """
    owner = importlib.import_module("fla.layers.attn")
    for cpu_version in (attention.flash_attn_func, attention.flash_attn_varlen_func):
        name = cpu_version.__name__
        original = getattr(owner, name, None)
        is_ours = original is cpu_version or hasattr(original, "cpu_version")
        if original is None and not torch.cuda.is_available():
            setattr(owner, name, cpu_version)
        elif original is None and attention.has_fused():
            setattr(owner, name, _by_device(getattr(attention, f"fused_{name}"), cpu_version))
        elif original is not None and not is_ours:
            setattr(owner, name, _by_device(original, cpu_version))


def _by_device(original: Callable[..., Any], cpu_version: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (cpu_version if _on_cpu(*args, **kwargs) else original)(*args, **kwargs)

    call.cpu_version = cpu_version  # type: ignore[attr-defined]
    return call
