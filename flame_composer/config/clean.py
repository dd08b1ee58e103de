"""The configuration of convert/clean.py: every step, its defaults and its rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from flame_composer.config.rules import require, require_seed, require_text
from flame_composer.config.source import HubSourceConfig, require_apart
from flame_composer.storage.filesystems import is_url


def require_fraction(value: float, name: str) -> None:
    require(0 <= value <= 1, name, "must be in [0, 1]")


@dataclass
class LanguageConfig:
    """Keep documents in certain languages, which a fastText model recognizes."""

    paths = ("model",)

    model: str = MISSING
    """File of a fastText model of languages, e.g. lid.176.bin; it is never downloaded."""
    languages: list[str] = field(default_factory=lambda: ["en"])
    """Languages to keep, under the names that the model has for them."""
    threshold: float = 0.65
    """Probability of being in one of these languages that a document must exceed to be kept."""

    def validate(self) -> None:
        require_text(self, "model")
        require(len(self.languages) > 0, "languages", "must name at least one language, e.g. [en]")
        require_fraction(self.threshold, "threshold")


@dataclass
class GopherRepetitionConfig:
    """Remove documents that repeat themselves, by the rules of Gopher.

    See arXiv 2112.11446, table A1. A limit of 0 is no limit.
    """

    dup_line_frac: float = 0.3
    """Largest share of a document's lines that repeat earlier ones."""
    dup_para_frac: float = 0.3
    """Largest share of a document's paragraphs that repeat earlier ones."""
    dup_line_char_frac: float = 0.2
    """Largest share of a document's characters in lines that repeat earlier ones."""
    dup_para_char_frac: float = 0.2
    """Largest share of a document's characters in paragraphs that repeat earlier ones."""
    top_n_grams: list[float] = field(default_factory=lambda: [0.2, 0.18, 0.16])
    """Largest shares of a document's characters in its most frequent sequence of 2, 3 and 4 words.
    """
    dup_n_grams: list[float] = field(default_factory=lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.1])
    """Largest shares of a document's characters in sequences of 5, 6, 7, 8, 9 and 10 words that
    repeat earlier ones.
    """

    def validate(self) -> None:
        for name in ("dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac"):
            require_fraction(getattr(self, name), name)
        for name, count in (("top_n_grams", 3), ("dup_n_grams", 6)):
            values = getattr(self, name)
            require(
                len(values) == count and all(0 <= value <= 1 for value in values),
                name,
                f"must be {count} numbers from 0 to 1",
            )


@dataclass
class GopherQualityConfig:
    """Remove documents that are hardly prose, by the rules of Gopher.

    See arXiv 2112.11446, appendix A. A limit of 0 is no limit.
    """

    min_doc_words: int = 50
    """Smallest number of words, not counting punctuation."""
    max_doc_words: int = 100000
    """Largest number of words, not counting punctuation."""
    min_avg_word_length: int = 3
    """Smallest mean length of a document's words, characters."""
    max_avg_word_length: int = 10
    """Largest mean length of a document's words, characters."""
    max_symbol_word_ratio: float = 0.1
    """Largest number of hash signs per word, and largest number of ellipses per word."""
    max_bullet_lines_ratio: float = 0.9
    """Largest share of lines that begin with a bullet or a dash."""
    max_ellipsis_lines_ratio: float = 0.3
    """Largest share of lines that end in an ellipsis."""
    min_alpha_words_ratio: float = 0.8
    """Smallest share of words, punctuation included, that hold a letter."""
    min_stop_words: int = 2
    """Smallest number of different words of `stop_words` in a document."""
    stop_words: list[str] = field(
        default_factory=lambda: ["the", "be", "to", "of", "and", "that", "have", "with"]
    )
    """Words that no prose is without; for text that is not English, name those of its language."""

    def validate(self) -> None:
        for name in (
            "min_doc_words",
            "max_doc_words",
            "min_avg_word_length",
            "max_avg_word_length",
            "min_stop_words",
        ):
            require(getattr(self, name) >= 0, name, "must be 0 or more")
        for name in (
            "max_symbol_word_ratio",
            "max_bullet_lines_ratio",
            "max_ellipsis_lines_ratio",
            "min_alpha_words_ratio",
        ):
            require_fraction(getattr(self, name), name)
        require(
            self.min_stop_words <= len(set(self.stop_words)),
            "stop_words",
            "must be at least min_stop_words words",
        )


@dataclass
class C4Config:
    """Remove lines and documents by the rules of C4; what is left of a document is kept.

    See arXiv 1910.10683, section 2.2.
    """

    remove_citations: bool = True
    """Cut marks like [12], [edit] and [citation needed] out of lines."""
    filter_no_terminal_punct: bool = False
    """Remove lines that do not end in . ? ! or a quotation mark, as C4 did. FineWeb found results
    better without this rule.
    """
    min_num_sentences: int = 5
    """Smallest number of sentences in a document; 0 for no such limit."""
    min_words_per_line: int = 3
    """Smallest number of words in a line; 0 for no such limit."""
    max_word_length: int = 1000
    """Largest number of characters in a word; lines with a longer word are removed. 0 for no such
    limit.
    """
    filter_lorem_ipsum: bool = True
    """Remove documents that hold "lorem ipsum"."""
    filter_javascript: bool = True
    """Remove lines that mention JavaScript."""
    filter_curly_bracket: bool = True
    """Remove documents with a curly bracket, which most code has."""
    filter_policy: bool = True
    """Remove lines about cookies, terms of use and privacy policies."""

    def validate(self) -> None:
        for name in ("min_num_sentences", "min_words_per_line", "max_word_length"):
            require(getattr(self, name) >= 0, name, "must be 0 or more")


@dataclass
class MinhashConfig:
    """Remove near-duplicates, found by MinHash.

    Two documents that share a fraction s of their word sequences are found with probability
    1 - (1 - s^hashes_per_bucket)^num_buckets. With the defaults this is 92 % for s = 0.8 and 5 %
    for s = 0.5.
    """

    n_grams: int = 5
    """Number of words in a sequence; documents with fewer words have no near-duplicates."""
    num_buckets: int = 14
    """Number of buckets; two documents that agree in one of them are near-duplicates."""
    hashes_per_bucket: int = 8
    """Number of hashes in a bucket, all of which must agree."""
    seed: int = 1
    """Seed of the hash functions."""

    def validate(self) -> None:
        for name in ("n_grams", "num_buckets", "hashes_per_bucket"):
            require(getattr(self, name) >= 1, name, "must be 1 or more")
        require_seed(self.seed, "seed")


@dataclass
class PiiConfig:
    """Mask personal information."""

    emails: str | None = "email@example.com"
    """Replacement for every e-mail address; null leaves them."""
    ips: str | None = "22.214.171.124"
    """Replacement for every IPv4 address; null leaves them. As far as is known, no machine answers
    at the default.
    """
    public_ips_only: bool = True
    """Leave IPv4 addresses that are private, reserved or local, like 192.168.0.1."""

    def validate(self) -> None:
        require(
            self.emails is not None or self.ips is not None,
            "emails",
            "must be set if ips is not; pii=null masks nothing",
        )


@dataclass
class SlurmConfig:
    """The jobs that are submitted with executor=slurm."""

    paths = ("activate",)

    partition: str = MISSING
    """Partition to submit jobs to."""
    time: str = MISSING
    """Time limit of a task, e.g. 10:00:00."""
    mem_per_cpu_gb: int = 4
    """Memory of a task, GB."""
    qos: str = "normal"
    """Quality of service."""
    activate: str | None = None
    """Script that a job sources first, to activate the Python environment; if not set, that of the
    environment in which clean.py runs.
    """
    max_array_size: int = 1001
    """Largest number of tasks that the cluster takes in one array job."""

    def validate(self) -> None:
        require_text(self, "partition", "time", "qos", "activate")
        for name in ("mem_per_cpu_gb", "max_array_size"):
            require(getattr(self, name) >= 1, name, "must be 1 or more")


@dataclass
class RayConfig:
    """The tasks that are run with executor=ray."""

    address: str = "auto"
    """Address of the Ray cluster; auto is the cluster that this machine belongs to."""
    mem_per_cpu_gb: float = 4.0
    """Memory to reserve for a task, GB."""

    def validate(self) -> None:
        require_text(self, "address")
        require(self.mem_per_cpu_gb > 0, "mem_per_cpu_gb", "must be more than 0")


@dataclass
class CleanConfig(HubSourceConfig):
    """Clean text to train on.

    The defaults follow FineWeb's recipe for prose from the web. section=null leaves a step out.
    """

    goes_on = True
    paths = ("source", "out", "removed_out")

    out: str = MISSING
    """Folder that the kept documents are written to, as JSONL for convert/to_mds.py."""
    removed_out: str | None = None
    """Folder that the removed documents are written to, in a folder for each step."""
    language: LanguageConfig | None = None
    """Keep documents in some languages only; this step is left out if not set."""
    gopher_repetition: GopherRepetitionConfig | None = field(default_factory=GopherRepetitionConfig)
    """Remove documents that repeat themselves."""
    gopher_quality: GopherQualityConfig | None = field(default_factory=GopherQualityConfig)
    """Remove documents that are hardly prose."""
    c4: C4Config | None = field(default_factory=C4Config)
    """Remove boilerplate lines, code and very short documents."""
    exact_dedup: bool = True
    """Keep only the first of documents with equal texts."""
    minhash: MinhashConfig | None = field(default_factory=MinhashConfig)
    """Keep only the first of documents that are nearly equal."""
    pii: PiiConfig | None = field(default_factory=PiiConfig)
    """Mask e-mail and IP addresses."""
    compression: Literal["zst", "gz", "none"] = "zst"
    """Compression of the output files."""
    unit_size: int = 67108864
    """Size of a task, bytes of input. A task writes one output file, and a cleaning is resumed task
    by task.
    """
    num_workers: int | None = None
    """Number of tasks at a time; if not set, one per core, or as many as a cluster has room for.
    The output does not depend on it.
    """
    executor: Literal["local", "slurm", "ray"] = "local"
    """Place where tasks run: processes of this machine, or a cluster whose machines see the same
    files under the same paths.
    """
    slurm: SlurmConfig | None = None
    """Settings of jobs, which must be set with executor=slurm."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Settings of tasks with executor=ray."""

    def validate(self) -> None:
        super().validate()
        require_text(self, "out", "removed_out")
        for name in ("out", "removed_out"):
            require(
                not is_url(getattr(self, name) or ""),
                name,
                "must be a folder of this machine; copy it to an object store when it is whole",
            )
        if self.removed_out is not None:
            require_apart(self.out, self.removed_out, "removed_out")
        steps = (
            self.language,
            self.gopher_repetition,
            self.gopher_quality,
            self.c4,
            self.minhash,
            self.pii,
        )
        require(
            self.exact_dedup or any(step is not None for step in steps),
            "exact_dedup",
            "must be true where every other step is null, or there is nothing to do",
        )
        require(self.unit_size > 0, "unit_size", "must be more than 0 bytes")
        require(
            self.num_workers is None or self.num_workers > 0,
            "num_workers",
            "must be 1 or more, or null",
        )
        require(
            (self.executor == "slurm") == (self.slurm is not None),
            "slurm",
            "must be set with executor=slurm, and with no other: slurm.partition=..."
            " slurm.time=...",
        )
        if self.executor != "local":
            self.require_absolute("out", "removed_out")
