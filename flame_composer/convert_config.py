"""What the scripts of convert/ are run with: every field, its default and its rules."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from flame_composer.config import ScriptConfig, require, require_seed, require_text
from flame_composer.storage import is_url


def require_apart(out: str, other: str, name: str) -> None:
    places = [place if is_url(place) else os.path.realpath(place) for place in (out, other)]
    first, second = (f"{place.rstrip('/')}/" for place in places)
    require(not first.startswith(second) and not second.startswith(first), name,
            f"must be a folder beside out={out}, neither the same nor inside the other")


def require_fraction(value: float, name: str) -> None:
    require(0 <= value <= 1, name, "must be in [0, 1]")

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")  # of an attention layer


@dataclass
class TokenizerTrainConfig(ScriptConfig):
    """Train a byte-level BPE tokenizer on text and save it as a Hugging Face tokenizer folder."""

    source: list[str] = MISSING
    """Files, folders or globs of JSONL, Parquet or plain text, also as URLs (s3://bucket/folder)."""
    out: str = MISSING
    """Folder the tokenizer is written to."""
    vocab_size: int = 32000
    """Number of tokens, special ones included."""
    text_column: str = "text"
    """Field of JSONL and Parquet records that holds the text."""
    suffixes: list[str] = field(default_factory=list)
    """Take only files with these endings when a folder is searched, e.g. [.py,.md]; if not set, .jsonl, .json-lines,
    .ndjson, .parquet and .txt, and those compressed. Other endings are plain text, one document a file."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do with a document that cannot be read: stop, or leave it out and count it."""
    min_frequency: int = 2
    """A pair must occur this often to be merged."""
    max_bytes: int | None = None
    """Learn from a sample of this many bytes, drawn from all over the source; from all of it if not set."""
    eos_token: str = "<|endoftext|>"
    """The token that ends a document (also used as bos and pad)."""

    def validate(self) -> None:
        require(len(self.source) > 0, "source", "must name at least one file, folder or glob")
        require_text(self, "out", "text_column", "eos_token")
        require(not is_url(self.out), "out", "must be a local folder")
        require(self.vocab_size >= 257, "vocab_size", "must be at least 257: 256 bytes and the end-of-text token")
        require(self.min_frequency >= 1, "min_frequency", "must be 1 or more")
        require(self.max_bytes is None or self.max_bytes > 0, "max_bytes", "must be more than 0")


@dataclass
class ConvertConfig(ScriptConfig):
    """Turn text into tokenized, packed MDS shards."""

    source: list[str] = MISSING
    """Files, folders or globs of JSONL or plain text, also as .gz .zst .bz2 .xz, or of Parquet, also as URLs
    (s3://bucket/folder); with `split`, Hugging Face datasets by id or folder."""
    split: str | None = None
    """Split of the Hugging Face dataset to read, e.g. train."""
    name: str | None = None
    """Configuration of the Hugging Face dataset, e.g. sample-10BT; its default if not set."""
    out: str = MISSING
    """Folder the dataset is written to, local or as a URL (s3://bucket/folder); then each work unit is made in TMPDIR first."""
    tokenizer: str = MISSING
    """Hugging Face tokenizer folder or id."""
    context_length: int = 2048
    """Tokens per row."""
    text_column: str = "text"
    """Field of JSONL and Parquet records that holds the text."""
    suffixes: list[str] = field(default_factory=list)
    """Take only files with these endings when a folder is searched, e.g. [.py,.md]; if not set, .jsonl, .json-lines,
    .ndjson, .parquet and .txt, and those compressed. Other endings are plain text, one document a file."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do with a document that cannot be read: stop, or leave it out and count it."""
    add_bos: bool = False
    """Put the tokenizer's bos token before every document."""
    add_eos: bool = True
    """Put the tokenizer's eos token after every document."""
    val_fraction: float = 0.0
    """Fraction of documents held out for validation, chosen by a hash of the text."""
    val_out: str | None = None
    """Folder the held-out documents' dataset is written to, local or as a URL."""
    shard_size: int = 67108864
    """Largest size of a shard, bytes."""
    unit_size: int = 67108864
    """Input bytes per work unit, the step in which a conversion is committed and resumed."""
    max_doc_length: int | None = None
    """Cut documents into pieces of at most so many tokens (bos and eos included), each a document to the model."""
    min_doc_length: int | None = None
    """Leave out documents of fewer tokens (bos and eos included), and count them."""
    seed: int | None = None
    """Shuffle the documents of each work unit, and the units; if not set, the order is that of the source."""
    encoder: Literal["auto", "gigatoken", "hf"] = "auto"
    """What turns text into tokens: gigatoken, checked against hf on a sample of every work unit; hf is the tokenizer itself;
    auto is gigatoken where it is installed and agrees, hf otherwise."""
    num_workers: int | None = None
    """Processes that convert; one per core if not set. The dataset does not depend on it."""
    cluster: str | None = None
    """Address of a Dask scheduler (tcp://host:8786) whose workers convert instead; they must see the same files under the
    same paths."""

    def validate(self) -> None:
        require(len(self.source) > 0, "source", "must name at least one file, folder or glob")
        require_text(self, "out", "val_out", "tokenizer", "text_column", "split", "name", "cluster")
        require(self.name is None or self.split is not None, "split", "must be set together with name, e.g. split=train")
        require(self.split is None or not self.suffixes, "suffixes", "must not be set together with split")
        require(self.context_length > 1, "context_length", "must be 2 tokens or more")
        require(0 <= self.val_fraction < 1, "val_fraction", "must be in [0, 1)")
        require((self.val_fraction > 0) == (self.val_out is not None), "val_out",
                "must be set together with val_fraction")
        if self.val_out is not None:
            require_apart(self.out, self.val_out, "val_out")
        smallest = 8 * self.context_length + 1024
        require(smallest <= self.shard_size < 2**32, "shard_size",
                f"must be at least {smallest} (one row) and less than {2**32} bytes")
        require(self.unit_size > 0, "unit_size", "must be more than 0 bytes")
        for name in ("max_doc_length", "min_doc_length"):
            length = getattr(self, name)
            require(length is None or length > 0, name, "must be a positive number of tokens, or null")
        require_seed(self.seed, "seed")
        require(self.num_workers is None or self.num_workers > 0, "num_workers", "must be 1 or more, or null")
        if self.cluster is not None:
            require(self.num_workers is None, "num_workers", "must not be set together with cluster")
            for name in ("source", "out", "val_out") if self.split is None else ("out", "val_out"):
                value = getattr(self, name) or []
                paths = [value] if isinstance(value, str) else value
                require(all(os.path.isabs(path) or is_url(path) for path in paths), name,
                        "must be absolute where there is a cluster, whose workers have working folders of their own")


@dataclass
class InspectConfig(ScriptConfig):
    """Show what a dataset made by convert/to_mds.py holds, and check that it is whole."""

    data: str = MISSING
    """Folder of the dataset, or where it lives in an object store (s3://bucket/path, gs://...)."""
    tokenizer: str | None = None
    """Tokenizer folder or id, which must be the dataset's own; needed to show rows as text."""
    rows: int = 2
    """Number of sample rows to show, evenly spread over the dataset."""
    row_numbers: list[int] = field(default_factory=list)
    """Show these rows instead, e.g. [0,17]; the first is 0."""
    whole_rows: bool = False
    """Show sample rows whole; if not set, the middle of long documents and of long rows is left out."""
    max_bytes: int | None = 1073741824
    """Take the histograms from evenly spread shards of about so many bytes; from all shards if null, or with verify."""
    verify: bool = False
    """Hash every shard and name the bad ones; the exit status is 1 if there are any. If not set, sizes are checked, and
    of a dataset in an object store only the shards that are read."""
    plot: str | None = None
    """PNG file to draw the histogram of the lengths of document pieces to."""

    def validate(self) -> None:
        require_text(self, "data", "tokenizer", "plot")
        require(self.rows >= 0, "rows", "must be 0 or more")
        require(all(number >= 0 for number in self.row_numbers), "row_numbers", "must all be 0 or more")
        require(self.max_bytes is None or self.max_bytes > 0, "max_bytes", "must be more than 0 bytes, or null")
        require(self.plot is None or self.plot.lower().endswith(".png"), "plot", "must be a file name ending in .png")


@dataclass
class ToHfConfig(ScriptConfig):
    """Turn a training checkpoint into a Hugging Face folder with safetensors and the tokenizer."""

    checkpoint: str = MISSING
    """A checkpoint file, or a folder of checkpoints (its newest is taken), local or in an object store."""
    out: str = MISSING
    """Folder to write; must not exist or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the weights are stored in."""
    max_shard_size: int = 5000000000
    """Largest size of a weights file, bytes; a larger model is stored in several."""

    def validate(self) -> None:
        require_text(self, "checkpoint", "out")
        require(self.max_shard_size > 0, "max_shard_size", "must be more than 0 bytes")


@dataclass
class FromLlamaConfig(ScriptConfig):
    """Turn a Llama or Mistral checkpoint into a GLA model's Hugging Face folder, to go on training from."""

    model: str = MISSING
    """Hugging Face folder or id of the checkpoint; its weights must be safetensors."""
    config: str = MISSING
    """The GLA model to make: a recipe (.yaml; its model.config is taken) or a Hugging Face config (.json). What follows
    from the checkpoint can be left out."""
    out: str = MISSING
    """Folder to write; must not exist or be empty."""
    tokenizer: str | None = None
    """Tokenizer folder or id; the checkpoint's own if not set."""
    fresh: list[str] = field(default_factory=list)
    """Attention projections to make anew though the checkpoint has them, e.g. [q_proj,k_proj] for another expand_k."""
    seed: int = 42
    """Seed of the tensors that are made anew."""
    max_shard_size: int = 2000000000
    """Largest size of a weights file, bytes; so much is in memory at a time."""

    def validate(self) -> None:
        require_text(self, "model", "config", "out", "tokenizer")
        require(set(self.fresh) <= set(PROJECTIONS), "fresh", f"must be among {', '.join(PROJECTIONS)}")
        require_seed(self.seed, "seed")
        require(self.max_shard_size > 0, "max_shard_size", "must be more than 0 bytes")


@dataclass
class LanguageConfig:
    """Keep documents in certain languages, as a fastText model tells them."""

    model: str = MISSING
    """File of a fastText language model, e.g. lid.176.bin; it is never downloaded."""
    languages: list[str] = field(default_factory=lambda: ["en"])
    """Languages to keep, as the model names them."""
    threshold: float = 0.65
    """Remove a document unless the model is surer than this that it is in one of them."""

    def validate(self) -> None:
        require_text(self, "model")
        require(len(self.languages) > 0, "languages", "must name at least one language, e.g. [en]")
        require_fraction(self.threshold, "threshold")


@dataclass
class GopherRepetitionConfig:
    """Remove documents that repeat themselves, by the rules of Gopher (arXiv 2112.11446, table A1); a limit of 0 is none."""

    dup_line_frac: float = 0.3
    """Largest share of a document's lines that have come before."""
    dup_para_frac: float = 0.3
    """The same of paragraphs."""
    dup_line_char_frac: float = 0.2
    """Largest share of its characters in lines that have come before."""
    dup_para_char_frac: float = 0.2
    """The same in paragraphs."""
    top_n_grams: list[float] = field(default_factory=lambda: [0.2, 0.18, 0.16])
    """Largest share of its characters in its most frequent sequence of 2, 3 and 4 words."""
    dup_n_grams: list[float] = field(default_factory=lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.1])
    """Largest share of its characters in sequences of 5, 6, 7, 8, 9 and 10 words that have come before."""

    def validate(self) -> None:
        for name in ("dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac"):
            require_fraction(getattr(self, name), name)
        for name, count in (("top_n_grams", 3), ("dup_n_grams", 6)):
            values = getattr(self, name)
            require(len(values) == count and all(0 <= value <= 1 for value in values), name,
                    f"must be {count} numbers from 0 to 1")


@dataclass
class GopherQualityConfig:
    """Remove what is hardly prose, by the rules of Gopher (arXiv 2112.11446, appendix A); a limit of 0 is none."""

    min_doc_words: int = 50
    """Fewest words, punctuation not counted."""
    max_doc_words: int = 100000
    """Most words, punctuation not counted."""
    min_avg_word_length: int = 3
    """Smallest mean length of the words, characters."""
    max_avg_word_length: int = 10
    """Largest mean length of the words, characters."""
    max_symbol_word_ratio: float = 0.1
    """Most hash signs per word, and most ellipses."""
    max_bullet_lines_ratio: float = 0.9
    """Largest share of lines that begin with a bullet or a dash."""
    max_ellipsis_lines_ratio: float = 0.3
    """Largest share of lines that end in an ellipsis."""
    min_alpha_words_ratio: float = 0.8
    """Smallest share of words (punctuation counted) that hold a letter."""
    min_stop_words: int = 2
    """Fewest different words of `stop_words`."""
    stop_words: list[str] = field(default_factory=lambda: ["the", "be", "to", "of", "and", "that", "have", "with"])
    """Words that prose is not without; give those of the language if it is not English."""

    def validate(self) -> None:
        for name in ("min_doc_words", "max_doc_words", "min_avg_word_length", "max_avg_word_length", "min_stop_words"):
            require(getattr(self, name) >= 0, name, "must be 0 or more")
        for name in ("max_symbol_word_ratio", "max_bullet_lines_ratio", "max_ellipsis_lines_ratio", "min_alpha_words_ratio"):
            require_fraction(getattr(self, name), name)
        require(self.min_stop_words <= len(set(self.stop_words)), "stop_words", "must be at least min_stop_words words")


@dataclass
class C4Config:
    """Remove lines and documents by the rules of C4 (arXiv 1910.10683, section 2.2); what is left of a text is kept."""

    remove_citations: bool = True
    """Take marks like [12], [edit] and [citation needed] out of lines."""
    filter_no_terminal_punct: bool = False
    """Remove lines that do not end in . ? ! or a quotation mark, as C4 did; FineWeb found it better not to."""
    min_num_sentences: int = 5
    """Remove documents of fewer sentences; 0 is no such limit."""
    min_words_per_line: int = 3
    """Remove lines of fewer words; 0 is no such limit."""
    max_word_length: int = 1000
    """Remove lines with a word of more characters; 0 is no such limit."""
    filter_lorem_ipsum: bool = True
    """Remove documents with "lorem ipsum"."""
    filter_javascript: bool = True
    """Remove lines that mention JavaScript."""
    filter_curly_bracket: bool = True
    """Remove documents with a curly bracket, which is most code."""
    filter_policy: bool = True
    """Remove lines on cookies, terms of use and privacy policies."""

    def validate(self) -> None:
        for name in ("min_num_sentences", "min_words_per_line", "max_word_length"):
            require(getattr(self, name) >= 0, name, "must be 0 or more")


@dataclass
class MinhashConfig:
    """Remove near-duplicates: two documents that share the part s of their word sequences are found with probability
    1 - (1 - s^hashes_per_bucket)^num_buckets, which is 92 % for s = 0.8 and 5 % for s = 0.5 with the defaults."""

    n_grams: int = 5
    """Words per sequence that is compared; documents of fewer words have no near-duplicates."""
    num_buckets: int = 14
    """Chances that two documents have to be found equal."""
    hashes_per_bucket: int = 8
    """Hashes that must agree in one of them."""
    seed: int = 1
    """Chooses the hash functions."""

    def validate(self) -> None:
        for name in ("n_grams", "num_buckets", "hashes_per_bucket"):
            require(getattr(self, name) >= 1, name, "must be 1 or more")
        require_seed(self.seed, "seed")


@dataclass
class PiiConfig:
    """Mask what tells of persons."""

    emails: str | None = "email@example.com"
    """Put in the place of every e-mail address; null leaves them."""
    ips: str | None = "22.214.171.124"
    """Put in the place of every IPv4 address; null leaves them. The default answers nobody, as far as is known."""
    public_ips_only: bool = True
    """Leave addresses that are private, reserved or local, like 192.168.0.1."""

    def validate(self) -> None:
        require(self.emails is not None or self.ips is not None, "emails",
                "must be set if ips is not; pii=null masks nothing")


@dataclass
class SlurmConfig:
    """How jobs are submitted with executor=slurm."""

    partition: str = MISSING
    """Partition to submit to."""
    time: str = MISSING
    """Time limit of a task, e.g. 10:00:00."""
    mem_per_cpu_gb: int = 4
    """Memory of a task, GB."""
    qos: str = "normal"
    """Quality of service."""
    activate: str | None = None
    """Script that a job sources first to have this environment; that of the environment this runs in, if not set."""
    max_array_size: int = 1001
    """Most tasks that the cluster takes in one array job."""

    def validate(self) -> None:
        require_text(self, "partition", "time", "qos", "activate")
        for name in ("mem_per_cpu_gb", "max_array_size"):
            require(getattr(self, name) >= 1, name, "must be 1 or more")


@dataclass
class RayConfig:
    """How tasks are run with executor=ray."""

    address: str = "auto"
    """Address of the Ray cluster; auto is the one that this machine belongs to."""
    mem_per_cpu_gb: float = 4.0
    """Memory to reserve for a task, GB."""

    def validate(self) -> None:
        require_text(self, "address")
        require(self.mem_per_cpu_gb > 0, "mem_per_cpu_gb", "must be more than 0")


@dataclass
class CleanConfig(ScriptConfig):
    """Clean text to train on. The defaults follow FineWeb's recipe for prose from the web; section=null leaves a step out."""

    source: list[str] = MISSING
    """Files, folders or globs of JSONL or plain text, also as .gz .zst .bz2 .xz, or of Parquet; with `split`, Hugging Face
    datasets by id or folder."""
    split: str | None = None
    """Split of the Hugging Face dataset to read, e.g. train."""
    name: str | None = None
    """Configuration of the Hugging Face dataset, e.g. sample-10BT; its default if not set."""
    out: str = MISSING
    """Folder the documents that stay are written to, as JSONL for convert/to_mds.py."""
    removed_out: str | None = None
    """Folder the documents that are removed are written to, a folder a step."""
    text_column: str = "text"
    """Field of JSONL and Parquet records that holds the text."""
    suffixes: list[str] = field(default_factory=list)
    """Take only files with these endings when a folder is searched, as in convert/to_mds.py."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do with a document that cannot be read: stop, or leave it out and count it."""
    language: LanguageConfig | None = None
    """Keep some languages only; off unless a model file is given."""
    gopher_repetition: GopherRepetitionConfig | None = field(default_factory=GopherRepetitionConfig)
    """Remove documents that repeat themselves."""
    gopher_quality: GopherQualityConfig | None = field(default_factory=GopherQualityConfig)
    """Remove what is hardly prose."""
    c4: C4Config | None = field(default_factory=C4Config)
    """Remove boilerplate lines, code and very short documents."""
    exact_dedup: bool = True
    """Of documents with equal texts, keep the first."""
    minhash: MinhashConfig | None = field(default_factory=MinhashConfig)
    """Of documents that are nearly equal, keep the first."""
    pii: PiiConfig | None = field(default_factory=PiiConfig)
    """Mask e-mail and IP addresses."""
    compression: Literal["zst", "gz", "none"] = "zst"
    """How the output files are compressed."""
    unit_size: int = 67108864
    """Input bytes per task; each writes one output file, and is the step in which a cleaning is resumed."""
    num_workers: int | None = None
    """Tasks at a time; one per core if not set, and with a cluster as many as it has room for. The output does not depend
    on it."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """What runs the tasks: processes of this machine, or a cluster whose machines see the same files under the same paths."""
    slurm: SlurmConfig | None = None
    """Needed with executor=slurm."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Used with executor=ray."""

    def validate(self) -> None:
        require(len(self.source) > 0, "source", "must name at least one file, folder or glob")
        require_text(self, "out", "removed_out", "text_column", "split", "name")
        require(self.name is None or self.split is not None, "split", "must be set together with name, e.g. split=train")
        require(self.split is None or not self.suffixes, "suffixes", "must not be set together with split")
        if self.removed_out is not None:
            require_apart(self.out, self.removed_out, "removed_out")
        steps = (self.language, self.gopher_repetition, self.gopher_quality, self.c4, self.minhash, self.pii)
        require(self.exact_dedup or any(step is not None for step in steps), "exact_dedup",
                "must be true where every other step is null, or there is nothing to do")
        require(self.unit_size > 0, "unit_size", "must be more than 0 bytes")
        require(self.num_workers is None or self.num_workers > 0, "num_workers", "must be 1 or more, or null")
        require((self.executor == "slurm") == (self.slurm is not None), "slurm",
                "must be set with executor=slurm, and with no other: slurm.partition=... slurm.time=...")
        if self.executor != "local":
            for name in ("source", "out", "removed_out") if self.split is None else ("out", "removed_out"):
                value = getattr(self, name) or []
                paths = [value] if isinstance(value, str) else value
                require(all(os.path.isabs(path) for path in paths), name,
                        "must be absolute where there is a cluster, whose workers have working folders of their own")
