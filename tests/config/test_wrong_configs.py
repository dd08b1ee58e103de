"""Configurations of recipes/train.py that are wrong: status 2, one line that names the key and what
it should be.

Those of `test_cli.py` are about how arguments are read, for any script; these go through the
script, up to what other packages' classes take.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flame_composer.config.cli import run
from flame_composer.config.train import TrainConfig
from tests.data_fixtures import byte_tokenizer

ROOT = Path(__file__).parents[2]

# Arguments, and how the line begins: with the first of them, if not said otherwise.
WRONG: dict[str, str] = {
    # Typos, at every level.
    "max_durations=5ba": "max_durations: unknown key; did you mean max_duration?",
    "batch_size=8": "batch_size: unknown key; did you mean global_batch_size?",
    "learning_rate=1e-3": "learning_rate: unknown key; did you mean optimizer.lr?",
    "optimizer.learning_rate=1e-3": (
        "optimizer.learning_rate: unknown key; did you mean optimizer.lr?"
    ),
    "optimizer.LR=1e-3": "optimizer.LR: unknown key; did you mean optimizer.lr?",
    "steps=100": "steps: unknown key; did you mean max_duration?",
    "lr=1e-3": "lr: unknown key; did you mean optimizer.lr?",
    "warmup=10ba": "warmup: unknown key; did you mean scheduler.warmup?",
    "optimizer.weight_dcay=1": (
        "optimizer.weight_dcay: unknown key; did you mean optimizer.weight_decay?"
    ),
    "optimizer.beta=[0.9,0.95]": "optimizer.beta: unknown key; did you mean optimizer.betas?",
    "scheduler.min_lr=0.1": "scheduler.min_lr: unknown key; did you mean scheduler.min_lr_ratio?",
    "scheduler.tmax=20ba": "scheduler.tmax: unknown key; did you mean scheduler.t_max?",
    "optimizer.decay_embeddings=false": (
        "optimizer.decay_embeddings: unknown key; did you mean optimizer.decay?"
    ),
    "data.instance_filter.repetition_max_count=32": (
        "data.instance_filter.repetition_max_count: unknown key; did you mean"
        " repetition_filter.max_count?"
    ),
    "repetition_filter.maximum=13": (
        "repetition_filter.maximum: unknown key; the keys of repetition_filter are "
    ),
    "scheduler.nme=cosine": "scheduler.nme: unknown key; did you mean scheduler.name?",
    "train_data.remot=s3://b/d": "train_data.remot: unknown key; did you mean train_data.remote?",
    "train_data.streams.web.propotion=1": (
        "train_data.streams.web.propotion: unknown key; did you mean"
        " train_data.streams.web.proportion?"
    ),
    "eval_data.max_row=5": "eval_data.max_row: unknown key; did you mean eval_data.max_rows?",
    "loss_spike.windw=5": "loss_spike.windw: unknown key; did you mean loss_spike.window?",
    "paralellism.fsdp={}": "paralellism: unknown key; did you mean parallelism?",
    "algorithm.ema={}": "algorithm: unknown key; did you mean algorithms?",
    "callback.lr_monitor={}": "callback: unknown key; did you mean callbacks?",
    # Wrong types.
    "seed=one": "must be int",
    "microbatch_size=2.5": "must be int | str",
    "microbatch_size=atuo": "must be a positive number of rows, or auto",
    "max_duration=100": "must be a whole number followed by ba, tok, sp or ep, e.g. 1000ba",
    "save_interval=2d": (
        "must be a whole number followed by ba, tok, sp or ep, or by s, min or h, or a fraction of"
        " the run like 0.05dur, e.g. 1000ba"
    ),
    "optimizer.betas=0.9": "must be tuple[float, float]",
    "varlen=perhaps": "must be bool",
    "train_data=d": "must hold keys and values; its keys are ",
    "algorithms=[ema]": "algorithms=['ema']: must be dict[str, Any]",
    "callbacks.lr_monitor=true": (
        "must hold its arguments, or be null for the defaults, or false to leave it out"
    ),
    "train_data.loss_across_documents=null": "must be bool",
    "varlen=2": "must be bool",
    # What is not one of the allowed values.
    "stall_timeout=1e300": (
        "stall_timeout=1e+300: must be a number of seconds more than 0 and no more than 100000000,"
        " or null"
    ),
    "train_data.num_workers=100000": "must be in [0, 1000]",
    "train_data.shuffle_block_size=99999999999999999999": "must be in [1, 1000000000000]",
    "train_data.predownload=99999999999999999999": "must be in [1, 1000000000000]",
    "train_data.num_canonical_nodes=99999999999": "must be in [1, 65536]",
    "wandb.project=": "must not be empty",
    "precision=bf16": "must be one of ['fp32', 'amp_bf16', 'amp_fp16']",
    "scheduler.name=step": "must be one of ['cosine', 'linear', 'constant', 'wsd']",
    "optimizer.name=sgd": "must be one of ['adamw', 'decoupled_adamw', 'lamb', 'muon']",
    "on_nan=ignore": "must be one of ['stop', 'skip']",
    "train_data.shuffle_algo=py2": (
        "must be one of ['spread', 'py1e', 'py1br', 'py1s', 'py2s', 'naive']"
    ),
    "optimizer.lr=-1": "must be more than 0, and finite",
    "optimizer.grad_clip_norm=0": "must be more than 0 and finite, or null",
    "scheduler.min_lr_ratio=2": "must be in [0, 1]",
    "optimizer.decay=[norms]": (
        "optimizer.decay=['norms']: must name only matrices, embeddings, vectors, not 'norms'"
    ),
    "optimizer.decay=null": "optimizer.decay=null: must be list[str]",
    "scheduler.t_max=9ba": (
        "scheduler.t_max=9ba: must not end before the run: 9 batches of 10 (max_duration=10ba)"
    ),
    "scheduler.t_max=1.25dur": (
        "scheduler.t_max=1.25dur: must be a whole number followed by ba, tok, sp or ep"
    ),
    "repetition_filter=true": "must hold keys and values; its keys are repetition_filter.min_peri",
    "repetition_filter.max_count=many": "must be int",
    "context_length=1": "must be 2 tokens or more",
    "train_data.cache_limit=lots": (
        "must be a number of bytes, or one with kb, mb, gb, tb or pb, e.g. 100gb"
    ),
    # What does not go together.
    "global_batch_size=7": "must be a multiple of devices x microbatch_size = 1 x 8 = 8",
    "scheduler.warmup=11ba": (
        "must not be longer than the run: 11 batches, of 10 in all (max_duration=10ba)"
    ),
    "scheduler.t_max=20ba scheduler.name=wsd": (
        "must be null with constant and wsd; only cosine and linear can end beyond a run"
    ),
    "repetition_filter.max_period=0": "must be min_period (1) or more",
    "eval_data.local=data": "must not be a dataset that is trained on",
    "train_data.streams.web.local=x": (
        "base.yaml: train_data.local=data: must be null with streams, which each have their own"
    ),
    "train_data.batching_method=stratified": "must be random without streams",
    "wandb.group=g": (
        "base.yaml: wandb.project: must be set (Weights & Biases project; the run's name and id are"
        " run_name); add it to the file or give wandb.project=..."
    ),
    "callbacks.early_stopper.patience=5ba": (
        "callbacks.early_stopper={'patience': '5ba'}: needs an evaluation to go by; set eval_data"
    ),
    "callbacks.speed_monitor={}": (
        "hands metrics to loggers, and there is none; set loggers.file_logger={}, wandb.project=..."
        " or tensorboard=true"
    ),
    "microbatch_size=auto eval_data.local=v": (
        "base.yaml: eval_batch_size: must be set with microbatch_size=auto, which is about training"
    ),
    "algorithms.ema={} parallelism.fsdp={} parallelism.cpu_fallback=true": (
        "must not be set together with parallelism.fsdp, which spreads parameters over devices"
    ),
    # Names of other packages' classes.
    "algorithms.emma={}": "there is no such algorithm; did you mean algorithms.ema?",
    "algorithms.gradient_clipping={}": "set optimizer.grad_clip_norm instead",
    "algorithms.mixup={}": "is for images",
    "algorithms.cut_out={}": "is for images",
    "algorithms.BlurPool={}": "is for images",
    "algorithms.alibi={}": (
        "gives positions to the attention of GPT-2 and BERT; neither GLA nor Llama has a place"
        " for it"
    ),
    "algorithms.lr_monitor={}": "there is no such algorithm; did you mean callbacks.lr_monitor?",
    "callbacks.speed_monitr={}": "there is no such callback; did you mean callbacks.speed_monitor?",
    "callbacks.nan_monitor={}": "set on_nan instead",
    "callbacks.checkpoint_saver={}": (
        "set save_folder, save_interval and save_num_checkpoints_to_keep instead"
    ),
    "callbacks.zzz={}": "there is no such callback; there are speed_monitor, lr_monitor, ",
    "loggers.wandb_logger={}": "set wandb.project instead",
    "loggers.wandb={}": "there is no such logger; set wandb.project instead",
    "callbacks.hf_checkpointer={}": "there is no such callback; set callbacks.hf_export={} instead",
    "loggers.tensorboard_logger={}": "set tensorboard=true instead",
    "loggers.neptune_logger={}": (
        "needs an account of its service, and is not tested here; set wandb.project, or"
        " loggers.file_logger={}"
    ),
    # Arguments of other packages' classes.
    "algorithms.ema.half_lif=9ba": (
        "unknown argument of EMA; did you mean algorithms.ema.half_life?"
    ),
    "algorithms.ema.half_life=9": "must be str; quote what is text",
    "algorithms.ema.half_life=no": (
        "algorithms.ema.half_life=false: must be str; quote what is text"
    ),
    "algorithms.ema.half_life=None": (
        "write null for no value; where that word is meant, quote it in a file: 'None'"
    ),
    "algorithms.ema.half_life=0123": (
        "YAML takes this for 83; write the number in plain digits, or quote what is text: '0123'"
    ),
    "algorithms.swa.update_interval=1ep": (
        "algorithms.swa={'update_interval': '1ep'}: SWA refuses it: update_interval=1ep: must be a"
        " whole number of batches, e.g. 100ba"
    ),
    "algorithms.label_smoothing.smoothing=2": (
        "algorithms.label_smoothing={'smoothing': 2}: LabelSmoothing refuses it: smoothing=2: must"
        " be more than 0 and less than 1"
    ),
    "algorithms.seq_length_warmup.max_seq_length=9": (
        "unknown argument of SeqLengthWarmup; did you mean"
        " algorithms.seq_length_warmup.min_seq_length?"
    ),
    "callbacks.speed_monitor.window_size=many loggers.file_logger={}": "must be int",
    "callbacks.runtime_estimator.time_unit=weeks loggers.file_logger={}": (
        "callbacks.runtime_estimator={'time_unit': 'weeks'}: RuntimeEstimator refuses it: Invalid"
        " time_unit: weeks. Must be one of"
    ),
    "callbacks.early_stopper={} eval_data.local=v": (
        "command line: callbacks.early_stopper.patience: must be set: str"
    ),
    "callbacks.generate.prompts=hello": "must be list[str]",
    "callbacks.hf_export.dtype=fp8": "must be one of float32, bfloat16, float16",
    "loggers.file_logger.filename=a{rank:q}": (
        "loggers.file_logger={'filename': 'a{rank:q}'}: FileLogger refuses it: filename=a{rank:q}:"
        " must hold "
    ),
    "loggers.file_logger.filename=~/a{rank}": (
        "loggers.file_logger={'filename': '~/a{rank}'}: FileLogger refuses it: filename=~/a{rank}:"
        " must lie within log_folder"
    ),
    "callbacks.hf_export.folder=$HOME/x": (
        "callbacks.hf_export={'folder': '$HOME/x'}: HfExport refuses it: folder: $HOME is not"
        " filled in here; write ${oc.env:HOME}"
    ),
    "loggers.file_logger.filname=x": (
        "unknown argument of FileLogger; did you mean loggers.file_logger.filename?"
    ),
    # Keys of the model's class.
    "model.config.num_hidden_layer=3": (
        "unknown key of GLAConfig; did you mean model.config.num_hidden_layers?"
    ),
    "model.config.hidden_size=big": "must be int",
    "model.config.hidden_act=1.10": "model.config.hidden_act=1.1: must be str; quote what is text",
    "model.config.hidden_size=0123": "YAML takes this for 83; ",
    "model.config.model_type=glaa": (
        "neither fla nor transformers has such a model; did you mean gla?"
    ),
    "model.config.vocab_size=10": "must be at least the tokenizer's 400 tokens",
    "model.config.num_hidden_layers=0": "must be 1 or more",
    "model.config.hidden_size=0": "must be 1 or more",
    "model.config.num_heads=-4": "must be 1 or more",
    "model.config.norm_eps=-1": "must be more than 0",
    "model.config.model_type=": (
        "model.config.model_type: neither fla nor transformers has such a model; give gla, for"
        " example"
    ),
    # muP: tests/model/test_mup.py has the models that it has no rules for.
    "model.mup_base_width=0": "must be in [1, 1048576], or null",
    "model.mup_base_width=-64": "must be in [1, 1048576], or null",
    "model.mup_base_width=2000000000": "must be in [1, 1048576], or null",
    "model.mup_base_width=64.5": "must be int, or null",
    "model.mup_base_width=gla": "must be int, or null",
    "model.mup_base_with=64": (
        "model.mup_base_with: unknown key; did you mean model.mup_base_width?"
    ),
    "mup_base_width=64": "mup_base_width: unknown key; did you mean model.mup_base_width?",
    "model.mup_base_width=64 model.pretrained=p": (
        "must be null with model.pretrained (and lora): it is about initial weights"
    ),
    "model.mup_base_width=64 model.pretrained=p lora.rank=8": (
        "must be null with model.pretrained (and lora): it is about initial weights"
    ),
    "optimizer.name=lamb model.mup_base_width=64": (
        "must be adamw or decoupled_adamw with model.mup_base_width: there are no rules for lamb"
    ),
    "optimizer.name=muon model.mup_base_width=64": (
        "must be adamw or decoupled_adamw with model.mup_base_width: there are no rules for muon"
    ),
    "optimizer.momentum=0.9": "must be null with optimizer.name=adamw; only muon has it",
    "optimizer.name=muon optimizer.moment=0.9": (
        "optimizer.moment: unknown key; did you mean optimizer.momentum?"
    ),
    "optimizer.name=muon model.pretrained=p lora.rank=8": (
        "must not be muon with lora: it is defined for whole matrices, adapters are products"
    ),
    "model.config.use_short_conv=true model.mup_base_width=16": (
        "must be left out with model.mup_base_width, which has no rules for it (docs/mup.md)"
    ),
    "model=gla": "must hold keys and values; its keys are "
    "model.config, model.pretrained, model.mup_base_width",
    "tokenizer=./nowhere": "tokenizer: ./nowhere: no such folder",
    # What this machine cannot do.
    **(
        {}
        if torch.cuda.is_available()
        else {
            "microbatch_size=auto": (
                "there is no GPU here, and auto works by trying out a GPU's memory; give a number"
                " of rows"
            ),
            "precision=amp_fp16": (
                "there is no GPU here, and CPUs do not train in fp16; set precision=fp32"
            ),
            "parallelism.fsdp={}": (
                "there is no GPU here; set parallelism.cpu_fallback=true to train with plain data"
                " parallelism, parallelism.cpu_fsdp=true to shard over processes, or"
                " parallelism.fsdp=null"
            ),
            "callbacks.memory_monitor={} loggers.file_logger={}": (
                "it logs the memory of a GPU, and there is none here; leave it out"
            ),
        }
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base.yaml, which is right but for the data, which is not there."""
    folder = tmp_path_factory.mktemp("wrong")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "base.yaml").write_text(
        yaml.safe_dump(
            {
                "run_name": "base",
                "max_duration": "10ba",
                "global_batch_size": 8,
                "microbatch_size": 8,
                "tokenizer": "tokenizer",
                "model": {
                    "config": {
                        "model_type": "gla",
                        "hidden_size": 32,
                        "num_hidden_layers": 1,
                        "num_heads": 2,
                    }
                },
                "train_data": {"local": "data"},
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def train() -> Any:
    return runpy.run_path(str(ROOT / "recipes" / "train.py"))["main"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(base)


def test_there_are_enough():
    assert len(WRONG) >= 60


def line_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, train: Any, *arguments: str
) -> str:
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", *arguments])
    capsys.readouterr()
    assert run(train, TrainConfig) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, "one line"
    assert err.startswith("error: ")
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("arguments", WRONG)
def test_on_the_command_line(capsys, monkeypatch, train, arguments):
    line = line_of(capsys, monkeypatch, train, "base.yaml", *arguments.split(" "))
    first, rule = arguments.partition(" ")[0], WRONG[arguments]
    assert line.startswith((rule, f"command line: {rule}", f"command line: {first}: {rule}")), line
    assert not list(Path().glob("runs/**/*.pt"))


IN_A_FILE = [
    "seed=one",
    "optimizer.lr=-1",
    "algorithms.emma={}",
    "algorithms.ema.half_lif=9ba",
    "callbacks.generate.prompts=hello",
    "model.config.hidden_size=big",
    "train_data.streams.web.propotion=1",
    "loss_spike.windw=5",
]


def test_what_the_environment_holds_is_not_told(capsys, monkeypatch, train):
    """Though a class of others says it in an error of its own."""
    monkeypatch.setenv("SECRET", "hunter2")
    for argument in (
        "algorithms.ema.half_life=${oc.env:SECRET}",
        "algorithms={ema: {half_life: '${oc.env:SECRET}'}}",
    ):
        line = line_of(capsys, monkeypatch, train, "base.yaml", argument)
        assert line.endswith(
            "EMA refuses it: half_life=${SECRET}: must be a whole number of batches, e.g. 100ba"
        )
        assert "hunter2" not in line


def test_a_file_that_is_none_is_not_told_at_length(capsys, monkeypatch, train):
    Path("words.txt").write_text("word " * 99)
    line = line_of(capsys, monkeypatch, train, "words.txt")
    assert line == f"words.txt: {('word ' * 99)[:77]}...: unknown key; see --help for all keys"


@pytest.mark.parametrize("argument", IN_A_FILE)
def test_the_same_in_a_file_names_the_file(capsys, monkeypatch, train, argument):
    content = yaml.safe_load(Path("base.yaml").read_text())
    key, _, text = argument.partition("=")
    *above, leaf = key.split(".")
    section = content
    for name in above:
        section = section.setdefault(name, {})
    section[leaf] = yaml.safe_load(text)
    Path("other.yaml").write_text(json.dumps(content))
    line = line_of(capsys, monkeypatch, train, "other.yaml")
    assert line.startswith(
        (f"other.yaml: {argument}: {WRONG[argument]}", f"other.yaml: {WRONG[argument]}")
    ), line
