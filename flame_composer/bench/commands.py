"""What recipes/benchmark.py compares as whole processes: conversion with what most people write,
and all around training.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flame_composer.bench.measure import Figure, Usage, interleaved, measure, median, ratio
from flame_composer.config.use import (
    ConversionBenchmarkConfig,
    DataBenchmarkConfig,
    StartBenchmarkConfig,
    TrainerBenchmarkConfig,
)
from flame_composer.dataset.manifest import read_manifest
from flame_composer.errors import ConfigError, DataError
from flame_composer.text.documents import sample_texts
from flame_composer.text.sources import find_files

ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
BASELINE = (
    "import sys; from flame_composer.bench.commands import convert_plainly; "
    "print(convert_plainly(*sys.argv[1:4], int(sys.argv[4])))"
)
BATCH = 1000  # documents that the baseline encodes in one call


# What is converted


def mistral_tokenizer(folder: Path) -> Path:
    """Put Mistral-7B's tokenizer, from the SentencePiece model that mistral-common carries, into
    `folder`.
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
    """Distinct documents drawn from all over `source` as JSONL of about `max_bytes`, and the first
    tenth of them.

    Without a source, the Python files of the standard library and of the installed packages: real
    text that every machine with this environment has.
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
    """What most people write: `encode_batch_fast`, an eos after each document, rows cut from the
    stream, MDSWriter.

    Returns the number of tokens. No work is left out that a careful author would leave in, and none
    put in: the JSON is decoded, shards are hashed; documents' lengths, splits and resumption are
    not there.
    """
    from streaming import MDSWriter
    from transformers import AutoTokenizer

    from flame_composer.text.tokenizer import token_dtype, vocab_size_of

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
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


# The comparison


@dataclass(frozen=True)
class Run:
    """One conversion of a corpus."""

    tokens: int
    usage: Usage


def compare_conversions(
    root: Path, config: ConversionBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """The scripts of `root` against what most people write, on a corpus put in `folder`."""
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
            root / "convert" / "to_mds.py",
            tokenizer,
            whole,
            tenth,
            config.context_length,
            config.unit_size,
            config.num_workers,
            config.repeats,
            bar.update,
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
    context_length: int,
    unit_size: int,
    num_workers: int,
    repeats: int,
    on_progress: Callable[[], Any],
) -> dict[str, Any]:
    """Convert `tenth` and `whole` with `convert_plainly` and with `script`, convert/to_mds.py, on
    one process and on `num_workers`, taking turns, `repeats` times; if more than once, after a
    first one on `tenth` that does not count.

    `on_progress` is called after each conversion. Raises DataError if their tokens differ.
    """
    settings = [
        f"tokenizer={tokenizer}",
        f"context_length={context_length}",
        f"unit_size={unit_size}",
    ]
    # The script first: it says what is wrong with a tokenizer.
    converters = {"one_worker": 1, "workers": num_workers, "baseline": 1}
    encoders: set[str] = set()

    def convert(name: str, corpus: Path) -> Run:
        with tempfile.TemporaryDirectory(dir=whole.parent) as folder:
            if name == "baseline":
                arguments = [str(corpus), tokenizer, f"{folder}/out", str(context_length)]
                usage = measure([sys.executable, "-c", BASELINE, *arguments], ONE_THREAD)
                tokens = int(usage.output)
            else:
                command = [
                    sys.executable,
                    str(script),
                    *settings,
                    f"source={corpus}",
                    f"out={folder}/out",
                ]
                usage = measure([*command, f"num_workers={converters[name]}"])
                manifest = read_manifest(f"{folder}/out")
                tokens = manifest.totals.tokens_in
                encoders.add(manifest.config["encoder"])
        on_progress()
        return Run(tokens, usage)

    for name in converters if repeats > 1 else ():
        convert(name, tenth)
    turns = [
        {name: (convert(name, tenth), convert(name, whole)) for name in converters}
        for _ in range(repeats)
    ]
    counts = {tuple(run.tokens for run in runs) for turn in turns for runs in turn.values()}
    if len(counts) != 1:
        raise DataError(f"the conversions do not agree on the number of tokens: {sorted(counts)}")
    ((_, num_tokens),) = counts
    return {"tokens": num_tokens, "encoder": ", ".join(encoders), **summary(turns)}


def summary(turns: Sequence[dict[str, tuple[Run, Run]]]) -> dict[str, Any]:
    """Medians over the turns, in each of which every converter made a tenth of the corpus and
    the whole; the most memory.
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
    """With the start of the processes, and without: what the whole took beyond the tenth, which
    starts the same way.
    """

    def speed(tokens: int, seconds: float) -> float:
        # A corpus that takes no time to measure
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


# Runs


def quickstart_data(root: Path, config: StartBenchmarkConfig, folder: Path) -> list[str]:
    """A tokenizer and a dataset made from Python files, and the arguments that train
    yamls/gla_tiny.yaml on it.
    """
    whole, _ = write_corpus((), (), round(config.megabytes * 1e6), folder)
    tokenizer, dataset = folder / "tokenizer", folder / "train"
    for command in (
        ["train_tokenizer.py", f"source={whole}", f"out={tokenizer}", "vocab_size=4096"],
        [
            "to_mds.py",
            f"source={whole}",
            f"out={dataset}",
            f"tokenizer={tokenizer}",
            "context_length=512",
            "num_workers=2",
        ],
    ):
        measure([sys.executable, str(root / "convert" / command[0]), *command[1:]])
    return [
        str(root / "yamls/gla_tiny.yaml"),
        f"tokenizer={tokenizer}",
        f"train_data.local={dataset}",
        "train_data.num_workers=1",
        "eval_data=null",
        "save_folder=null",
        "autoresume=false",
        "progress_bar=false",
        "run_name=timed",
        f"log_folder={folder}/run",
        "scheduler.warmup=0ba",
    ]


def compare_trainers(
    root: Path, config: TrainerBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """recipes/train.py against a loop of forward, backward and optimizer step over the same
    batches.
    """
    arguments = [*quickstart_data(root, config, folder), f"max_duration={config.steps}ba"]
    log = folder / "run/train_log.jsonl"

    def recipe() -> float:
        log.unlink(missing_ok=True)
        measure([sys.executable, str(root / "recipes/train.py"), *arguments])
        speeds = [json.loads(line)["throughput"] for line in log.read_text().splitlines()]
        return median(speeds[2:])

    def bare() -> float:
        code = (
            "import sys; from flame_composer.bench.runs import bare_loop; bare_loop(*sys.argv[1:])"
        )
        return float(measure([sys.executable, "-c", code, *arguments]).output.splitlines()[-1])

    found = interleaved({"recipe": recipe, "bare": bare}, config.repeats, "trainer", warm=0)
    result = {f"{name}_tokens_per_second": round(median(values)) for name, values in found.items()}
    name = "trainer: tokens/s of recipes/train.py over a bare loop"
    return result, [Figure(name, ratio(found["recipe"], found["bare"]), at_least=0.95)]


def compare_readers(
    root: Path, config: DataBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """The data path: rows to batches against StreamingDataset's rows, and where an epoch is
    begun in its middle.
    """
    quickstart_data(root, config, folder)
    dataset = str(folder / "train")

    def call(function: str, *arguments: float) -> Callable[[], float]:
        first = f"import sys; from flame_composer.bench.runs import {function}; "
        code = first + f"print({function}(sys.argv[1], *map(float, sys.argv[2:])))"
        return lambda: float(
            measure(
                [sys.executable, "-c", code, dataset, *map(str, arguments)]
            ).output.splitlines()[-1]
        )

    rows = interleaved(
        {
            "ours": call("read_all", 0),
            "plain": call("read_all_plainly"),
            "one_worker": call("read_all", 1),
            "two_workers": call("read_all", 2),
        },
        config.repeats,
        "rows",
        warm=0,
    )
    begun = interleaved(
        {
            "start": call("first_batch", config.epoch_rows, 0),
            "end": call("first_batch", config.epoch_rows, 0.99),
        },
        config.repeats,
        "first batch",
        warm=0,
    )
    result: dict[str, Any] = {
        f"{name}_rows_per_second": round(median(values)) for name, values in rows.items()
    }
    result |= {
        f"first_batch_at_the_{name}_seconds": round(median(values), 2)
        for name, values in begun.items()
    }
    return result, [
        Figure(
            "data: rows/s to collated batches over StreamingDataset's rows",
            ratio(rows["ours"], rows["plain"]),
            at_least=1,
        ),
        Figure(
            f"data: first batch at 99 % of {config.epoch_rows:,} rows over at 0 %",
            ratio(begun["end"], begun["start"]),
            at_most=1.2,
        ),
    ]


def compare_starts(
    root: Path, config: StartBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """The first step of recipes/train.py against the imports it cannot do without; and what
    answers without them.
    """
    arguments = [*quickstart_data(root, config, folder), "max_duration=1ba"]
    script, log = str(root / "recipes/train.py"), folder / "run/train_log.jsonl"

    def first_step() -> float:
        log.unlink(missing_ok=True)
        start = time.time()
        measure([sys.executable, script, *arguments])
        return log.stat().st_mtime - start

    def imports() -> float:
        code = "import torch, composer, streaming; from flame_composer import cpu; cpu.enable()"
        return measure([sys.executable, "-c", code]).seconds

    def answer(*keys: str, status: int) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            process = subprocess.run(
                [sys.executable, script, *keys], capture_output=True, check=False
            )
            if process.returncode != status:
                raise DataError(
                    f"recipes/train.py {' '.join(keys)}: ended with status {process.returncode},"
                    f" not {status}"
                )
            return time.perf_counter() - start

        return run

    found = interleaved(
        {
            "first_step": first_step,
            "imports": imports,
            "help": answer("--help", status=0),
            "mistake": answer(arguments[0], "optimizer.weight_dcay=1", status=2),
        },
        config.repeats,
        "start",
        warm=0,
    )
    result = {f"{name}_seconds": round(median(values), 2) for name, values in found.items()}
    return result, [
        Figure(
            "start: first training step over importing torch, composer, streaming, fla",
            ratio(found["first_step"], found["imports"]),
            at_most=1.3,
        ),
        Figure("start: --help, seconds", median(found["help"]), at_most=1),
        Figure(
            "start: a mistake in the configuration, seconds", median(found["mistake"]), at_most=1
        ),
    ]


# All of them


def run_each(script: Path, names: Sequence[str]) -> dict[str, Any]:
    """Run the benchmarks of a script in turn, and show what they print. Returns what each says
    in its last line.
    """
    results = {}
    for name in names:
        print(f"\n== {name}", flush=True)
        process = subprocess.run(
            [sys.executable, str(script), name], stdout=subprocess.PIPE, text=True, check=False
        )
        print(process.stdout, end="", flush=True)
        if process.returncode != 0:
            raise DataError(f"{name}: ended with status {process.returncode}")
        results[name] = json.loads(process.stdout.splitlines()[-1])
    return results
