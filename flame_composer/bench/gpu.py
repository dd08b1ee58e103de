"""`make gpu`: all that is to be known of a machine with a GPU, within nine minutes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from flame_composer.bench.measure import machine, workplace
from flame_composer.config.gpu import GPU_PARTS, GpuBenchmarkConfig
from flame_composer.errors import ConfigError

LIMIT = 530  # seconds, for all parts together

# Parts of a stage run at the same time; those that are timed on the GPU have it to themselves. The
# most seconds that each may take, which is more than it should.
STAGES: tuple[dict[str, int], ...] = (
    {"data": 60},
    {
        "warm_gla_340m": 240,
        "warm_transformer_340m": 120,
        "warm_gated_deltanet_340m": 240,
        "plan": 180,
        "tests": 240,
        "parity": 120,
    },
    {"speed_gla_340m": 75},
    {"speed_transformer_340m": 75},
    {"speed_gated_deltanet_340m": 75},
    {"rows": 60},
    {"resume": 200, "convert": 90},
    {"save": 60},
    {"decode": 60},
    {"trainer": 75},
    {"auto": 60},
)
PART = "from flame_composer.bench.gpu_parts import main; main()"


def check(config: GpuBenchmarkConfig) -> None:
    """Run all parts and show what they found; exit with status 1 if one failed.

    Raise ConfigError if there is no GPU, unless this is a rehearsal.
    """
    require_device(config)
    with workplace(config.folder) as folder:
        found, is_well = check_all(config, folder)
    print(Path(config.out, "gpu.md").read_text())
    print(json.dumps({"benchmark": "gpu", **found}))
    if not is_well:
        sys.exit(f"some parts failed; what they printed is in {config.out}")


def check_all(config: GpuBenchmarkConfig, folder: Path) -> tuple[dict[str, Any], bool]:
    """Run the parts that are asked for; return their answers, and whether all went well.

    Each part runs in a process of its own in `folder`, with a time limit: a part that fails, or
    takes too long, does not keep others from running.
    """
    started = time.monotonic()
    found: dict[str, Any] = {
        **machine(),
        "device": _device(),
        "commit": _commit(),
        **_versions(),
        "rehearsal": config.rehearse,
    }
    wanted = set(config.names or GPU_PARTS)
    results: dict[str, Any] = {}
    with tqdm(total=len(wanted), desc="make gpu", disable=None) as bar:
        for stage in STAGES:
            limits = {name: limit for name, limit in stage.items() if name in wanted}
            batches = [{name: limits[name]} for name in limits] if config.rehearse else [limits]
            for batch in filter(None, batches):
                left = None if config.rehearse else LIMIT - (time.monotonic() - started)
                results |= run_parts(batch, folder, config.rehearse, left)
                seconds = round(time.monotonic() - started)
                found |= {"seconds": seconds, "parts": results}
                write_report(found, folder, Path(config.out))  # lest a later end loses it
                bar.update(len(batch))
    return found, all("problem" not in result for result in results.values())


def run_parts(
    limits: dict[str, int], folder: Path, is_rehearsal: bool, left: float | None
) -> dict[str, Any]:
    """Run parts at the same time; return for each its answers or its problem.

    `left`: the seconds that are left for everything, or None for no limit at all.
    """
    if left is not None and left < 20:
        return {name: {"problem": "no time was left"} for name in limits}
    mode = "rehearsal" if is_rehearsal else "real"
    started = time.monotonic()
    processes = {}
    for name in limits:
        with (folder / f"{name}.log").open("w") as log:
            processes[name] = subprocess.Popen(
                [sys.executable, "-c", PART, name, str(folder), mode],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    results: dict[str, Any] = {}
    try:
        for name, process in processes.items():
            ends = None
            if left is not None:
                ends = max(0, min(limits[name], left) - (time.monotonic() - started))
            try:
                process.wait(ends)
            except subprocess.TimeoutExpired:
                end_all_of_session(process.pid)
                process.wait()
                took = round(time.monotonic() - started)
                results[name] = {"problem": f"not done after {took} s"}
                continue
            results[name] = _read(name, folder, process.returncode)
    finally:
        for process in processes.values():
            if process.poll() is None:
                end_all_of_session(process.pid)
    return results


def end_all_of_session(leader: int) -> None:
    """Kill every process of the session that `leader` leads, whatever group it is in."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == leader:
                process.kill()


def _read(name: str, folder: Path, status: int) -> dict[str, Any]:
    answers = folder / f"{name}.json"
    if status == 0 and answers.exists():
        return {"answers": json.loads(answers.read_text())}
    said = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
    return {"problem": f"{said[-1][:300] if said else 'nothing was said'} (status {status})"}


def require_device(config: GpuBenchmarkConfig) -> None:
    """Raise ConfigError if there is no GPU, unless this is a rehearsal."""
    import torch

    if not torch.cuda.is_available() and not config.rehearse:
        raise ConfigError(
            "there is no GPU here; rehearse=true runs the same commands on small models without one"
        )


def write_report(found: dict[str, Any], folder: Path, out: Path) -> None:
    """Write what was found in `folder` to `out`: gpu.json, gpu.md, and what each part printed."""
    out.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, out)
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "gpu.md").write_text("\n".join(_table(found)) + "\n")


def _table(found: dict[str, Any]) -> Sequence[str]:
    versions = ", ".join(f"{name} {found[name]}" for name in _versions())
    what = "Rehearsed without a GPU: no figure here is one of a GPU" if found["rehearsal"] else ""
    where = f"{found['device']}, {found['cores']} cores, commit {found['commit']}, {versions}"
    lines = [
        f"{where}; {found['seconds']} s. {what}".strip(),
        "",
        "| part | question | answer |",
        "|---|---|---|",
    ]
    for name, result in found["parts"].items():
        if "problem" in result:
            lines.append(f"| {name} | | **failed**: {result['problem'].replace('|', '/')} |")
        for each in result.get("answers", ()):
            value = each["answer"]
            shown = f"{value:,}" if isinstance(value, (int, float)) else value
            lines.append(f"| {name} | {each['question']} | {shown} {each['unit']}".rstrip() + " |")
    return lines


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _commit() -> str:
    """Return the commit of this checkout, or "unknown" if it is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    packages = ("torch", "triton", "fla-core", "mosaicml", "flame-composer")
    return {name: importlib.metadata.version(name) for name in packages}
