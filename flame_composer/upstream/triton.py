"""triton 3.3.0 without a GPU: a driver that claims one, launches that are noted, compiling."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import make_backend, triton_key
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

MAX_TENSOR_MEMORY = 512  # columns, on sm_100 (triton.compiler.CompiledKernel)


@dataclass(frozen=True)
class Variant:
    """A kernel as it would be compiled for one launch, under one of its configurations."""

    function: Any  # a JITFunction
    specialization: str  # JSON: types of arguments, constants, options
    configuration: tuple[tuple[str, Any], ...]  # what the autotuner chose: (name, value)

    @property
    def key(self) -> str:
        """Return a hash of all that decides what is compiled, besides the architecture."""
        text = f"{self.function.module}.{self.function.fn.__name__} {self.specialization}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def size(self) -> tuple[int, ...]:
        """Return what to sort by to try those first that ask for little memory."""
        chosen = dict(self.configuration)
        stages, warps = chosen.pop("num_stages"), chosen.pop("num_warps")
        return math.prod(value for value in chosen.values() if type(value) is int), stages, warps


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: one variant for each configuration that the autotuner would time."""

    kernel: str
    variants: tuple[Variant, ...]


def claim_gpu(capability: int, shared_memory: int, multiprocessors: int) -> None:
    """Make Triton say, for the rest of the process, that it has a GPU: before fla is imported.

    `capability` is 90 for sm_90; `shared_memory` is what a block may have, in bytes.

    Upstream: triton 3.3.0, `triton.runtime.driver.driver.set_active`, `DriverBase`.
    Mends: without a GPU there is no driver, and fla decides by its answers, at import, which
    kernels and configurations there are.
    """

    class Claimed(DriverBase):
        @classmethod
        def is_active(cls) -> bool:  # type: ignore[override]
            return True

        @property
        def utils(self) -> Claimed:
            return self

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": shared_memory, "multiprocessor_count": multiprocessors}

        def get_current_target(self) -> GPUTarget:  # type: ignore[override]
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

        def get_benchmarker(self) -> Callable[..., Any]:
            def call_once(call: Callable[[], Any], *, quantiles: Any, **_: Any) -> list[float]:
                call()
                return [0.0] * len(quantiles)

            return call_once

    driver.set_active(Claimed())


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """Note launches of kernels in the body instead of making them; yield the list they go to.

    What kernels would write stays as it was. An autotuner hands on all its configurations each
    time, whatever it found before. Needs `claim_gpu`.

    Upstream: triton 3.3.0, `JITFunction.cache_hook`, `Autotuner.run`, `Autotuner.cache`.
    Mends: there is no public way to know what an autotuned kernel would be compiled to without
    launching it.
    """
    launches: list[Launch] = []
    tuned: dict[str, Variant] | None = None
    names: set[str] = set()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function, text = fn.jit_function, compile["specialization_data"]
        variant = Variant(function, text, _configuration(function, json.loads(text), names))
        if tuned is None:
            launches.append(Launch(fn.name, (variant,)))
        else:
            tuned.setdefault(variant.key, variant)
        return True  # do not compile or launch it

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal tuned, names
        self.cache.clear()
        tuned, names = {}, {name for config in self.configs for name in config.kwargs}
        try:
            tune(self, *args, **kwargs)
            launches.append(Launch(self.base_fn.__name__, tuple(tuned.values())))
        finally:
            tuned, names = None, set()

    tune, hook = Autotuner.run, JITFunction.cache_hook
    Autotuner.run, JITFunction.cache_hook = run, staticmethod(note)  # type: ignore[assignment]
    try:
        yield launches
    finally:
        Autotuner.run, JITFunction.cache_hook = tune, hook


def prepare_to_compile() -> None:
    """Compute now what Triton computes once in a process that compiles, for those forked from it.

    Upstream: triton 3.3.0, `triton.compiler.compiler.triton_key`, `CUDABackend.hash`.
    Mends: a process hashes all of Triton's compiler, and asks ptxas for its version, before it
    compiles or looks into the cache: half a second in each.
    """
    triton_key()
    make_backend(driver.active.get_current_target()).hash()


def compiled_shared_memory(variant: Variant) -> int:
    """Compile for the GPU that is claimed; return the bytes of shared memory that a block needs.

    Raise what Triton or ptxas raises. What was compiled before is read from Triton's cache.

    Upstream: triton 3.3.0, `JITFunction.preload`.
    Mends: compiling without launching takes the private form of what was noted at a launch.
    """
    metadata = variant.function.preload(variant.specialization).metadata
    if (getattr(metadata, "tmem_size", None) or 0) > MAX_TENSOR_MEMORY:
        raise ValueError(
            f"needs {metadata.tmem_size} columns of tensor memory, and there are"
            f" {MAX_TENSOR_MEMORY}"
        )
    return metadata.shared


def _configuration(
    function: Any, specialization: dict[str, Any], names: set[str]
) -> tuple[tuple[str, Any], ...]:
    """Return the autotuned values of a launch, such as BK, num_warps and num_stages."""
    keys, values = specialization["constant_keys"], specialization["constant_vals"]
    constants = {function.arg_names[key[0]]: value for key, value in zip(keys, values, strict=True)}
    chosen = [(name, constants[name]) for name in sorted(names & set(constants))]
    options = specialization["options"]
    return (*chosen, *((name, options[name]) for name in ("num_warps", "num_stages")))
