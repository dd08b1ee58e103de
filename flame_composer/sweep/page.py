"""The page of a sweep: its table, the loss over each axis, the curves of all trials."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

from flame_composer.config.axes import Axis
from flame_composer.config.sweep import SweepConfig
from flame_composer.errors import ConfigError, DataError, masked
from flame_composer.lines import visible
from flame_composer.storage.local import appearing
from flame_composer.sweep import record
from flame_composer.sweep.driving import locked
from flame_composer.sweep.results import Outcome, table
from flame_composer.sweep.trials import folder_of
from flame_composer.train.charts import DPI, SIZE, document, html_table, series, thinned
from flame_composer.train.run_log import Run, read_run

SMOOTH, SHARE = 10, 20  # the mean is drawn of so many steps, or of this part of a shorter run
MOST_NAMED = 12  # curves; of more, the legend names the best
MOST_TICKS = 12  # values that are ticks; they must not be closer than those of so many would be
WIDE = 10  # a list of whole numbers whose ends are further apart by this factor is logarithmic


def write_page(config: SweepConfig, outcome: Outcome) -> Path:
    """Write report.html into the sweep's folder, and return its path.

    It appears whole, and not over that of a process that has enlarged the sweep meanwhile.
    """
    page = document(Path(config.sweep_folder).name, _body(config, outcome))
    path = Path(config.sweep_folder, "report.html")
    try:
        with locked(path.parent):
            if record.is_of(config):
                with appearing(str(path)) as file:
                    file.write(page.encode())
    except OSError as error:
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def _body(config: SweepConfig, outcome: Outcome) -> str:
    pictures = {
        f"{config.result().replace('_', ' ')} over {axis.key}": over(config, outcome, number)
        for number, axis in enumerate(config.axes)
        if len(axis.extremes()) > 1
    }
    pictures["training loss of all trials"] = curves(config, outcome, "loss")
    if config.eval_data is not None:
        pictures["evaluation loss of all trials"] = curves(config, outcome, "eval_loss")
    rows = table(config, outcome)
    body = [html_table(rows[0], rows[1:])]
    if outcome.best is not None:
        best = html.escape(visible(outcome.content["command"]))
        body.append(f"<p>The best trial's values in a run of their own:</p>\n<pre>{best}</pre>")
    for title, png in pictures.items():
        shown = html.escape(visible(title))
        if png is not None:
            data = base64.b64encode(png).decode()
            body.append(f'<h2>{shown}</h2>\n<img alt="{shown}" src="data:image/png;base64,{data}">')
    return "\n".join(body)


def over(config: SweepConfig, outcome: Outcome, number: int) -> bytes | None:
    """Return a chart of the metric over the values of one axis as a PNG, or None without values.

    Each point is a trial. A line joins the best of each number in a list.
    """
    from matplotlib.figure import Figure

    axis = config.axes[number]
    points = [
        (trial.values[number], result.metric, result.state)
        for trial, result in outcome.ranked
        if result.metric is not None
    ]
    if not points:
        return None
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    values = [value for value, _, _ in points]
    places = [float(each if axis.has_numbers() else axis.values.index(each)) for each in values]
    for state, color in (("finished", "C0"), ("pruned", "0.6")):
        chosen = [
            (place, metric)
            for place, (_, metric, of) in zip(places, points, strict=True)
            if of == state
        ]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), "o", color=color, label=state)
    best: dict[float, float] = {}
    for place, (_, metric, state) in zip(places, points, strict=True):
        if state == "finished":
            best[place] = min(metric, best.get(place, metric))
    if axis.has_numbers():
        if axis.values and len(best) > 1:
            x, y = zip(*sorted(best.items()), strict=True)
            axes.plot(x, y, color="C0", linewidth=1, label="best of each value")
        set_scale(axes, axis, dict(zip(places, values, strict=True)))
    else:
        shown = [visible(masked(name)) for name in axis.values]
        axes.set_xticks(range(len(shown)), shown, parse_math=False)
    return _finished(figure, axes, visible(axis.key), config.result().replace("_", " "))


def set_scale(axes: Any, axis: Axis, values: dict[float, str]) -> None:
    """Set the scale and the ticks of a numeric axis; `values` holds those drawn, as written.

    A list of positive numbers is logarithmic; one of whole numbers only if its ends are WIDE apart.
    A range is logarithmic if numbers were drawn from it so. The values are the ticks, unless they
    are of a range of fractions, or too close to each other.
    """
    from matplotlib.ticker import MaxNLocator

    numbers = [float(each) for each in axis.extremes()]
    is_whole = axis.kind in ("", "int") and all(each.is_integer() for each in numbers)
    is_narrow = is_whole and max(numbers) < WIDE * min(numbers)
    is_log = min(numbers) > 0 and not is_narrow if not axis.kind else axis.kind == "loguniform"
    if is_log:
        axes.set_xscale("log")
    elif is_whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    places = sorted(values)
    at = np.log(places) if is_log else np.array(places)
    are_apart = np.all(np.diff(at) * MOST_TICKS >= at[-1] - at[0])
    if are_apart and (is_whole or axis.values):
        axes.set_xticks(places, [values[place] for place in places])
        axes.set_xticks([], minor=True)


def curves(config: SweepConfig, outcome: Outcome, key: str) -> bytes | None:
    """Return a chart of a key of all trials' logs over steps as a PNG, or None without values.

    Better trials are drawn darker, and over worse ones.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(len(outcome.ranked), 2)))
    drawn = [
        (place, trial, run)
        for place, (trial, result) in enumerate(outcome.ranked)
        if result.same_as is None and (run := _run(config, trial)) is not None
    ]
    longest = max((run.num_rows for _, _, run in drawn), default=0)
    smooth = max(min(SMOOTH, longest // SHARE), 1)
    for place, trial, run in reversed(drawn):
        steps, values = thinned(*series(run, key, smooth))
        if len(values):
            named = trial.name if place < MOST_NAMED else None
            marker = "o" if key == "eval_loss" else None
            axes.plot(
                steps, values, color=shades[place], linewidth=1.2, marker=marker, markersize=3,
                label=named, zorder=3 + len(drawn) - place,
            )  # fmt: skip
    if not axes.lines:
        return None
    mean = f" (mean of {smooth})" if key == "loss" and smooth > 1 else ""
    return _finished(figure, axes, "step", f"{key.replace('_', ' ')}{mean}", reverse=True)


def _run(config: SweepConfig, trial: Any) -> Run | None:
    try:
        return read_run(str(folder_of(config, trial)))
    except (ConfigError, DataError):  # it failed before its first step
        return None


def _finished(figure: Any, axes: Any, across: str, up: str, reverse: bool = False) -> bytes:
    axes.set_xlabel(across, parse_math=False)  # a $ in it stands for itself
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1 and reverse:
        handles, labels = handles[::-1], labels[::-1]
    for text in axes.legend(handles, labels, frameon=False, fontsize="small").get_texts():
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()
