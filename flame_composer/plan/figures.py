"""The figures of a plan, and the JSON they are written as."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Bytes on each device by part, at their peak together: in the backward pass of the loss."""

    weights: int
    copies: int  # of weights, to compute with
    gradients: int
    optimizer: int
    activations: int
    logits: int  # and what the loss makes of them
    process: int

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part by its name for people."""
        return {
            "weights": self.weights,
            "copies for computing": self.copies,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits and loss": self.logits,
            "process": self.process,
        }

    @property
    def total(self) -> int:
        """The bytes of all parts together."""
        return sum(self.parts().values())


@dataclass(frozen=True)
class Data:
    """What a run reads of its training data."""

    tokens: int
    bytes: int
    steps_per_epoch: int
    epochs: float
    context_length: int
    read_by_a_node_an_epoch: int  # bytes
    downloaded_by_a_node: int  # bytes, in the whole run
    smallest_cache: int  # bytes
    cache_limit: int | None  # bytes


@dataclass(frozen=True)
class Time:
    """How long a run takes, and what it costs if the price of a device is known."""

    tokens_per_second: float
    seconds_per_step: float
    seconds: float
    cost: float | None


@dataclass(frozen=True)
class Checkpoints:
    """What a run saves; None where it saves by the clock and nobody knows how long a step takes."""

    bytes: int  # of one
    save_seconds: float
    every_steps: float | None
    number: int | None
    bytes_kept: int | None


@dataclass(frozen=True)
class Preemption:
    """How often to save, and the share of the time that counts, if machines are taken away."""

    best_save_interval: str
    best_save_seconds: float
    goodput: float
    goodput_as_configured: float | None
    goodput_with_notice: float


@dataclass(frozen=True)
class Plan:
    """All figures of a run; what cannot be known, or does not apply, is None."""

    run_name: str
    devices: int  # of a node
    nodes: int
    device: str
    parameters: int
    multiplied_parameters: int
    microbatch_size: int
    accumulation_steps: int
    largest_microbatch_size: int | None  # that fits; None if not even one row does
    tokens_per_step: int
    steps: int
    tokens: int
    tokens_per_parameter: float
    flops_per_token: int
    flops: int
    memory: Memory
    device_memory: int  # bytes
    warmup_steps: int | None
    data: Data | None
    time: Time | None
    checkpoints: Checkpoints | None
    preemption: Preemption | None

    def to_json(self, warnings: list[str]) -> dict[str, Any]:
        """Return the plan as the JSON object that recipes/plan.py prints, `warnings` last."""
        content = dataclasses.asdict(self)
        content["memory"] = {
            "parts": self.memory.parts(),
            "total": self.memory.total,
            "device": content.pop("device_memory"),
        }
        return {**content, "warnings": warnings}
