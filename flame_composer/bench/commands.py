"""Benchmarks that run whole processes: training, reading data, and starting."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flame_composer.bench import charts
from flame_composer.bench.conversions import write_corpus
from flame_composer.bench.measure import Figure, interleaved, measure, median, ratio
from flame_composer.config.bench import (
    BENCHMARKS,
    AllBenchmarksConfig,
    DataBenchmarkConfig,
    StartBenchmarkConfig,
    TrainerBenchmarkConfig,
)
from flame_composer.errors import DataError
from flame_composer.train.charts import require_plot


def quickstart_data(root: Path, config: StartBenchmarkConfig, folder: Path) -> list[str]:
    """Make a tokenizer and a dataset from Python files; return the arguments to train on it.

    The arguments are for recipes/train.py; the first is yamls/gla_tiny.yaml.
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
    """Time recipes/train.py against a bare loop over the same batches.

    The loop does nothing but forward, backward and optimizer steps.
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


SMALL_EPOCH = 10_000_000  # rows


def compare_readers(
    root: Path, config: DataBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """Time reading batches against StreamingDataset reading rows, and the start in mid-epoch.

    For the latter, the time to a first batch near the end of a large epoch is compared with that at
    the beginning of a small one.
    """
    quickstart_data(root, config, folder)
    dataset = str(folder / "train")

    def call(function: str, *arguments: float) -> Callable[[], list[float]]:
        first = f"import sys; from flame_composer.bench.runs import {function}; "
        code = first + f"print({function}(sys.argv[1], *map(float, sys.argv[2:])))"
        command = [sys.executable, "-c", code, dataset, *map(str, arguments)]
        return lambda: json.loads(measure(command).output.splitlines()[-1])

    small = min(config.epoch_rows, SMALL_EPOCH)
    found = interleaved(
        {
            "read": call("read_all"),
            "plain": call("read_all_plainly"),
            "start": call("first_batch", small, 0),
            "end": call("first_batch", config.epoch_rows, 0.99),
        },
        config.repeats,
        "data",
        warm=0,
    )
    names = ("ours", "one_worker", "two_workers")
    rows = dict(zip(names, zip(*found["read"], strict=True), strict=True))
    rows["plain"] = tuple(rate for (rate,) in found["plain"])
    begun = {name: [seconds for seconds, _ in found[name]] for name in ("start", "end")}
    memory = median([megabytes for _, megabytes in found["end"]])
    result: dict[str, Any] = {"memory_to_the_first_batch_mb": round(memory)} | {
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
            at_least=1.7,
        ),
        Figure(
            f"data: first batch at 99 % of {config.epoch_rows:,} rows over row 0 of {small:,}",
            ratio(begun["end"], begun["start"]),
            at_most=2,
        ),
        Figure("data: MB of memory to that batch, above imports", memory, at_most=150),
    ]


def compare_starts(
    root: Path, config: StartBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """Time the first step of recipes/train.py against the imports that it needs.

    Also time its answers to --help and to a mistake, for which it imports none of those.
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


def run_each(script: Path, names: Sequence[str]) -> dict[str, Any]:
    """Run the named benchmarks of a script one after another, passing on their output.

    Return the JSON of each benchmark's last line, by name. Raise DataError if one fails.
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


def run_all(script: Path, config: AllBenchmarksConfig) -> None:
    """Run the benchmarks of a script, print all figures, and exit with 1 if any is far missed."""
    if config.plot:
        require_plot(config.plot)
    results = run_each(script, config.names or BENCHMARKS)
    figures = [Figure(**each) for result in results.values() for each in result["figures"]]
    print("", *(figure.line() for figure in figures), sep="\n")
    print(json.dumps({"benchmark": "all", "results": results}))
    if config.plot:
        charts.write(results, config.plot)
    if missed := [figure.name for figure in figures if figure.is_missed()]:
        sys.exit(f"missed by more than a tenth: {', '.join(missed)}")
