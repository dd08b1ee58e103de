"""How fast things are here, each against another in one run.

    python recipes/benchmark.py NAME [key=value ...]    # where NAME is one of

    train       GLA against a Llama of the same size, forward and backward
    growth      the same with more rows, and with fewer and more layers
    decode      the same two, token by token
    trainer     recipes/train.py against a bare loop over the same batches
    data        shards to batches against StreamingDataset; the first batch of a resumed epoch
    start       the first training step against importing the libraries
    checkpoint  saving and reading against torch.save and torch.load
    convert     convert/to_mds.py against encode_batch_fast and MDSWriter
    all         all of them, as `make bench`

One JSON line last: medians, the medians of the ratios of each turn, and `figures`, what is stated
of them.
"""

import json
import sys
from pathlib import Path

from flame_composer.bench import charts as benchmark_charts
from flame_composer.bench import commands as benchmark
from flame_composer.bench import measure as measuring
from flame_composer.bench.conversions import compare_conversions
from flame_composer.bench.measure import Figure
from flame_composer.config.bench import (
    BENCHMARKS,
    AllBenchmarksConfig,
    BenchmarkConfig,
    CheckpointBenchmarkConfig,
    ConversionBenchmarkConfig,
    DataBenchmarkConfig,
    DecodeBenchmarkConfig,
    StartBenchmarkConfig,
    TrainerBenchmarkConfig,
)
from flame_composer.config.cli import run_one_of
from flame_composer.train import charts

ROOT = Path(__file__).parent.parent


def report(name: str, result: dict, figures: list[Figure]) -> None:
    for figure in figures:
        print(figure.line(), flush=True)
    print(
        json.dumps(
            {
                "benchmark": name,
                **measuring.machine(),
                **result,
                "figures": [vars(figure) for figure in figures],
            }
        )
    )


def train(config: BenchmarkConfig) -> None:
    from flame_composer.bench import models as timing

    report("train", *timing.training(config))


def growth(config: BenchmarkConfig) -> None:
    from flame_composer.bench import models as timing

    report("growth", *timing.growth(config))


def decode(config: DecodeBenchmarkConfig) -> None:
    from flame_composer.bench import models as timing

    report("decode", *timing.decoding(config))


def checkpoint(config: CheckpointBenchmarkConfig) -> None:
    from flame_composer.bench import runs as run_timing

    with measuring.workplace(config.folder) as folder:
        report("checkpoint", *run_timing.checkpoints(config, folder))


def trainer(config: TrainerBenchmarkConfig) -> None:
    with measuring.workplace(config.folder) as folder:
        report("trainer", *benchmark.compare_trainers(ROOT, config, folder))


def data(config: DataBenchmarkConfig) -> None:
    with measuring.workplace(config.folder) as folder:
        report("data", *benchmark.compare_readers(ROOT, config, folder))


def start(config: StartBenchmarkConfig) -> None:
    with measuring.workplace(config.folder) as folder:
        report("start", *benchmark.compare_starts(ROOT, config, folder))


def convert(config: ConversionBenchmarkConfig) -> None:
    with measuring.workplace(config.folder) as folder:
        report("convert", *compare_conversions(ROOT, config, folder))


def run_all(config: AllBenchmarksConfig) -> None:
    if config.plot:
        charts.require_plot(config.plot)
    results = benchmark.run_each(Path(__file__), config.names or BENCHMARKS)
    figures = [Figure(**each) for result in results.values() for each in result["figures"]]
    print(
        "",
        *(figure.line() for figure in figures),
        json.dumps({"benchmark": "all", "results": results}),
        sep="\n",
    )
    if config.plot:
        benchmark_charts.write(results, config.plot)
    if missed := [figure.name for figure in figures if figure.is_missed()]:
        sys.exit(f"missed by more than a tenth: {', '.join(missed)}")


if __name__ == "__main__":
    sys.exit(
        run_one_of(
            {
                "train": (train, BenchmarkConfig),
                "growth": (growth, BenchmarkConfig),
                "decode": (decode, DecodeBenchmarkConfig),
                "trainer": (trainer, TrainerBenchmarkConfig),
                "data": (data, DataBenchmarkConfig),
                "start": (start, StartBenchmarkConfig),
                "checkpoint": (checkpoint, CheckpointBenchmarkConfig),
                "convert": (convert, ConversionBenchmarkConfig),
                "all": (run_all, AllBenchmarksConfig),
            }
        )
    )
