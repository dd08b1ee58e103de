"""The figures of a plan, and the JSON in which they are printed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Bytes used on each device, by part, at the peak of a training step."""

    weights: int
    copies: int  # of the weights, gathered or in the precision that is computed with
    gradients: int
    buffers: int  # that gradients are reduced in
    optimizer: int
    activations: int
    logits: int  # with their copies in the loss
    process: int
    counted: bool  # by torch's own books; else estimated by formula

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part by the name that people are shown."""
        return {
            "weights": self.weights,
            "copies for computing": self.copies,
            "gradients": self.gradients,
            "reduced gradients": self.buffers,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits and loss": self.logits,
            "process": self.process,
        }

    @property
    def total(self) -> int:
        """The bytes of all parts together."""
        return sum(self.parts().values())

    @property
    def tensors(self) -> int:
        """The bytes of all parts but the process, which are those of tensors."""
        return self.total - self.process


@dataclass(frozen=True)
class Data:
    """The training data, and how much of it a run reads."""

    tokens: int
    bytes: int
    steps_per_epoch: int
    epochs: float
    context_length: int
    read_by_a_node_an_epoch: int  # bytes of shards
    downloaded_by_a_node: int  # bytes, in the whole run
    smallest_cache: int  # bytes
    cache_limit: int | None  # bytes
    shards: int
    mixed_rows: int  # rows that are mixed with one another, of each canonical node
    mixed_shards: float  # that these rows come from, on average
    start_seconds: float  # of a core of each node, until the place of any row is known


@dataclass(frozen=True)
class Time:
    """The speed and length of a run, and its cost if the price of a device is known."""

    tokens_per_second: float
    seconds_per_step: float
    seconds: float
    cost: float | None
    mfu: float | None  # None if the speed was measured
    mfu_source: str | None  # None if the speed or the MFU was given


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    What depends on the number of steps between them is None if the run saves by the clock and the
    length of a step is not known.
    """

    bytes: int  # of one checkpoint
    save_seconds: float  # until it is whole
    wait_seconds: float  # of those, what training waits
    every_steps: float | None
    number: int | None
    bytes_kept: int | None
    host_bytes: int  # of a machine's memory that hold the copy from which a checkpoint is written
    notice_seconds: float | None  # from SIGTERM until a checkpoint of the current step is whole


@dataclass(frozen=True)
class Preemption:
    """The best interval between saves, and the goodput, of a run that is interrupted at times.

    Goodput is the share of the time that is spent on training that is not lost again.
    """

    best_save_interval: str
    best_save_seconds: float
    goodput: float
    goodput_as_configured: float | None
    goodput_with_notice: float


@dataclass(frozen=True)
class Division:
    """Rows and layers divided over devices, or how they could be so that a row fits."""

    tensor: int
    context: int
    places: int  # groups of devices that work on different rows
    tokens_of_a_row: int  # on each device
    sent: dict[str, int] | None  # bytes from a device in a step, by axis; None if not known
    smallest: dict[str, int] | None  # the least of both with which a row fits; None if none does

    @property
    def together(self) -> int:
        """The number of devices that share rows."""
        return self.tensor * self.context


@dataclass(frozen=True)
class Plan:
    """All figures of a run; those that are not known, or do not apply, are None."""

    run_name: str
    devices: int  # on each node
    nodes: int
    device: str
    parameters: int
    multiplied_parameters: int
    microbatch_size: int
    accumulation_steps: int
    largest_microbatch_size: int | None  # None if not even one row fits
    tokens_per_step: int
    steps: int
    tokens: int
    tokens_per_parameter: float
    flops_per_token: int
    flops: int
    memory: Memory
    device_memory: int  # bytes that a device has
    warmup_steps: int | None
    data: Data | None
    time: Time | None
    checkpoints: Checkpoints | None
    preemption: Preemption | None
    division: Division | None = None  # of rows and layers that are whole, and may be

    def to_json(self, warnings: list[str]) -> dict[str, Any]:
        """Return the JSON object that recipes/plan.py prints, with `warnings` as its last key."""
        content = dataclasses.asdict(self)
        content["memory"] = {
            "parts": self.memory.parts(),
            "total": self.memory.total,
            "counted": self.memory.counted,
            "device": content.pop("device_memory"),
        }
        if self.division is None:
            del content["division"]
        return {**content, "warnings": warnings}
