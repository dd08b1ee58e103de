"""GPUs under the names that CUDA gives them, as the planner knows them."""

from __future__ import annotations

from flame_composer.plan.memory import DEVICES


def device_of(name: str) -> str | None:
    """Return the name in DEVICES of the GPU that CUDA calls `name`, or None if it has none."""
    words = name.lower().replace("rtx ", "rtx").replace("-", " ").split()
    found = [kind for kind in DEVICES if kind.split("_")[0] in words]
    if "pcie" in words and f"{found[0] if found else ''}_pcie" in DEVICES:
        return f"{found[0]}_pcie"
    return found[0] if found else None


def peak_of(name: str) -> float | None:
    """Return the peak FLOP/s in bfloat16 of the GPU that CUDA calls `name`, or None if unknown."""
    device = device_of(name)
    return None if device is None else DEVICES[device].peak
