"""Where the parts of `make gpu` work, and how they run this repository's scripts."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame_composer.bench.measure import measure
from flame_composer.train.kernels import KERNELS

ROOT = Path(__file__).parent.parent.parent
SMALL = {"gla": "num_heads=2", "llama": "num_attention_heads=2", "gated_deltanet": "num_heads=2"}


@dataclass(frozen=True)
class Answer:
    """What a part found out: a number or a word, and how it is to be read."""

    question: str
    answer: float | str
    unit: str = ""


@dataclass(frozen=True)
class Site:
    """The folder that all parts work in, and whether this is a rehearsal without a GPU."""

    folder: Path
    is_rehearsal: bool

    def keys(self, recipe: str, run: str, *more: str) -> list[str]:
        """Return the arguments of recipes/train.py for a short run of `recipe` on our own data."""
        rows, steps = (4, 4) if self.is_rehearsal else (32, 12)
        return [
            str(ROOT / f"yamls/{recipe}.yaml"),
            f"tokenizer={self.folder}/data/tokenizer",
            f"train_data.local={self.folder}/data/train",
            "train_data.remote=null",
            "train_data.cache_limit=null",
            "eval_data=null",
            f"run_name={run}",
            f"log_folder={self.folder}/{run}",
            f"save_folder={self.folder}/{run}/checkpoints",
            "save_interval=1000ba",
            "progress_bar=false",
            "scheduler.warmup=0ba",
            f"max_duration={steps}ba",
            f"global_batch_size={rows}",
            *(self._small(recipe) if self.is_rehearsal else ()),
            *more,
        ]

    def _small(self, recipe: str) -> list[str]:
        import yaml

        kind = yaml.safe_load((ROOT / f"yamls/{recipe}.yaml").read_text())["model"]["config"]
        return [
            "precision=fp32",
            "parallelism.fsdp=null",
            "context_length=128",
            "microbatch_size=2",
            "train_data.num_workers=0",
            "model.config.hidden_size=64",
            "model.config.num_hidden_layers=1",
            f"model.config.{SMALL[kind['model_type']]}",
            *(["model.config.head_dim=32"] if kind["model_type"] == "gated_deltanet" else []),
        ]

    def take_choices(self, run: str, other: str) -> None:
        """Give a run the choices of kernels that another one has kept, if it has any."""
        kept = self.folder / run / "checkpoints" / KERNELS
        if kept.exists():
            folder = self.folder / other / "checkpoints"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(kept, folder)

    def log(self, run: str) -> list[dict[str, Any]]:
        """Return the rows of a run's log without what depends on the clock."""
        rows = [json.loads(line) for line in (self.folder / run / "train_log.jsonl").open()]
        return [{key: row[key] for key in row if key != "throughput"} for row in rows]


def run(*command: str) -> str:
    """Run a script of this repository to its end; return its stdout, or raise DataError."""
    return measure([sys.executable, *command]).output
