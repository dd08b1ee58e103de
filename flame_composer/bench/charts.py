"""Charts of how cost grows, in one PNG, from the results of all benchmarks.

The charts show growth with the context length, rows, layers and workers, and of decoding with the
length of the prompt.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flame_composer.errors import DataError

NAMES = {"gla": "GLA", "llama": "Llama"}


class Panel(NamedTuple):
    """One chart: lines over the same values of x."""

    title: str
    x_name: str
    y_name: str
    lines: dict[str, list[float]]  # by name, with a value for each of `xs`
    xs: list[int]


def panels(results: dict[str, Any]) -> Iterator[Panel]:
    """Yield the panels for `results`, the output of recipes/benchmark.py by benchmark.

    Benchmarks that are missing in it have no panel.
    """
    if "train" in results:
        rows = results["train"]["results"]
        contexts = [row["context_length"] for row in rows]
        speeds = _by_model(rows, "tokens_per_second")
        yield Panel("training step", "context", "tokens/s", speeds, contexts)
    if "growth" in results:
        yield from _growth_panels(results["growth"])
    if "decode" in results:
        yield from _decoding_panels(results["decode"]["results"])
    if "convert" in results and "data" in results:
        yield _workers_panel(results["convert"], results["data"])


def _by_model(rows: list[dict[str, Any]], key: str, scale: float = 1.0) -> dict[str, list[float]]:
    return {name: [row[f"{model}_{key}"] * scale for row in rows] for model, name in NAMES.items()}


def _growth_panels(growth: dict[str, Any]) -> Iterator[Panel]:
    by_rows, by_layers = growth["by_rows"], growth["by_layers"]
    yield Panel(
        "training step",
        f"rows of {growth['context_length']}",
        "tokens/s",
        _by_model(by_rows, "tokens_per_second"),
        [row["rows"] for row in by_rows],
    )
    slowness = {
        name: [1000 / speed for speed in speeds]
        for name, speeds in _by_model(by_layers, "tokens_per_second").items()
    }
    yield Panel(
        "training step", "layers", "ms a token", slowness, [row["layers"] for row in by_layers]
    )


def _decoding_panels(rows: list[dict[str, Any]]) -> Iterator[Panel]:
    contexts = sorted({row["context_length"] for row in rows})
    by_size = {
        size: [row for row in rows if row["batch_size"] == size]
        for size in sorted({row["batch_size"] for row in rows})
    }
    per_token = {
        f"{name}, {size} at a time": values
        for size, timed in by_size.items()
        for name, values in _by_model(timed, "milliseconds").items()
    }
    yield Panel("decoding", "context", "ms a step", per_token, contexts)
    kept = _by_model(by_size[min(by_size)], "bytes_kept_per_sequence", 1e-6)
    yield Panel("decoding", "context", "MB kept of a sequence", kept, contexts)


def _workers_panel(convert: dict[str, Any], data: dict[str, Any]) -> Panel:
    loading = data["two_workers_rows_per_second"] / data["one_worker_rows_per_second"]
    lines = {
        "conversion": [1.0, convert["workers_over_one_after_start"] or float("nan")],
        "loading": [1.0, loading],
    }
    return Panel("speed over one worker's", "workers", "times", lines, [1, convert["num_workers"]])


def draw(results: dict[str, Any]) -> bytes:
    """Return all panels as one PNG."""
    from matplotlib.figure import Figure

    found = list(panels(results))
    width = min(3, max(1, len(found)))
    figure = Figure(figsize=(4.4 * width, 3.4 * -(-len(found) // width)), layout="constrained")
    for number, panel in enumerate(found, 1):
        axes = figure.add_subplot(-(-len(found) // width), width, number)
        for line, values in panel.lines.items():
            axes.plot(panel.xs, values, marker="o", markersize=4, linewidth=1.4, label=line)
        axes.set(title=panel.title, xlabel=panel.x_name, ylabel=panel.y_name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(panel.xs, [f"{x:,}" for x in panel.xs])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return buffer.getvalue()


def write(results: dict[str, Any], path: str) -> None:
    """Write the charts of `results` to a PNG file.

    Raise DataError if the file cannot be written, or none of the results has a chart.
    """
    if not any(panels(results)):
        raise DataError(f"plot: nothing that is drawn was measured: {', '.join(results)}")
    try:
        Path(path).write_bytes(draw(results))
    except OSError as error:
        raise DataError(
            f"plot: {path}: {error.strerror}; give another file with plot=..."
        ) from None
