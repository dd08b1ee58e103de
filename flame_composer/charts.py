"""What a run looks like: its log as charts, in an HTML page that needs nothing else and as PNGs, runs over one another."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.config import ConfigError, DataError

LOG, STARTS = "train_log.jsonl", "starts.jsonl"


@dataclass(frozen=True)
class Run:
    """A run's log: its rows in order, and the steps it was started after, 0 the first time; `notes` for what is odd."""

    name: str
    place: str
    rows: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    notes: list[str]

    @property
    def resumed_after(self) -> list[int]:
        return sorted({start["step"] for start in self.starts if start["step"] > 0})


class Chart(NamedTuple):
    """`key` of a row over the step; `also` is drawn as points, where a row has it."""

    name: str
    title: str
    key: str
    also: str | None = None
    log_scale: bool = False


CHARTS = (
    Chart("loss", "loss", "loss", "eval_loss"),
    Chart("perplexity", "perplexity", "perplexity", "eval_perplexity", log_scale=True),
    Chart("learning_rate", "learning rate", "learning_rate"),
    Chart("grad_norm", "gradient norm", "grad_norm", log_scale=True),
    Chart("throughput", "tokens a second", "throughput"),
)
SMOOTHED = ("loss", "perplexity", "grad_norm", "throughput")
NUMBERS = ("current_steps", "total_steps", "num_tokens")


def read_run(path: str) -> Run:
    """The run whose log folder, or log, this is. A last row that a kill cut short is left out, and noted.

    Raises ConfigError where there is no log, DataError for one that is empty or damaged.
    """
    log = Path(path) / LOG if Path(path).is_dir() else Path(path)
    if not log.is_file():
        what = f"has no {LOG}" if Path(path).is_dir() else "no such folder"
        raise ConfigError(f"runs: {path}: {what}; name the log_folder of a run, e.g. runs/gla_tiny")
    notes: list[str] = []
    rows = _read_lines(log, notes)
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(key), int) for key in NUMBERS) or not _are_numbers(row):
            raise DataError(f"{log}:{number}: damaged: not a row of a training log; restore it from a copy, or delete the line")
        loss = row.get("loss")
        row["perplexity"] = None if loss is None or loss > 700 else math.exp(loss)
    if not rows:
        raise DataError(f"{log}: holds no whole row yet; wait for the run's first step")
    starts = log.with_name(STARTS)
    started = _read_lines(starts, notes, forgiving=True) if starts.is_file() else []
    if not started:
        notes.append(f"there is no {STARTS} beside the log, so resumes are not marked")
    last = rows[-1]["current_steps"]
    started = [start for start in started if isinstance(start.get("step"), int) and start["step"] < last]
    return Run(log.parent.name if log.name == LOG else log.stem, str(log.parent), rows, started, notes)


def _are_numbers(row: dict[str, Any]) -> bool:
    keys = {chart.key for chart in CHARTS} | {chart.also for chart in CHARTS if chart.also}
    values = [row[key] for key in keys if row.get(key) is not None]
    return all(isinstance(value, float) or (isinstance(value, int) and abs(value) < 1e300) for value in values)


def _read_lines(path: Path, notes: list[str], *, forgiving: bool = False) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines. Raises DataError for a line that is none, unless it is the last and not ended, or
    such lines are forgiven."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not text'}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else None
        except (ValueError, RecursionError):
            row = ()
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None and number == len(lines):
            notes.append(f"the last row of {path.name} was cut short, and is left out")
        elif row is not None and forgiving:
            notes.append(f"line {number} of {path.name} is damaged, and is left out")
        elif row is not None:
            raise DataError(f"{path}:{number}: damaged: not a JSON object; restore it from a copy, or delete the line")
    return rows


def series(run: Run, key: str, smooth: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and the values of a key; a value that is null is not a number, and leaves a gap. Means over `smooth` values."""
    found = [(row["current_steps"], row[key]) for row in run.rows if key in row]
    steps = np.array([step for step, _ in found], np.float64)
    values = np.array([math.nan if value is None else value for _, value in found], np.float64)
    width = min(smooth, len(values)) if key in SMOOTHED else 1
    if width > 1:
        values = np.convolve(values, np.ones(width) / width, mode="valid")
        steps = steps[width - 1 :]
    return steps, values


def draw(runs: Sequence[Run], chart: Chart, smooth: int) -> bytes | None:
    """The chart as a PNG; None if no run has its values."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    drawn = {run.place: series(run, chart.key, smooth) for run in runs}
    if not any(len(values) and np.isfinite(values).any() for _, values in drawn.values()):
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        color = f"C{number % 10}"
        steps, values = drawn[run.place]
        if not len(values):
            continue
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=color, linewidth=1.2, label=label, marker=marker, markersize=4)
        if chart.also is not None:
            points = series(run, chart.also, 1)
            if len(points[0]):
                axes.plot(*points, color=color, linestyle="none", marker="D", markersize=4.5, markeredgecolor="white",
                          label=f"{label}, evaluation")
        for step in run.resumed_after:
            axes.axvline(step, color=color, linewidth=1, linestyle=":")
    if any(run.resumed_after for run in runs):
        axes.plot([], [], color="gray", linewidth=1, linestyle=":", label="resumed")
    if chart.log_scale and all((values[np.isfinite(values)] > 0).all() for _, values in drawn.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set(xlabel="step", ylabel=chart.title + (f" (mean of {smooth})" if smooth > 1 and chart.key in SMOOTHED else ""))
    axes.grid(alpha=0.3)
    for text in axes.legend(frameon=False, fontsize="small").get_texts():
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()


def labels(runs: Sequence[Run]) -> list[str]:
    """Their names, or where two have the same, their folders."""
    names = [run.name for run in runs]
    return [run.place if names.count(run.name) > 1 else run.name for run in runs]


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of what each run has come to."""
    head = ["run", "steps", "tokens", "loss", "best loss", "eval loss", "eval perplexity", "tokens a second",
            "resumed after step"]
    lines = []
    for run, label in zip(runs, labels(runs), strict=True):
        last = run.rows[-1]
        losses = [row["loss"] for row in run.rows if row.get("loss") is not None]
        evaluated: dict[str, Any] = next((row for row in reversed(run.rows) if row.get("eval_loss") is not None), {})
        speeds = [row["throughput"] for row in run.rows if row.get("throughput") is not None]
        lines.append([
            label, f"{last['current_steps']:,} of {last['total_steps']:,}", f"{last['num_tokens']:,}",
            _number(last.get("loss"), ".4f"), _number(min(losses, default=None), ".4f"),
            _number(evaluated.get("eval_loss"), ".4f"), _number(evaluated.get("eval_perplexity"), ".2f"),
            _number(float(np.median(speeds)) if speeds else None, ",.0f"),
            ", ".join(f"{step:,}" for step in run.resumed_after) or "never",
        ])  # fmt: skip
    return head, lines


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def page(runs: Sequence[Run], pictures: dict[str, bytes]) -> str:
    """The page, with the PNGs in it: nothing is loaded from elsewhere, and nothing in a name is taken for HTML."""
    head, lines = table(runs)
    cells = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    notes = "\n".join(
        f"<p>{html.escape(f'{label}: {note}.')}</p>"
        for run, label in zip(runs, labels(runs), strict=True) for note in run.notes
    )
    titles = {chart.name: chart.title for chart in CHARTS}
    charts = "\n".join(
        f'<h2>{html.escape(titles[name])}</h2>\n<img alt="{html.escape(titles[name])} over steps" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in pictures.items()
    )
    title = html.escape(", ".join(labels(runs)))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.3rem 0.8rem 0.3rem 0; text-align: left; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div><table>
<tr>{"".join(f"<th>{html.escape(name)}</th>" for name in head)}</tr>
{cells}
</table></div>
{notes}
{charts}
</body>
</html>
"""


def write(runs: Sequence[Run], out: Path, smooth: int) -> dict[str, Path]:
    """Draw what the runs have values for into `out`: NAME.png for each chart, and report.html. Returns the files by name.

    Raises DataError if they cannot be written.
    """
    drawn = {chart.name: draw(runs, chart, smooth) for chart in CHARTS}
    pictures = {name: png for name, png in drawn.items() if png is not None}
    files = {name: out / f"{name}.png" for name in pictures} | {"html": out / "report.html"}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, png in pictures.items():
            files[name].write_bytes(png)
        for name in drawn.keys() - pictures.keys():
            (out / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
        files["html"].write_text(page(runs, pictures), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written to: {error.strerror}; give another folder with out=...") from None
    return files


def require_plot(path: str) -> None:
    """Makes the folder of a plot, before the work that it is to show. Raises ConfigError where none can be written."""
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"plot={path}: {folder} cannot be made: {error.strerror}") from None
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"plot={path}: {'is a folder' if Path(path).is_dir() else f'{folder} cannot be written to'}")
