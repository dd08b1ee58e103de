"""The stages of a cleaning: datatrove's filters and deduplication, from our reader to our parts."""

from __future__ import annotations

import importlib.metadata
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters.pii import PIIFormatter

from flame_composer.cleaning.filters import UnicodeTokenizer, build_filters, build_mask, judge
from flame_composer.cleaning.parts import (
    DOCUMENTS,
    Counts,
    PartsFolder,
    PartWriter,
    publish_file,
    read_json,
    read_part,
)
from flame_composer.config.clean import CleanConfig
from flame_composer.errors import DataError
from flame_composer.text.documents import read_documents
from flame_composer.text.sources import slice_json

Documents = Iterator[Document]

FILTERED = "filtered"  # what the filters leave, for the deduplication to read again
EXACT_HASHES = "exact_hashes"
FINDINGS = ("exact_found", "minhash_found", "minhash_clusters")
MAX_FINDERS = 16  # tasks that share the hashes of all documents
MAX_TASKS = 65534  # as many as datatrove's priorities can tell apart


# Steps of a pipeline. Each is called with what the step before yields, the task's number and the
# number of tasks.


@dataclass
class Aside:
    """A counter of removed documents, which also writes them to `folder` if that is set.

    datatrove's name for this role is exclusion writer.
    """

    folder: PartsFolder | None
    step: str

    def open(self, rank: int) -> None:
        self.reasons: Counter[str] = Counter()
        self.writer = (
            None
            if self.folder is None
            else PartWriter(self.folder.part(rank, f"{DOCUMENTS}/{self.step}"))
        )

    def write(self, document: Document, rank: int, reason: str = "") -> None:
        self.reasons[reason] += 1
        if self.writer is not None:
            self.writer.write(document.id, document.text, reason or self.step)

    def commit(self) -> None:
        if self.writer is not None:
            self.writer.commit()

    # datatrove uses this context only if there is something to remove.
    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@dataclass
class Filter:
    """The step that reads a work unit and yields the documents that the filters keep."""

    config: CleanConfig
    folder: PartsFolder
    removed: PartsFolder | None
    filters: dict[str, BaseFilter]

    def __call__(self, data: None, rank: int, world_size: int) -> Documents:
        counts = Counts()
        asides = {name: Aside(self.removed, name) for name in self.filters}
        for aside in asides.values():
            aside.open(rank)
        for document in self._read(rank, counts):
            for name, step in self.filters.items():
                before = document.text
                is_kept, reason = judge(name, step, document)
                if not is_kept:
                    document.text = before
                    asides[name].write(document, rank, reason)
                    break
                if document.text != before:
                    counts.changed[name] += 1
            else:
                yield document
        for aside in asides.values():
            aside.commit()
        counts.removed = {name: aside.reasons for name, aside in asides.items()}
        record = {
            "inputs": [slice_json(part) for part in self.folder.units[rank]],
            "counts": counts.to_json(),
        }
        publish_file(counts_path(self.folder, "filter", rank), record)

    def _read(self, rank: int, counts: Counts) -> Documents:
        def skip(error: DataError) -> None:
            if self.config.on_error == "fail":
                raise error
            counts.documents += 1
            counts.unreadable += 1

        for part in self.folder.units[rank]:
            shard = f"{part.start}:" if part.format == "dataset" else ""
            documents = read_documents(
                part, self.config.text_column, skip, self.config.max_document_bytes
            )
            for text, path, position in documents:
                counts.documents += 1
                counts.characters += len(text)
                if text.strip():
                    yield Document(text, f"{path}:{shard}{position}", metadata={"unit": rank})
                else:
                    counts.empty += 1


@dataclass
class Keep:
    """The step that writes documents to disk, for `ReadAgain`, and passes them on."""

    folder: PartsFolder

    def __call__(self, data: Documents, rank: int, world_size: int) -> Documents:
        writer = PartWriter(filtered_path(self.folder, rank))
        for document in data:
            writer.write(document.id, document.text)
            yield document
        writer.commit()


@dataclass
class ReadAgain:
    """The step that yields the documents which `Keep` wrote."""

    folder: PartsFolder

    def __call__(self, data: None, rank: int, world_size: int) -> Documents:
        for document_id, text in read_part(filtered_path(self.folder, rank)):
            yield Document(text, document_id, metadata={"unit": rank})


@dataclass
class KeepFirst:
    """The step that keeps the first document, in source order, of each cluster.

    datatrove's MinhashDedupCluster finds the clusters. Its own filter would keep an arbitrary
    document of each.
    """

    clusters: str

    def __call__(self, data: None, rank: int, world_size: int) -> None:
        seen: set[int] = set()
        for path in sorted(Path(self.clusters).glob("*.clusters")):
            removed = bytearray()
            for document, cluster in struct.iter_unpack("<2I", path.read_bytes()):
                if cluster in seen:
                    removed += struct.pack("<I", document)
                seen.add(cluster)
            path.with_suffix(".remove").write_bytes(removed)


@dataclass
class Finish:
    """The step that masks personal data, and writes the part that is published."""

    folder: PartsFolder
    mask: PIIFormatter | None
    asides: tuple[Aside, ...]

    def __call__(self, data: Documents, rank: int, world_size: int) -> None:
        counts = Counts()
        for aside in self.asides:
            aside.open(rank)
        writer = PartWriter(self.folder.part(rank))
        for document in data:
            text = document.text
            if self.mask is not None:
                text = self.mask.format(text)
                counts.changed["pii"] += text != document.text
            counts.characters_out += len(text)
            writer.write(document.id, text)
        for aside in self.asides:
            aside.commit()
        writer.commit()
        counts.out = writer.documents
        counts.removed = {aside.step: aside.reasons for aside in self.asides}
        publish_file(counts_path(self.folder, "finish", rank), {"counts": counts.to_json()})


@dataclass
class Publish:
    """The step that adds up the counts, and publishes the finished folders."""

    folder: PartsFolder
    removed: PartsFolder | None
    steps: tuple[str, ...]

    def __call__(self, data: None, rank: int, world_size: int) -> None:
        totals = Counts(removed={step: Counter() for step in self.steps})
        for number in range(len(self.folder.units)):
            for stage in ("filter", "finish"):
                totals.add(
                    Counts.from_json(read_json(counts_path(self.folder, stage, number))["counts"])
                )
        if self.removed is not None and self.removed.finished() is None:
            self.removed.publish(totals)
        self.folder.publish(totals)


def counts_path(folder: PartsFolder, stage: str, rank: int) -> Path:
    """Return the path of the counts of one task of a stage."""
    return folder.work / "counts" / stage / f"{rank:05}.json"


def filtered_path(folder: PartsFolder, rank: int) -> Path:
    """Return the path of the documents that a task's filters have kept."""
    return folder.work / FILTERED / f"{rank:05}.jsonl.zst"


# The stages


@dataclass
class Stage:
    """A pipeline and the number of its tasks, which start once the stage before has finished."""

    name: str
    pipeline: list[Callable[..., Any]]
    tasks: int


def text_of(document: Document) -> str:
    return document.text


def earlier_first(document: Document) -> int:
    """Return a document's priority: the highest, which datatrove keeps, is the first unit's."""
    return MAX_TASKS + 1 - document.metadata["unit"]


def build_stages(
    config: CleanConfig, folder: PartsFolder, removed: PartsFolder | None
) -> list[Stage]:
    """Return the stages of a cleaning in order; the first reads the source, the last publishes."""
    num_units = len(folder.units)
    filters, mask = build_filters(config), build_mask(config)
    first = Stage("filter", [Filter(config, folder, removed, filters)], num_units)
    stages = [first]
    rereading: list[Callable[..., Any]] = [ReadAgain(folder)]
    hashing = list(rereading)  # the same, but it keeps no removed documents
    asides: list[Aside] = []
    if config.exact_dedup or config.minhash is not None:
        first.pipeline.append(Keep(folder))
    if config.exact_dedup:
        exact = ExactDedupConfig(text_of, earlier_first)
        hashes, found = str(folder.work / EXACT_HASHES), str(folder.work / "exact_found")
        finders = min(num_units, MAX_FINDERS)
        first.pipeline.append(ExactDedupSignature(hashes, exact, finders))
        stages.append(Stage("find equal", [ExactFindDedups(hashes, found, exact)], finders))
        asides.append(Aside(removed, "exact_dedup"))
        rereading.append(ExactDedupFilter(found, exact, asides[-1]))
        hashing.append(ExactDedupFilter(found, exact))
    if config.minhash is not None:
        section = config.minhash
        minhash = MinhashConfig(
            section.n_grams, section.num_buckets, section.hashes_per_bucket, section.seed
        )
        hashes, found = str(folder.work / "minhash_hashes"), str(folder.work / "minhash_found")
        clusters = str(folder.work / "minhash_clusters")
        signature = MinhashDedupSignature(hashes, minhash, UnicodeTokenizer())
        if config.exact_dedup:
            stages.append(Stage("hash", [*hashing, signature], num_units))
        else:
            first.pipeline.append(signature)
        stages.append(
            Stage(
                "find similar",
                [MinhashDedupBuckets(hashes, found, config=minhash)],
                section.num_buckets,
            )
        )
        stages.append(
            Stage(
                "cluster",
                [
                    MinhashDedupCluster(found, clusters, minhash, save_cluster_id=True),
                    KeepFirst(clusters),
                ],
                1,
            )
        )
        asides.append(Aside(removed, "minhash"))
        rereading.append(MinhashDedupFilter(clusters, asides[-1]))
    finish = Finish(folder, mask, tuple(asides))
    if asides:
        stages.append(Stage("finish", [*rereading, finish], num_units))
    else:
        first.pipeline.append(finish)
    steps = (*filters, *(aside.step for aside in asides))
    return [*stages, Stage("publish", [Publish(folder, removed, steps)], 1)]


def versions() -> dict[str, str]:
    """Return the versions of the packages that the results depend on."""
    return {name: importlib.metadata.version(name) for name in ("datatrove", "regex")}
