"""Charts of how cost grows, in one PNG, from a run of all benchmarks.

It grows with the context, rows, layers, the context that is decoded after, and workers.
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
    """Yield the panels for the results of recipes/benchmark.py, which are given by name.

    A benchmark that did not run has no panel.
    """

    def both(rows: list[dict[str, Any]], key: str, scale: float = 1.0) -> dict[str, list[float]]:
        return {
            name: [row[f"{model}_{key}"] * scale for row in rows] for model, name in NAMES.items()
        }

    if "train" in results:
        rows = results["train"]["results"]
        contexts = [row["context_length"] for row in rows]
        yield Panel(
            "training step", "context", "tokens/s", both(rows, "tokens_per_second"), contexts
        )
    if "growth" in results:
        length, by_rows, by_layers = (
            results["growth"][key] for key in ("context_length", "by_rows", "by_layers")
        )
        yield Panel(
            "training step",
            f"rows of {length}",
            "tokens/s",
            both(by_rows, "tokens_per_second"),
            [row["rows"] for row in by_rows],
        )
        slowness = {
            name: [1000 / speed for speed in speeds]
            for name, speeds in both(by_layers, "tokens_per_second").items()
        }
        yield Panel(
            "training step", "layers", "ms a token", slowness, [row["layers"] for row in by_layers]
        )
    if "decode" in results:
        rows = results["decode"]["results"]
        contexts = sorted({row["context_length"] for row in rows})
        sizes = sorted({row["batch_size"] for row in rows})
        per_token = {
            f"{name}, {size} at a time": values
            for size in sizes
            for name, values in both(
                [row for row in rows if row["batch_size"] == size], "milliseconds"
            ).items()
        }
        yield Panel("decoding", "context", "ms a step", per_token, contexts)
        kept = both(
            [row for row in rows if row["batch_size"] == sizes[0]], "bytes_kept_per_sequence", 1e-6
        )
        yield Panel("decoding", "context", "MB kept of a sequence", kept, contexts)
    if "convert" in results and "data" in results:
        convert, data = results["convert"], results["data"]
        lines = {
            "conversion": [1.0, convert["workers_over_one_after_start"] or float("nan")],
            "loading": [
                1.0,
                data["two_workers_rows_per_second"] / data["one_worker_rows_per_second"],
            ],
        }
        yield Panel(
            "speed over one worker's", "workers", "times", lines, [1, convert["num_workers"]]
        )


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
