"""Every rule of every configuration, what a duration comes to, and that none of it needs torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import re
import subprocess
import sys
from fractions import Fraction
from typing import Any, Literal, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_composer.config import bench, data, gpu, parallelism, plan, sections, serve, sweep, use
from flame_composer.config import clean as clean_config
from flame_composer.config import convert as convert_config
from flame_composer.config import sft as sft_config
from flame_composer.config import source as source_config
from flame_composer.config import train as train_config
from flame_composer.config.bench import (
    AllBenchmarksConfig,
    BenchmarkConfig,
    CheckpointBenchmarkConfig,
    ContextBenchmarkConfig,
    ConversionBenchmarkConfig,
    DataBenchmarkConfig,
    DecodeBenchmarkConfig,
    ExamplesBenchmarkConfig,
    ModelsBenchmarkConfig,
    QuantizeBenchmarkConfig,
    ServingBenchmarkConfig,
    SizesConfig,
    StartBenchmarkConfig,
    TrainerBenchmarkConfig,
)
from flame_composer.config.clean import (
    C4Config,
    CleanConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    LanguageConfig,
    MinhashConfig,
    PiiConfig,
    RayConfig,
    SlurmConfig,
)
from flame_composer.config.convert import (
    ConvertConfig,
    FromLlamaConfig,
    InspectConfig,
    PruneConfig,
    QuantizeConfig,
    ToHfConfig,
    TokenizerTrainConfig,
)
from flame_composer.config.data import DataConfig, EvalDataConfig, PlaceConfig, StreamConfig
from flame_composer.config.fields import docs_of, hints_of
from flame_composer.config.gpu import GPU_PARTS, GpuBenchmarkConfig
from flame_composer.config.parallelism import FsdpConfig, ParallelismConfig
from flame_composer.config.plan import PlanConfig
from flame_composer.config.rules import ScriptConfig, require_duration
from flame_composer.config.sections import (
    EvalTasksConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RepetitionConfig,
    SchedulerConfig,
    SpikeConfig,
    WandbConfig,
)
from flame_composer.config.serve import ServeConfig
from flame_composer.config.sft import SftConfig
from flame_composer.config.source import HubSourceConfig, SourceConfig
from flame_composer.config.sweep import SweepConfig
from flame_composer.config.train import TrainConfig
from flame_composer.config.use import (
    ChatConfig,
    EvaluateConfig,
    GenerateConfig,
    PredictConfig,
    ReportConfig,
)
from flame_composer.config.written import takes_text
from flame_composer.errors import ConfigError, InvalidField

CLASSES = [
    value
    for module in (
        sections,
        parallelism,
        data,
        source_config,
        train_config,
        convert_config,
        clean_config,
        sft_config,
        serve,
        use,
        plan,
        sweep,
        bench,
        gpu,
    )
    for value in vars(module).values()
    if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
]

# Bases of others that nothing is run with: their rules are broken in each of those.
SHARED = {PlaceConfig, SizesConfig, SourceConfig, HubSourceConfig}

# What makes each of them valid.
GIVEN: dict[type, dict[str, Any]] = {
    ModelConfig: {"config": {"model_type": "gla"}},
    DataConfig: {"local": "d"},
    EvalDataConfig: {"local": "d"},
    EvalTasksConfig: {"tasks": ["t"]},
    StreamConfig: {"local": "d"},
    OptimizerConfig: {},
    SchedulerConfig: {},
    RepetitionConfig: {},
    SpikeConfig: {},
    LoraConfig: {},
    FsdpConfig: {},
    ParallelismConfig: {},
    TrainConfig: {
        "run_name": "r",
        "max_duration": "10ba",
        "global_batch_size": 8,
        "microbatch_size": 4,
        "tokenizer": "t",
        "train_data": DataConfig(local="d"),
    },
    TokenizerTrainConfig: {"source": ["s"], "out": "o"},
    ConvertConfig: {"source": ["s"], "out": "o", "tokenizer": "t"},
    SftConfig: {"source": ["s"], "format": "alpaca", "out": "o", "tokenizer": "t"},
    EvaluateConfig: {"model": "m", "data": EvalDataConfig(local="d")},
    GenerateConfig: {"model": "m"},
    ChatConfig: {"model": "m"},
    ServeConfig: {"model": "m"},
    PredictConfig: {"model": "m", "data": PlaceConfig(local="d"), "out": "o"},
    ToHfConfig: {"checkpoint": "c", "out": "o"},
    QuantizeConfig: {"model": "m", "dtype": "int8", "out": "o"},
    FromLlamaConfig: {"model": "m", "config": "c", "out": "o"},
    PruneConfig: {"model": "m", "out": "o", "sparsity": 0.5},
    InspectConfig: {"data": "d"},
    BenchmarkConfig: {},
    ModelsBenchmarkConfig: {},
    ReportConfig: {"runs": ["r"]},
    AllBenchmarksConfig: {},
    GpuBenchmarkConfig: {},
    ConversionBenchmarkConfig: {},
    ExamplesBenchmarkConfig: {},
    **{
        cls: {}
        for cls in (
            ContextBenchmarkConfig,
            DecodeBenchmarkConfig,
            ServingBenchmarkConfig,
            QuantizeBenchmarkConfig,
            CheckpointBenchmarkConfig,
            StartBenchmarkConfig,
            TrainerBenchmarkConfig,
            DataBenchmarkConfig,
        )
    },
    CleanConfig: {"source": ["s"], "out": "o"},
    LanguageConfig: {"model": "m"},
    **{
        cls: {}
        for cls in (
            GopherRepetitionConfig,
            GopherQualityConfig,
            C4Config,
            MinhashConfig,
            PiiConfig,
            RayConfig,
        )
    },
    SlurmConfig: {"partition": "p", "time": "1:00:00"},
    WandbConfig: {"project": "p"},
}
GIVEN[PlanConfig] = GIVEN[TrainConfig] | {"devices": 2, "device": "h100"}
# Built without a file, its default would keep the name of the run in braces
GIVEN[SweepConfig] = {**GIVEN[TrainConfig], "sweep_folder": "runs/sweeps/tiny"}
NO_STEP = dict.fromkeys(("gopher_repetition", "gopher_quality", "c4", "minhash", "pii")) | {
    "exact_dedup": False
}
SLURM = {"executor": "slurm", "slurm": SlurmConfig(**GIVEN[SlurmConfig])}

nan, inf = math.nan, math.inf
WHOLE = "must be a whole number followed by ba, tok, sp or ep, e.g. 1000ba"
FRACTION = (
    "must be a whole number followed by ba, tok, sp or ep, or a fraction of the run like 0.05dur,"
    " e.g. 1000ba"
)
NEEDS_DATA = "must name a dataset folder made by convert/to_mds.py or to_sft.py (or set remote)"
NAME = "must be letters, digits, '.', '_' and '-' (it names folders)"
SEED = "must be in [0, 2**32)"
ROWS = "must be a positive number of rows"
EMPTY = "must not be empty"

FRACTION_OF_ONE = "must be in [0, 1]"
OPEN = "must be more than 0 and less than 1"
FINITE = "must be more than 0, and finite"
ITS_OWN = "must be null with optimizer.name="
DASK = "tcp://host:8786"
ABSOLUTE = (
    "must be absolute where there is a cluster, whose workers have working folders of their own"
)

# Class, what is given beside GIVEN, the field at fault, the rule. Values on both sides of every
# border.
OF_REGISTRY: dict[str, Any] = {"source": [], "format": None, "registry": "r", "datasets": ["d"]}
STAR = "must have one * at most in each text, which must not be all of it"
BROKEN: list[tuple[type, dict[str, Any], str, str]] = [
    *(
        (SftConfig, {name: [""]}, name, EMPTY)
        for name in ("source", "val_source", "datasets", "val_datasets")
    ),
    *(
        (SftConfig, {name: ""}, name, EMPTY)
        for name in [
            "out",
            "val_out",
            "tokenizer",
            "template",
            "registry",
            "cluster",
            "split",
            "name",
        ]
    ),
    *((SftConfig, {name: ""}, name, EMPTY) for name in ("split", "name")),
    (
        SftConfig,
        {"source": []},
        "source",
        "must name at least one file, folder or glob (or set registry and datasets)",
    ),
    (
        SftConfig,
        {"registry": "r"},
        "source",
        "must not be set together with registry, which names the files",
    ),
    (
        SftConfig,
        OF_REGISTRY | {"datasets": []},
        "datasets",
        "must name at least one dataset of the registry",
    ),
    *(
        (SftConfig, {name: ["d"]}, name, "must be set together with registry")
        for name in ("datasets", "val_datasets")
    ),
    (
        SftConfig,
        OF_REGISTRY | {"val_source": ["v"]},
        "val_source",
        "must not be set together with registry; name val_datasets",
    ),
    (
        SftConfig,
        {"format": None},
        "format",
        "must say what form the examples have: alpaca, sharegpt, messages, prompt_completion",
    ),
    *(
        (
            SftConfig,
            OF_REGISTRY | {name: value},
            name,
            "must not be set together with registry, which says it",
        )
        for name, value in {
            "format": "alpaca",
            "columns": {"prompt": "p"},
            "tags": {"role": "r"},
            "split": "train",
            "name": "n",
            "suffixes": [".jl"],
        }.items()
    ),
    (SftConfig, {"name": "n"}, "split", "must be set together with name, e.g. split=train"),
    (
        SftConfig,
        {"split": "train", "suffixes": [".jl"]},
        "suffixes",
        "must not be set together with split",
    ),
    (
        SftConfig,
        {"val_source": ["./s", "v"], "val_out": "v"},
        "val_source",
        "must not name what is trained on: s",
    ),
    (
        SftConfig,
        OF_REGISTRY | {"val_datasets": ["d"], "val_out": "v"},
        "val_datasets",
        "must not name what is trained on: d",
    ),
    (SftConfig, {"source": ["a", "s/", "./s"]}, "source", "must name nothing twice: s"),
    (
        SftConfig,
        OF_REGISTRY | {"datasets": ["d", "d"]},
        "datasets",
        "must name nothing twice: d",
    ),
    *(
        (
            SftConfig,
            {name: value, "template": template},
            name,
            "only goes with template=chatml or alpaca; another template says it itself",
        )
        for name, value in {"default_system": "", "add_bos": False}.items()
        for template in ("tokenizer", "own.jinja")
    ),
    *(
        (SftConfig, {"val_fraction": x, "val_out": "v"}, "val_fraction", "must be in [0, 1)")
        for x in (-0.1, 1.0, float("nan"))
    ),
    (
        SftConfig,
        {"val_fraction": 0.1, "val_source": ["v"], "val_out": "v"},
        "val_fraction",
        "must be 0 with val_source or val_datasets",
    ),
    *(
        (
            SftConfig,
            given,
            "val_out",
            "must be set together with val_fraction, val_source or val_datasets",
        )
        for given in (
            {"val_out": "v"},
            {"val_fraction": 0.1},
            {"val_source": ["v"]},
            OF_REGISTRY | {"val_datasets": ["v"]},
        )
    ),
    *(
        (
            SftConfig,
            {"val_fraction": 0.1, "val_out": val_out},
            "val_out",
            "must be a folder beside out=o, neither the same nor inside the other",
        )
        for val_out in ("o", "./o/", "o/v")
    ),
    (SftConfig, {"max_document_bytes": 0}, "max_document_bytes", "must be more than 0 bytes"),
    (
        SftConfig,
        {"shard_size": 9 * 2048 + 1023},
        "shard_size",
        "must be at least 19456 (one row) and less than 4294967296 bytes",
    ),
    (SftConfig, {"cluster": "host:8786"}, "cluster", f"must be like {DASK}"),
    *(
        (
            SftConfig,
            {"source": ["/s"], "out": "/o", "cluster": DASK} | given,
            name,
            "must be absolute where there is a cluster, whose workers have working folders of their"
            " own",
        )
        for name, given in {
            "source": {"source": ["/s", "s"]},
            "val_source": {"val_source": ["s"], "val_out": "/v"},
            "registry": OF_REGISTRY,
            "out": {"out": "o"},
            "val_out": {"val_fraction": 0.1, "val_out": "v"},
        }.items()
    ),
    (
        ModelConfig,
        {"config": {}},
        "config.model_type",
        "must be set (e.g. model.config.model_type=gla), or model.pretrained must name a folder",
    ),
    (ModelConfig, {"pretrained": ""}, "pretrained", EMPTY),
    (ModelConfig, {"mup_base_width": 0}, "mup_base_width", "must be in [1, 1048576], or null"),
    *((cls, {"local": None}, "local", NEEDS_DATA) for cls in (EvalDataConfig, StreamConfig)),
    (DataConfig, {"local": None}, "local", NEEDS_DATA.replace("remote)", "remote, or streams)")),
    *(
        (cls, {name: ""}, name, EMPTY)
        for cls in (DataConfig, EvalDataConfig, StreamConfig)
        for name in ("local", "remote")
    ),
    *(
        (StreamConfig, {name: value}, name, f"must be more than 0, and no more than {most}")
        for name, most in (("proportion", 10**6), ("repeat", 10**6), ("choose", 10**12))
        for value in (0, -1, most + 1)
    ),
    *(
        (StreamConfig, {name: value}, name, "must be more than 0, and no more than 1000000")
        for name in ("proportion", "repeat")
        for value in (nan, inf)
    ),
    *(
        (
            StreamConfig,
            {first: 1, second: 1},
            "proportion",
            "must not be set together with repeat or choose",
        )
        for first, second in (
            ("proportion", "repeat"),
            ("proportion", "choose"),
            ("repeat", "choose"),
        )
    ),
    *(
        (
            DataConfig,
            {"local": None, "streams": {"a": StreamConfig(local="d")}, name: "d"},
            name,
            "must be null with streams, which each have their own",
        )
        for name in ("local", "remote")
    ),
    *(
        (
            DataConfig,
            {"local": None, "streams": {name: StreamConfig(local="d")}},
            "streams",
            "must have names of letters, digits, '_' and '-'",
        )
        for name in ("", "a.b", "a b", "a/b", "a\n")
    ),
    (
        DataConfig,
        {
            "local": None,
            "streams": {"a": StreamConfig(local="d", repeat=1), "b": StreamConfig(local="e")},
        },
        "streams",
        "must all have proportion, or all repeat, or all choose, or none: a has repeat, b has none",
    ),
    *(
        (
            DataConfig,
            {"batching_method": method},
            "batching_method",
            "must be random without streams",
        )
        for method in ("stratified", "per_stream")
    ),
    *((WandbConfig, {name: ""}, name, EMPTY) for name in ("project", "entity", "group")),
    (
        TrainConfig,
        {
            "callbacks": {"optimizer_monitor": None},
            "parallelism": ParallelismConfig(fsdp=FsdpConfig()),
            "optimizer": OptimizerConfig(name="decoupled_adamw"),
            "tensorboard": True,
        },
        "callbacks.optimizer_monitor",
        (
            "cannot gather what decoupled_adamw adds to it with parallelism.fsdp; set "
            "callbacks.optimizer_monitor.log_optimizer_metrics=false, or optimizer.name=adamw"
        ),
    ),
    (
        ParallelismConfig,
        {"gradient_compression": "bf16", "fsdp": FsdpConfig()},
        "gradient_compression",
        "must be null with parallelism.fsdp, which has mixed_precision for it",
    ),
    (DataConfig, {"download_retries": -1}, "download_retries", "must be 0 or more"),
    *(
        (
            DataConfig,
            {"download_timeout": seconds},
            "download_timeout",
            "must be more than 0, and finite",
        )
        for seconds in (0.0, -1.0, nan, inf)
    ),
    *(
        (cls, {"num_workers": number}, "num_workers", "must be in [0, 1000]")
        for cls in (DataConfig, EvalDataConfig)
        for number in (-1, 1001)
    ),
    (DataConfig, {"prefetch_factor": 0}, "prefetch_factor", "must be 1 or more"),
    *(
        (DataConfig, {name: number}, name, f"must be in [1, {most}]")
        for name, most in (
            ("shuffle_block_size", 10**12),
            ("num_canonical_nodes", 65536),
            ("predownload", 10**12),
        )
        for number in (0, most + 1)
    ),
    *((DataConfig, {"shuffle_seed": seed}, "shuffle_seed", SEED) for seed in (-1, 2**32)),
    *(
        (
            DataConfig,
            {"cache_limit": limit},
            "cache_limit",
            "must be a number of bytes, or one with kb, mb, gb, tb or pb, e.g. 100gb",
        )
        for limit in ("", "lots", "-1gb", "1.5", "10 gb", "10xb", "gb", "1.5b")
    ),
    *(
        (EvalDataConfig, {"max_rows": n}, "max_rows", "must be a positive number of rows, or null")
        for n in (0, -1)
    ),
    *(
        (OptimizerConfig, {"lr": lr}, "lr", "must be more than 0, and finite")
        for lr in (0.0, -1e-3, nan, inf)
    ),
    *(
        (OptimizerConfig, {"betas": betas}, "betas", "must both be in [0, 1)")
        for betas in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, nan))
    ),
    *(
        (OptimizerConfig, {"eps": eps}, "eps", "must be more than 0, and finite")
        for eps in (0.0, -1e-8, nan, inf)
    ),
    *(
        (OptimizerConfig, {"name": name, key: value}, key, f"{ITS_OWN}{name}; only muon has it")
        for name in ("adamw", "decoupled_adamw", "lamb")
        for key, value in (("momentum", 0.95), ("update_scale", "original"), ("adamw_lr_ratio", 1))
    ),
    *(
        (OptimizerConfig, {"name": "muon", "momentum": value}, "momentum", OPEN)
        for value in (0.0, 1.0, -0.5, nan)
    ),
    *(
        (OptimizerConfig, {"name": "muon", "adamw_lr_ratio": ratio}, "adamw_lr_ratio", FINITE)
        for ratio in (0.0, -1.0, nan, inf)
    ),
    (
        TrainConfig,
        {
            "lora": LoraConfig(),
            "model": ModelConfig(pretrained="p"),
            "optimizer": OptimizerConfig(name="muon"),
        },
        "optimizer.name",
        "must not be muon with lora: it is defined for whole matrices, adapters are products",
    ),
    *(
        (OptimizerConfig, {"weight_decay": decay}, "weight_decay", "must be 0 or more, and finite")
        for decay in (-0.1, nan, inf)
    ),
    *(
        (
            OptimizerConfig,
            {"grad_clip_norm": clip},
            "grad_clip_norm",
            "must be more than 0 and finite, or null",
        )
        for clip in (0.0, -1.0, nan, inf)
    ),
    *(
        (SchedulerConfig, {"warmup": warmup}, "warmup", FRACTION)
        for warmup in (
            "",
            "5",
            "ba",
            "-5ba",
            "5 ba",
            "1.5ba",
            "1e3ba",
            "5BA",
            "1.5dur",
            "2dur",
            "dur",
            "1__0ba",
            "1_ba",
            "_1ba",
            "٣ba",
            "9" * 5000 + "ba",
            "5ba\n",
        )
    ),
    (SchedulerConfig, {"decay": "10"}, "decay", FRACTION),
    (FsdpConfig, {"replicas": 2}, "replicas", "must be null unless sharding_strategy=HYBRID_SHARD"),
    (
        FsdpConfig,
        {"sharding_strategy": "HYBRID_SHARD", "replicas": 0},
        "replicas",
        "must be more than 0",
    ),
    *(
        (ParallelismConfig, {name: number}, name, "must be 1 device or more")
        for name in ("tensor", "context")
        for number in (0, -2)
    ),
    (
        TrainConfig,
        {"parallelism": ParallelismConfig(context=2)},
        "parallelism.context",
        "tensor x context = 1 x 2 must divide the 1 devices",
    ),
    (
        ParallelismConfig,
        {"cpu_fallback": True, "cpu_fsdp": True},
        "cpu_fsdp",
        "must not be set together with cpu_fallback",
    ),
    (
        TrainConfig,
        {"microbatch_size": "auto", "eval_tasks": EvalTasksConfig(["t"])},
        "eval_tasks.batch_size",
        "must be set with microbatch_size=auto, which is about training",
    ),
    (
        TrainConfig,
        {"parallelism": ParallelismConfig(FsdpConfig()), "eval_tasks": EvalTasksConfig(["t"])},
        "eval_tasks",
        "must be null with parallelism.fsdp: evaluate checkpoints with recipes/evaluate.py",
    ),
    (
        TrainConfig,
        {"microbatch_size": "auto", "parallelism": ParallelismConfig(FsdpConfig())},
        "microbatch_size",
        "must be a number with parallelism.fsdp, which cannot try",
    ),
    (
        TrainConfig,
        {"parallelism": ParallelismConfig(FsdpConfig("HYBRID_SHARD", replicas=2))},
        "parallelism.fsdp.replicas",
        "must divide the 1 devices",
    ),
    (
        TrainConfig,
        {"scheduler": SchedulerConfig(name="wsd", warmup="3ba", decay="8ba")},
        "scheduler.decay",
        "must leave room for the warmup: 8 and 3 batches of 10",
    ),
    *(
        (SchedulerConfig, {"min_lr_ratio": ratio}, "min_lr_ratio", "must be in [0, 1]")
        for ratio in (-0.1, 1.1, nan)
    ),
    *(
        (TrainConfig, {"run_name": name}, "run_name", NAME)
        for name in ("", "a/b", "../a", ".a", "-a", "a b", "a\n", "a:b")
    ),
    *((TrainConfig, {"seed": seed}, "seed", SEED) for seed in (-1, 2**32, 10**50)),
    *(
        (TrainConfig, {name: ""}, name, EMPTY)
        for name in ("tokenizer", "save_folder", "log_folder")
    ),
    *(
        (TrainConfig, {"max_duration": duration}, "max_duration", WHOLE)
        for duration in ("", "10", "0.5dur", "1e5ba", "-1ba")
    ),
    *(
        (TrainConfig, {"max_duration": duration}, "max_duration", "must be more than 0")
        for duration in ("0ba", "00tok", "0ep")
    ),
    (TrainConfig, {"eval_interval": "1.5ba"}, "eval_interval", FRACTION),
    (TrainConfig, {"eval_interval": "30min"}, "eval_interval", FRACTION),
    *(
        (
            TrainConfig,
            {"save_interval": interval},
            "save_interval",
            FRACTION.replace("or ep,", "or ep, or by s, min or h,"),
        )
        for interval in ("1.5ba", "1.5h", "5m", "1h30min", "min")
    ),
    *(
        (
            TrainConfig,
            {"stall_timeout": s},
            "stall_timeout",
            "must be a number of seconds more than 0 and no more than 100000000, or null",
        )
        for s in (0.0, -1.0, nan, inf)
    ),
    *(
        (TrainConfig, {"z_loss": z}, "z_loss", "must be 0 or more, and finite; OLMo 2 has 1e-5")
        for z in (-1e-5, nan, inf)
    ),
    (
        OptimizerConfig,
        {"decay": ["matrices", "vector"]},
        "decay",
        "must name only matrices, embeddings, vectors, not 'vector'; did you mean vectors?",
    ),
    (
        OptimizerConfig,
        {"decay": ["biases?"]},
        "decay",
        "must name only matrices, embeddings, vectors, not 'biases?'",
    ),
    (
        OptimizerConfig,
        {"decay": []},
        "decay",
        "must name one of matrices, embeddings, vectors; to decay nothing, set"
        " optimizer.weight_decay=0",
    ),
    (
        OptimizerConfig,
        {"decay": ["vectors", "vectors"]},
        "decay",
        "must not name a kind twice",
    ),
    *(
        (
            SchedulerConfig,
            {"name": name, "t_max": "20ba"},
            "t_max",
            "must be null with constant and wsd; only cosine and linear can end beyond a run",
        )
        for name in ("constant", "wsd")
    ),
    *(
        (SchedulerConfig, {"t_max": duration}, "t_max", WHOLE)
        for duration in ("", "5e12tok", "1.25dur", "0.5dur", "T")
    ),
    (SchedulerConfig, {"t_max": "0ba"}, "t_max", "must be more than 0"),
    *(
        (
            TrainConfig,
            {"scheduler": SchedulerConfig(t_max=t_max)},
            "scheduler.t_max",
            "must not end before the run: 9 batches of 10 (max_duration=10ba)",
        )
        for t_max in ("9ba", "72sp")
    ),
    (RepetitionConfig, {"min_period": 0}, "min_period", "must be 1 token or more"),
    (
        RepetitionConfig,
        {"max_period": 2, "min_period": 3},
        "max_period",
        "must be min_period (3) or more",
    ),
    *(
        (
            RepetitionConfig,
            {"max_count": count},
            "max_count",
            "must be 2 or more: a sequence that occurs once is not repeated",
        )
        for count in (1, 0, -32)
    ),
    (
        TrainConfig,
        {"context_length": 31, "repetition_filter": RepetitionConfig()},
        "repetition_filter",
        "leaves nothing out: 32 tokens or more that repeat do not fit into a row of"
        " context_length=31",
    ),
    *((LoraConfig, {"rank": rank}, "rank", "must be in [1, 65536]") for rank in (0, -1, 65537)),
    *(
        (LoraConfig, {"alpha": alpha}, "alpha", "must be more than 0, and finite")
        for alpha in (0.0, -1.0, inf, nan)
    ),
    *(
        (LoraConfig, {"dropout": dropout}, "dropout", "must be in [0, 1)")
        for dropout in (1.0, -0.1, nan)
    ),
    (LoraConfig, {"targets": []}, "targets", "must name a projection, or be default or all"),
    (LoraConfig, {"targets": [""]}, "targets", EMPTY),
    (LoraConfig, {"targets": ["o", "o"]}, "targets", "must not name one of them twice"),
    *(
        (
            LoraConfig,
            {"targets": [name, "q_proj"]},
            "targets",
            "must be default or all alone, or names only",
        )
        for name in ("default", "all")
    ),
    (
        TrainConfig,
        {"lora": LoraConfig()},
        "model.pretrained",
        "must be set with lora: adapters are added to weights that were trained before",
    ),
    (SpikeConfig, {"window": 0}, "window", "must be 1 step or more"),
    (SpikeConfig, {"patience": 0}, "patience", "must be 1 step or more"),
    *(
        (SpikeConfig, {"factor": factor}, "factor", "must be more than 1, and finite")
        for factor in (1.0, nan, inf)
    ),
    *(
        (TrainConfig, {name: duration}, name, "must be more than 0")
        for name in ("eval_interval", "save_interval")
        for duration in ("0ba", "0dur", "0.0dur", ".00dur")
    ),
    (TrainConfig, {"save_interval": "0min"}, "save_interval", "must be more than 0"),
    *((TrainConfig, {"global_batch_size": size}, "global_batch_size", ROWS) for size in (0, -8)),
    *(
        (TrainConfig, {"microbatch_size": size}, "microbatch_size", f"{ROWS}, or auto")
        for size in (0, -8, "", "many", "8")
    ),
    (
        TrainConfig,
        {"microbatch_size": "auto", "eval_data": EvalDataConfig(local="e")},
        "eval_batch_size",
        "must be set with microbatch_size=auto, which is about training",
    ),
    (
        TrainConfig,
        {"callbacks": {"early_stopper": {"patience": "5ba"}}},
        "callbacks.early_stopper",
        "needs an evaluation to go by; set eval_data",
    ),
    (
        TrainConfig,
        {"callbacks": {"lr_monitor": None}},
        "callbacks.lr_monitor",
        (
            "hands metrics to loggers, and there is none; set loggers.file_logger={},"
            " wandb.project=... or tensorboard=true"
        ),
    ),
    *(
        (
            TrainConfig,
            {section: {name: {}}, "parallelism": ParallelismConfig(fsdp=FsdpConfig())},
            f"{section}.{name}",
            "must not be set together with parallelism.fsdp, which spreads parameters over devices",
        )
        for section, names in (
            ("algorithms", ("ema", "swa", "layer_freezing")),
            ("callbacks", ("generate", "hf_export")),
        )
        for name in names
    ),
    (
        TrainConfig,
        {"eval_batch_size": 0},
        "eval_batch_size",
        "must be a positive number of rows, or null",
    ),
    (TrainConfig, {"context_length": 1}, "context_length", "must be 2 tokens or more"),
    *(
        (
            TrainConfig,
            {"save_num_checkpoints_to_keep": n},
            "save_num_checkpoints_to_keep",
            "must be more than 0, or -1 for all",
        )
        for n in (0, -2)
    ),
    (
        TrainConfig,
        {"microbatch_size": 3},
        "global_batch_size",
        "must be a multiple of devices x microbatch_size = 1 x 3 = 3",
    ),
    (
        TrainConfig,
        {"microbatch_size": 16},
        "global_batch_size",
        "must be a multiple of devices x microbatch_size = 1 x 16 = 16",
    ),
    (
        TrainConfig,
        {"eval_data": EvalDataConfig(local="d")},
        "eval_data.local",
        "must not be a dataset that is trained on",
    ),
    (
        TrainConfig,
        {"scheduler": SchedulerConfig(warmup="11ba")},
        "scheduler.warmup",
        "must not be longer than the run: 11 batches, of 10 in all (max_duration=10ba)",
    ),
    (
        TrainConfig,
        {"scheduler": SchedulerConfig(warmup="81sp")},
        "scheduler.warmup",
        "must not be longer than the run: 11 batches, of 10 in all (max_duration=10ba)",
    ),
    *((PlanConfig, {"devices": number}, "devices", "must be in [1, 1000]") for number in (0, 1001)),
    *(
        (PlanConfig, {"nodes": number}, "nodes", "must be in [1, 100000]")
        for number in (0, 100_001)
    ),
    *(
        (PlanConfig, {"mfu": share}, "mfu", "must be in [1e-06, 1], or null")
        for share in (0.0, 1e-300, 1.1, nan)
    ),
    *(
        (PlanConfig, {name: value}, name, "must be in [1e-06, 1e+12], or null")
        for name in ("tokens_per_second", "save_seconds", "preemption_hours")
        for value in (0.0, -1.0, nan, inf, 1e308)
    ),
    *(
        (PlanConfig, {"price_per_hour": price}, "price_per_hour", "must be in [0, 1e+12], or null")
        for price in (-1.0, nan, inf)
    ),
    *(
        (PlanConfig, {"restart_minutes": minutes}, "restart_minutes", "must be in [0, 1e+12]")
        for minutes in (-1.0, nan, inf)
    ),
    *(
        (
            PlanConfig,
            {"dataset_tokens": number},
            "dataset_tokens",
            "must be a whole number in [1, 10**18], or null",
        )
        for number in (0, 0.5, 1.5, 10**19)
    ),
    *(
        (
            PlanConfig,
            {"save_bandwidth": speed},
            "save_bandwidth",
            "must be a number of bytes more than 0, or one with kb, mb, gb, tb or pb, e.g. 500mb",
        )
        for speed in ("", "0", "0.0gb", "fast", "-1gb")
    ),
    (PlanConfig, {"run_name": ""}, "run_name", NAME),
    (
        PlanConfig,
        {"nodes": 2},
        "global_batch_size",
        "must be a multiple of devices x microbatch_size = 4 x 4 = 16",
    ),
    *(
        (SweepConfig, {name: value}, name, f"must be {least} or more")
        for name, value, least in (
            ("random_trials", 0, 1),
            ("metric_steps", 0, 1),
            ("prune_warmup", -1, 0),
            ("prune_trials", 0, 1),
            ("parallel", 0, 1),
        )
    ),
    *(
        (SweepConfig, {"devices": number}, "devices", "must be in [1, 1000], or null")
        for number in (0, 1001)
    ),
    *(
        (
            SweepConfig,
            {"search": search, "trials": number},
            "trials",
            f"must be a number in [1, 1000] with search={search}",
        )
        for search in ("random", "tpe")
        for number in (None, 0, 1001)
    ),
    (
        SweepConfig,
        {"trials": 2},
        "trials",
        "must be left out with search=grid, whose trials are all combinations",
    ),
    (SweepConfig, {"search_seed": -1}, "search_seed", "must be in [0, 2**32)"),
    (SweepConfig, {"metric": "eval_loss"}, "metric", "needs an evaluation; set eval_data"),
    (SweepConfig, {"prune": "median"}, "prune", "needs an evaluation; set eval_data"),
    (
        SweepConfig,
        {"autoresume": False},
        "autoresume",
        "must be true: a trial goes on from its checkpoint when the sweep is started again",
    ),
    (
        SweepConfig,
        {"retry_failed": True, "search": "tpe", "trials": 2},
        "retry_failed",
        "must be false with search=tpe or prune, where later trials depend on earlier ones",
    ),
    (SweepConfig, {"sweep_folder": ""}, "sweep_folder", EMPTY),
    (SweepConfig, {"sweep_folder": "s3://a/b"}, "sweep_folder", "must be a local folder"),
    *(
        (
            SweepConfig,
            {"sweep_folder": folder},
            "sweep_folder",
            "must end in letters, digits, '.', '_' and '-' (its name begins the runs' names)",
        )
        for folder in ("runs/a b", "..", "/", "é")
    ),
    (
        SweepConfig,
        {"sweep_folder": "a/{b}"},
        "sweep_folder",
        "must hold no braces, which Composer would fill in; write ${run_name} for the name of the"
        " run",
    ),
    (AllBenchmarksConfig, {"plot": ""}, "plot", EMPTY),
    (
        AllBenchmarksConfig,
        {"names": ["train", "strat"]},
        "names",
        "must be among train, models, growth, context, decode, quantize, serve, trainer, data,"
        " start, checkpoint, convert, examples",
    ),
    (GpuBenchmarkConfig, {"out": ""}, "out", EMPTY),
    (GpuBenchmarkConfig, {"folder": ""}, "folder", EMPTY),
    (
        GpuBenchmarkConfig,
        {"names": ["save", "sped"]},
        "names",
        f"must be among {', '.join(GPU_PARTS)}",
    ),
    (ReportConfig, {"runs": []}, "runs", "must name at least one run's folder, e.g. runs/gla_tiny"),
    (ReportConfig, {"out": ""}, "out", EMPTY),
    (ReportConfig, {"smooth": 0}, "smooth", "must be 1 step or more"),
    *(
        (cls, {"source": []}, "source", "must name at least one file, folder or glob")
        for cls in (TokenizerTrainConfig, ConvertConfig)
    ),
    *(
        (TokenizerTrainConfig, {name: ""}, name, EMPTY)
        for name in ("out", "text_column", "eos_token")
    ),
    (TokenizerTrainConfig, {"out": "s3://b/tokenizer"}, "out", "must be a local folder"),
    (
        TokenizerTrainConfig,
        {"vocab_size": 256},
        "vocab_size",
        "must be at least 257: 256 bytes and the end-of-text token",
    ),
    (TokenizerTrainConfig, {"min_frequency": 0}, "min_frequency", "must be 1 or more"),
    (TokenizerTrainConfig, {"max_bytes": 0}, "max_bytes", "must be more than 0"),
    *((LanguageConfig, {"threshold": x}, "threshold", FRACTION_OF_ONE) for x in (-0.1, 1.1, nan)),
    (LanguageConfig, {"model": ""}, "model", EMPTY),
    (LanguageConfig, {"languages": []}, "languages", "must name at least one language, e.g. [en]"),
    *(
        (GopherRepetitionConfig, {name: x}, name, FRACTION_OF_ONE)
        for x in (-0.1, 1.1, nan)
        for name in ("dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac")
    ),
    *(
        (GopherRepetitionConfig, {"top_n_grams": x}, "top_n_grams", "must be 3 numbers from 0 to 1")
        for x in ([], [0.1] * 4, [0.1, 0.1, 1.1], [-0.1, 0.1, 0.1])
    ),
    *(
        (GopherRepetitionConfig, {"dup_n_grams": x}, "dup_n_grams", "must be 6 numbers from 0 to 1")
        for x in ([0.1] * 5, [nan] * 6)
    ),
    *(
        (GopherQualityConfig, {name: -1}, name, "must be 0 or more")
        for name in (
            "min_doc_words",
            "max_doc_words",
            "min_avg_word_length",
            "max_avg_word_length",
            "min_stop_words",
        )
    ),
    *(
        (GopherQualityConfig, {name: x}, name, FRACTION_OF_ONE)
        for x in (-0.1, 1.1, nan)
        for name in (
            "max_symbol_word_ratio",
            "max_bullet_lines_ratio",
            "max_ellipsis_lines_ratio",
            "min_alpha_words_ratio",
        )
    ),
    *(
        (
            GopherQualityConfig,
            {"stop_words": x},
            "stop_words",
            "must be at least min_stop_words words",
        )
        for x in ([], ["the"], ["the", "the"])
    ),
    *(
        (C4Config, {name: -1}, name, "must be 0 or more")
        for name in ("min_num_sentences", "min_words_per_line", "max_word_length")
    ),
    *(
        (MinhashConfig, {name: 0}, name, "must be 1 or more")
        for name in ("n_grams", "num_buckets", "hashes_per_bucket")
    ),
    *((MinhashConfig, {"seed": seed}, "seed", SEED) for seed in (-1, 2**32)),
    (
        PiiConfig,
        {"emails": None, "ips": None},
        "emails",
        "must be set if ips is not; pii=null masks nothing",
    ),
    *((SlurmConfig, {name: ""}, name, EMPTY) for name in ("partition", "time", "qos", "activate")),
    *(
        (SlurmConfig, {name: 0}, name, "must be 1 or more")
        for name in ("mem_per_cpu_gb", "max_array_size")
    ),
    (RayConfig, {"address": ""}, "address", EMPTY),
    *(
        (RayConfig, {"mem_per_cpu_gb": x}, "mem_per_cpu_gb", "must be more than 0")
        for x in (0.0, nan)
    ),
    (CleanConfig, {"source": []}, "source", "must name at least one file, folder or glob"),
    *(
        (CleanConfig, {name: ""}, name, EMPTY)
        for name in ("out", "removed_out", "text_column", "split", "name")
    ),
    (CleanConfig, {"name": "n"}, "split", "must be set together with name, e.g. split=train"),
    (
        CleanConfig,
        {"split": "train", "suffixes": [".py"]},
        "suffixes",
        "must not be set together with split",
    ),
    *(
        (
            CleanConfig,
            {"removed_out": folder},
            "removed_out",
            "must be a folder beside out=o, neither the same nor inside the other",
        )
        for folder in ("o", "./o", "o/p", ".")
    ),
    (
        CleanConfig,
        NO_STEP,
        "exact_dedup",
        "must be true where every other step is null, or there is nothing to do",
    ),
    (CleanConfig, {"unit_size": 0}, "unit_size", "must be more than 0 bytes"),
    *(
        (cls, {"max_document_bytes": 0}, "max_document_bytes", "must be more than 0 bytes")
        for cls in (CleanConfig, ConvertConfig, TokenizerTrainConfig)
    ),
    (CleanConfig, {"num_workers": 0}, "num_workers", "must be 1 or more, or null"),
    *(
        (
            CleanConfig,
            given,
            "slurm",
            (
                "must be set with executor=slurm, and with no other: slurm.partition=..."
                " slurm.time=..."
            ),
        )
        for given in ({"executor": "slurm"}, {"slurm": SLURM["slurm"]}, SLURM | {"executor": "ray"})
    ),
    *(
        (
            CleanConfig,
            {"source": ["/s"], "out": "/o", "removed_out": "/r"} | cluster | {name: value},
            name,
            ABSOLUTE,
        )
        for name, value in (("source", ["/s", "s"]), ("out", "o"), ("removed_out", "r"))
        for cluster in (SLURM, {"executor": "ray"})
    ),
    *(
        (
            CleanConfig,
            {name: "s3://bucket/folder"},
            name,
            "must be a folder of this machine; copy it to an object store when it is whole",
        )
        for name in ("out", "removed_out")
    ),
    (AllBenchmarksConfig, {"plot": "costs.svg"}, "plot", "must be a file name ending in .png"),
    *(
        (ConvertConfig, {name: ""}, name, EMPTY)
        for name in ("out", "val_out", "tokenizer", "text_column", "split", "name")
    ),
    (
        ConvertConfig,
        {"token_dtype": "uint16", "split": "train"},
        "token_dtype",
        "must not be set together with split",
    ),
    (
        ConvertConfig,
        {"token_borders": "csv"},
        "token_borders",
        "must be set together with token_dtype",
    ),
    *(
        (
            ConvertConfig,
            {"token_dtype": "uint16", name: value},
            name,
            "must not be set together with token_dtype",
        )
        for name, value in (("encoder", "hf"), ("text_column", "body"))
    ),
    (ConvertConfig, {"name": "n"}, "split", "must be set together with name, e.g. split=train"),
    (
        ConvertConfig,
        {"split": "train", "suffixes": [".py"]},
        "suffixes",
        "must not be set together with split",
    ),
    *(
        (ConvertConfig, {name: 0}, name, "must be a positive number of tokens, or null")
        for name in ("max_doc_length", "min_doc_length")
    ),
    *((ConvertConfig, {"seed": seed}, "seed", "must be in [0, 2**32)") for seed in (-1, 2**32)),
    (ConvertConfig, {"num_workers": 0}, "num_workers", "must be 1 or more, or null"),
    (
        ConvertConfig,
        {"num_workers": 1, "cluster": DASK},
        "num_workers",
        "must not be set together with cluster",
    ),
    *(
        (
            ConvertConfig,
            {"source": ["/s"], "out": "/o", "val_fraction": 0.1, "val_out": "/v", "cluster": DASK}
            | given,
            name,
            ABSOLUTE,
        )
        for name, given in (
            ("source", {"source": ["/s", "s"]}),
            ("out", {"out": "o"}),
            ("val_out", {"val_out": "v"}),
        )
    ),
    (ConvertConfig, {"cluster": ""}, "cluster", EMPTY),
    *(
        (ConvertConfig, {"cluster": address}, "cluster", f"must be like {DASK}")
        for address in (
            "host",
            "host:8786",
            "tcp://host",
            "tcp://:8786",
            "tcp://host:port",
            "tcp://a b:1",
        )
    ),
    (ConvertConfig, {"context_length": 1}, "context_length", "must be 2 tokens or more"),
    *(
        (ConvertConfig, {"val_fraction": x, "val_out": "v"}, "val_fraction", "must be in [0, 1)")
        for x in (-0.1, 1.0, nan)
    ),
    (ConvertConfig, {"val_fraction": 0.1}, "val_out", "must be set together with val_fraction"),
    (ConvertConfig, {"val_out": "v"}, "val_out", "must be set together with val_fraction"),
    *(
        (
            ConvertConfig,
            {"val_fraction": 0.1, "val_out": val_out, "out": out},
            "val_out",
            f"must be a folder beside out={out}, neither the same nor inside the other",
        )
        for out, val_out in (
            ("o", "o"),
            ("o", "./o"),
            ("o", "o/val"),
            ("o/train", "o"),
            ("o", "x/../o"),
            ("s3://b/o", "s3://b/o/"),
            ("s3://b/o", "s3://b/o/val"),
            ("s3://b", "s3://b/val"),
        )
    ),
    *(
        (
            ConvertConfig,
            {"shard_size": size},
            "shard_size",
            "must be at least 17408 (one row) and less than 4294967296 bytes",
        )
        for size in (17407, 2**32)
    ),
    (ConvertConfig, {"unit_size": 0}, "unit_size", "must be more than 0 bytes"),
    *(
        (EvaluateConfig, {name: ""}, name, EMPTY)
        for name in ("model", "base", "tokenizer", "plot", "task_path")
    ),
    (GenerateConfig, {"base": ""}, "base", EMPTY),
    (ToHfConfig, {"base": ""}, "base", EMPTY),
    (EvaluateConfig, {"batch_size": 0}, "batch_size", ROWS),
    (EvaluateConfig, {"data": None}, "data", "must be set (data.local=...), or tasks, or suite"),
    (
        EvaluateConfig,
        {"datasets": {"a": EvalDataConfig(local="e")}},
        "data",
        "must be null with datasets, which each have their own",
    ),
    (
        EvaluateConfig,
        {"data": None, "datasets": {name: EvalDataConfig(local="e") for name in "ab"}},
        "datasets",
        "must all be different ones",
    ),
    *(
        (
            EvaluateConfig,
            {"block_size": n},
            "block_size",
            "must be a positive number of tokens, or null",
        )
        for n in (0, -1)
    ),
    (
        EvaluateConfig,
        {"data": None, "tasks": ["t"], "block_size": 1},
        "block_size",
        "needs data.local=... or datasets",
    ),
    (
        EvaluateConfig,
        {"plot": "p.svg", "block_size": 1},
        "plot",
        "must be a file name ending in .png",
    ),
    (EvaluateConfig, {"plot": "p.png"}, "block_size", "must be set together with plot"),
    *(
        (cls, {"tasks": ["t", "t"]}, "tasks", "must not name a task twice")
        for cls in (EvaluateConfig, EvalTasksConfig)
    ),
    *(
        (cls, {"tasks": ["t"], "num_fewshot": -1}, "num_fewshot", "must be 0 or more, or null")
        for cls in (EvaluateConfig, EvalTasksConfig)
    ),
    (EvaluateConfig, {"task_path": "p"}, "tasks", "must be set together with task_path, or suite"),
    (EvaluateConfig, {"data_root": ""}, "data_root", EMPTY),
    (EvaluateConfig, {"data_root": "."}, "data_root", "needs tasks or suite"),
    (
        EvaluateConfig,
        {"data_root": "s3://b/d", "suite": "base"},
        "data_root",
        "must be a local folder",
    ),
    (
        EvaluateConfig,
        {"data_root": "nowhere", "tasks": ["t"]},
        "data_root",
        "no such folder; make it, with a folder for each dataset, as docs/benchmarks_data.md says",
    ),
    *(
        (
            EvaluateConfig,
            {**more, "suite": "bias"},
            name,
            "must not be set with stereoset, whose sentences are no answers; name other tasks with"
            " tasks=[...]",
        )
        for name, more in (
            ("apply_chat_template", {"apply_chat_template": True}),
            ("system_instruction", {"system_instruction": "s"}),
        )
    ),
    *(
        (
            cls,
            {"tasks": ["t"], "task_code": True},
            "task_path",
            "must be set together with task_code",
        )
        for cls in (EvaluateConfig, EvalTasksConfig)
    ),
    (EvaluateConfig, {"task_limit": 0}, "task_limit", "must be a positive number, or null"),
    (EvaluateConfig, {"max_length": 1}, "max_length", "must be 2 tokens or more, or null"),
    (EvaluateConfig, {"apply_chat_template": True}, "apply_chat_template", "needs tasks or suite"),
    (EvaluateConfig, {"system_instruction": "s"}, "system_instruction", "needs tasks or suite"),
    (
        EvaluateConfig,
        {"tasks": ["t"], "apply_chat_template": True, "add_bos": False},
        "add_bos",
        "must be null with apply_chat_template, which decides what texts begin with",
    ),
    (
        EvaluateConfig,
        {"tasks": ["t"], "fewshot_as_multiturn": False},
        "fewshot_as_multiturn",
        "must be true without apply_chat_template",
    ),
    (EvalTasksConfig, {"tasks": []}, "tasks", "must name at least one task"),
    (EvalTasksConfig, {"task_path": ""}, "task_path", EMPTY),
    (EvalTasksConfig, {"interval": "10"}, "interval", FRACTION),
    *(
        (EvalTasksConfig, {name: 0}, name, "must be more than 0, or null")
        for name in ("limit", "batch_size")
    ),
    *((GenerateConfig, {name: ""}, name, EMPTY) for name in ("model", "prompts")),
    (
        GenerateConfig,
        {"prompt": "", "prompts": "p"},
        "prompts",
        "must not be set together with prompt",
    ),
    (GenerateConfig, {"batch_size": 0}, "batch_size", "must be a positive number of prompts"),
    *(
        (
            GenerateConfig,
            {"repetition_penalty": x},
            "repetition_penalty",
            "must be more than 0, and finite",
        )
        for x in (0.0, inf, nan)
    ),
    (GenerateConfig, {"stop": ["a", ""]}, "stop", "must not hold an empty text"),
    *((PredictConfig, {name: ""}, name, EMPTY) for name in ("model", "out")),
    (PredictConfig, {"out": "s3://b/o"}, "out", "must be a local folder"),
    (PredictConfig, {"batch_size": 0}, "batch_size", "must be a positive number of prompts"),
    (
        PredictConfig,
        {"max_examples": 0},
        "max_examples",
        "must be a positive number of answers, or null",
    ),
    *((PredictConfig, {"seed": seed}, "seed", SEED) for seed in (-1, 2**32)),
    *((GenerateConfig, {"seed": seed}, "seed", SEED) for seed in (-1, 2**32)),
    *((ChatConfig, {"seed": seed}, "seed", SEED) for seed in (-1, 2**32)),
    *((ChatConfig, {name: ""}, name, EMPTY) for name in ("model", "base")),
    *((ServeConfig, {name: ""}, name, EMPTY) for name in ("model", "base", "log_texts")),
    (ServeConfig, {"served_name": ""}, "served_name", "must not be empty"),
    (ServeConfig, {"host": ""}, "host", "must not be empty; 0.0.0.0 is for all addresses"),
    *((ServeConfig, {"port": port}, "port", "must be in [0, 65535]") for port in (-1, 2**16)),
    *(
        (ServeConfig, {name: 0}, name, "must be 1 or more")
        for name in (
            "max_rows",
            "max_waiting",
            "max_prompt_tokens",
            "max_new_tokens",
            "prefill_tokens",
        )
    ),
    (ServeConfig, {"prefix_cache_bytes": -1}, "prefix_cache_bytes", "must be 0 or more"),
    (ServeConfig, {"max_body_bytes": 999}, "max_body_bytes", "must be 1000 bytes or more"),
    *(
        (ServeConfig, {"request_seconds": x}, "request_seconds", "must be more than 0, and finite")
        for x in (0, inf, nan)
    ),
    *(
        (ServeConfig, {"drain_seconds": x}, "drain_seconds", "must be 0 or more, and finite")
        for x in (-1, inf, nan)
    ),
    (ServeConfig, {"blocked": ["a", ""]}, "blocked", "must not hold an empty text"),
    *((ServeConfig, {"blocked": ["a", text]}, "blocked", STAR) for text in ("*", "f**k", "*a*")),
    (
        ServeConfig,
        {"host": "0.0.0.0"},
        "api_key_env",
        "must be set to serve at another address than 127.0.0.1: anyone who can reach it could use"
        " the model",
    ),
    (
        ServeConfig,
        {"api_key_env": "NOWHERE_SET"},
        "api_key_env",
        "names an environment variable that is not set",
    ),
    (ChatConfig, {"system": ""}, "system", "must not be empty; null is for none"),
    *(
        (
            ChatConfig,
            {"repetition_penalty": x},
            "repetition_penalty",
            "must be more than 0, and finite",
        )
        for x in (0, inf, nan)
    ),
    (ExamplesBenchmarkConfig, {"folder": ""}, "folder", EMPTY),
    *(
        (ExamplesBenchmarkConfig, {name: 0}, name, "must be more than 0")
        for name in ("megabytes", "repeats")
    ),
    *(
        (cls, {name: value}, name, rule)
        for cls in (GenerateConfig, PredictConfig, ChatConfig)
        for name, values, rule in (
            ("max_new_tokens", (0,), "must be more than 0"),
            ("temperature", (-0.1, inf, nan), "must be 0 or more, and finite"),
            ("top_p", (0.0, 1.01, nan), "must be in (0, 1]"),
            ("top_k", (-1,), "must be 0 or more"),
        )
        for value in values
    ),
    *(
        (cls, {"out": "s3://bucket/folder"}, "out", "must be a local folder")
        for cls in (ToHfConfig, FromLlamaConfig, PruneConfig)
    ),
    *((PruneConfig, {name: ""}, name, EMPTY) for name in ("model", "base", "out")),
    *(
        (PruneConfig, keys, "sparsity", "must be set (e.g. 0.5), or pattern=2:4, and not both")
        for keys in ({"sparsity": None}, {"pattern": "2:4"})
    ),
    *(
        (PruneConfig, {"sparsity": value}, "sparsity", "must be more than 0 and less than 1")
        for value in (0.0, 1.0, -0.1, nan, inf)
    ),
    *((ToHfConfig, {name: ""}, name, EMPTY) for name in ("checkpoint", "out", "push_to_hub")),
    *((QuantizeConfig, {name: ""}, name, EMPTY) for name in ("model", "base", "out")),
    (QuantizeConfig, {"out": "s3://bucket/folder"}, "out", "must be a local folder"),
    (QuantizeBenchmarkConfig, {"batch_sizes": [1, 0]}, "batch_sizes", "must be 1 or more"),
    (QuantizeBenchmarkConfig, {"model": ""}, "model", EMPTY),
    (QuantizeBenchmarkConfig, {"model": "m", "data": ""}, "data", EMPTY),
    (QuantizeBenchmarkConfig, {"model": "m"}, "data", "must be set together with model"),
    *(
        (QuantizeBenchmarkConfig, {name: 0}, name, "must be more than 0")
        for name in ("hidden_size", "num_layers", "vocab_size", "new_tokens", "repeats")
    ),
    *(
        (cls, {"max_shard_size": 0}, "max_shard_size", "must be more than 0 bytes")
        for cls in (ToHfConfig, FromLlamaConfig)
    ),
    *(
        (FromLlamaConfig, {name: ""}, name, EMPTY)
        for name in ("model", "config", "out", "tokenizer")
    ),
    (
        FromLlamaConfig,
        {"fresh": ["q_proj", "g_proj"]},
        "fresh",
        "must be among q_proj, k_proj, v_proj, o_proj",
    ),
    (FromLlamaConfig, {"seed": -1}, "seed", SEED),
    *((InspectConfig, {name: ""}, name, EMPTY) for name in ("data", "tokenizer", "plot")),
    (InspectConfig, {"rows": -1}, "rows", "must be 0 or more"),
    (InspectConfig, {"row_numbers": [3, -1]}, "row_numbers", "must all be 0 or more"),
    (InspectConfig, {"max_bytes": 0}, "max_bytes", "must be more than 0 bytes, or null"),
    (InspectConfig, {"plot": "lengths.svg"}, "plot", "must be a file name ending in .png"),
    *(
        (cls, {name: 0}, name, "must be more than 0")
        for cls in (BenchmarkConfig, ModelsBenchmarkConfig)
        for name in ("batch_tokens", "hidden_size", "num_layers", "vocab_size", "repeats")
    ),
    (
        ModelsBenchmarkConfig,
        {"names": ["kda", "llama"]},
        "names",
        "must be among gla, hgrn2, gsa, retnet, linear_attn, lightnet, rwkv6, mamba2, delta_net,"
        " gated_deltanet, kda, gated_deltaproduct, comba, rwkv7",
    ),
    *(
        (
            cls,
            {"context_lengths": lengths},
            "context_lengths",
            "must be 2 tokens or more",
        )
        for cls in (BenchmarkConfig, ModelsBenchmarkConfig)
        for lengths in ([], [512, 1])
    ),
    *((ConversionBenchmarkConfig, {name: ""}, name, EMPTY) for name in ("tokenizer", "folder")),
    *(
        (ConversionBenchmarkConfig, {name: 0}, name, "must be more than 0")
        for name in ("megabytes", "unit_size", "repeats")
    ),
    *(
        (ConversionBenchmarkConfig, {"megabytes": size}, "megabytes", "must be more than 0")
        for size in (inf, nan)
    ),
    (
        ConversionBenchmarkConfig,
        {"context_length": 1},
        "context_length",
        "must be 2 tokens or more",
    ),
    (ConversionBenchmarkConfig, {"num_workers": 1}, "num_workers", "must be 2 or more"),
    *(
        (cls, {"folder": ""}, "folder", EMPTY)
        for cls in (CheckpointBenchmarkConfig, ServingBenchmarkConfig, StartBenchmarkConfig)
    ),
    *(
        (cls, {name: 0}, name, "must be more than 0")
        for cls in (DecodeBenchmarkConfig, CheckpointBenchmarkConfig, ServingBenchmarkConfig)
        for name in ("hidden_size", "num_layers", "vocab_size", "repeats")
    ),
    (ServingBenchmarkConfig, {"vocab_size": 511}, "vocab_size", "must be 512 or more"),
    *(
        (ServingBenchmarkConfig, {name: 0}, name, "must be more than 0")
        for name in ("num_together", "new_tokens", "num_mixed")
    ),
    *(
        (ServingBenchmarkConfig, {name: values}, name, "must be 1 or more")
        for name in ("clients", "context_lengths")
        for values in ([], [0])
    ),
    (DecodeBenchmarkConfig, {"new_tokens": 0}, "new_tokens", "must be more than 0"),
    *(
        (ContextBenchmarkConfig, {name: 0}, name, "must be more than 0")
        for name in ("hidden_size", "num_layers", "vocab_size")
    ),
    (ContextBenchmarkConfig, {"short_steps": 0}, "short_steps", "must be more than 0"),
    (ContextBenchmarkConfig, {"ranks": 1}, "ranks", "must be 2 or more"),
    (
        ContextBenchmarkConfig,
        {"model_type": "llama"},
        "model_type",
        "must be among delta_net, gated_deltanet, gla, hgrn2, kda",
    ),
    *(
        (
            ContextBenchmarkConfig,
            {name: length},
            name,
            "must leave each of the ranks as many tokens, 16 or more",
        )
        for name in ("context_length", "short_context_length")
        for length in (30, 4097)
    ),
    *(
        (StartBenchmarkConfig, {name: 0}, name, "must be more than 0")
        for name in ("megabytes", "repeats")
    ),
    (StartBenchmarkConfig, {"megabytes": inf}, "megabytes", "must be more than 0"),
    (TrainerBenchmarkConfig, {"steps": 3}, "steps", "must be more than 3"),
    (DataBenchmarkConfig, {"epoch_rows": 0}, "epoch_rows", "must be more than 0"),
    *(
        (DecodeBenchmarkConfig, {name: values}, name, "must be 1 or more")
        for name in ("context_lengths", "batch_sizes")
        for values in ([], [0])
    ),
]

# The other side of the borders.
ALLOWED: list[tuple[type, dict[str, Any]]] = [
    *((cls, {}) for cls in GIVEN),
    (ModelConfig, {"config": {}, "pretrained": "p"}),
    *(
        (cls, {"local": None, "remote": "s3://b/d"})
        for cls in (DataConfig, EvalDataConfig, StreamConfig)
    ),
    *((StreamConfig, {name: 1}) for name in ("proportion", "repeat", "choose")),
    *(
        (
            DataConfig,
            {
                "local": None,
                "batching_method": "stratified",
                "streams": {name: StreamConfig(local=name, **weight) for name in ("a-1", "B_2")},
            },
        )
        for weight in ({}, {"proportion": 0.1}, {"repeat": 3.0}, {"choose": 9})
    ),
    (DataConfig, {"download_retries": 0, "download_timeout": 0.1}),
    (
        DataConfig,
        {
            "num_workers": 0,
            "prefetch_factor": 1,
            "shuffle_block_size": 1,
            "num_canonical_nodes": 1,
            "predownload": 1,
        },
    ),
    *((DataConfig, {"cache_limit": limit}) for limit in ("100", "100b", "1.5gb", "10GB", "1kb")),
    *((DataConfig, {"shuffle_seed": seed}) for seed in (0, 2**32 - 1)),
    (EvalDataConfig, {"max_rows": 1}),
    (OptimizerConfig, {"name": "muon", "momentum": 0.5, "update_scale": "original"}),
    (OptimizerConfig, {"name": "muon", "adamw_lr_ratio": 2.0}),
    (OptimizerConfig, {"betas": (0.0, 0.0), "weight_decay": 0.0, "grad_clip_norm": None}),
    *(
        (SchedulerConfig, {"warmup": warmup})
        for warmup in ("0ba", "0dur", "1dur", "1.0dur", ".5dur", "1_000tok", "3ep", "4sp")
    ),
    *(
        (TrainConfig, {"scheduler": SchedulerConfig(name="wsd", warmup="3ba", decay=decay)})
        for decay in ("7ba", "0ba", "0.7dur")
    ),
    *((SchedulerConfig, {"min_lr_ratio": ratio}) for ratio in (0.0, 1.0)),
    *((TrainConfig, {"run_name": name}) for name in ("a", "0", "a-b_c.d")),
    (
        TrainConfig,
        {"seed": 0, "save_num_checkpoints_to_keep": -1, "save_folder": None, "context_length": 2},
    ),
    (TrainConfig, {"eval_data": EvalDataConfig(local="e"), "eval_batch_size": 1}),
    (TrainConfig, {"microbatch_size": "auto"}),
    (
        TrainConfig,
        {"microbatch_size": "auto", "eval_data": EvalDataConfig(local="e"), "eval_batch_size": 1},
    ),
    (TrainConfig, {"callbacks": {"lr_monitor": False}, "algorithms": {"ema": {}}}),
    *(
        (TrainConfig, {"callbacks": {"lr_monitor": None}} | logger)
        for logger in (
            {"loggers": {"file_logger": None}},
            {"tensorboard": True},
            {"wandb": WandbConfig(project="p")},
        )
    ),
    (TrainConfig, {"scheduler": SchedulerConfig(warmup="10ba")}),
    (TrainConfig, {"max_duration": "1ep", "scheduler": SchedulerConfig(warmup="10ba")}),
    (TokenizerTrainConfig, {"vocab_size": 257, "min_frequency": 1, "max_bytes": 1}),
    (SftConfig, OF_REGISTRY | {"val_datasets": ["v"], "val_out": "v"}),
    (SftConfig, {"val_source": ["v"], "val_out": "v", "split": "train", "name": "n"}),
    (SftConfig, {"val_fraction": 0.1, "val_out": "v", "shard_size": 19456}),
    (SftConfig, {"source": ["a/set"], "split": "train", "out": "/o", "cluster": DASK}),
    *(
        (SftConfig, {"template": name, "default_system": "", "add_bos": False})
        for name in ("alpaca", "chatml")
    ),
    (ConvertConfig, {"val_fraction": 0.1, "val_out": "o2"}),
    (ConvertConfig, {"val_fraction": 0.1, "out": "s3://b/o", "val_out": "s3://b/o2"}),
    (
        ConvertConfig,
        {
            "source": ["s3://b/s"],
            "val_fraction": 0.1,
            "out": "s3://b/o",
            "val_out": "/o",
            "cluster": DASK,
        },
    ),
    *((ConvertConfig, {"shard_size": size}) for size in (17408, 2**32 - 1)),
    (ConvertConfig, {"source": ["a/set"], "split": "train", "out": "/o", "cluster": DASK}),
    (ConvertConfig, {"max_doc_length": 1, "min_doc_length": 1, "seed": 0, "num_workers": 1}),
    (
        GenerateConfig,
        {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 0.5, "stop": ["\n"]},
    ),
    *((GenerateConfig, given) for given in ({"prompt": ""}, {"prompts": "p", "batch_size": 1})),
    (
        EvaluateConfig,
        {
            "block_size": 1,
            "plot": "p.PNG",
            "task_limit": None,
            "tasks": ["t"],
            "task_path": "p",
            "max_length": 2,
        },
    ),
    (
        EvaluateConfig,
        {"data": None, "datasets": {name: EvalDataConfig(local=name) for name in "ab"}},
    ),
    (EvaluateConfig, {"data": None, "tasks": ["t"], "num_fewshot": 0, "task_limit": 1}),
    (EvaluateConfig, {"data": None, "suite": "bias", "data_root": ".", "add_bos": True}),
    (EvalTasksConfig, {"interval": "1ba", "limit": 1, "batch_size": 1, "num_fewshot": 0}),
    (InspectConfig, {"rows": 0, "row_numbers": [0], "max_bytes": 1, "plot": "a.PNG"}),
    (InspectConfig, {"max_bytes": None}),
    (FromLlamaConfig, {"fresh": ["k_proj"], "max_shard_size": 1}),
    (BenchmarkConfig, {"context_lengths": [2], "repeats": 1}),
    (ServingBenchmarkConfig, {"vocab_size": 512, "clients": [1], "context_lengths": [1]}),
    (
        PlanConfig,
        {
            "mfu": 1.0,
            "price_per_hour": 0.0,
            "restart_minutes": 0.0,
            "dataset_tokens": 1,
            "save_bandwidth": "0.1GB",
        },
    ),
    (PlanConfig, {"devices": 1, "nodes": 2}),
    (SweepConfig, {"search": "random", "trials": 1, "devices": 1, "retry_failed": True}),
    (SweepConfig, {"search": "tpe", "trials": 1000, "prune_warmup": 0, "metric": "loss"}),
    (ReportConfig, {"smooth": 1, "out": "o"}),
    (
        ConversionBenchmarkConfig,
        {"megabytes": 0.1, "unit_size": 1, "repeats": 1, "context_length": 2, "num_workers": 2},
    ),
    (CleanConfig, NO_STEP | {"exact_dedup": True}),
    *(
        (CleanConfig, NO_STEP | {name: section})
        for name, section in (
            ("minhash", MinhashConfig()),
            ("pii", PiiConfig()),
            ("c4", C4Config()),
            ("language", LanguageConfig(model="m")),
        )
    ),
    *(
        (CleanConfig, {"source": ["a/set"], "split": "train", "out": "/o"} | each)
        for each in (SLURM, {"executor": "ray"})
    ),
    (
        GopherRepetitionConfig,
        {"top_n_grams": [0.0, 1.0, 0.5], "dup_n_grams": [0.0] * 6, "dup_line_frac": 0.0},
    ),
    (
        GopherQualityConfig,
        {"min_doc_words": 0, "min_stop_words": 0, "stop_words": [], "min_alpha_words_ratio": 1.0},
    ),
    (C4Config, {"min_num_sentences": 0}),
    *((PiiConfig, {name: None}) for name in ("emails", "ips")),
]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def ids(cases: list[Any]) -> list[str]:
    return [
        f"{cls.__name__}-{', '.join(f'{k}={v!r}'[:40] for k, v in given.items())}"
        for cls, given, *_ in cases
    ]


@pytest.mark.parametrize(("cls", "given", "name", "rule"), BROKEN, ids=ids(BROKEN))
def test_broken_rule(cls, given, name, rule):
    with pytest.raises(InvalidField) as caught:
        cls(**GIVEN[cls] | given).validate()
    assert (caught.value.name, caught.value.rule) == (name, rule)


@pytest.mark.parametrize(("cls", "given"), ALLOWED, ids=ids(ALLOWED))
def test_allowed(cls, given):
    config = cls(**GIVEN[cls] | given)
    before = dataclasses.asdict(config)
    config.validate()
    assert dataclasses.asdict(config) == before, "it is looked at, not changed"


def test_no_rule_is_left_out():
    """Every `require...` in config.py is broken by some case above."""
    with_rules = {cls for cls in CLASSES if "validate" in vars(cls)}
    assert with_rules == {*GIVEN, *SHARED}
    for cls in GIVEN:
        owners = [cls, *(base for base in cls.__mro__ if base in SHARED)]
        rules = [
            each
            for owner in owners
            for name, each in vars(owner).items()
            if name.startswith(("validate", "_check", "require_"))
        ]
        source = "".join(map(inspect.getsource, rules))
        tested = {name for broken, _, name, _ in BROKEN if broken is cls}
        tested |= {"algorithms", "callbacks", "loggers"}  # whose names have the rules
        named = set(re.findall(r'"([a-z_.]+)"', source)) & (
            {f.name for f in dataclasses.fields(cls)} | {"config.model_type"}
        )
        assert named - tested == set(), cls
    assert with_rules == set(CLASSES)


@pytest.mark.parametrize("cls", [EvaluateConfig, EvalTasksConfig])
def test_tasks_need_the_harness(monkeypatch, cls):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = (
        r"^tasks: lm-evaluation-harness is not installed; pip install 'flame-composer\[eval\]'$"
    )
    with pytest.raises(InvalidField, match=message):
        cls(**GIVEN[cls] | {"tasks": ["t"]}).validate()


def test_a_server_needs_its_packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidField, match=r"pip install 'flame-composer\[serve\]'$"):
        ServeConfig(model="m").validate()


@pytest.mark.parametrize("key", ["short", "x" * 15, "x" * 20 + " ", "ключ" * 5, "x" * 20 + "\n"])
def test_an_api_key_that_is_none(monkeypatch, key):
    monkeypatch.setenv("SERVE_KEY", key)
    with pytest.raises(InvalidField, match="must have 16 characters or more") as refused:
        ServeConfig(model="m", api_key_env="SERVE_KEY").validate()
    assert key not in str(refused.value)
    monkeypatch.setenv("SERVE_KEY", "x" * 16)
    ServeConfig(model="m", host="0.0.0.0", api_key_env="SERVE_KEY").validate()


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_global_batch_divides_among_devices(monkeypatch, devices):
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    config = TrainConfig(**GIVEN[TrainConfig])  # 8 rows, 4 at a time
    if devices <= 2:
        config.validate()
    else:
        rule = re.escape(
            "global_batch_size: must be a multiple of devices x microbatch_size = 4 x 4 = 16"
        )
        with pytest.raises(InvalidField, match=f"^{rule}$"):
            config.validate()


def test_auto_needs_rows_for_every_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    rule = "^global_batch_size: must be a multiple of the 3 devices$"
    with pytest.raises(InvalidField, match=rule):
        TrainConfig(**GIVEN[TrainConfig] | {"microbatch_size": "auto"}).validate()


@pytest.mark.parametrize("world_size", ["", "0", "-1", "two", "1.0", "1" * 5000])
def test_world_size_that_is_no_number(monkeypatch, world_size):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(
        ConfigError,
        match=f"^environment: WORLD_SIZE={world_size}: must be the number of processes; ",
    ):
        TrainConfig(**GIVEN[TrainConfig]).validate()


def train_config(global_batch_size: int, context_length: int) -> TrainConfig:
    given = GIVEN[TrainConfig] | {
        "global_batch_size": global_batch_size,
        "context_length": context_length,
    }
    return TrainConfig(**given)


counts = st.integers(0, 10**12)
sizes = st.integers(1, 10**4)


@given(count=counts, batch=sizes, context=st.integers(2, 10**5), epoch=st.integers(1, 10**7))
def test_in_batches(count, batch, context, epoch):
    """The fewest whole batches that hold that much."""
    config = train_config(batch, context)
    assert config.in_batches(f"{count}ba", None) == count
    assert config.in_batches(f"{count:_}ba", None) == count
    assert config.in_batches(f"{count}ep", None) is None
    assert config.in_batches(f"{count}ep", epoch) == count * epoch
    for unit, per_batch in (("sp", batch), ("tok", batch * context)):
        batches = config.in_batches(f"{count}{unit}", None)
        assert batches is not None
        assert (batches - 1) * per_batch < count <= batches * per_batch


@given(thousandths=st.integers(0, 1000), run=st.integers(1, 10**6))
def test_fractions_of_the_run_in_batches(thousandths, run):
    config = train_config(1, 2)
    duration = f"{'1.0' if thousandths == 1000 else f'0.{thousandths:03}'}dur"
    require_duration(duration, "x", fraction=True, zero=True)
    assert config.in_batches(duration, 5) is None
    batches = config.in_batches(duration, 5, run)
    assert batches in (
        exact := math.ceil(Fraction(thousandths, 1000) * run),
        exact + 1,
    ), "0.1 is not a tenth to a computer"


@pytest.mark.parametrize(
    ("interval", "batches", "seconds"),
    [
        ("500ba", 500, None),
        ("0.1dur", 10, None),
        ("2ep", 80, None),
        ("90s", None, 90),
        ("30min", None, 1800),
        ("2h", None, 7200),
    ],
)
def test_saving_goes_by_batches_or_by_the_clock(interval, batches, seconds):
    config = train_config(8, 32)
    config.save_interval = interval
    config.max_duration = "100ba"
    plan = config.plan(epoch_batches=40)
    assert (plan.save_batches, plan.save_seconds) == (batches, seconds)
    assert (plan.total, plan.per_epoch) == (100, 40)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"warmup": "2ep"}, "scheduler.warmup"),
        ({"warmup": "41ba"}, "scheduler.warmup"),
        ({"t_max": "39ba"}, "scheduler.t_max"),
        ({"name": "wsd", "warmup": "0.5dur", "decay": "21ba"}, "scheduler.decay"),
    ],
)
def test_a_run_in_epochs_is_looked_at_when_their_length_is_known(changes, field):
    config = train_config(8, 32)
    config.max_duration, config.scheduler = "1ep", SchedulerConfig(**changes)
    config.validate()
    with pytest.raises(InvalidField) as caught:
        config.plan(epoch_batches=40)
    assert caught.value.name == field


@given(text=st.text(alphabet="0123456789._-badurtokspe ", max_size=12) | st.text(max_size=5))
def test_whatever_passes_as_a_duration_can_be_computed(text):
    try:
        require_duration(text, "x", fraction=True)
    except InvalidField:
        return
    batches = train_config(8, 32).in_batches(text, 10, 100)
    assert batches is not None
    assert batches >= 1


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_type_and_a_line_of_doc(cls):
    docs = docs_of(cls)
    for field in dataclasses.fields(cls):
        doc = docs.get(field.name, "")
        assert re.match(r"[A-Z&`].*\.$", doc, re.DOTALL), f"{cls.__name__}.{field.name}: {doc!r}"
    if issubclass(cls, ScriptConfig):
        assert inspect.cleandoc(cls.__doc__).endswith("."), "what `--help` says of the script"


def test_reading_a_configuration_imports_nothing_heavy():
    code = (
        "import json, sys\n"
        "from flame_composer.config import cli, load, use\n"
        "load.load(use.GenerateConfig, ['model=m', 'prompt=p'])\n"
        "print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    imported = set(json.loads(result.stdout))
    assert "omegaconf" in imported
    assert (
        imported
        & {
            "torch",
            "composer",
            "transformers",
            "streaming",
            "numpy",
            "fla",
            "triton",
            "datasets",
            "wandb",
        }
        == set()
    )


# Text keys that hold no path; any other one is in its section's `paths`.
NO_PATHS = {
    "model_type",
    "shuffle_algo",
    "quantize",
    "gradient_compression",
    "pattern",
    "suite",
    "system_instruction",
    "run_name",
    "max_duration",
    "eval_interval",
    "save_interval",
    "interval",
    "warmup",
    "decay",
    "t_max",
    "cache_limit",
    "save_bandwidth",
    "project",
    "entity",
    "group",
    "tags",
    "targets",
    "tasks",
    "prompt",
    "stop",
    "text_column",
    "format",
    "default_system",
    "system",
    "datasets",
    "val_datasets",
    "suffixes",
    "eos_token",
    "split",
    "name",
    "cluster",
    "languages",
    "stop_words",
    "emails",
    "ips",
    "partition",
    "time",
    "qos",
    "address",
    "fresh",
    "push_to_hub",
    "names",
    "token_dtype",
    "update_scale",
    "metric",
    "prune",
    "served_name",
    "host",
    "api_key_env",
    "blocked",
}


@pytest.mark.parametrize("cls", GIVEN, ids=lambda cls: cls.__name__)
def test_every_text_key_is_a_path_or_is_known_to_be_none(cls):
    paths, texts = (
        set(getattr(cls, "paths", ())),
        {name for name, hint in hints_of(cls).items() if takes_text(hint)},
    )
    texts -= {name for name, hint in hints_of(cls).items() if get_origin(hint) is Literal}
    assert paths <= texts
    assert texts - paths <= NO_PATHS, "add it to `paths`, where it is one"
    assert not paths & NO_PATHS
