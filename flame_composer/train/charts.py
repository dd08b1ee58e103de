"""Charts of runs, drawn from their logs as PNGs and on a self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, DataError, masked
from flame_composer.lines import visible
from flame_composer.train.run_log import CHARTS, Chart, Column, Run

SMOOTHED = ("loss", "perplexity", "grad_norm", "throughput")
LARGEST = 1e100  # the largest value drawn, well within what matplotlib can compute with
SIZE, DPI = (9, 4.2), 120  # of a picture: inches, and pixels per inch
PIXELS = SIZE[0] * DPI  # width of the picture; a line is narrower


def series(run: Run, key: str, smooth: int) -> Column:
    """Return the steps and the values of a key, those in SMOOTHED as means over `smooth` values.

    A value that is null, or too large to draw, leaves a gap.
    """
    steps, values = run.columns[key]
    values = np.where(np.abs(values) <= LARGEST, values, np.nan)
    width = min(smooth, len(values)) if key in SMOOTHED else 1
    return (steps[width - 1 :], _means(values, width)) if width > 1 else (steps, values)


def _means(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the means of every `width` consecutive values.

    They are made from sums of 1, 2, 4, ... values. This is fast and, unlike a cumulative sum, lets
    a huge value affect only the means that contain it.
    """
    total, at = np.zeros(len(values) - width + 1), 0
    sums, size = values, 1
    while True:
        if width & size:
            total += sums[at : at + len(total)]
            at += size
        if 2 * size > width:
            return total / width
        sums, size = sums[:-size] + sums[size:], 2 * size


def thinned(steps: NDArray[np.float64], values: NDArray[np.float64]) -> Column:
    """Return the points of a line that can be seen, so that a long log is drawn quickly.

    In each column of pixels, the first, the smallest, the largest and the last value are kept. A
    NaN leaves a gap only at the start or end of a column, or if the column has no other value.
    """
    if len(values) <= 4 * PIXELS:
        return steps, values
    across = (
        steps
        if (np.diff(steps) >= 0).all() and steps[-1] > steps[0]
        else np.arange(len(steps), dtype=np.float64)
    )
    column = np.floor((across - across[0]) / (across[-1] - across[0]) * PIXELS)
    firsts = np.flatnonzero(np.diff(column, prepend=-1))
    lasts = np.append(firsts[1:], len(values)) - 1
    least, largest = np.fmin.reduceat(values, firsts), np.fmax.reduceat(values, firsts)
    drawn = np.stack([values[firsts], least, largest, values[lasts]], axis=1).ravel()
    return (
        np.stack([steps[firsts], steps[firsts], steps[firsts], steps[lasts]], axis=1).ravel(),
        drawn,
    )


def draw(runs: Sequence[Run], chart: Chart, smooth: int) -> bytes | None:
    """Return the chart of all runs as a PNG, or None if no run has values for it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    drawn = {run.place: thinned(*series(run, chart.key, smooth)) for run in runs}
    if not any(len(values) and np.isfinite(values).any() for _, values in drawn.values()):
        return None
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        color = f"C{number % 10}"
        steps, values = drawn[run.place]
        if not len(values):
            continue
        marker = "o" if len(values) == 1 else None
        axes.plot(
            steps, values, color=color, linewidth=1.2, label=label, marker=marker, markersize=4
        )
        if chart.also is not None:
            points = thinned(*series(run, chart.also, 1))
            if len(points[0]):
                axes.plot(
                    *points,
                    color=color,
                    linestyle="none",
                    marker="D",
                    markersize=4.5,
                    markeredgecolor="white",
                    label=f"{label}, evaluation",
                )
        across = axes.get_xaxis_transform()
        axes.vlines(run.resumed_after, 0, 1, color, linestyle=":", linewidth=1, transform=across)
    if any(run.resumed_after for run in runs):
        axes.plot([], [], color="gray", linewidth=1, linestyle=":", label="resumed")
    if chart.log_scale and all(
        (values[np.isfinite(values)] > 0).all() for _, values in drawn.values()
    ):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set(
        xlabel="step",
        ylabel=chart.title
        + (f" (mean of {smooth})" if smooth > 1 and chart.key in SMOOTHED else ""),
    )
    axes.grid(alpha=0.3)
    for text in axes.legend(frameon=False, fontsize="small").get_texts():
        text.set_parse_math(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A character that the font lacks is missing from the chart, but the page shows it.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()


def labels(runs: Sequence[Run]) -> list[str]:
    """Return printable labels: the runs' names, or their folders where a name is shared."""
    names = [run.name for run in runs]
    return [visible(run.place if names.count(run.name) > 1 else run.name) for run in runs]


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a table with the results of each run."""
    head = [
        "run",
        "steps",
        "tokens",
        "loss",
        "best loss",
        "eval loss",
        "eval perplexity",
        "tokens a second",
        "resumed after step",
    ]
    lines = []
    for run, label in zip(runs, labels(runs), strict=True):
        ends = {key: values[-1] for key, (_, values) in run.columns.items() if len(values)}
        known = {key: values[~np.isnan(values)] for key, (_, values) in run.columns.items()}
        evaluated = {
            key: known[key][-1] if len(known[key]) else None
            for key in ("eval_loss", "eval_perplexity")
        }
        lines.append(
            [
                label,
                f"{run.last['current_steps']:,} of {run.last['total_steps']:,}",
                f"{run.last['num_tokens']:,}",
                _number(ends.get("loss"), ".4f"),
                _number(known["loss"].min() if len(known["loss"]) else None, ".4f"),
                _number(evaluated["eval_loss"], ".4f"),
                _number(evaluated["eval_perplexity"], ".2f"),
                _number(
                    float(np.median(known["throughput"])) if len(known["throughput"]) else None,
                    ",.0f",
                ),
                ", ".join(f"{step:,}" for step in run.resumed_after) or "never",
            ]
        )
    return head, lines


def _number(value: float | None, form: str) -> str:
    return "none" if value is None or math.isnan(value) else format(value, form)


def page(runs: Sequence[Run], pictures: dict[str, bytes]) -> str:
    """Return the report as HTML, with `pictures`, PNGs by the name of their chart, embedded.

    Nothing is loaded from elsewhere, and names are escaped so that none is read as HTML.
    """
    head, lines = table(runs)
    notes = "\n".join(
        f"<p>{html.escape(visible(f'{label}: {note}.'))}</p>"
        for run, label in zip(runs, labels(runs), strict=True)
        for note in run.notes
    )
    titles = {chart.name: chart.title for chart in CHARTS}
    charts = "\n".join(
        f'<h2>{html.escape(titles[name])}</h2>\n<img alt="{html.escape(titles[name])} over steps" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in pictures.items()
    )
    body = f"{html_table(head, lines)}\n{notes}\n{charts}"
    return document(", ".join(labels(runs)), body)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML; its cells are text, of which nothing is read as HTML."""
    cells = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(visible(masked(cell)))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"""<div><table>
<tr>{"".join(f"<th>{html.escape(visible(name))}</th>" for name in head)}</tr>
{cells}
</table></div>"""


def document(title: str, body: str) -> str:
    """Return a page of HTML, which loads nothing, with a title (text) and a body (HTML)."""
    title = html.escape(visible(title))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{
  font-family: sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222;
}}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.3rem 0.8rem 0.3rem 0; text-align: left; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write(runs: Sequence[Run], out: Path, smooth: int) -> dict[str, Path]:
    """Write report.html and a NAME.png per chart into `out`; return the files by name.

    Charts that no run has values for are left out. Raise DataError if a file cannot be written.
    """
    drawn = {chart.name: draw(runs, chart, smooth) for chart in CHARTS}
    pictures = {name: png for name, png in drawn.items() if png is not None}
    files = {name: out / f"{name}.png" for name in pictures} | {"html": out / "report.html"}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, png in pictures.items():
            files[name].write_bytes(png)
        for name in drawn.keys() - pictures.keys():
            (out / f"{name}.png").unlink(missing_ok=True)  # left by an earlier report
        files["html"].write_text(page(runs, pictures), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written to: {error.strerror}; give another folder with out=..."
        ) from None
    return files


def require_plot(path: str) -> None:
    """Make the folder of a plot; raise ConfigError if the plot could not be written there.

    Call it before the work that the plot is to show.
    """
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"plot={path}: {folder} cannot be made: {error.strerror}") from None
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"plot={path}:"
            f" {'is a folder' if Path(path).is_dir() else f'{folder} cannot be written to'}"
        )
