"""The last stretch of a conversion: what is missing of its datasets is converted and published."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from flame_composer.dataset.manifest import Manifest
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
) -> list[Manifest]:
    """Convert what is missing of the datasets, and return their manifests in order.

    They have the same units. `build_job` returns the job that converts those of the datasets that
    are unfinished; they are encoded by `encoder`. Progress, warnings and totals are printed.
    """
    manifests: dict[str, Manifest] = {}
    unfinished: list[DatasetWriter] = []
    for dataset in datasets:
        manifest = dataset.finished()
        if manifest is None:
            unfinished.append(dataset)
        else:
            manifests[dataset.out] = manifest
            print(f"{dataset.out}: already finished, nothing to do")
            print(totals_table([manifest]))
    if unfinished:
        require_installed(encoder)
        for dataset in unfinished:
            dataset.begin()
        job = build_job(tuple(unfinished))
        to_do = sorted(set().union(*(dataset.uncommitted() for dataset in unfinished)))
        sizes = [job.num_bytes(number) for number in range(len(unfinished[0].plan.units))]
        committed = sum(sizes) - sum(sizes[number] for number in to_do)
        with Progress(sum(sizes), committed) as progress:
            for warning in convert_units(
                job, to_do, workers_for(num_workers), progress.update, cluster
            ):
                progress.warn(warning)
        made = [dataset.publish() for dataset in unfinished]
        manifests |= {each.out: manifest for each, manifest in zip(unfinished, made, strict=True)}
        print(totals_table(made))
        print(
            f"{progress.num_tokens:,} tokens in {format_seconds(progress.seconds)}:"
            f" {progress.num_tokens / progress.seconds:,.0f} tokens/s ({encoder})"
        )
    return [manifests[dataset.out] for dataset in datasets]


def workers_for(num_workers: int | None) -> int:
    """Return the number of processes that convert: one per core if it is not set."""
    return num_workers or len(os.sched_getaffinity(0))
