"""Arguments to configuration: precedence, and one line for every mistake, with where it is and
what to do about it.
"""

from __future__ import annotations

import errno
import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flame_composer.config import cli
from flame_composer.config.bench import (
    AllBenchmarksConfig,
    BenchmarkConfig,
    CheckpointBenchmarkConfig,
    ConversionBenchmarkConfig,
    DataBenchmarkConfig,
    DecodeBenchmarkConfig,
    QuantizeBenchmarkConfig,
    StartBenchmarkConfig,
    TrainerBenchmarkConfig,
)
from flame_composer.config.clean import CleanConfig
from flame_composer.config.cli import help_text, run
from flame_composer.config.convert import (
    ConvertConfig,
    FromLlamaConfig,
    InspectConfig,
    PruneConfig,
    QuantizeConfig,
    ToHfConfig,
    TokenizerTrainConfig,
)
from flame_composer.config.data import StreamConfig
from flame_composer.config.fields import ANY_NAME, fields_of, nearest
from flame_composer.config.load import load
from flame_composer.config.plan import PlanConfig
from flame_composer.config.rules import ScriptConfig
from flame_composer.config.sections import WandbConfig
from flame_composer.config.sweep import SweepConfig
from flame_composer.config.train import TrainConfig
from flame_composer.config.use import EvaluateConfig, GenerateConfig, ReportConfig
from flame_composer.config.written import as_meant, parse_yaml
from flame_composer.errors import ConfigError, DataError, InvalidField
from flame_composer.upstream.omegaconf import dump_yaml

SCRIPTS: list[type[ScriptConfig]] = [
    TrainConfig,
    TokenizerTrainConfig,
    ConvertConfig,
    EvaluateConfig,
    GenerateConfig,
    ToHfConfig,
    FromLlamaConfig,
    InspectConfig,
    PruneConfig,
    BenchmarkConfig,
    ConversionBenchmarkConfig,
    DecodeBenchmarkConfig,
    QuantizeBenchmarkConfig,
    QuantizeConfig,
    CheckpointBenchmarkConfig,
    StartBenchmarkConfig,
    TrainerBenchmarkConfig,
    DataBenchmarkConfig,
    AllBenchmarksConfig,
    CleanConfig,
    PlanConfig,
    ReportConfig,
    SweepConfig,
]
BASE = """
run_name: base
max_duration: 10ba
global_batch_size: 8
microbatch_size: 8
tokenizer: tok
model:
  config: {model_type: gla, hidden_size: 64}
train_data: {local: data}
"""
OPTIMIZER_KEYS = ", ".join(
    f"optimizer.{name}"
    for name in (
        "name",
        "lr",
        "betas",
        "eps",
        "momentum",
        "update_scale",
        "adamw_lr_ratio",
        "weight_decay",
        "decay",
        "grad_clip_norm",
    )
)
MODEL_KEYS = "model.config, model.pretrained, model.mup_base_width"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with base.yaml in it."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def train(*arguments: str) -> TrainConfig:
    return load(TrainConfig, ["base.yaml", *arguments])


def train_yaml(text: str | bytes, *arguments: str) -> TrainConfig:
    """base.yaml with `text` after it, or instead of it if that is no mapping."""
    content = text if isinstance(text, bytes) else (BASE + text).encode()
    Path("x.yaml").write_bytes(content)
    return load(TrainConfig, ["x.yaml", *arguments])


def message_of(call: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def test_defaults_then_yaml_then_arguments():
    config = train_yaml(
        "optimizer: {lr: 1e-3, eps: 1.0e-9}\nseed: 1\n", "optimizer.lr=0.5", "seed=2", "seed=3"
    )
    assert config.optimizer.lr == 0.5, "an argument beats the file"
    assert config.optimizer.eps == 1e-9, (
        "the file beats the default, beside a key that an argument sets"
    )
    assert config.optimizer.weight_decay == 0.01
    assert config.seed == 3, "the last argument counts"
    assert config.model.config == {"model_type": "gla", "hidden_size": 64}
    assert config.origins["seed"] == ("command line", 3)
    assert config.origins["optimizer.eps"] == ("x.yaml", 1e-9)


def test_types_come_out_as_declared():
    config = train(
        "optimizer.lr=1",
        "optimizer.betas=[0.8,0.9]",
        "varlen=no",
        "eval_batch_size=4",
        "save_folder=null",
    )
    assert (config.optimizer.lr, type(config.optimizer.lr)) == (1.0, float)
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.varlen is False
    assert config.eval_batch_size == 4
    assert config.save_folder is None
    assert train("optimizer.betas=0.8,0.9").optimizer.betas == (0.8, 0.9)
    assert train("optimizer.grad_clip_norm=null").optimizer.grad_clip_norm is None


def test_nested_keys_of_the_model():
    config = train(
        "model.config.num_heads=2",
        "model.config.attn={layers: [0, 1], num_heads: 4}",
        "model.config.attn.window=8",
    )
    assert config.model.config == {
        "model_type": "gla",
        "hidden_size": 64,
        "num_heads": 2,
        "attn": {"layers": [0, 1], "num_heads": 4, "window": 8},
    }
    assert config.origins["model.config.num_heads"] == ("command line", 2)
    assert config.origins["model.config.hidden_size"] == ("base.yaml", 64)


def test_sections_that_are_off_unless_set():
    config = train()
    assert (config.eval_data, config.wandb, config.parallelism.fsdp) == (None, None, None)
    config = train("eval_data.local=val", "wandb.project=p", "parallelism.fsdp={}")
    assert (config.eval_data.local, config.eval_data.num_workers) == ("val", 0)
    assert config.wandb.project == "p"
    assert config.parallelism.fsdp.sharding_strategy == "FULL_SHARD"
    assert train_yaml("wandb: {project: p}\n", "wandb=null").wandb is None
    assert (
        message_of(lambda: train("wandb.group=g"))
        == "base.yaml: wandb.project: must be set (Weights & Biases project; the run's name and id"
        " are run_name); add it to the file or give wandb.project=..."
    )


SOURCES = {
    "a": ["a"],
    "a,b": ["a", "b"],
    " a , b ": ["a", "b"],
    "a,,b,": ["a", "b"],
    "[a,b]": ["a", "b"],
    "*.jsonl": ["*.jsonl"],
    "[*.jsonl,x/**/*.txt]": ["*.jsonl", "x/**/*.txt"],
    "[ab]*.txt": ["[ab]*.txt"],
    "a: b": ["a: b"],
    "-": ["-"],
    "['a,b',c]": ["a,b", "c"],
    '["a"]': ["a"],
    "3": ["3"],
    "[3,0x1]": ["3", "0x1"],
    "true": ["true"],
    "#x": ["#x"],
    "data/{a}.txt": ["data/{a}.txt"],
    "ünï.txt": ["ünï.txt"],
    "s3://b/c": ["s3://b/c"],
    "a=b": ["a=b"],
}


@pytest.mark.parametrize("text", SOURCES)
def test_lists(text):
    assert load(TokenizerTrainConfig, [f"source={text}", "out=o"]).source == SOURCES[text]


@pytest.mark.parametrize(
    ("text", "numbers"), [("3", [3]), ("3,5", [3, 5]), ("[3,5]", [3, 5]), ("[]", [])]
)
def test_lists_of_numbers(text, numbers):
    assert load(InspectConfig, ["data=d", f"row_numbers={text}"]).row_numbers == numbers


@pytest.mark.parametrize("text", ["true", "1.5", "a", "[a]"])
def test_lists_of_numbers_hold_nothing_else(text):
    shown = {"a": "['a']", "[a]": "['a']"}
    message = message_of(lambda: load(InspectConfig, ["data=d", f"row_numbers={text}"]))
    assert message == f"command line: row_numbers={shown.get(text, text)}: must be list[int]"


def test_lists_in_yaml():
    Path("x.yaml").write_text("source: [a, 'b,c']\nsuffixes: .py,.md\nout: o\n")
    config = load(TokenizerTrainConfig, ["x.yaml"])
    assert (config.source, config.suffixes) == (["a", "b,c"], [".py", ".md"])


@given(
    text=st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="$"), max_size=20
    ).filter("???".__ne__)
)
@example("def f(x):")
@example("*.jsonl")
@example("nul")
@example("{a: 1}")
@example("[1, 2]")
@example("0x10")
@example("yes")
@example(" spaces ")
@example("a=b")
@example("# no comment")
@example("two\nlines")
@example("'")
@settings(deadline=None)
def test_strings_are_taken_as_they_stand(text):
    assert load(GenerateConfig, ["model=m", f"prompt={text}"]).prompt == text


def test_null_is_null_only_where_a_value_may_be_missing():
    assert train("save_folder=null").save_folder is None
    assert train("train_data.remote=null").train_data.remote is None
    assert (
        message_of(lambda: train("tokenizer=null")) == "command line: tokenizer=null: must be str"
    ), "as in a file"
    assert load(GenerateConfig, ["model=m", "prompt=null"]).prompt is None


def test_a_dollar_sign_can_be_escaped():
    assert (
        load(GenerateConfig, ["model=m", r"prompt=echo \${HOME} $HOME $(x)"]).prompt
        == "echo ${HOME} $HOME $(x)"
    )
    assert (
        message_of(lambda: load(GenerateConfig, ["model=m", "prompt=${HOME}"]))
        == "command line: prompt=${HOME}: Interpolation key 'HOME' not found; where '${' is meant"
        " as it stands, write '\\${'"
    )


PRECISION = "must be one of ['fp32', 'amp_bf16', 'amp_fp16']"
COMMAND_LINE = {
    # Unknown keys, with the nearest.
    "optimizer.weight_dcay=0.1": (
        "optimizer.weight_dcay: unknown key; did you mean optimizer.weight_decay?"
    ),
    "lr=1": "lr: unknown key; did you mean optimizer.lr?",
    "sed=1": "sed: unknown key; did you mean seed?",
    "séed=1": "séed: unknown key; did you mean seed?",
    "weight_decay=1": "weight_decay: unknown key; did you mean optimizer.weight_decay?",
    "optimiser.lr=1": "optimiser: unknown key; did you mean optimizer?",
    "train_data.locale=x": "train_data.locale: unknown key; did you mean train_data.local?",
    "parallelism.fsdp.shard_strategy=x": (
        "parallelism.fsdp.shard_strategy: unknown key; did you mean"
        " parallelism.fsdp.sharding_strategy?"
    ),
    "wandb.projct=p": "wandb.projct: unknown key; did you mean wandb.project?",
    "zzz=1": "zzz: unknown key; see --help for all keys",
    "parallelism.fsdp.sync_module_states=true": (
        "parallelism.fsdp.sync_module_states: unknown key; it is of torch's first FSDP; FSDP2 does"
        " without it"
    ),
    "parallelism.fsdp.zzz=1": (
        "parallelism.fsdp.zzz: unknown key; the keys of parallelism.fsdp are"
        " parallelism.fsdp.sharding_strategy, parallelism.fsdp.replicas,"
        " parallelism.fsdp.mixed_precision, parallelism.fsdp.state_dict_type"
    ),
    "fsdp_config.sharding_strategy=FULL_SHARD": (
        "fsdp_config: unknown key; did you mean parallelism.fsdp?"
    ),
    "model.name=gla": "model.name: unknown key; did you mean model.config.model_type?",
    "training.seq_len=2048": "training.seq_len: unknown key; did you mean context_length?",
    "training.seed=1": "training.seed: unknown key; did you mean seed?",
    "nnodes=2": (
        "nnodes: unknown key; it is the launcher's (composer, torchrun or Slurm): see"
        " docs/migrating-from-flame.md, Several nodes"
    ),
    "a.b.c=1": "a: unknown key; see --help for all keys",
    "resolved_yaml=x": "resolved_yaml: unknown key; see --help for all keys",
    "--seed=1": "--seed: unknown key; did you mean seed?",
    "optimizer.lr =1": "optimizer.lr : unknown key; did you mean optimizer.lr?",
    "optimizer.=1": "optimizer.: unknown key; did you mean optimizer?",
    ".lr=1": ".lr: unknown key; did you mean optimizer.lr?",
    "=3": "'': unknown key; see --help for all keys",
    "=": "'': unknown key; see --help for all keys",
    # No key=value.
    "": "'': must be key=value (only the first argument can be a file)",
    "seed": "seed: must be key=value (only the first argument can be a file)",
    "seed:1": "seed:1: must be key=value (only the first argument can be a file)",
    "--seed": "--seed: must be key=value (only the first argument can be a file)",
    # Wrong types.
    "seed=x": "seed=x: must be int",
    "seed=1.5": "seed=1.5: must be int",
    "seed=1e3": "seed=1000.0: must be int",
    "seed=true": "seed=true: must be int",
    "seed=": "seed=null: must be int",
    "seed=null": "seed=null: must be int",
    "seed=[1]": "seed=[1]: must be int",
    "seed={}": "seed={}: must be int",
    "seed.x=1": "seed={'x': 1}: must be int",
    "seed=2024-01-01": "seed=2024-01-01: must be int",
    "varlen=maybe": "varlen=maybe: must be bool",
    "optimizer.lr=high": "optimizer.lr=high: must be float",
    "optimizer.lr==1": "optimizer.lr==1: must be float",
    "optimizer.lr.x=1": "optimizer.lr={'x': 1}: must be float",
    "optimizer.betas=0.9": "optimizer.betas=0.9: must be tuple[float, float]",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9]: must be tuple[float, float]",
    "optimizer.betas=[1,2,3]": "optimizer.betas=[1, 2, 3]: must be tuple[float, float]",
    "optimizer.betas.0=0.9": "optimizer.betas={'0': 0.9}: must be tuple[float, float]",
    "optimizer.betas[0]=0.9": "optimizer.betas={'0': 0.9}: must be tuple[float, float]",
    "wandb.tags=null": "wandb.tags=null: must be list[str]",
    "precision=bf16": f"precision=bf16: {PRECISION}; did you mean amp_bf16?",
    "precision=FP32": f"precision=FP32: {PRECISION}; did you mean fp32?",
    "precision=half": f"precision=half: {PRECISION}",
    "precision=[fp32]": f"precision=['fp32']: {PRECISION}",
    "scheduler.name=cosin": (
        "scheduler.name=cosin: must be one of ['cosine', 'linear', 'constant', 'wsd']; did you mean"
        " cosine?"
    ),
    "stall_timeout=long": "stall_timeout=long: must be float, or null",
    # A value where a section is, and the reverse.
    "model=x": f"model=x: must hold keys and values; its keys are {MODEL_KEYS}",
    "model=3": f"model=3: must hold keys and values; its keys are {MODEL_KEYS}",
    "model=[1]": f"model=[1]: must hold keys and values; its keys are {MODEL_KEYS}",
    "model.config=3": "model.config=3: must be dict[str, Any]",
    "model.config=[1]": "model.config=[1]: must be dict[str, Any]",
    "model.config=null": "model.config=null: must be dict[str, Any]",
    "model.config={1: 2}": "model.config={1: 2}: must be dict[str, Any]",
    "optimizer=": f"optimizer=null: must hold keys and values; its keys are {OPTIMIZER_KEYS}",
    "optimizer=null": f"optimizer=null: must hold keys and values; its keys are {OPTIMIZER_KEYS}",
    # Values that break a rule: where it was set, even if the rule is about something else.
    "train_data.local=": "train_data.local=: must not be empty",
    "run_name=": "run_name=: must be letters, digits, '.', '_' and '-' (it names folders)",
    "seed=-1": "seed=-1: must be in [0, 2**32)",
    "optimizer.lr=nan": "optimizer.lr=nan: must be more than 0, and finite",
    "optimizer.lr=inf": "optimizer.lr=inf: must be more than 0, and finite",
    "optimizer.lr=1e400": "optimizer.lr=inf: must be more than 0, and finite",
    "global_batch_size=0": "global_batch_size=0: must be a positive number of rows",
    "scheduler.warmup=11ba": (
        "scheduler.warmup=11ba: must not be longer than the run: 11 batches, of 10 in all"
        " (max_duration=10ba)"
    ),
    # Interpolations that lead nowhere.
    "log_folder=${foo}": (
        "log_folder=${foo}: Interpolation key 'foo' not found; where '${' is meant as it stands,"
        " write '\\${'"
    ),
    "run_name=${run_name}": "run_name=${run_name}: Recursive interpolation detected",
    "log_folder=${": "log_folder=${: cannot be read: no viable alternative at input '${'",
    "log_folder=${oc.env:FLAME_NOT_SET}": (
        "log_folder=${oc.env:FLAME_NOT_SET}: Environment variable 'FLAME_NOT_SET' not found"
    ),
    "model.config.a={b: '${oc.env:FLAME_NOT_SET}'}": (
        "model.config.a.b=${oc.env:FLAME_NOT_SET}: Environment variable 'FLAME_NOT_SET' not found"
    ),
    "log_folder=${nosuch:1}": "log_folder=${nosuch:1}: Unsupported interpolation type nosuch",
    "log_folder=${optimizer}": "log_folder=${optimizer}: must be str",
    "seed=${run_name}": "seed=${run_name}: must be int",
    "optimizer.betas=${seed}": "optimizer.betas=${seed}: must be tuple[float, float]",
    "optimizer=${scheduler}": (
        f"optimizer=${{scheduler}}: must hold keys and values; its keys are {OPTIMIZER_KEYS}"
    ),
}


@pytest.mark.parametrize("argument", COMMAND_LINE)
def test_mistakes_on_the_command_line(argument):
    assert message_of(lambda: train(argument)) == f"command line: {COMMAND_LINE[argument]}"


NOT_YAML = "x.yaml: not valid YAML: "
IN_YAML = {
    "optimizer: {weight_dcay: 1}": (
        "x.yaml: optimizer.weight_dcay: unknown key; did you mean optimizer.weight_decay?"
    ),
    "lr: 1": "x.yaml: lr: unknown key; did you mean optimizer.lr?",
    "model_config: 1": "x.yaml: model_config: unknown key; did you mean model.config?",
    "3: 4": "x.yaml: 3: unknown key; see --help for all keys",
    "true: 4": "x.yaml: True: unknown key; see --help for all keys",
    "x: &x {lr: 1}\noptimizer: *x": "x.yaml: x.lr: unknown key; did you mean optimizer.lr?",
    "optimizer: &o {lr: 1}\nscheduler: *o": (
        "x.yaml: scheduler.lr: unknown key; did you mean optimizer.lr?"
    ),
    "optimizer.lr: 1": (
        "x.yaml: optimizer.lr: unknown key; in a file write lr on a line of its own under optimizer"
    ),
    "optimizer: 3": (
        f"x.yaml: optimizer=3: must hold keys and values; its keys are {OPTIMIZER_KEYS}"
    ),
    "optimizer:": (
        f"x.yaml: optimizer=null: must hold keys and values; its keys are {OPTIMIZER_KEYS}"
    ),
    "optimizer: {lr: fast}": "x.yaml: optimizer.lr=fast: must be float",
    "precision: bf16": f"x.yaml: precision=bf16: {PRECISION}; did you mean amp_bf16?",
    "optimizer: {lr: -1}": "x.yaml: optimizer.lr=-1: must be more than 0, and finite",
    "seed: ${nowhere}": (
        "x.yaml: seed=${nowhere}: Interpolation key 'nowhere' not found; where '${' is meant as it"
        " stands, write '\\${'"
    ),
    "seed: ${oc.env:FLAME_NOT_SET}": (
        "x.yaml: seed=${oc.env:FLAME_NOT_SET}: Environment variable 'FLAME_NOT_SET' not found"
    ),
    "seed: ${": f"{NOT_YAML}no viable alternative at input '${{' full_key: seed object_type=dict",
    "run_name: twice": (
        f"{NOT_YAML}while constructing a mapping at line 2, column 1 found duplicate key run_name"
        " at line"
    ),
    "optimizer: {lr: 1, lr: 2}": f"{NOT_YAML}while constructing a mapping at",
    "optimizer:\n\tlr: 1": (
        f"{NOT_YAML}while scanning for the next token found character that cannot start any"
        " token at"
    ),
    "a: b: c": f"{NOT_YAML}mapping values are not allowed in this context at",
    "seed: *a": f"{NOT_YAML}found undefined alias at",
    "seed: &a [*a]": f"{NOT_YAML}YAML recursive aliases are not supported. at",
    "seed: [1": f"{NOT_YAML}while parsing a flow sequence at",
    f"seed: {'[' * 3000}{']' * 3000}": (
        f"{NOT_YAML}lists and mappings in one another, more than 100 deep"
    ),
    f"seed: {'9' * 5000}": (
        f"{NOT_YAML}Exceeds the limit (4300 digits) for integer string conversion"
    ),
    "seed: 1\x00": f"{NOT_YAML}unacceptable character #x0000: control characters are not allowed",
    "? {a: 1}\n: 3": f"{NOT_YAML}while constructing a mapping at",
    "seed: !!python/object/apply:os._exit [7]": (
        f"{NOT_YAML}could not determine a constructor for the tag"
    ),
}


@pytest.mark.parametrize("text", IN_YAML, ids=lambda text: repr(text[:40]))
def test_mistakes_in_a_file(text):
    message = message_of(lambda: train_yaml(text))
    assert message.startswith(IN_YAML[text])
    assert message == IN_YAML[text] or text not in COMMAND_LINE, "no more than that"
    assert "\n" not in message


NO_MAPPING = "x.yaml: must hold keys and values (a YAML mapping)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", NO_MAPPING),
        (b"[]", NO_MAPPING),
        (b"3", NO_MAPPING),
        (b"abc", "x.yaml: abc: unknown key; see --help for all keys"),
        (
            b"\xff\xfe\x00",
            (
                "x.yaml: not valid YAML: 'utf-8' codec can't decode byte 0xff in position 0:"
                " invalid start byte"
            ),
        ),
        *(
            (
                empty,
                (
                    "x.yaml: global_batch_size: must be set (Rows per optimizer step over all"
                    " devices); add it to the file or give global_batch_size=..."
                ),
            )
            for empty in (b"", b"\n", b"# all of it\n", b"---\n", b"null\n")
        ),
        (
            b"---\nseed: 1\n---\nseed: 2\n",
            (
                "x.yaml: not valid YAML: expected a single document in the stream at "
                "line 2, column 1 but found another document at line 3, column 1"
            ),
        ),
    ],
)
def test_files_that_hold_something_else(content, message):
    assert message_of(lambda: train_yaml(content)) == message


def test_a_byte_order_mark_does_no_harm():
    assert train_yaml(("\ufeff" + BASE + "seed: 5").encode()).seed == 5


def test_files_that_are_not_there(folder):
    (folder / "sub").mkdir()
    for file, message in {
        "bas.yaml": "bas.yaml: no such file; did you mean base.yaml?",
        "nowhere/base.yaml": "nowhere/base.yaml: no such file",
        "base.yml": "base.yml: no such file; did you mean base.yaml?",
        "sub": "sub: is a folder; name a YAML file",
        "x" * 5000: f"{'x' * 5000}: no such file",
        "a\0b": "a\0b: no such file",
        "--config": (
            "command line: --config: unknown option; arguments are [file.yaml] [key=value ...], see"
            " --help"
        ),
    }.items():
        assert message_of(lambda file=file: load(TrainConfig, [file])) == message
    assert (
        message_of(lambda: load(TrainConfig, ["base.yaml", "base.yaml"]))
        == "command line: base.yaml: must be key=value (only the first argument can be a file)"
    )


@pytest.mark.parametrize(
    ("cls", "key"),
    [
        (TokenizerTrainConfig, "out"),
        (ConvertConfig, "out"),
        (EvaluateConfig, "model"),
        (GenerateConfig, "model"),
        (ToHfConfig, "checkpoint"),
        (InspectConfig, "data"),
        (TrainConfig, "global_batch_size"),
    ],
)
def test_what_must_be_set_is_named_with_the_remedy(cls, key):
    doc = next(doc for name, _, _, doc in fields_of(cls) if name == key).rstrip(".")
    message = f"command line: {key}: must be set ({doc}); add it to the file or give {key}=..."
    assert message_of(lambda: load(cls, [])) == message


@pytest.mark.parametrize("cls", [TrainConfig, PlanConfig, ConvertConfig])
def test_names_of_others_lead_to_keys_of_ours(cls):
    ours = {"model.config.model_type", *(key for key, _, _, _ in fields_of(cls))}
    assert len(cls.elsewhere) > 20
    for theirs, remedy in cls.elsewhere.items():
        meant = re.fullmatch(r"did you mean (.+)\?", remedy)
        named = set(re.findall(r"[a-z_.]+", meant[1])) if meant else set()
        assert named - {"or", "for", "data"} <= ours, theirs
        if theirs in ours:
            assert cls is PlanConfig, "which has some that are not the run's"
            continue
        shown = message_of(lambda theirs=theirs: load(cls, [f"{theirs}=1"]))
        assert shown == f"command line: {theirs}: unknown key; {remedy}"


def test_a_name_of_others_that_a_plan_takes():
    assert (
        message_of(lambda: load(PlanConfig, ["gpus=8"]))
        == "command line: gpus: unknown key; did you mean devices?"
    )
    assert (
        message_of(lambda: load(PlanConfig, ["steps=8"]))
        == "command line: steps: unknown key; did you mean max_duration?"
    )


KEYS = [key for key, annotation, _, _ in fields_of(TrainConfig)]


@given(key=st.sampled_from(KEYS), data=st.data())
def test_one_wrong_letter_finds_the_key(key, data):
    """Whatever letter of a key is left out, a key of that section or of that name is offered."""
    leaf = key.rpartition(".")[2]
    cut = data.draw(st.integers(len(key) - len(leaf), len(key) - 1))
    typo = key[:cut] + key[cut + 1 :]
    if len(leaf) < 5 or typo in KEYS:
        return
    offered = re.fullmatch(r"; did you mean (.+)\?", nearest(typo, KEYS))
    assert offered is not None
    assert offered[1] in KEYS
    assert offered[1].rpartition(".")[2][0:1] or key.startswith(offered[1])


ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
VALUES = ANY | st.sampled_from(
    [
        "null",
        "nan",
        "inf",
        "-1",
        "1e999",
        "[]",
        "{}",
        "[",
        "{",
        "'",
        "${",
        "${seed}",
        "${oc.decode:'7'}",
        "&a",
        "*a",
        "!!x",
    ]
)


def loaded_or_refused(argv: list[str]) -> TrainConfig | str:
    try:
        return load(TrainConfig, argv)
    except ConfigError as error:
        return str(error)


@given(
    key=st.sampled_from(KEYS) | ANY,
    suffix=st.sampled_from(["", ".x", "[0]", "..", " "]),
    value=VALUES,
)
@settings(max_examples=150, deadline=None)
def test_no_argument_gives_a_traceback(key, suffix, value):
    """Any key=value is either taken or refused with a ConfigError."""
    result = loaded_or_refused(["base.yaml", f"{key}{suffix}={value}"])
    assert isinstance(result, TrainConfig) or re.match("(command line|base.yaml): ", result)


@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | ANY,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(ANY | st.integers(), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    key=st.sampled_from([key for key in KEYS if "." not in key]),
)
@settings(max_examples=150, deadline=None)
def test_no_file_gives_a_traceback(content, key):
    Path("any.yaml").write_text(
        yaml.safe_dump(yaml.safe_load(BASE) | {key: content}, allow_unicode=True), encoding="utf-8"
    )
    result = loaded_or_refused(["any.yaml"])
    assert isinstance(result, TrainConfig) or result.startswith("any.yaml: ")


# Texts as they are written

LOOK_LIKE_NUMBERS = [
    "1.10",
    "0123",
    "1e5",
    "no",
    "true",
    "2024-01-01",
    "1:30",
    "0x1F",
    "1_000",
    ".5",
    "1.",
    "+1",
    "y",
    "off",
    "=",
    "0b11",
    ".inf",
    "12:30:45",
]


@pytest.mark.parametrize("text", LOOK_LIKE_NUMBERS)
def test_a_text_is_what_was_written(text, monkeypatch):
    """In a file and on the command line, alone, in lists, in sections, under names of the user's
    own, and saved.
    """
    for config in (
        train_yaml(
            f"log_folder: {text}\nwandb: {{project: {text}, tags: [{text}, b], group: &g"
            f" {text}}}\neval_data:\n  local: {text}\nsave_folder: {text}\n",
            f"tokenizer={text}",
        ),
        train(
            f"log_folder={text}",
            f"wandb={{project: {text}, tags: [{text}, b], group: {text}}}",
            f"eval_data.local={text}",
            f"save_folder={text}",
            f"tokenizer={text}",
        ),
    ):
        assert config.wandb is not None
        assert config.eval_data is not None
        found = (
            config.log_folder,
            config.wandb.project,
            config.wandb.group,
            config.eval_data.local,
            config.save_folder,
        )
        assert (*found, config.tokenizer) == (text,) * 6
        assert config.wandb.tags == [text, "b"]
        assert config.origins["wandb.group"][1] == text
        Path("again.yaml").write_text(config.resolved_yaml, encoding="utf-8")
        assert load(TrainConfig, ["again.yaml"]) == config
        assert yaml.safe_load(config.resolved_yaml)["wandb"]["tags"] == [
            text,
            "b",
        ], "for those who read it with PyYAML"


@pytest.mark.parametrize(
    "name", ["1.10", "0123", "1e5", "no", "0x1F", "1_000", "true", "2024-01-01"]
)
def test_a_run_is_named_as_it_is_written(name):
    for config in (
        train_yaml("", f"run_name={name}"),
        train_file(BASE.replace("run_name: base", f"run_name: {name}")),
    ):
        assert config.run_name == name
        assert config.save_folder == f"runs/{name}/checkpoints"
        assert yaml.safe_load(config.resolved_yaml)["run_name"] == name


def train_file(text: str, *arguments: str) -> TrainConfig:
    return train_yaml(text.encode(), *arguments)


def test_every_text_key_of_every_script_is_what_was_written():
    for cls in SCRIPTS:
        for key, annotation, _, _ in fields_of(cls):
            if annotation not in ("str", "str | None", "list[str]") or ANY_NAME in key:
                continue
            *above, leaf = key.split(".")
            nested: Any = leaf + (": [0123, 1e5]" if annotation == "list[str]" else ": 0123")
            for name in reversed(above):
                nested = f"{name}: {{{nested}}}"
            content = as_meant(cls, parse_yaml(nested), "place")
            for name in key.split("."):
                content = content[name]
            assert content == (["0123", "1e5"] if annotation == "list[str]" else "0123"), key


def test_streams_are_named_as_they_are_written():
    streams = "train_data:\n  streams: {no: {local: 1.10}, 0123: {local: 1e5}, 1_0: {local: a}}\n"
    config = train_file(
        BASE.replace("train_data: {local: data}\n", streams), "train_data.streams.1e5.local=0x1"
    )
    assert {name: stream.local for name, stream in config.train_data.streams.items()} == {
        "no": "1.10",
        "0123": "1e5",
        "1_0": "a",
        "1e5": "0x1",
    }
    Path("again.yaml").write_text(config.resolved_yaml)
    assert load(TrainConfig, ["again.yaml"]) == config


def test_dicts_of_texts_and_anchors():
    content = parse_yaml("{a: &x 1.10, b: [*x, no], c: {d: *x}}")
    assert as_meant(dict[str, Any], content, "place") == {
        "a": 1.1,
        "b": [1.1, False],
        "c": {"d": 1.1},
    }
    assert as_meant(dict[str, str], parse_yaml("{a: 1.10, b: null, c: 'x'}"), "p") == {
        "a": "1.10",
        "b": None,
        "c": "x",
    }
    config = train_yaml("eval_data: {local: &n 010}\nwandb: {project: *n}\n")
    assert (config.eval_data and config.eval_data.local, config.wandb and config.wandb.project) == (
        "010",
        "010",
    )


MEANT_OTHERWISE = {
    # None is Python's word for null.
    "save_folder=None": (
        "write null for no value; where that word is meant, quote it in a file: 'None'"
    ),
    "eval_data.local=None": (
        "write null for no value; where that word is meant, quote it in a file: 'None'"
    ),
    "stall_timeout=None": (
        "write null for no value; where that word is meant, quote it in a file: 'None'"
    ),
    "wandb=None": "write null for no value; where that word is meant, quote it in a file: 'None'",
    "model.config.hidden_act=None": (
        "write null for no value; where that word is meant, quote it in a file: 'None'"
    ),
    "tokenizer=None": "must be set; where that word is meant, quote it in a file: 'None'",
    "run_name=None": "must be set; where that word is meant, quote it in a file: 'None'",
    "seed=None": "must be int",
    "tokenizer=null": "must be str",
    # Numbers that are others in YAML 1.1.
    "seed=0123": (
        "YAML takes this for 83; write the number in plain digits, or quote what is text: '0123'"
    ),
    "seed=1:30": (
        "YAML takes this for 90; write the number in plain digits, or quote what is text: '1:30'"
    ),
    "microbatch_size=010": (
        "YAML takes this for 8; write the number in plain digits, or quote what is text: '010'"
    ),
    "optimizer.lr=1:30.5": (
        "YAML takes this for 90.5; write the number in plain digits, or quote what is text:"
        " '1:30.5'"
    ),
    "model.config.name=0123": (
        "YAML takes this for 83; write the number in plain digits, or quote what is text: '0123'"
    ),
    # The default of a variable that is not set.
    "log_folder=${oc.env:FLAME_NOT_SET,1.10}": (
        "the default 1.10 would become 1.1; quote it: '1.10'"
    ),
    "log_folder=a/${oc.env:FLAME_NOT_SET, true}": (
        "the default true would become True; quote it: 'true'"
    ),
}


@pytest.mark.parametrize("argument", MEANT_OTHERWISE)
def test_what_was_not_meant_is_refused(argument):
    line = f"{argument}: {MEANT_OTHERWISE[argument]}"
    assert message_of(lambda: train(argument)) == f"command line: {line}"
    key, _, text = argument.partition("=")
    content = yaml.safe_load(BASE)
    *above, leaf = key.split(".")
    section = content
    for name in above:
        section = section.setdefault(name, {})
    section[leaf] = "TEXT"
    quoted = f'"{text}"' if "$" in text else text
    assert (
        message_of(lambda: train_file(yaml.safe_dump(content).replace("TEXT", quoted)))
        == f"x.yaml: {line}"
    )


def test_what_stays_a_number_or_null():
    config = train_yaml(
        "seed: 0x1F\nsave_folder: ~\nloss_spike: null\nstall_timeout: 1_000\ncontext_length: 08\n",
        "model.config.a=[1.50,no,'0123',null]",
        "eval_batch_size=7",
    )
    assert (config.seed, config.save_folder, config.loss_spike, config.stall_timeout) == (
        31,
        None,
        None,
        1000.0,
    )
    assert (config.context_length, config.model.config["a"]) == (8, [1.5, False, "0123", None])
    assert train_file(BASE.replace("run_name: base", "run_name: 'None'")).run_name == "None"
    assert train("log_folder=${oc.env:FLAME_NOT_SET,'1.10'}").log_folder == "1.10"
    assert train("seed=${oc.env:FLAME_NOT_SET,1_000}").seed == 1000


@given(
    text=st.text(st.sampled_from("\\${}a '\"\n:1.0e?N~-"), max_size=8)
    | st.sampled_from([*LOOK_LIKE_NUMBERS, "None", "~", "???"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
)
@settings(deadline=None, max_examples=300)
def test_what_is_saved_is_read_again_as_it_was(text):
    saved = dump_yaml({"key": text, "list": [text]})
    assert (
        OmegaConf.create(
            as_meant(dict[str, str], parse_yaml(saved.partition("list:")[0]), "place")
        ).key
        == text
    )
    assert OmegaConf.create(saved).list[0] == text


def test_a_saved_configuration_with_escapes_is_read_again():
    config = train_yaml(
        "wandb: {project: 'None', entity: 'a\\${HOME}', group: '${wandb.entity}/x', tags: ['None',"
        " a]}\n"
    )
    assert config.wandb == WandbConfig("None", "a${HOME}", "a${HOME}/x", ["None", "a"])
    Path("again.yaml").write_text(config.resolved_yaml)
    assert load(TrainConfig, ["again.yaml"]) == config


def test_the_configuration_that_a_run_saved_is_read_again(undisturbed):
    for saved in (undisturbed / "config.yaml", undisturbed / "checkpoints" / "config.yaml"):
        assert load(TrainConfig, [str(saved)]).resolved_yaml == saved.read_text(encoding="utf-8")


def test_tags_that_do_not_fit_are_no_traceback():
    for value in ("!!int", "!!bool perhaps", "!!timestamp soon", "!!float"):
        assert message_of(lambda value=value: train_yaml(f"seed: {value}\n")).startswith(
            "x.yaml: not valid YAML: "
        )
        assert message_of(lambda value=value: train(f"seed={value}")).startswith(
            "command line: seed="
        )


# Paths


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    streams = "train_data: {streams: {a: {local: ~/a}, b: {remote: ~/b}}}\n"
    folders = "save_folder: ~/s/${run_name}\nlog_folder: ${save_folder}/l\n"
    config = train_file(
        BASE.replace("train_data: {local: data}\n", streams) + folders,
        "tokenizer=~/t",
        "eval_data.local=~",
        "model.pretrained=~/m",
    )
    assert (config.save_folder, config.log_folder, config.tokenizer) == (
        "/home/me/s/base",
        "/home/me/s/base/l",
        "/home/me/t",
    )
    assert config.eval_data is not None
    assert (config.eval_data.local, config.model.pretrained) == ("/home/me", "/home/me/m")
    assert config.train_data.streams == {
        "a": StreamConfig(local="/home/me/a"),
        "b": StreamConfig(remote="/home/me/b"),
    }
    convert = load(
        ConvertConfig, ["source=[~/x/*.jsonl,s3://b/~/y,a/~b]", "out=~/o", "tokenizer=org/name"]
    )
    assert convert.source == ["/home/me/x/*.jsonl", "s3://b/~/y", "a/~b"]
    assert (convert.out, convert.tokenizer) == ("/home/me/o", "org/name")
    assert load(ReportConfig, ["~/runs/a"]).runs == ["/home/me/runs/a"]
    assert train("log_folder=./~x").log_folder == "./~x"
    assert (
        message_of(lambda: train("log_folder=~nobody_here/x"))
        == "command line: log_folder=~nobody_here/x: nobody's home is known here as ~nobody_here;"
        " write the folder out, or ./~... for a name that begins so"
    )


def test_a_variable_of_the_shell_in_a_path_is_refused(monkeypatch, folder):
    monkeypatch.setenv("HOME", "/home/me")
    for argument, name in {
        "save_folder=$HOME/ckpt": "HOME",
        "log_folder=runs/a_$USER": "USER",
        "train_data.local=$SCRATCH/d": "SCRATCH",
        "save_folder=s3://$BUCKET/x": "BUCKET",
        "tokenizer=$TOK": "TOK",
        "eval_data.remote=/x/$A/$B": "A",
    }.items():
        line = (
            f"command line: {argument}: ${name} is not filled in here; write ${{oc.env:{name}}} for"
            " what it is set to"
        )
        assert message_of(lambda argument=argument: train(argument)) == line
    assert message_of(
        lambda: load(ConvertConfig, ["source=[a,$HOME/*.txt]", "out=o", "tokenizer=t"])
    ).startswith("command line: source=['a', '$HOME/*.txt']: $HOME is not filled in here; ")
    assert train("save_folder=${oc.env:HOME}/ckpt").save_folder == "/home/me/ckpt"
    (folder / "price$list").mkdir()
    assert train("train_data.local=price$list").train_data.local == "price$list", "it is there"
    assert load(GenerateConfig, ["model=m", "prompt=echo $HOME ~"]).prompt == "echo $HOME ~", (
        "no path"
    )


BRACES = [
    "save_folder=runs/{run_name}/c",
    "log_folder={x}",
    "save_folder=s3://b/{rank}",
    "log_folder=a}",
]


@pytest.mark.parametrize("argument", BRACES)
def test_braces_that_composer_would_fill_in_are_refused(argument):
    rule = (
        "must hold no braces, which Composer would fill in; write ${run_name} for the name of"
        " the run"
    )
    assert message_of(lambda: train(argument)) == f"command line: {argument}: {rule}"


def test_names_of_runs_that_no_folder_can_have():
    for name in ("{x}", "a{rank}", "a\0b"):
        with pytest.raises(ConfigError, match=re.escape("(it names folders)")):
            train(f"run_name={name}")
    assert train(f"run_name={'a' * 255}").run_name == "a" * 255
    for name in ("a" * 256, "a" * 5000, "a" + "\u0416" * 128):
        message = message_of(lambda name=name: train(f"run_name={name}"))
        assert message.endswith(": must be 255 bytes at most (it names folders)")
        assert len(message) < 300


# Many keys


def test_a_thousand_streams_and_a_thousand_arguments_take_seconds():
    streams = {
        f"s{i}": {"local": f"/d/{i}", "remote": f"s3://b/{i}", "proportion": 1.0}
        for i in range(1000)
    }
    content = yaml.safe_load(BASE) | {"train_data": {"streams": streams}}
    Path("many.yaml").write_text(yaml.safe_dump(content))
    begin = time.process_time()
    config = load(TrainConfig, ["many.yaml"])
    assert time.process_time() - begin < 10
    assert list(config.train_data.streams) == sorted(streams)
    begin = time.process_time()
    arguments = [f"model.config.k{i}={i}" for i in range(1000)]
    assert list(train(*arguments).model.config.items())[2:] == [(f"k{i}", i) for i in range(1000)]
    assert train(*(f"seed={i}" for i in range(1000))).seed == 999
    assert time.process_time() - begin < 15
    begin = time.process_time()
    many = [f"train_data.streams.s{i}.choose={i or 'x'}" for i in reversed(range(200))]
    Path("many.yaml").write_text(
        yaml.safe_dump(content | {"train_data": {"streams": dict(list(streams.items())[:200])}})
    )
    assert (
        message_of(lambda: load(TrainConfig, ["many.yaml", *many]))
        == "command line: train_data.streams.s0.choose=x: must be int, or null"
    )
    assert time.process_time() - begin < 10


def test_of_two_mistakes_the_first_is_told():
    assert message_of(lambda: train("seed=x", "sed=1")) == "command line: seed=x: must be int"
    assert (
        message_of(lambda: train("seed=1", "seed=x", "seed=2"))
        == "command line: seed=x: must be int"
    )
    assert message_of(lambda: train("optimizer=${scheduler}", "optimizer.lr=x")).startswith(
        "command line: optimizer.lr=x: "
    )


def test_later_arguments_go_over_earlier_ones_key_by_key():
    config = train(
        "model.config.a={b: 1, c: 2}",
        "model.config.a.b=3",
        "model.config.a={d: 4}",
        "model.config.e=1",
        "model.config.e={f: 1}",
        "wandb=null",
        "wandb.project=p",
        "wandb={group: g}",
        "wandb.tags=a",
        "wandb.tags=[b,c]",
    )
    assert config.model.config == {
        "model_type": "gla",
        "hidden_size": 64,
        "a": {"b": 3, "c": 2, "d": 4},
        "e": {"f": 1},
    }
    assert config.wandb == WandbConfig(project="p", group="g", tags=["b", "c"])


# Interpolation and the environment

SECRET = "hunter2-secret"


@pytest.mark.parametrize(
    "text", ["[" * 300_000 + "]" * 300_000, "{a: " * 300_000, "a: " + "[" * 300_000]
)
def test_a_configuration_of_endless_depth_is_refused(tmp_path, text):
    """libyaml would end the process."""
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, [str(file)])
    assert (
        str(caught.value)
        == f"{file}: not valid YAML: lists and mappings in one another, more than 100 deep"
    )
    with pytest.raises(
        ConfigError, match=r"cannot be read: lists and mappings in one another, more than 100 deep$"
    ):
        load(TrainConfig, [f"model.config={text}"])


def test_texts_that_name_one_another_without_end_are_refused(tmp_path):
    """Five keys, each of which has the next one in it 60 times: 800 million texts."""
    names = (
        "run_name",
        "tokenizer",
        "save_folder",
        "log_folder",
        "train_data.local",
        "eval_data.local",
    )
    keys = [f"{name}={f'${{{inner}}}' * 60}" for name, inner in itertools.pairwise(names)]
    message = r"its values name one another \(\$\{\.\.\.\}\) so often"
    with pytest.raises(ConfigError, match=f"^command line: {message}"):
        load(TrainConfig, [*keys, "eval_data.local=xxx"])
    file = tmp_path / "a.yaml"
    twice = "".join(
        f"    a{n}: {{x: '${{..a{n + 1}}}', y: '${{model.config.a{n + 1}}}'}}\n" for n in range(60)
    )
    file.write_text(f"model:\n  config:\n{twice}    a60: 1\n")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: {message}"):
        load(TrainConfig, [str(file), "tokenizer=t", "train_data.local=x", "eval_data.local=x"])


def test_interpolation_of_other_keys():
    config = train()
    assert (config.save_folder, config.log_folder) == ("runs/base/checkpoints", "runs/base")
    config = train(
        "run_name=other",
        "log_folder=/logs/${run_name}/${seed}",
        "model.config.hidden_size=${context_length}",
    )
    assert config.save_folder == "runs/other/checkpoints"
    assert config.log_folder == "/logs/other/42"
    assert yaml.safe_load(train("seed=${oc.decode:'7'}").resolved_yaml)["seed"] == 7
    assert config.model.config["hidden_size"] == 2048
    resolved = yaml.safe_load(config.resolved_yaml)
    assert resolved["log_folder"] == "/logs/other/42"
    assert resolved["model"]["config"]["hidden_size"] == 2048


def test_environment_variables_work_and_are_nowhere_kept(monkeypatch):
    monkeypatch.setenv("FLAME_SECRET", SECRET)
    monkeypatch.setenv("FLAME_NUMBER", "77123")
    config = train_yaml(
        "log_folder: ${oc.env:FLAME_SECRET}\nsave_folder:"
        " ${log_folder}/${run_name}/again/${log_folder}\neval_data: {local: 'before"
        " ${oc.env:FLAME_SECRET} after', remote: '${oc.select:log_folder}'}\nseed:"
        " ${oc.env:FLAME_NUMBER}\nwandb: {project: '${oc.env:FLAME_UNSET,fallback}', tags:"
        " ['${oc.env:FLAME_SECRET}', plain]}\n",
        "model.config.x=${oc.env:FLAME_SECRET}",
        "model.config.y={deep: ['${oc.env:FLAME_SECRET}']}",
        "model.config.z=${oc.decode:${oc.env:FLAME_NUMBER}}",
        "model.config.v=${model.config.z}",
    )
    assert config.log_folder == SECRET
    assert config.save_folder == f"{SECRET}/base/again/{SECRET}"
    assert config.eval_data is not None
    assert (config.eval_data.local, config.eval_data.remote) == (f"before {SECRET} after", SECRET)
    assert config.seed == 77123
    assert config.wandb is not None
    assert (config.wandb.project, config.wandb.tags) == ("fallback", [SECRET, "plain"])
    assert config.model.config["x"] == SECRET
    assert config.model.config["y"] == {"deep": [SECRET]}
    assert (config.model.config["z"], config.model.config["v"]) == (77123, 77123)

    for kept in (config.resolved_yaml, str(config.origins)):
        assert SECRET not in kept
        assert "77123" not in kept
    resolved = yaml.safe_load(config.resolved_yaml)
    assert resolved["log_folder"] == "<environment variable FLAME_SECRET>"
    assert resolved["save_folder"] == "{0}/base/again/{0}".format(
        "<environment variable FLAME_SECRET>"
    )
    assert resolved["seed"] == "<environment variable FLAME_NUMBER>"
    assert resolved["run_name"] == "base"
    assert train("log_folder=${oc.env:FLAME_SECRET}").log_folder == SECRET, (
        "the resolvers are as they were"
    )
    assert train("log_folder=${oc.decode:${oc.env:FLAME_NUMBER}}").log_folder == "77123"


@pytest.mark.parametrize(
    "argument",
    [
        "seed=${oc.env:FLAME_SECRET}",
        "optimizer.lr=${oc.env:FLAME_SECRET}",
        "precision=${oc.env:FLAME_SECRET}",
        "model=${oc.env:FLAME_SECRET}",
        "max_duration=${oc.env:FLAME_SECRET}",
        "run_name=${oc.env:FLAME_SECRET}/",
        "log_folder=${${oc.env:FLAME_SECRET}}",
        "log_folder=${oc.env:${oc.env:FLAME_SECRET}}",
        "seed=${oc.decode:${oc.env:FLAME_SECRET}}",
        "seed=${oc.decode:'[${oc.env:FLAME_SECRET}'}",
        "optimizer.betas=[${oc.env:FLAME_SECRET},1]",
        "train_data.cache_limit=${oc.env:FLAME_SECRET}",
    ],
)
def test_a_refused_environment_variable_is_not_shown(monkeypatch, argument):
    monkeypatch.setenv("FLAME_SECRET", SECRET)
    message = message_of(lambda: train(argument))
    assert message.startswith("command line: " + argument.partition("=")[0])
    assert "hunter2" not in message


def test_passwords_in_addresses_are_not_kept():
    config = train(
        "train_data.remote=s3://key:se/cret@bucket/x",
        "wandb.project=p",
        "wandb.tags=[https://token@host]",
    )
    assert config.train_data.remote == "s3://key:se/cret@bucket/x"
    resolved = yaml.safe_load(config.resolved_yaml)
    assert resolved["train_data"]["remote"] == "s3://key:***@bucket/x"
    assert resolved["wandb"]["tags"] == ["https://***@host"]


def test_what_came_from_the_environment_is_shown_by_its_name(monkeypatch, capsys):
    """In errors of what goes on from there, too; not what has the same letters by chance."""
    monkeypatch.setenv("FLAME_SECRET", SECRET)
    monkeypatch.setenv("FLAME_LIST", "[first-part-of-it, second-part-of-it]")
    monkeypatch.setenv("FLAME_NUMBER", "512")
    argv = [
        "script.py",
        "model=/a/${oc.env:FLAME_SECRET}b",
        "prompt=p",
        "max_new_tokens=${oc.env:FLAME_NUMBER}",
        "stop=${oc.decode:${oc.env:FLAME_LIST}}",
    ]
    monkeypatch.setattr(sys, "argv", argv)

    def main(config: Any) -> None:
        print(f"{config.model} {config.stop[1]} {config.max_new_tokens}")
        raise DataError(f"{config.model}: cannot be read")

    assert run(main, GenerateConfig) == 1
    assert capsys.readouterr() == (
        "/a/${FLAME_SECRET}b ${FLAME_LIST} 512\n",
        "error: /a/${FLAME_SECRET}b: cannot be read\n",
    )


TOO_LONG = "must be shorter: 255 bytes between slashes, and 4,095 in all"
NUL = "must not hold a NUL character; write it without"
PATHS = [
    (
        TrainConfig,
        [
            "save_folder",
            "log_folder",
            "tokenizer",
            "train_data.local",
            "train_data.remote",
            "model.pretrained",
        ],
    ),
    (ConvertConfig, ["source", "out", "val_out", "tokenizer"]),
    (TokenizerTrainConfig, ["source", "out"]),
    (GenerateConfig, ["model", "prompts"]),
    (EvaluateConfig, ["model", "plot", "data.local"]),
    (InspectConfig, ["data", "plot"]),
    (ToHfConfig, ["checkpoint", "out"]),
    (FromLlamaConfig, ["model", "config", "out", "tokenizer"]),
    (PruneConfig, ["model", "base", "out"]),
    (CleanConfig, ["source", "out", "removed_out", "language.model"]),
    (ReportConfig, ["runs", "out"]),
]


@pytest.mark.parametrize(("cls", "key"), [(cls, key) for cls, keys in PATHS for key in keys])
@pytest.mark.parametrize(
    ("value", "rule"), [("a\0b", NUL), ("x" * 256, TOO_LONG), ("é/" * 2000, TOO_LONG)]
)
def test_no_file_can_have_such_a_name(cls, key, value, rule):
    content: dict[str, Any] = yaml.safe_load(BASE) if cls is TrainConfig else {}
    needed = {
        ConvertConfig: {"source": ["s"], "out": "o", "tokenizer": "t", "context_length": 8},
        TokenizerTrainConfig: {"source": ["s"], "out": "o"},
        GenerateConfig: {"model": "m"},
        EvaluateConfig: {"model": "m"},
        InspectConfig: {"data": "d"},
        ToHfConfig: {"checkpoint": "c", "out": "o"},
        FromLlamaConfig: {"model": "m", "config": "c", "out": "o"},
        PruneConfig: {"model": "m", "out": "o"},
        CleanConfig: {"source": ["s"], "out": "o"},
    }
    content |= needed.get(cls, {})
    section, _, leaf = key.rpartition(".")
    place = content.setdefault(section, {}) if section else content
    place[leaf] = [value] if leaf in ("source", "runs") else value
    argv = ["long.yaml"]
    if cls is ReportConfig:
        argv = [] if "\0" in value else [value] if key == "runs" else ["run", f"out={value}"]
    Path("long.yaml").write_text(yaml.dump(content, allow_unicode=True))
    if argv:
        message = message_of(lambda: load(cls, argv))
        assert f": {key}=" in message
        assert message.endswith(f": {rule}")


def test_a_long_name_of_a_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "base.yaml", f"run_name={'x' * 5000}"])
    assert run(do_nothing, TrainConfig) == 2
    err = capsys.readouterr().err
    assert err.endswith("xxx...: must be 255 bytes at most (it names folders)\n")
    assert len(err) < 300
    assert train(f"run_name={'x' * 255}").run_name == "x" * 255
    assert message_of(lambda: train("wandb.project=p", f"run_name={'x' * 201}")).endswith(
        ": must be 200 bytes at most (it names folders)"
    )


def test_resolved_yaml_is_the_configuration():
    config = train("optimizer.lr=0.5", "eval_data.local=v")
    Path("again.yaml").write_text(config.resolved_yaml)
    again = load(TrainConfig, ["again.yaml"])
    assert again == config
    assert again.resolved_yaml == config.resolved_yaml


# Help


@pytest.mark.parametrize("cls", SCRIPTS, ids=lambda cls: cls.__name__)
def test_help_lists_every_key_with_type_default_and_doc(cls):
    text = help_text(cls, "script.py")
    first = "RUNS ..." if cls is ReportConfig else "[file.yaml]"
    assert text.startswith(
        f"usage: script.py {first} [key=value ...]\n\n{inspect.cleandoc(cls.__doc__)}\n"
    )
    flat = " ".join(text.split())
    for key, annotation, default, doc in fields_of(cls):
        assert re.search(rf"^  {re.escape(key)}: {re.escape(annotation)}", text, re.MULTILINE)
        line = f" {key}: {annotation}{'' if default is None else f' = {default}'} "
        assert line + " ".join(doc.split()) in flat
    assert all(len(line) <= 144 for line in text.splitlines())


def test_help_says_what_a_user_needs():
    lines = help_text(TrainConfig, "train.py").splitlines()
    assert "  seed: int = 42" in lines
    assert "  run_name: str = (must be set)" in lines
    assert "  save_folder: str | None = runs/${run_name}/checkpoints" in lines
    assert "  scheduler.name: one of ['cosine', 'linear', 'constant', 'wsd'] = cosine" in lines
    assert "  optimizer: section" in lines
    assert "  wandb.tags: list[str] = []" in lines
    assert "  optimizer.grad_clip_norm: float | None = 1.0" in lines
    assert (
        "  gopher_repetition.top_n_grams: list[float] = [0.2, 0.18, 0.16]"
        in help_text(CleanConfig, "clean.py").splitlines()
    )


# run()


def do_nothing(config: Any) -> None:
    pass


def test_run_loads_calls_and_returns_0(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "model=m", "prompt=p"])
    seen = []
    assert run(seen.append, GenerateConfig) == 0
    assert [(config.model, config.prompt) for config in seen] == [("m", "p")]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["no.yaml", "--help"], ["x=1", "-h"]])
def test_run_help(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["recipes/script.py", *arguments])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # would outlive the test
    assert run(do_nothing, GenerateConfig) == 0
    assert capsys.readouterr() == (help_text(GenerateConfig, "script.py") + "\n", "")


def failing(error: Exception) -> Any:
    def main(config: Any) -> None:
        raise error

    return main


ERRORS = [
    (ConfigError("place: key: rule"), 2, "place: key: rule"),
    (ConfigError("a name with\na newline"), 2, "a name with a newline"),
    (DataError("shard: damaged"), 1, "shard: damaged"),
    (DataError("a name with\na newline"), 1, "a name with a newline"),
    (
        InvalidField("top_k", "too many for this model"),
        2,
        "command line: top_k=7: too many for this model",
    ),
    (InvalidField("top_p", "a rule"), 2, "command line: top_p=0.95: a rule"),
]


@pytest.mark.parametrize(("error", "status", "line"), ERRORS, ids=lambda value: str(value)[:20])
def test_run_says_what_is_wrong_in_one_line(monkeypatch, capsys, error, status, line):
    monkeypatch.setattr(sys, "argv", ["script.py", "model=m", "prompt=p", "top_k=7"])
    assert run(failing(error), GenerateConfig) == status
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_run_does_not_hide_what_is_nobodys_mistake(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "model=m", "prompt=p"])
    with pytest.raises(ZeroDivisionError):
        run(failing(ZeroDivisionError()), GenerateConfig)


def test_a_library_that_makes_an_error_of_the_exit_does_not_hide_it(monkeypatch, capsys):
    """As safetensors does where a signal comes while it asks torch for a name."""

    def main(config: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            raise AttributeError("module 'torch' has no attribute 'UntypedStorage'") from None

    monkeypatch.setattr(sys, "argv", ["script.py", "model=m", "prompt=p"])
    with pytest.raises(SystemExit, match=r"^143$"):
        run(main, GenerateConfig)
    assert capsys.readouterr() == ("", "")


def test_what_is_not_utf8_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "model=m", "prompt=k\udce4t"])
    assert run(failing(AssertionError("must not be called")), GenerateConfig) == 2
    assert capsys.readouterr() == ("", "error: command line: 'prompt=k\\udce4t': must be UTF-8\n")


def test_run_refuses_before_it_calls(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "modle=m"])
    assert run(failing(AssertionError("must not be called")), GenerateConfig) == 2
    assert capsys.readouterr() == (
        "",
        "error: command line: modle: unknown key; did you mean model?\n",
    )


def test_one_rank_speaks_of_a_mistake_and_every_rank_of_damage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "model=m", "prompt=p"])
    monkeypatch.setenv("RANK", "1")
    assert run(failing(ConfigError("a mistake")), GenerateConfig) == 2
    assert capsys.readouterr().err == ""
    assert run(failing(DataError("damage")), GenerateConfig) == 1
    assert capsys.readouterr().err == "error: damage\n"


class Damaged:
    """A dataset whose third row is damaged, by the process that reads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise DataError(f"{os.getppid()}: damaged shard; restore it")
        return index


def test_damage_met_by_a_loader_process_is_one_line(monkeypatch, capfd):
    from torch.utils.data import DataLoader

    def main(config: Any) -> None:
        list(DataLoader(Damaged(), num_workers=1))  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(sys, "argv", ["script.py", "model=m", "prompt=p"])
    assert run(main, GenerateConfig) == 1
    assert capfd.readouterr() == ("", f"error: {os.getpid()}: damaged shard; restore it\n")


def test_what_the_machine_did_is_found_under_what_came_of_it(monkeypatch):
    """As within `torch.save`, which makes an error of its own when it is left by another; but
    not under an answer of ours.
    """
    monkeypatch.delenv("RANK", raising=False)

    def chained(first: Exception, second: Exception, *, hide: bool = False) -> Exception:
        try:
            try:
                raise first
            except Exception:
                if hide:
                    raise second from None
                raise second  # noqa: B904
        except Exception as error:
            return error

    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    full = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    torso = RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 768 vs 662")
    loss = "a loader process was killed by signal: Killed (short of memory? give fewer num_workers)"
    assert cli._from_outside(chained(killed, torso)) == loss
    assert (
        cli._from_outside(chained(full, torso))
        == "/data/x: a disk cannot be written: No space left on device"
    )
    assert cli._from_outside(chained(full, torso, hide=True)) is None
    assert cli._from_outside(chained(full, ConfigError("out: cannot be written to"))) is None
    assert cli._from_outside(torso) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user, which takes root")
def test_a_user_id_without_a_name_gets_one():
    """As containers have it in Kubernetes and OpenShift; torch asks getpass when it is imported."""
    script = """
import getpass, os
from flame_composer.config.cli import _name_user
os.setuid(54321)
_name_user()
print(getpass.getuser())
"""
    bare = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOGNAME", "USER", "LNAME", "USERNAME")
    }
    done = subprocess.run([sys.executable, "-c", script], env=bare, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("uid-54321\n", "")
