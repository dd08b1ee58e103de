"""The configuration of `recipes/benchmark.py gpu`: its keys, defaults and rules."""

from __future__ import annotations

from dataclasses import dataclass, field

from flame_composer.config.rules import ScriptConfig, require, require_text

GPU_PARTS = (
    "data",
    "tests",
    "parity",
    "plan",
    "warm_gla_340m",
    "warm_transformer_340m",
    "warm_gated_deltanet_340m",
    "speed_gla_340m",
    "speed_transformer_340m",
    "speed_gated_deltanet_340m",
    "rows",
    "auto",
    "save",
    "trainer",
    "decode",
    "resume",
    "convert",
)


@dataclass
class GpuBenchmarkConfig(ScriptConfig):
    """Find out all that is to be known of a machine with a GPU, in nine minutes at most.

    The exit status is 1 if a part failed.
    """

    paths = ("out", "folder")

    names: list[str] = field(default_factory=list)
    """Names of the parts to run; all if not set. data is needed by those that train."""
    rehearse: bool = False
    """Run the same commands on a machine without a GPU, on small models and without time limits."""
    out: str = "runs/gpu"
    """Folder for gpu.json, gpu.md and the output of each part."""
    folder: str | None = None
    """Folder for data and runs, which are removed at the end; the system's temporary folder if not
    set.
    """

    def validate(self) -> None:
        require_text(self, "out", "folder")
        rule = f"must be among {', '.join(GPU_PARTS)}"
        require(set(self.names) <= set(GPU_PARTS), "names", rule)
