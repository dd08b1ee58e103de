"""recipes/train.py, whose operations of several ranks are counted, and which may get a signal.

    python tests/collectives.py [file.yaml] [key=value ...]

The file named as in the environment's COUNTS gets a line of JSON from the first rank: how often
each module of the package called each operation. With SIGNAL in the environment, e.g.
`log JsonlLog.batch_checkpoint 3 1`, that method of flame_composer.train sends a SIGTERM to its own
process first, when the clock is at that batch, on the rank with that number.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.utils import dist

ROOT = Path(__file__).parent.parent
OPERATIONS = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier")
OPERATIONS += ("broadcast_object_list",)


def counted(name: str, counts: Counter[str]) -> Callable[..., Any]:
    """Return Composer's operation `name`, counted by the module that calls it."""
    operation = getattr(dist, name)

    @functools.wraps(operation)
    def call(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals["__name__"]
        if caller.startswith("flame_composer."):
            counts[f"{caller.removeprefix('flame_composer.')} {name}"] += 1
        return operation(*args, **kwargs)

    return call


def signalled(module: str, method: str, batch: str, rank: str) -> None:
    owner_name, name = method.split(".")
    owner = getattr(importlib.import_module(f"flame_composer.train.{module}"), owner_name)
    inner = getattr(owner, name)

    def call(self: Any, state: Any, logger: Any) -> Any:
        if (state.timestamp.batch.value, dist.get_global_rank()) == (int(batch), int(rank)):
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, state, logger)

    setattr(owner, name, call)


if __name__ == "__main__":
    counts: Counter[str] = Counter()
    for each in OPERATIONS:
        setattr(dist, each, counted(each, counts))
    if "SIGNAL" in os.environ:
        signalled(*os.environ["SIGNAL"].split())
    sys.argv[0] = "recipes/train.py"
    try:
        runpy.run_path(str(ROOT / "recipes/train.py"), run_name="__main__")
    finally:  # it ends with SystemExit
        if "COUNTS" in os.environ and os.environ["RANK"] == "0":
            Path(os.environ["COUNTS"]).write_text(json.dumps(counts))
