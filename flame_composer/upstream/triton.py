"""triton 3.3.0's compiler: a driver that claims a GPU, launches that are noted, compiling."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import make_backend
from triton.runtime import cache, driver
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

from flame_composer.processes import end_with_parent

MAX_TENSOR_MEMORY = 512  # columns, on sm_100 (triton.compiler.CompiledKernel)
PATIENCE = 300  # seconds that one configuration may take to compile, which takes a few


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

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

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
def without_launches() -> Iterator[None]:
    """Make a launch of any kernel do nothing in the body.

    Upstream: triton 3.3.0, `JITFunction.run`, `Autotuner.run` and `Heuristics.run`.
    Mends: a launch needs a GPU.
    """
    launchers = {JITFunction, Autotuner, Heuristics, *Autotuner.__subclasses__()}
    with ExitStack() as stack:
        for launcher in launchers:
            if "run" in vars(launcher):
                stack.enter_context(patch.object(launcher, "run", lambda *_, **__: None))
        yield


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """Note launches of kernels in the body instead of making them; yield the list they go to.

    What kernels would write stays as it was. An autotuner hands on all its configurations each
    time, whatever it found before. Needs `claim_gpu`, and fake tensors `fakes_as_on_gpus`.

    Upstream: triton 3.3.0, `JITFunction.cache_hook`, `Autotuner.run`, `Autotuner.cache`.
    Mends: there is no public way to know what an autotuned kernel would be compiled to without
    launching it.
    """
    launches: list[Launch] = []
    tuned: dict[str, Variant] | None = None
    names: set[str] = set()

    def note(variant: Variant) -> None:
        if tuned is None:
            launches.append(Launch(variant.function.fn.__name__, (variant,)))
        else:
            tuned.setdefault(variant.key, variant)

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal tuned, names
        self.cache.clear()
        self.cache_results = False  # of later versions, which keep times on disk
        tuned, names = {}, _tuned_names(self.configs)
        try:
            tune(self, *args, **kwargs)
            launches.append(Launch(self.base_fn.__name__, tuple(tuned.values())))
        finally:
            tuned, names = None, set()

    tune = Autotuner.run
    Autotuner.run = run  # type: ignore[method-assign]
    try:
        with _noting(note, lambda: names):
            yield launches
    finally:
        Autotuner.run = tune  # type: ignore[method-assign]


@contextmanager
def _noting(note: Callable[[Variant], None], names: Callable[[], set[str]]) -> Iterator[None]:
    """Call `note` in place of compiling and launching; `names` returns those of tuned arguments."""

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function, text = fn.jit_function, compile["specialization_data"]
        note(Variant(function, text, _configuration(function, json.loads(text), names())))
        return True  # do not compile or launch it

    if hasattr(triton, "knobs"):  # since Triton 3.4
        owner, name, hook_there = triton.knobs.runtime, "jit_cache_hook", hook
    else:
        owner, name, hook_there = JITFunction, "cache_hook", staticmethod(hook)
    before = getattr(owner, name)
    setattr(owner, name, hook_there)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _tuned_names(candidates: Sequence[Any]) -> set[str]:
    return {name for config in candidates for name in config.kwargs}


def drives_gpu() -> bool:
    """Return whether Triton has a GPU: a real one, which no other driver claims to be."""
    return torch.cuda.is_available() and type(driver.active).__module__.startswith("triton.")


def compile_candidates_together(workers: int) -> None:
    """Make an autotuner compile its candidates in `workers` processes before it times the first.

    They are forked, keep what they compile in Triton's cache, and never touch the GPU. What they
    could not compile, the autotuner tries by itself.

    Upstream: triton 3.3.0, `Autotuner._bench`, `JITFunction.cache_hook`.
    Mends: an autotuner compiles its candidates one by one, on one core: hundreds before the first
    step of a model of fla, which takes minutes on a new machine.
    """
    bench = Autotuner._bench
    if bench.__module__ != Autotuner.__module__:
        return  # done before

    def compile_all_first(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        nonlocal workers
        candidates = self.prune_configs(meta)
        may_fork = workers > 1 and not multiprocessing.current_process().daemon
        if may_fork and len(candidates) > 1 and config is candidates[0]:
            target = driver.active.get_current_target()
            if not _compile_in_processes(_variants(self, candidates, args, meta), target, workers):
                workers = 1
        return bench(self, *args, config=config, **meta)

    Autotuner._bench = compile_all_first  # type: ignore[method-assign]


def _variants(
    tuner: Any, candidates: Sequence[Any], args: tuple[Any, ...], meta: dict[str, Any]
) -> list[Variant]:
    """Return the variants of a launch that this process has not loaded yet."""
    noted: list[Variant] = []
    with _noting(noted.append, lambda: _tuned_names(candidates)):
        for config in candidates:
            with suppress(Exception):  # the autotuner will meet it, too
                tuner.fn.run(*args, **{**meta, **config.all_kwargs(), "warmup": True})
    return noted


def _compile_in_processes(variants: Sequence[Variant], target: GPUTarget, workers: int) -> bool:
    """Compile variants into Triton's cache.

    Return False if the compiler hangs, if no process can be started, or if the GPU is not NVIDIA's.
    """
    if target.backend != "cuda":
        return False
    prepare_to_compile()
    context = multiprocessing.get_context("fork")
    waiting = sorted(variants, key=lambda variant: variant.size)  # the largest takes longest
    running: dict[Any, tuple[Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            variant = waiting.pop()
            variant.function.cache_key  # noqa: B018 (computed once, not in each process)
            process = context.Process(target=_compile_for, args=(variant, target), daemon=True)
            with warnings.catch_warnings():  # of threads, which the child has none of
                warnings.simplefilter("ignore", DeprecationWarning)
                try:
                    process.start()
                except OSError:  # too little memory, or too many processes
                    return _end(running)
            running[process.sentinel] = process, time.monotonic()
        for sentinel in wait(list(running), timeout=1):
            running.pop(sentinel)[0].join()
        if any(time.monotonic() - started > PATIENCE for _, started in running.values()):
            return _end(running)
    return True


def _end(running: Mapping[Any, tuple[Any, float]]) -> bool:
    for process, _ in running.values():
        process.kill()
        process.join()
    return False


def _compile_for(variant: Variant, target: GPUTarget) -> None:
    end_with_parent()
    nowhere = os.open(os.devnull, os.O_WRONLY)  # for what the compiler itself writes
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    claim_gpu(int(target.arch), 0, 0)
    with suppress(Exception):
        variant.function.preload(variant.specialization)
    os._exit(0)  # without what the parent does at its end


def prepare_to_compile() -> None:
    """Compute now what Triton computes once in a process that compiles, for those forked from it.

    Upstream: triton 3.3.0, `triton.compiler.compiler.triton_key`, `CUDABackend.hash`.
    Mends: a process hashes all of Triton's compiler, and asks ptxas for its version, before it
    compiles or looks into the cache: half a second in each.
    """
    from triton.compiler import compiler

    (compiler if hasattr(compiler, "triton_key") else cache).triton_key()  # since Triton 3.4
    make_backend(driver.active.get_current_target()).hash()


def multiplies_matrices(capability: int) -> bool:
    """Return whether Triton compiles products of matrices for an architecture, such as 90.

    Upstream: triton 3.3.0, triton-lang/triton issue 6087.
    Mends: nothing; it tells why `compiled_shared_memory` fails for sm_120.
    """
    return capability != 120 or triton.__version__ != "3.3.0"


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
