"""Whether a recipe's kernels compile for a device, and fit it, before there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from signal import SIGKILL
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from flame_composer.config.plan import PlanConfig
from flame_composer.errors import ConfigError
from flame_composer.processes import when_parent_ends

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from flame_composer.plan.compiling import Verdict

# Shared memory that a block may have, by compute capability: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
SHARED_MEMORY: Mapping[int, int] = MappingProxyType(
    {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
)


@dataclass(frozen=True)
class Gpu:
    """What decides which kernels there are on a device, and how they are compiled."""

    capability: int  # 90 for sm_90
    multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Return the bytes of shared memory that a block may have."""
        return SHARED_MEMORY[self.capability]


# From the same data sheets as plan.memory.DEVICES.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "a100": Gpu(80, 108),
        "a100_40gb": Gpu(80, 108),
        "a10": Gpu(86, 72),
        "l40s": Gpu(89, 142),
        "l4": Gpu(89, 58),
        "rtx4090": Gpu(89, 128),
        "h100": Gpu(90, 132),
        "h100_pcie": Gpu(90, 114),
        "h200": Gpu(90, 132),
        "b200": Gpu(100, 148),
        "rtx5090": Gpu(120, 170),
    }
)
_SIZES = ("head_dim", "expand_k", "expand_v", "expand_ratio", "num_slots", "state_size")


@dataclass(frozen=True)
class Checked:
    """The verdicts on a recipe's launches; `failures` are uses that the model itself refused."""

    gpu: Gpu
    verdicts: list[Verdict]
    failures: dict[str, str]

    def warnings(self, device: str, hf_config: PretrainedConfig) -> list[str]:
        """Return a line for each kernel of which no configuration fits, and for each failure."""
        lines: dict[str, str] = {}
        for verdict in self.verdicts:
            if not verdict.fit:
                lines.setdefault(verdict.kernel, self._misfit(verdict, device, hf_config))
        return [
            *lines.values(),
            *(
                f"{use}: fla refuses it on a GPU, or it cannot be followed without one: {error}"
                for use, error in self.failures.items()
            ),
        ]

    def _misfit(self, verdict: Verdict, device: str, hf_config: PretrainedConfig) -> str:
        there = f"{device} (sm_{self.gpu.capability})"
        where = f"{verdict.kernel} ({', '.join(verdict.uses)})"
        if verdict.least is None:
            reason = max(verdict.errors, key=lambda error: verdict.errors[error])
            if self.gpu.capability == 120:
                reason += " (triton 3.3.0 cannot multiply matrices there: triton issue 6087)"
            return (
                f"no configuration of {where} compiles for {there}: {reason}; take another device"
                " or model"
            )
        sizes = [name for name in _SIZES if hasattr(hf_config, name)]
        smaller = f"a smaller {' or '.join(sizes)}, or more num_heads" if sizes else "more heads"
        return (
            f"no configuration of {where} fits {there}: the least, {verdict.smallest}, asks for"
            f" {verdict.least / 1024:.4g} KB of shared memory a block, and there are"
            f" {self.gpu.shared_memory >> 10}; give the model {smaller}, or take another device"
        )

    def line(self) -> str:
        """Return one line on how many kernels there are and how many fit."""
        fit = sum(verdict.fit > 0 for verdict in self.verdicts)
        compiled = sum(verdict.compiled for verdict in self.verdicts)
        return (
            f"{fit} of {len(self.verdicts)} launches have a configuration that compiles for"
            f" sm_{self.gpu.capability} and fits ({compiled:,} compiled)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that recipes/plan.py prints."""
        return {
            "capability": self.gpu.capability,
            "shared_memory": self.gpu.shared_memory,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "failures": self.failures,
        }


# Variables of the environment that would change what is compiled
NOT_OF_A_PLAN = ("TRITON_INTERPRET", "FLA_CACHE_MODE", "FLA_CONFIG_DIR")


@contextmanager
def compiler(config: PlanConfig) -> Iterator[Compiler | None]:
    """Start a process that claims to have the device, and imports fla while this one goes on.

    Yield None if there is nothing to compile: on CPUs, and with `kernels: none`.
    """
    if config.device not in GPUS or config.kernels == "none":
        yield None
        return
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={
                **{name: each for name, each in os.environ.items() if name not in NOT_OF_A_PLAN},
                "CUDA_VISIBLE_DEVICES": "",
            },
            preexec_fn=partial(when_parent_ends, SIGKILL),
        )
        try:
            found = Compiler(process, errors, GPUS[config.device])
            with suppress(BrokenPipeError):
                found.send(asdict(found.gpu))
            yield found
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # closing writes what was not taken
                    pipe.close()


class Compiler:
    """The process that compiles."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str], gpu: Gpu):
        self.process, self.errors, self.gpu = process, errors, gpu

    def send(self, message: dict[str, Any]) -> None:
        """Send one message as a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def check(self, config: PlanConfig, hf_config: PretrainedConfig) -> Checked | None:
        """Return the verdicts on all launches of the run, its evaluation and generation.

        Return None if the model is not one of fla's. Show a progress bar in a terminal. Raise
        ConfigError if the process ends early.
        """
        from flame_composer.plan.compiling import Verdict

        if not type(hf_config).__module__.startswith("fla."):
            return None
        with suppress(BrokenPipeError):  # it has ended, and says why below
            self.send({"steps": _steps(config, hf_config), "every": config.kernels == "every"})
        verdicts: list[Verdict] = []
        assert self.process.stdout is not None
        with tqdm(desc="compiling", unit="kernel", disable=None) as bar:
            for line in self.process.stdout:
                message = json.loads(line)
                if "failures" in message:
                    return Checked(self.gpu, verdicts, message["failures"])
                if "launches" in message:
                    bar.reset(message["launches"])
                else:
                    verdicts.append(Verdict(**message))
                    bar.update()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(
            f"kernels={config.kernels}: the process that compiles them ended early: {last[:300]};"
            " give kernels=none to plan without them"
        )


def _steps(config: PlanConfig, hf_config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of `launches.Steps` for the run of `config`."""
    from flame_composer.model.causal_lm import WITHOUT_VARLEN

    dtype = {"fp32": None, "amp_bf16": "bfloat16", "amp_fp16": "float16"}[config.precision]
    fsdp = config.parallelism.fsdp
    is_cast = dtype is not None and fsdp is not None and fsdp.mixed_precision != "FULL"
    packed = [config.varlen]
    if config.kernels == "every" and hf_config.model_type not in WITHOUT_VARLEN:
        packed = [True, False]
    return {
        "model": json.loads(hf_config.to_json_string(use_diff=False)),
        "rows": config.microbatch_size if isinstance(config.microbatch_size, int) else 1,
        "context_length": config.context_length,
        "packed": packed,
        "autocast": dtype,
        "weights": dtype if is_cast else "float32",
        "lora": None if config.lora is None else asdict(config.lora),
    }


def serve() -> None:
    """Be the process that compiles: stdin has a device, then steps to follow, as JSON lines."""
    gpu = Gpu(**json.loads(sys.stdin.readline()))
    from flame_composer.upstream.cuda import claim_device
    from flame_composer.upstream.triton import claim_gpu

    claim_gpu(gpu.capability, gpu.shared_memory, gpu.multiprocessors)
    claim_device(gpu.capability)
    from flame_composer import cpu

    cpu.enable()
    from flame_composer.plan.compiling import judge
    from flame_composer.plan.launches import Steps, follow

    stdout, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def report(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=stdout, flush=True)

    for line in sys.stdin:
        asked = json.loads(line)
        followed = follow(Steps(**asked["steps"]))
        report({"launches": len(followed.launches)})
        judge(
            followed.launches,
            gpu.shared_memory,
            every=asked["every"],
            report=lambda verdict: report(asdict(verdict)),
        )
        report({"failures": followed.failures})
