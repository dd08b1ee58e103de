"""Compiles the kernels of every recipe for every architecture, and writes the table of docs/gpu.md.

    python -m tests.compile_table RESULTS [every] [RECIPE ...]   # compiles what RESULTS lacks
    python -m tests.compile_table RESULTS table                  # prints the table

RESULTS is a file of JSON lines, one for each recipe and architecture, which is added to: what was
stopped goes on. With `every`, every configuration of a kernel is compiled, otherwise those that are
needed to find one that fits. Recipes are named as in yamls/; all that use fla if none is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flame_composer.config.load import load
from flame_composer.config.plan import PlanConfig
from tests.runs import ROOT

# One device of each architecture.
DEVICES = ("a100", "h100", "a10", "b200", "rtx5090", "l40s")
# Whose model a recipe that loads one has.
MODELS = {"sft_340m": "gla_340m", "sft_tiny": "gla_tiny", "sft_lora_7b": "gla_7b_continual"}
# For which Triton 3.3.0 compiles no product of matrices (triton-lang/triton issue 6087).
NOT_FOR = 120
# Uses that fla refuses on any GPU.
REFUSED = {"delta_net_340m": {"generation"}}  # it has no chunked kernel for fp32


def keys_of(recipe: str) -> dict[str, Any] | None:
    """The model's config of a recipe, or None if it is not one of fla's."""
    text = (ROOT / "yamls" / f"{MODELS.get(recipe, recipe)}.yaml").read_text()
    keys = yaml.safe_load(text)["model"]["config"]
    return None if keys["model_type"] == "llama" else keys


def recipes() -> list[str]:
    """The recipes in yamls/ that use fla."""
    names = sorted(path.stem for path in (ROOT / "yamls").glob("*.yaml"))
    return [name for name in names if keys_of(name)]


def devices_of(recipe: str) -> int:
    """The fewest devices that a recipe trains on: those that share its rows."""
    text = (ROOT / "yamls" / f"{recipe}.yaml").read_text()
    settings = yaml.safe_load(text).get("parallelism") or {}
    return settings.get("tensor", 1) * settings.get("context", 1)


def plan_config(recipe: str, device: str, every: bool) -> PlanConfig:
    keys = [f"model.config.{key}={value}" for key, value in (keys_of(recipe) or {}).items()]
    kernels = "every" if every else "one"
    return load(
        PlanConfig,
        [
            f"{ROOT}/yamls/{recipe}.yaml",
            *keys,
            f"devices={devices_of(recipe)}",
            f"device={device}",
            f"kernels={kernels}",
        ],
    )


def read(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def compile_all(path: Path, every: bool, names: list[str]) -> None:
    from flame_composer.plan.child import child_for
    from flame_composer.plan.planning import find_hf_config

    done = {(row["recipe"], row["device"], row["every"]) for row in read(path)}
    for device in DEVICES:
        missing = [name for name in names if (name, device, every) not in done]
        if not missing:
            continue
        with child_for(device) as child:
            for name in missing:
                config = plan_config(name, device, every)
                checked = child.check(config, find_hf_config(config, None))
                assert checked is not None
                row = {"recipe": name, "device": device, "every": every, **checked.to_json()}
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(name, device, checked.line(), flush=True)


def table(path: Path) -> Iterator[str]:
    yield (
        "| recipe | architecture | launches | that fit | configurations | tried | compiled | fit"
        " | most needed, KB | largest, KB | there, KB |"
    )
    yield "|" + " --- |" * 11
    rows = {(row["recipe"], row["capability"]): row for row in read(path)}
    for row in sorted(read(path), key=lambda row: row["every"]):
        rows[row["recipe"], row["capability"]] = row  # all configurations, if there are
    for (recipe, capability), row in sorted(rows.items()):
        found = row["verdicts"]
        cells = [
            recipe,
            f"sm_{capability}",
            len(found),
            sum(each["fit"] > 0 for each in found),
            sum(each["configurations"] for each in found),
            sum(each["compiled"] + sum(each["errors"].values()) for each in found),
            sum(each["compiled"] for each in found),
            sum(each["fit"] for each in found),
            f"{max(each['least'] or 0 for each in found) / 1024:.4g}",
            f"{max(each['most'] or 0 for each in found) / 1024:.4g}",
            row["shared_memory"] >> 10,
        ]
        yield "| " + " | ".join(map(str, cells)) + " |"


def main(results: str, *rest: str) -> None:
    if rest == ("table",):
        print("\n".join(table(Path(results))))
        return
    names = [name for name in rest if name != "every"]
    compile_all(Path(results), "every" in rest, names or recipes())


if __name__ == "__main__":
    main(*sys.argv[1:])
