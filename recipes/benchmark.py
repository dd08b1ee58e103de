"""Benchmarks of this library, each measured against an alternative in the same run.

    python recipes/benchmark.py NAME [key=value ...]    # NAME is one of these:

    train       a GLA model against a Llama of the same size, forward and backward
    growth      the same with more rows, and with fewer and with more layers
    decode      the same two models, generating token by token
    quantize    the first of them with weights of int8 and bf16 against fp32
    trainer     recipes/train.py against a bare loop over the same batches
    data        loading batches against StreamingDataset; the first batch of a resumed epoch
    start       the time to the first training step against the time of the imports
    checkpoint  saving and loading against torch.save and torch.load
    convert     convert/to_mds.py against encode_batch_fast and MDSWriter
    examples    convert/to_sft.py against apply_chat_template and Dataset.map
    all         all of these, as `make bench` runs them
    gpu         what is to be known of a machine with a GPU, as `make gpu` runs it

The last line is JSON: medians, medians of the turns' ratios, and `figures` with their limits.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flame_composer.bench import charts as benchmark_charts
from flame_composer.bench import commands, gpu, measure
from flame_composer.bench.conversions import compare_conversions
from flame_composer.bench.examples import compare_examples
from flame_composer.bench.measure import Figure
from flame_composer.config import bench as configs
from flame_composer.config.cli import run_one_of
from flame_composer.train import charts


def timed(name: str, config: Any) -> None:
    from flame_composer.bench.models import decoding, growth, training
    from flame_composer.bench.quantized import quantizing

    parts: Any = {"train": training, "growth": growth, "decode": decoding, "quantize": quantizing}
    measure.report(name, *parts[name](config))


train, growth, decode = (partial(timed, name) for name in ("train", "growth", "decode"))


def checkpoint(config: configs.CheckpointBenchmarkConfig) -> None:
    from flame_composer.bench import runs

    with measure.workplace(config.folder) as folder:
        measure.report("checkpoint", *runs.checkpoints(config, folder))


def compared(name: str, compare: Callable[..., tuple], config: Any) -> None:
    with measure.workplace(config.folder) as folder:
        measure.report(name, *compare(Path(__file__).parents[1], config, folder))


trainer = partial(compared, "trainer", commands.compare_trainers)
data = partial(compared, "data", commands.compare_readers)
start = partial(compared, "start", commands.compare_starts)
convert = partial(compared, "convert", compare_conversions)
examples = partial(compared, "examples", compare_examples)


def run_all(config: configs.AllBenchmarksConfig) -> None:
    if config.plot:
        charts.require_plot(config.plot)
    results = commands.run_each(Path(__file__), config.names or configs.BENCHMARKS)
    figures = [Figure(**each) for result in results.values() for each in result["figures"]]
    print("", *(figure.line() for figure in figures), sep="\n")
    print(json.dumps({"benchmark": "all", "results": results}))
    if config.plot:
        benchmark_charts.write(results, config.plot)
    if missed := [figure.name for figure in figures if figure.is_missed()]:
        sys.exit(f"missed by more than a tenth: {', '.join(missed)}")


if __name__ == "__main__":
    sys.exit(
        run_one_of(
            {
                "train": (train, configs.BenchmarkConfig),
                "growth": (growth, configs.BenchmarkConfig),
                "decode": (decode, configs.DecodeBenchmarkConfig),
                "quantize": (partial(timed, "quantize"), configs.QuantizeBenchmarkConfig),
                "trainer": (trainer, configs.TrainerBenchmarkConfig),
                "data": (data, configs.DataBenchmarkConfig),
                "start": (start, configs.StartBenchmarkConfig),
                "checkpoint": (checkpoint, configs.CheckpointBenchmarkConfig),
                "convert": (convert, configs.ConversionBenchmarkConfig),
                "examples": (examples, configs.ExamplesBenchmarkConfig),
                "gpu": (gpu.check, configs.GpuBenchmarkConfig),
                "all": (run_all, configs.AllBenchmarksConfig),
            }
        )
    )
