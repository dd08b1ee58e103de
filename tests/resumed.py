"""What a rank of recipes/train.py has loaded when it is about to take its first step.

    python tests/resumed.py OUT file.yaml [key=value ...]

Writes OUT/rank<R>.pt: every tensor of the weights and of the optimizer's state that this rank
holds, by its path, with its first row. GAP in the environment takes the place of ranges.GAP.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from flame_composer.checkpoint import ranges
from flame_composer.config.cli import run
from flame_composer.config.train import TrainConfig
from flame_composer.train.assemble import build_run, check, find_start
from flame_composer.upstream.fsdp import first_row_of


def rows_in(tree: Any, path: str) -> dict[str, tuple[int, torch.Tensor]]:
    if isinstance(tree, DTensor):
        return {path: (first_row_of(tree), tree.to_local().detach().clone())}
    if isinstance(tree, torch.Tensor):
        return {path: (0, tree.detach().clone())}
    if isinstance(tree, dict):
        return {
            name: rows
            for key, value in tree.items()
            for name, rows in rows_in(value, f"{path}.{key}").items()
        }
    return {}


def main(config: TrainConfig) -> None:
    ranges.GAP = int(os.environ.get("GAP", ranges.GAP))
    parts = check(config)
    start = find_start(config, parts)
    training = build_run(config, parts, start)
    state = training.trainer.state
    (optimizer,) = state.optimizers
    loaded = {
        **rows_in(get_model_state_dict(state.model), "model"),
        **rows_in(get_optimizer_state_dict(state.model, optimizer)["state"], "state"),
    }
    torch.save(loaded, OUT / f"rank{dist.get_global_rank()}.pt")
    print("resumed from", start and start.place)


if __name__ == "__main__":
    OUT = Path(sys.argv.pop(1))
    sys.exit(run(main, TrainConfig))
