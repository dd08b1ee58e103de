"""Whether a recipe's kernels compile for a device, and fit it, before there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

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
# How a verdict's error begins if the machine ended the compiler, twice: nothing is known then.
ENDED_HERE = "the compiler was ended here"
_SIZES = ("head_dim", "expand_k", "expand_v", "expand_ratio", "num_slots", "state_size")


@dataclass(frozen=True)
class Checked:
    """The verdicts on a recipe's launches; `failures` are uses that the model itself refused."""

    gpu: Gpu
    verdicts: list[Verdict]
    failures: dict[str, str]

    def warnings(self, device: str, hf_config: PretrainedConfig) -> list[str]:
        """Return a line for each kernel of which no configuration is known to fit, and failure."""
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
        unknown = [error for error in verdict.errors if error.startswith(ENDED_HERE)]
        if unknown:
            return (
                f"whether {where} fits {there} is not known: {unknown[0]}; plan again when more"
                " memory is free, or give kernels=none"
            )
        if verdict.least is None:
            reason = max(verdict.errors, key=lambda error: verdict.errors[error])
            from flame_composer.upstream.triton import multiplies_matrices

            if not multiplies_matrices(self.gpu.capability):
                reason += (
                    " (triton 3.3.0 cannot multiply matrices there, triton issue 6087; a later one"
                    " can: STACK=current, docs/stacks.md)"
                )
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
