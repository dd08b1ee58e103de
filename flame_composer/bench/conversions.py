"""The benchmark of convert/to_mds.py against a plain script, taking turns on the same text."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flame_composer.bench.measure import Figure, Usage, measure
from flame_composer.config.bench import ConversionBenchmarkConfig
from flame_composer.dataset.manifest import read_manifest
from flame_composer.errors import ConfigError, DataError
from flame_composer.text.documents import sample_texts
from flame_composer.text.sources import find_files

ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

BASELINE = (
    "import sys; from flame_composer.bench.conversions import convert_plainly; "
    "print(convert_plainly(*sys.argv[1:4], int(sys.argv[4])))"
)

BATCH = 1000  # documents that the baseline encodes in one call


def mistral_tokenizer(folder: Path) -> Path:
    """Write Mistral-7B's tokenizer into the new folder `folder`, and return the folder.

    It is made from the SentencePiece model that mistral-common carries. Raise ConfigError if that
    package, or gigatoken, is not installed.

    Upstream: gigatoken 0.10.0, `gigatoken._load.sentencepiece`.
    Mends: neither package has a public function that makes a tokenizer.json from the model.
    """
    missing = [
        name for name in ("mistral_common", "gigatoken") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(
            f"tokenizer: {' and '.join(missing)} is not installed; pip install"
            " 'flame-composer[dev]' or name one"
        )
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None  # noqa: PT018
    model = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
    folder.mkdir()
    state = json.loads(sentencepiece_to_tokenizer_json(model.read_bytes()))
    (folder / "tokenizer.json").write_text(json.dumps(state))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def write_corpus(
    source: Sequence[str], suffixes: Sequence[str], max_bytes: int, folder: Path
) -> tuple[Path, Path]:
    """Write distinct documents from all over `source` to two files; return the files.

    The files are JSONL: one of about `max_bytes`, and one with the first tenth of that. Without a
    source, the Python files of the standard library and of the installed packages are used, real
    text that every machine with this environment has. Raise ConfigError if the source has no text.
    """
    if not source:
        source, suffixes = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")], (".py",)
    whole, tenth = folder / "whole.jsonl", folder / "tenth.jsonl"
    seen: set[str] = set()
    with whole.open("w") as file:
        for text in sample_texts(find_files(source, suffixes), "text", sys.maxsize, lambda _: None):
            if text and text not in seen:
                seen.add(text)
                file.write(json.dumps({"text": text}) + "\n")
                if file.tell() >= max_bytes:
                    break
    if not seen:
        raise ConfigError(f"source: {', '.join(source)}: holds no text")
    with whole.open() as file, tenth.open("w") as part:
        while part.tell() < whole.stat().st_size / 10:
            part.write(file.readline())
    return whole, tenth


def convert_plainly(source: str, tokenizer_path: str, out: str, context_length: int) -> int:
    """Convert a corpus as most people would, and return the number of its tokens.

    It uses `encode_batch_fast`, puts an eos after each document, cuts the tokens into rows and
    writes them with MDSWriter. Like a careful author's script, it decodes JSON and hashes
    shards, but it records no document lengths, makes no splits and cannot resume.
    """
    from streaming import MDSWriter

    from flame_composer.text.tokenizer import token_dtype, vocab_size_of
    from flame_composer.upstream.tokenizers import read_fast

    tokenizer = read_fast(tokenizer_path)
    dtype = token_dtype(vocab_size_of(tokenizer))
    columns = {"input_ids": f"ndarray:{np.dtype(dtype).name}:{context_length}"}
    num_tokens, tail = 0, np.zeros(0, dtype)
    with (
        Path(source).open() as file,
        MDSWriter(columns=columns, out=out, hashes=["xxh64"]) as writer,
    ):
        while texts := [json.loads(line)["text"] for line in itertools.islice(file, BATCH)]:
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(
                texts, add_special_tokens=False
            )
            parts = [tail]
            for encoding in encodings:
                parts += np.array(encoding.ids, dtype), np.array([tokenizer.eos_token_id], dtype)
            tokens = np.concatenate(parts)
            num_tokens += len(tokens) - len(tail)
            end = len(tokens) // context_length * context_length
            for row in tokens[:end].reshape(-1, context_length):
                writer.write({"input_ids": row})
            tail = tokens[end:]
    return num_tokens


@dataclass(frozen=True)
class Run:
    """One conversion of a corpus."""

    tokens: int
    usage: Usage


def compare_conversions(
    root: Path, config: ConversionBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """Time convert/to_mds.py in `root` against `convert_plainly`, on a corpus put in `folder`."""
    tokenizer = config.tokenizer or str(mistral_tokenizer(folder / "tokenizer"))
    whole, tenth = write_corpus(
        config.source, config.suffixes, round(config.megabytes * 1e6), folder
    )
    result: dict[str, Any] = {
        "corpus_bytes": whole.stat().st_size,
        "num_workers": config.num_workers,
        "repeats": config.repeats,
    }
    with tqdm(unit=" conversions", disable=None) as bar:
        result |= convert_in_turns(
            root / "convert" / "to_mds.py", tokenizer, whole, tenth, config, bar.update
        )
    for name in ("baseline", "one_worker", "workers"):
        print(f"{name:10}", ", ".join(f"{key} {value}" for key, value in result[name].items()))
    return result, [
        Figure(
            "conversion: tokens per CPU-second of one worker",
            result["one_worker"]["tokens_per_cpu_second"],
            at_least=3e6,
        ),
        Figure(
            "conversion: the same over encode_batch_fast and MDSWriter",
            result["one_worker_over_baseline"],
            at_least=6,
        ),
        Figure(
            f"conversion: {config.num_workers} workers over one, after start",
            result["workers_over_one_after_start"],
            at_least=1.8 if config.num_workers == 2 else None,
        ),
        Figure(
            "conversion: peak memory of a worker, MB", result["one_worker"]["peak_mb"], at_most=600
        ),
    ]


def convert_in_turns(
    script: Path,
    tokenizer: str,
    whole: Path,
    tenth: Path,
    config: ConversionBenchmarkConfig,
    on_progress: Callable[[], Any],
) -> dict[str, Any]:
    """Convert `tenth` and `whole` in three ways, taking turns, and return what they took.

    The ways are `script`, which is convert/to_mds.py, with one worker and with
    `config.num_workers`, and `convert_plainly`. There are `config.repeats` turns; if there are
    several, each way first converts `tenth` once, which does not count. `on_progress` is called
    after each conversion. Raise DataError if the numbers of tokens differ.
    """
    # The script comes first, since it explains what is wrong with a tokenizer.
    converters = {"one_worker": 1, "workers": config.num_workers, "baseline": 1}
    encoders: set[str] = set()

    def convert(name: str, corpus: Path) -> Run:
        with tempfile.TemporaryDirectory(dir=whole.parent) as folder:
            if name == "baseline":
                arguments = [str(corpus), tokenizer, f"{folder}/out", str(config.context_length)]
                usage = measure([sys.executable, "-c", BASELINE, *arguments], ONE_THREAD)
                tokens = int(usage.output)
            else:
                keys = [
                    f"tokenizer={tokenizer}",
                    f"context_length={config.context_length}",
                    f"unit_size={config.unit_size}",
                    f"source={corpus}",
                    f"out={folder}/out",
                    f"num_workers={converters[name]}",
                ]
                usage = measure([sys.executable, str(script), *keys])
                manifest = read_manifest(f"{folder}/out")
                tokens = manifest.totals.tokens_in
                encoders.add(manifest.config["encoder"])
        on_progress()
        return Run(tokens, usage)

    for name in converters if config.repeats > 1 else ():
        convert(name, tenth)
    turns = [
        {name: (convert(name, tenth), convert(name, whole)) for name in converters}
        for _ in range(config.repeats)
    ]
    counts = {tuple(run.tokens for run in runs) for turn in turns for runs in turn.values()}
    if len(counts) != 1:
        raise DataError(f"the conversions do not agree on the number of tokens: {sorted(counts)}")
    ((_, num_tokens),) = counts
    return {"tokens": num_tokens, "encoder": ", ".join(encoders), **summary(turns)}


def summary(turns: Sequence[dict[str, tuple[Run, Run]]]) -> dict[str, Any]:
    """Return each converter's median speeds and largest memory over all turns, and ratios of them.

    A turn holds, for each converter, its runs on a tenth of the corpus and on the whole.
    """
    speeds = [{name: _speeds(*runs) for name, runs in turn.items()} for turn in turns]
    result: dict[str, Any] = {}
    for name, first in speeds[0].items():
        result[name] = {key: _median([turn[name][key] for turn in speeds]) for key in first}
        for key, which in (("peak_mb_of_a_tenth", 0), ("peak_mb", 1)):
            result[name][key] = max(turn[name][which].usage.peak_bytes for turn in turns) >> 20
    for key, above, below, speed in (
        ("one_worker_over_baseline", "one_worker", "baseline", "tokens_per_cpu_second"),
        ("workers_over_one", "workers", "one_worker", "tokens_per_second"),
    ):
        for suffix in ("", "_after_start"):
            result[key + suffix] = _median(
                [turn[above][speed + suffix] / turn[below][speed + suffix] for turn in speeds], 2
            )
    return result


def _speeds(tenth: Run, whole: Run) -> dict[str, float]:
    """Return the speeds with and without the time that the processes take to start.

    Those without it ("after_start") count only what the whole corpus took beyond the tenth, whose
    conversion starts in the same way.
    """

    def speed(tokens: int, seconds: float) -> float:
        # A small corpus may take no time that can be measured.
        return tokens / seconds if seconds > 0 else math.nan

    tokens, usage, start = whole.tokens, whole.usage, tenth.usage
    return {
        "tokens_per_cpu_second": speed(tokens, usage.cpu_seconds),
        "tokens_per_cpu_second_after_start": speed(
            tokens - tenth.tokens, usage.cpu_seconds - start.cpu_seconds
        ),
        "tokens_per_second": speed(tokens, usage.seconds),
        "tokens_per_second_after_start": speed(
            tokens - tenth.tokens, usage.seconds - start.seconds
        ),
    }


def _median(values: Sequence[float], digits: int | None = None) -> float | None:
    return None if any(map(math.isnan, values)) else round(statistics.median(values), digits)
