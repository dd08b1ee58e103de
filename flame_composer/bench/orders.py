"""What an order of rows costs by their number, and how well it mixes them; also StreamingDataset's.

python -c "from flame_composer.bench.orders import measure_orders; measure_orders('o.png')"
"""

from __future__ import annotations

import io
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flame_composer.bench.measure import measure
from flame_composer.loader.mixture import Mixture
from flame_composer.loader.order import Ints, StreamOrder
from flame_composer.quantities import align

ROWS_EACH = 16_222  # of 2,048 tokens of 2 bytes, in a shard of 64 MiB
BATCH = 1024
WINDOW = 1 << 22
NUMBERS = (10**7, 10**8, 10**9, 10**10, 10**11)
MOST_LAID_OUT = 10**8  # 5.3 GB
RUN = "import sys; from flame_composer.bench.orders import {}; {}(*map(int, sys.argv[1:]))"


def ours(num_rows: int, percent: int) -> None:
    """Print the processor's seconds and the MB to a first batch at a percentage of an epoch."""

    def begin(shards: int) -> None:
        made = StreamOrder(np.full(shards, ROWS_EACH), seed=1, window=WINDOW)
        mixed = Mixture([made], [made.num_rows], global_batch_size=BATCH, seed=1)
        next(mixed.batches(0, mixed.num_batches * percent // 100))

    begin(2)  # numpy sets something up at its first use
    _print_cost(lambda: begin(num_rows // ROWS_EACH))


def theirs(num_rows: int) -> None:
    """Print the same for StreamingDataset's order, which is laid out as a whole."""
    from flame_composer.upstream.streaming import StreamingOrder

    def begin(shards: int) -> None:
        sizes = [np.full(shards, ROWS_EACH)]
        next(StreamingOrder(sizes, [{}], global_batch_size=BATCH, algo="py1e", seed=1).batches(0))

    begin(2)
    _print_cost(lambda: begin(num_rows // ROWS_EACH))


def _print_cost(work: Callable[[], None]) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    work()
    seconds = time.process_time() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, (most - before) / 1024]))


class Mixing(NamedTuple):
    """How evenly shards' rows lie in batches, and how many shards are open or new at once.

    `evenness` is the variance of the number of a shard's rows in a batch over the mean, 1 if they
    are drawn at random, in the batches between the first and the last that have any.
    """

    evenness: float
    most_open: int
    most_new: int


def mixing(rows: Ints, per_shard: int, batch: int) -> Mixing:
    """Return how well rows [N] of shards of `per_shard` rows are mixed, in batches of `batch`."""
    shards = (rows[: len(rows) // batch * batch] // per_shard).reshape(-1, batch)
    counts = np.zeros((len(shards), int(rows.max()) // per_shard + 1))
    for number, row in enumerate(shards):
        np.add.at(counts[number], row, 1)
    seen = counts > 0
    first = seen.argmax(axis=0)
    last = len(seen) - 1 - seen[::-1].argmax(axis=0)
    inside = [
        counts[a + 1 : b, shard] for shard, (a, b) in enumerate(zip(first, last, strict=True))
    ]
    ratios = [each.var() / each.mean() for each in inside if len(each) > 5 and each.mean()]
    batches = np.arange(len(shards))[:, None]
    return Mixing(
        float(np.mean(ratios)),
        int(((batches >= first) & (batches <= last)).sum(axis=1).max()),
        int(np.bincount(first)[1:].max()),
    )


def compare_mixing() -> dict[str, Mixing]:
    """Return how 300 shards of 1,000 rows are mixed over 16,000 rows, in batches of 256."""
    from streaming.base.shuffle import get_shuffle

    sizes, window = np.full(300, 1000), 16_000
    spread = StreamOrder(sizes, seed=3, window=window).interleaved(0, 300_000)
    orders = {"spread": spread, "py1e": get_shuffle("py1e", sizes, 1, 3, 0, window)}
    return {name: mixing(rows, 1000, 256) for name, rows in orders.items()}


def measure_orders(plot: str) -> None:
    """Measure first batches of 10 million rows and more, print a table, and draw it to a PNG."""
    found: dict[str, list[tuple[int, float, float]]] = {}

    def add(name: str, function: str, number: int, *arguments: int) -> None:
        command = [sys.executable, "-c", RUN.format(function, function), str(number)]
        output = measure([*command, *map(str, arguments)]).output.splitlines()[-1]
        seconds, megabytes = json.loads(output)
        found.setdefault(name, []).append((number, seconds, megabytes))
        print(f"{name}: {number:,} rows, {seconds:.2f} s, {megabytes:.0f} MB", file=sys.stderr)

    for number in NUMBERS:
        add("spread, at the beginning", "ours", number, 0)
        add("spread, at 99 %", "ours", number, 99)
        if number <= MOST_LAID_OUT:
            add("StreamingDataset's py1e", "theirs", number)
    table = [("order", "rows", "seconds", "MB")] + [
        (name, f"{number:,}", f"{seconds:.2f}", f"{megabytes:.0f}")
        for name, costs in found.items()
        for number, seconds, megabytes in costs
    ]
    mixed = [("order", "evenness", "most shards open", "most new in a batch")] + [
        (name, f"{each.evenness:.2f}", str(each.most_open), str(each.most_new))
        for name, each in compare_mixing().items()
    ]
    print(*align(table), "", *align(mixed), sep="\n")
    Path(plot).write_bytes(draw(found))


def draw(costs: dict[str, list[tuple[int, float, float]]]) -> bytes:
    """Return a PNG of seconds and MB over the number of rows, both logarithmic, by order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    for name, points in costs.items():
        numbers, seconds, megabytes = zip(*points, strict=True)
        axes[0].loglog(numbers, seconds, marker="o", label=name)
        axes[1].loglog(numbers, megabytes, marker="o", label=name)
    for each, what in zip(axes, ("seconds of a core", "MB"), strict=True):
        each.set_xlabel("rows")
        each.set_ylabel(f"{what} to the first batch")
        each.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()
