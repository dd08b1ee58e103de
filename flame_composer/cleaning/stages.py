"""What is done to documents: datatrove's filters and deduplication between our reader and our
parts, in stages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
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
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.pipeline.filters.language_filter import LanguageFilter
from datatrove.pipeline.formatters.pii import PIIFormatter
from datatrove.utils.lid import FastTextLID
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from flame_composer.cleaning.parts import (
    DOCUMENTS,
    Counts,
    PartsFolder,
    PartWriter,
    publish_file,
    read_json,
    read_part,
)
from flame_composer.config.clean import (
    C4Config,
    CleanConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    LanguageConfig,
)
from flame_composer.config.fields import nearest
from flame_composer.errors import ConfigError, DataError
from flame_composer.text.documents import read_documents

Documents = Iterator[Document]

FILTERED = "filtered"  # what the filters leave, where it is read again by the deduplication
EXACT_HASHES = "exact_hashes"
FINDINGS = ("exact_found", "minhash_found", "minhash_clusters")
MAX_FINDERS = 16  # tasks among which the hashes of all documents are divided
MAX_TASKS = 65534  # what datatrove's priorities can tell apart
WORDS = regex.compile(r"(?w)\b(?!\s).+?\b", regex.DOTALL)
SENTENCES = regex.compile(r"""(?:\p{Lu}\.|.)+?(?:[.?!…]+["'”’)\]]*(?=\s|$)|[。！？।]+|\n+|$)""")


# Steps on a document


class UnicodeTokenizer(WhitespaceTokenizer):
    """Words by the default rules of Unicode (UAX #29) and sentences by their last character.

    For any language that parts words with spaces, without a model, and 16 times as fast as the
    spaCy tokenizers that datatrove has for each language.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return [word for word in WORDS.findall(text) if not word.isspace()]

    def sent_tokenize(self, text: str) -> list[str]:
        return [sentence for part in SENTENCES.findall(text) if (sentence := part.strip())]


class FastTextFile(FastTextLID):
    """A fastText model out of a file of ours, where datatrove has addresses to download it from."""

    def __init__(self, path: str, languages: list[str]):
        super().__init__(languages)
        self.path = path
        self._model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            from fasttext.FastText import _FastText

            self._model = _FastText(self.path)
        return self._model


def build_filters(config: CleanConfig) -> dict[str, BaseFilter]:
    """The filters that the configuration asks for, by its names for them, in the order in which
    they are applied.
    """
    filters: dict[str, BaseFilter] = {}
    if config.language is not None:
        filters["language"] = build_language_filter(config.language)
    words = UnicodeTokenizer()
    builders: dict[str, Callable[[Any, UnicodeTokenizer], BaseFilter]] = {
        "gopher_repetition": build_repetition_filter,
        "gopher_quality": build_quality_filter,
        "c4": build_c4_filter,
    }
    sections = {
        "gopher_repetition": config.gopher_repetition,
        "gopher_quality": config.gopher_quality,
        "c4": config.c4,
    }
    return filters | {
        name: builders[name](section, words)
        for name, section in sections.items()
        if section is not None
    }


def build_language_filter(section: LanguageConfig) -> LanguageFilter:
    language_filter = LanguageFilter(section.languages, section.threshold)
    language_filter.model = FastTextFile(section.model, section.languages)
    return language_filter


def build_repetition_filter(
    section: GopherRepetitionConfig, words: UnicodeTokenizer
) -> GopherRepetitionFilter:
    limits = dataclasses.asdict(section)
    for name, first in (("top_n_grams", 2), ("dup_n_grams", 5)):
        limits[name] = tuple((n, limit) for n, limit in enumerate(limits[name], first) if limit)
    return GopherRepetitionFilter(**limits, language=words)


def build_quality_filter(
    section: GopherQualityConfig, words: UnicodeTokenizer
) -> GopherQualityFilter:
    limits = dataclasses.asdict(section)
    # What it does, against what it is called
    limits["max_non_alpha_words_ratio"] = limits.pop("min_alpha_words_ratio")
    return GopherQualityFilter(**limits, language=words)


def build_c4_filter(section: C4Config, words: UnicodeTokenizer) -> C4QualityFilter:
    limits = {
        name: -1 if value == 0 and value is not False else value
        for name, value in dataclasses.asdict(section).items()
    }
    return C4QualityFilter(**limits, language=words)


def judge(name: str, step: BaseFilter, document: Document) -> tuple[bool, str]:
    """Whether the step keeps the document, which it may change, and if not, why ("" where there
    is one reason only).
    """
    result = step.filter(document)
    is_kept, reason = result if isinstance(result, tuple) else (bool(result), "")
    if name == "language" and not is_kept:
        reason = document.metadata["language"]
    if is_kept and not document.text.strip():
        return False, "no_line_left"
    return is_kept, reason


def build_mask(config: CleanConfig) -> PIIFormatter | None:
    if config.pii is None:
        return None
    emails, ips = config.pii.emails, config.pii.ips
    return PIIFormatter(
        remove_emails=emails is not None,
        email_replacement=emails or "",
        remove_ips=ips is not None,
        ip_replacement=ips or "",
        only_remove_public_ips=config.pii.public_ips_only,
    )


def check_model(section: LanguageConfig) -> str:
    """A hash of the model's file. Raises ConfigError unless it can be read and knows the
    languages.
    """
    if not os.path.isfile(section.model):
        raise ConfigError(
            f"language.model: {section.model}: no such file; give that of a fastText model, e.g."
            " lid.176.bin"
        )
    try:
        labels = FastTextFile(section.model, []).model.get_labels()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"language.model: {section.model}: cannot be read: {error}") from None
    known = [label.removeprefix("__label__") for label in labels]
    for language in section.languages:
        if language not in known:
            hint = nearest(language, known) or f"; it knows {', '.join(sorted(known)[:20])}"
            raise ConfigError(f"language.languages: {language}: unknown to {section.model}{hint}")
    digest = hashlib.blake2b(digest_size=8)
    with Path(section.model).open("rb") as model:
        while block := model.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Steps of a pipeline: called with what the step before yields, the task's number and the number of
# tasks


@dataclass
class Aside:
    """Keeps removed documents, if there is a folder for them, and counts them; what datatrove
    calls an exclusion writer.
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

    # Datatrove enters and leaves it only if there is something to remove
    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@dataclass
class Filter:
    """Reads a work unit and yields what the filters leave of it."""

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
            "inputs": [dataclasses.asdict(part) for part in self.folder.units[rank]],
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
    """Writes the documents down, to be read again, and passes them on."""

    folder: PartsFolder

    def __call__(self, data: Documents, rank: int, world_size: int) -> Documents:
        writer = PartWriter(filtered_path(self.folder, rank))
        for document in data:
            writer.write(document.id, document.text)
            yield document
        writer.commit()


@dataclass
class ReadAgain:
    """Yields what `Keep` wrote."""

    folder: PartsFolder

    def __call__(self, data: None, rank: int, world_size: int) -> Documents:
        for document_id, text in read_part(filtered_path(self.folder, rank)):
            yield Document(text, document_id, metadata={"unit": rank})


@dataclass
class KeepFirst:
    """Of each cluster that datatrove's MinhashDedupCluster has found, has its filter keep the
    first document in source order, where datatrove would keep any.
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
    """Masks what tells of persons, and writes the part that is published."""

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
    """Adds up, and puts the finished folders in their places."""

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
    return folder.work / "counts" / stage / f"{rank:05}.json"


def filtered_path(folder: PartsFolder, rank: int) -> Path:
    return folder.work / FILTERED / f"{rank:05}.jsonl.zst"


# The stages


@dataclass
class Stage:
    """A pipeline and the number of its tasks; a stage starts when the one before has finished."""

    name: str
    pipeline: list[Callable[..., Any]]
    tasks: int


def text_of(document: Document) -> str:
    return document.text


def earlier_first(document: Document) -> int:
    """datatrove keeps the document of the highest priority: that of the first task."""
    return MAX_TASKS + 1 - document.metadata["unit"]


def build_stages(
    config: CleanConfig, folder: PartsFolder, removed: PartsFolder | None
) -> list[Stage]:
    num_units = len(folder.units)
    filters, mask = build_filters(config), build_mask(config)
    first = Stage("filter", [Filter(config, folder, removed, filters)], num_units)
    stages = [first]
    rereading: list[Callable[..., Any]] = [ReadAgain(folder)]
    hashing = list(rereading)  # like it, but nothing is kept aside
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
    return {name: importlib.metadata.version(name) for name in ("datatrove", "regex")}
