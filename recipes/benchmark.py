"""Benchmarks of this library, each measured against an alternative in the same run.

    python recipes/benchmark.py NAME [key=value ...]    # NAME is one of these:

    train       a GLA model against a Llama of the same size, forward and backward
    models      other models of fla against a Llama of their size
    growth      the same with more rows, and with fewer and with more layers
    context     a long row on one rank, and divided over two
    decode      the same two models, generating token by token
    quantize    the first of them with weights of int8 and bf16 against fp32
    serve       recipes/serve.py against requests one after another, and static batches
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

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flame_composer.bench import commands, gpu, measure
from flame_composer.bench.conversions import compare_conversions
from flame_composer.bench.examples import compare_examples
from flame_composer.config import bench as configs
from flame_composer.config.cli import run_one_of
from flame_composer.config.gpu import GpuBenchmarkConfig

ROOT = Path(__file__).parent.parent


def timed(name: str, config: Any) -> None:
    from flame_composer.bench import decoding, dividing, families, models, quantized

    made = {"train": models.training, "growth": models.growth, "decode": decoding.decoding}
    made |= {"quantize": quantized.quantizing, "models": families.compare_models}
    made |= {"context": dividing.compare_divisions}
    measure.report(name, *made[name](config))


def written(name: str, config: Any) -> None:
    from flame_composer.bench import runs, serving

    made = {"checkpoint": runs.checkpoints, "serve": partial(serving.compare_serving, ROOT)}
    with measure.workplace(config.folder) as folder:
        measure.report(name, *made[name](config, folder))


def compared(name: str, compare: Callable[..., tuple], config: Any) -> None:
    with measure.workplace(config.folder) as folder:
        measure.report(name, *compare(ROOT, config, folder))


trainer = partial(compared, "trainer", commands.compare_trainers)
data = partial(compared, "data", commands.compare_readers)
start = partial(compared, "start", commands.compare_starts)
convert = partial(compared, "convert", compare_conversions)
examples = partial(compared, "examples", compare_examples)


def run_all(config: configs.AllBenchmarksConfig) -> None:
    commands.run_all(Path(__file__), config)


if __name__ == "__main__":
    sys.exit(
        run_one_of(
            {
                "train": (partial(timed, "train"), configs.BenchmarkConfig),
                "models": (partial(timed, "models"), configs.ModelsBenchmarkConfig),
                "growth": (partial(timed, "growth"), configs.BenchmarkConfig),
                "context": (partial(timed, "context"), configs.ContextBenchmarkConfig),
                "decode": (partial(timed, "decode"), configs.DecodeBenchmarkConfig),
                "quantize": (partial(timed, "quantize"), configs.QuantizeBenchmarkConfig),
                "serve": (partial(written, "serve"), configs.ServingBenchmarkConfig),
                "trainer": (trainer, configs.TrainerBenchmarkConfig),
                "data": (data, configs.DataBenchmarkConfig),
                "start": (start, configs.StartBenchmarkConfig),
                "checkpoint": (partial(written, "checkpoint"), configs.CheckpointBenchmarkConfig),
                "convert": (convert, configs.ConversionBenchmarkConfig),
                "examples": (examples, configs.ExamplesBenchmarkConfig),
                "gpu": (gpu.check, GpuBenchmarkConfig),
                "all": (run_all, configs.AllBenchmarksConfig),
            }
        )
    )
