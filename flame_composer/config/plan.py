"""The configuration of recipes/plan.py: the keys of a run, and those of its machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from flame_composer.config import other_names
from flame_composer.config.rules import BYTES, require
from flame_composer.config.train import TrainConfig


@dataclass
class PlanConfig(TrainConfig):
    """Show what a run of recipes/train.py will take and cost, before anyone pays for it.

    Give the run's own file and keys, and add the keys from `devices` on, which describe the
    machines.
    """

    elsewhere = other_names.PLANNING

    devices: int = MISSING
    """Number of GPUs in a machine, or of processes on CPUs."""
    device: Literal[
        "a100", "a100_40gb", "h100", "h100_pcie", "h200", "b200", "l40s", "l4", "a10", "rtx4090",
        "rtx5090", "cpu"
    ] = MISSING  # fmt: skip
    """Kind of device; h100 and h200 are SXM modules, a100 has 80 GB."""
    kernels: Literal["one", "every", "none"] = "one"
    """Which configurations of an fla model's kernels are compiled for the device: of each kernel
    one that fits, every one (packed and not), or none.
    """
    nodes: int = 1
    """Number of machines, each with `devices` devices."""
    mfu: float | None = None
    """Share of the devices' peak throughput that goes into the model's own FLOPs, in (0, 1]; if not
    set, what was published for the kind of model (docs/planning.md), an assumption until it has
    been measured.
    """
    tokens_per_second: float | None = None
    """Measured throughput of the whole run, tokens per second; takes the place of mfu."""
    price_per_hour: float | None = None
    """Price of one device for an hour."""
    dataset_tokens: float | None = None
    """Number of tokens in the training data; read from its manifest if not set and there is one."""
    save_seconds: float | None = None
    """Measured time until a checkpoint is whole, seconds; takes the place of save_bandwidth."""
    save_bandwidth: str = "1gb"
    """Bytes per second at which a checkpoint is written; an assumption."""
    preemption_hours: float | None = None
    """Mean time between preemptions (machines being taken away), hours."""
    restart_minutes: float = 10.0
    """Time from a preemption to the next step, minutes: waiting for machines, starting, and loading
    the checkpoint.
    """

    def validate(self) -> None:
        for name, most in (("devices", 1000), ("nodes", 100_000)):
            require(0 < getattr(self, name) <= most, name, f"must be in [1, {most}]")
        # Far beyond any real value; within these bounds no figure becomes infinite.
        mfu_is_valid = self.mfu is None or 1e-6 <= self.mfu <= 1
        require(mfu_is_valid, "mfu", "must be in [1e-06, 1], or null")
        for name in ("tokens_per_second", "save_seconds", "preemption_hours"):
            value = getattr(self, name)
            require(
                value is None or 1e-6 <= value <= 1e12, name, "must be in [1e-06, 1e+12], or null"
            )
        require(
            self.price_per_hour is None or 0 <= self.price_per_hour <= 1e12,
            "price_per_hour",
            "must be in [0, 1e+12], or null",
        )
        require(0 <= self.restart_minutes <= 1e12, "restart_minutes", "must be in [0, 1e+12]")
        require(
            self.dataset_tokens is None
            or (0 < self.dataset_tokens <= 10**18 and self.dataset_tokens % 1 == 0),
            "dataset_tokens",
            "must be a whole number in [1, 10**18], or null",
        )
        require(
            bool(BYTES.fullmatch(self.save_bandwidth))
            and bool(self.save_bandwidth.strip("0.bBkKmMgGtTpP")),
            "save_bandwidth",
            "must be a number of bytes more than 0, or one with kb, mb, gb, tb or pb, e.g. 500mb",
        )
        is_divided = (
            self.parallelism.tensor == 1 or self.device != "cpu" or self.parallelism.cpu_fsdp
        )
        rule = "must be true with parallelism.tensor on CPUs"
        require(is_divided, "parallelism.cpu_fsdp", rule)
        super().validate()

    def world_size(self) -> str:
        return str(self.devices * self.nodes)

    @property
    def places(self) -> int:
        """The number of groups of devices that train on the same rows."""
        return self.devices * self.nodes // (self.parallelism.tensor * self.parallelism.context)
