"""The last stretch of a conversion: what is missing of its datasets is converted and published."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from flame_composer.dataset.ledger import Ledger
from flame_composer.dataset.publish import NotWhole
from flame_composer.dataset.totals import Progress, totals_table
from flame_composer.dataset.workers import Job, convert_units
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.quantities import format_seconds
from flame_composer.text.encoder import require_installed


def finish(
    datasets: Sequence[DatasetWriter],
    build_job: Callable[[tuple[DatasetWriter, ...]], Job],
    *,
    encoder: str,
    num_workers: int | None,
    cluster: str | None,
) -> None:
    """Convert what is missing of the datasets, and publish them.

    They have the same units. `build_job` returns the job that converts those of the datasets that
    are unfinished; they are encoded by `encoder`. Progress, warnings and totals are printed.
    """
    kind = datasets[0].plan.kind
    unfinished: list[DatasetWriter] = []
    for dataset in datasets:
        totals = dataset.finished()
        if totals is None:
            unfinished.append(dataset)
        else:
            print(f"{dataset.out}: already finished, nothing to do")
            print(totals_table(kind, [(dataset.plan.split, totals)]))
    if not unfinished:
        return
    require_installed(encoder)
    for dataset in unfinished:
        dataset.begin()
    job = build_job(tuple(unfinished))
    to_do = sorted(set().union(*(dataset.uncommitted() for dataset in unfinished)))
    sizes = [job.num_bytes(number) for number in range(len(unfinished[0].plan.units))]
    committed = sum(sizes) - sum(sizes[number] for number in to_do)
    with Progress(sum(sizes), committed) as progress:

        def convert(numbers: Sequence[int]) -> None:
            workers = workers_for(num_workers)
            for warning in convert_units(job, numbers, workers, progress.update, cluster):
                progress.warn(warning)

        convert(to_do)
        made = [(each.plan.split, published(each, convert)) for each in unfinished]
    print(totals_table(kind, made))
    print(
        f"{progress.num_tokens:,} tokens in {format_seconds(progress.seconds)}:"
        f" {progress.num_tokens / progress.seconds:,.0f} tokens/s ({encoder})"
    )


def published(dataset: DatasetWriter, convert: Callable[[Sequence[int]], None]) -> Ledger:
    """Publish a dataset, and return its totals.

    Units that turn out not to be whole, although a listing showed them, are converted first: they
    were being uploaded when the last conversion was killed, or have lost a file since. Raises
    NotWhole if a unit is so again.
    """
    mended: set[int] = set()
    while True:
        try:
            return dataset.publish()
        except NotWhole as found:
            if found.numbers & mended:
                raise
            mended |= found.numbers
            convert(sorted(found.numbers))


def workers_for(num_workers: int | None) -> int:
    """Return the number of processes that convert: one per core if it is not set."""
    return num_workers or len(os.sched_getaffinity(0))
