"""Every recipe in yamls/: it is valid, its comment says what it comes to, and it makes a model
of the size it is named for.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from flame_composer import cpu
from flame_composer.config.convert import ConvertConfig, ToHfConfig
from flame_composer.config.load import load
from flame_composer.config.sft import SftConfig
from flame_composer.config.train import TrainConfig
from flame_composer.cpu.coverage import ON_CPU
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.model.build import build_model, load_pretrained
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config
from tests.conftest import CONTEXT_LENGTH, GLA, small_fla
from tests.data_fixtures import byte_tokenizer
from tests.recipes.small import keys_of, small
from tests.runs import ROOT, Corpus, Ranks, check, read_log, run_script

TUNING = sorted((ROOT / "yamls").glob("sft_*.yaml"))
FILES = sorted({*(ROOT / "yamls").glob("*.yaml")} - {*TUNING})
PARAMETERS = {
    "delta_net_340m": 341_594_112,
    "gated_deltanet_1b": 1_387_348_732,
    "gated_deltanet_340m": 346_996_350,
    "gated_deltanet_hybrid_340m": 336_415_840,
    "gla_1b": 1_365_514_240,
    "gla_1b_paper": 1_365_514_240,
    "gla_340m": 341_707_776,
    "gla_340m_256k": 341_707_776,
    "gla_340m_paper": 341_707_776,
    "gla_7b_continual": 7_244_390_400,
    "gla_7b_tp": 6_741_635_072,
    "gla_tiny": 4_484_096,
    "gsa_340m": 347_390_976,
    "hgrn2_340m": 341_148_672,
    "kda_340m": 340_832_312,
    "mamba2_340m": 349_619_712,
    "olmo2_1b": 1_484_916_736,
    "olmo2_tiny": 5_509_376,
    "olmo_1b": 1_176_764_416,
    "rwkv7_340m": 348_564_480,
    "transformer_340m": 341_099_520,
    "transformer_tiny": 4_458_752,
}
# The yardsticks of the papers, a batch and a warmup in tokens.
PAPER = {"gla_340m_paper": (15e9, 0.5e6, 0.5e9), "gla_1b_paper": (100e9, 2e6, 1e9)}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("DATA_REMOTE", raising=False)


def test_there_is_a_count_for_every_recipe() -> None:
    assert [path.stem for path in FILES] == sorted(PARAMETERS)


@pytest.mark.filterwarnings("ignore:According to Bo")  # fla's word on its RWKV
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not path.stem.endswith("_tiny"):
        monkeypatch.setenv("WORLD_SIZE", "8")  # GPUs
    config = load(TrainConfig, [str(path)])
    assert config.run_name == path.stem
    hf_config = build_hf_config(config.model.config, None, config.context_length, to_run=False)
    with torch.device("meta"):
        model = build_model(hf_config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[path.stem]
    if config.varlen:
        CausalLM(model, byte_tokenizer(), varlen=True)  # its layers keep documents apart

    steps = config.plan(epoch_batches=10**9).total
    comment = "".join(
        line for line in path.read_text().splitlines(keepends=True) if line.startswith("#")
    )
    said = re.search(r"(\d+) steps x (\d+) rows x (\d+) tokens = ([\d.]+) (B|M)", comment)
    if said is None:
        assert path.stem == "gla_tiny"
    else:
        assert [int(number) for number in said.groups()[:3]] == [
            steps,
            config.global_batch_size,
            config.context_length,
        ]
        tokens = steps * config.global_batch_size * config.context_length
        assert float(said[4]) == round(tokens / {"B": 1e9, "M": 1e6}[said[5]], 1)
    if not path.stem.endswith("_tiny"):
        assert f"recipes/train.py yamls/{path.name}" in comment


@pytest.mark.parametrize("path", TUNING, ids=lambda path: path.stem)
def test_recipe_for_tuning(path: Path) -> None:
    """It starts from a model that another recipe makes, and the commands in its comment are taken:
    those that make its model and its data.
    """
    config = load(TrainConfig, [str(path)])
    assert config.run_name == path.stem
    assert config.varlen
    assert not config.model.config
    assert config.model.pretrained is not None
    base = Path(config.model.pretrained).parts[1]
    before = load(TrainConfig, [f"{ROOT}/yamls/{base}.yaml"])
    assert (config.tokenizer, config.context_length) == (before.tokenizer, before.context_length)
    assert config.plan(epoch_batches=1000).total >= 1000
    if path.stem.endswith("_tiny"):
        return
    text = path.read_text().split("run_name")[0].replace("\\\n#", "")
    assert f"recipes/train.py yamls/{path.name}" in text
    assert config.global_batch_size % (8 * config.microbatch_size) == 0, "eight GPUs"
    commands = [
        shlex.split(line[1:]) for line in text.splitlines() if line.startswith("#   python")
    ]
    export, convert = (command[2:] for command in commands)
    exported = load(ToHfConfig, export)
    assert exported.out == config.model.pretrained
    assert exported.checkpoint == before.save_folder
    assert (config.lora is not None) == ("lora" in path.stem)
    converted = load(SftConfig, convert)
    assert converted.context_length == config.context_length
    assert converted.tokenizer == config.tokenizer
    assert config.eval_data is not None
    assert converted.out == config.train_data.remote
    assert converted.val_out == config.eval_data.remote


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes(name: str) -> None:
    config = load(TrainConfig, [f"{ROOT}/yamls/{name}.yaml"])
    plan = config.plan(epoch_batches=10**9)
    batch = config.global_batch_size * config.context_length
    expected = PAPER[name]
    assert [plan.total * batch, batch, plan.warmup * batch] == pytest.approx(expected, rel=0.05)
    assert (
        config.optimizer.lr,
        config.scheduler.min_lr_ratio,
        config.optimizer.grad_clip_norm,
    ) == (3e-4, 0.1, 1.0)


def test_baselines_are_as_large_as_what_they_are_compared_with() -> None:
    for name in ("340m", "tiny"):
        assert PARAMETERS[f"transformer_{name}"] == pytest.approx(
            PARAMETERS[f"gla_{name}"], rel=0.01
        )
    for name, count in PARAMETERS.items():
        assert "340m" not in name or count == pytest.approx(341e6, rel=0.03)


def test_recipes_of_one_size_differ_in_the_model_only() -> None:
    def rest(name: str) -> list[str]:
        lines = (ROOT / f"yamls/{name}.yaml").read_text().splitlines()
        start = lines.index("  config:")
        end = next(i for i in range(start, len(lines)) if not lines[i].strip())
        return [
            line
            for line in lines[:start] + lines[end:]
            if not line.startswith(("#", "run_name", "varlen"))
        ]

    for name in PARAMETERS:
        if name.endswith("_340m"):
            assert rest(name) == rest("gla_340m")
    assert rest("transformer_tiny") == rest("gla_tiny")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gla_340m_256k", ("parallelism.context=2", "parallelism.fsdp=null", "microbatch_size=1")),
        ("gla_7b_tp", ("parallelism.tensor=2", "parallelism.cpu_fsdp=true")),
    ],
)
def test_a_divided_recipe_made_small_trains_on_two_ranks_as_on_one(
    corpus: Corpus, tmp_path: Path, name: str, keys: tuple[str, ...]
) -> None:
    long = tmp_path / "long"
    convert = ("convert/to_mds.py", f"source={corpus.text}", f"tokenizer={corpus.tokenizer}")
    check(run_script(*convert, "context_length=128", f"out={long}"))
    path = ROOT / f"yamls/{name}.yaml"
    common = (
        *keys_of(path, small(path)),
        f"train_data.local={long}",
        "context_length=128",
        "global_batch_size=2",
        "eval_data=null",
        "max_duration=6ba",
        "optimizer.eps=0.01",
    )
    divided, alone = tmp_path / "divided", tmp_path / "alone"
    fsdp = ("parallelism.fsdp={sharding_strategy: FULL_SHARD}",)
    Ranks(2, *corpus.keys(divided, *common, *fsdp, *keys)).finish()
    corpus.train_run(alone, *common)
    ours, theirs = read_log(divided), read_log(alone)
    assert len(ours) == len(theirs) == 6
    for mine, whole in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(whole["loss"], abs=1e-5)


def test_long_rows_are_made_by_the_command_in_the_recipe() -> None:
    path = ROOT / "yamls/gla_340m_256k.yaml"
    text = path.read_text().split("run_name")[0].replace("\\\n#", "")
    (command,) = [shlex.split(line[1:]) for line in text.splitlines() if "python" in line]
    converted = load(ConvertConfig, command[2:])
    recipe = yaml.safe_load(path.read_text())
    assert converted.max_doc_length is None, "documents are whole"
    assert converted.context_length == recipe["context_length"] == 262_144
    assert converted.tokenizer == recipe["tokenizer"]
    assert "s3://my-bucket/long}/train" in recipe["train_data"]["remote"]
    assert (converted.out, converted.val_out) == (
        "s3://my-bucket/long/train",
        "s3://my-bucket/long/val",
    )


def test_transformer_tiny_trains(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = corpus.train_run(
        run,
        "yamls/transformer_tiny.yaml",
        "max_duration=4ba",
        "scheduler.warmup=1ba",
        "eval_data=null",
    )
    losses = [row["loss"] for row in read_log(run)]
    assert summary["steps"] == len(losses) == 4
    assert losses[0] == pytest.approx(math.log(4096), rel=0.05)
    assert losses[-1] < losses[0] - 0.2


# What cannot be trained here

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them")


@needs_no_gpu
def test_a_model_without_a_cpu_form_is_refused_before_anything_starts(
    corpus: Corpus, tmp_path: Path
) -> None:
    file = corpus.yaml_with({"model_type": "mesa_net"})
    process = run_script(
        "recipes/train.py",
        file,
        "precision=fp32",
        "parallelism.fsdp=null",
        f"tokenizer={corpus.tokenizer}",
        f"log_folder={tmp_path / 'run'}",
    )
    assert process.returncode == 2
    assert (
        process.stderr.splitlines()[-1]
        == f"error: {file}: model.config.model_type=mesa_net: fla's mesa_net needs a GPU, and there"
        f" is none here; of fla's models, {', '.join(ON_CPU[:-1])} and {ON_CPU[-1]} train on a CPU,"
        " and so does any of transformers' own (llama, ...)"
    )
    assert not (tmp_path / "run").exists()


@needs_no_gpu
@pytest.mark.filterwarnings("ignore:The correction_factor is set to 1 by default")  # Comba's own
@pytest.mark.filterwarnings("ignore:According to Bo")  # RWKV-7's own
def test_every_fla_model_that_is_not_refused_trains_on_a_cpu() -> None:
    cpu.enable()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fla = {name for name in CONFIG_MAPPING if CONFIG_MAPPING[name].__module__.startswith("fla.")}
    assert {"gla", "mamba", "mamba2", "gsa", "hgrn2", "delta_net", "transformer"} <= fla
    for name in fla - set(ON_CPU):
        with pytest.raises(
            InvalidField, match=f"^model.config.model_type: fla's {name} needs a GPU"
        ):
            build_hf_config({"model_type": name}, None, CONTEXT_LENGTH)
    ids = torch.randint(0, 400, (1, 16))
    for name in ON_CPU:
        model = build_model(build_hf_config(small_fla(name), byte_tokenizer(), CONTEXT_LENGTH))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert all(
            parameter.grad is not None and parameter.grad.isfinite().all()
            for parameter in model.parameters()
        )


@needs_no_gpu
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attnres_block_size", 2),
        ("hidden_act", "powglu"),
    ],
)
def test_parts_of_gla_without_a_cpu_form_are_refused(key: str, value: object) -> None:
    with pytest.raises(InvalidField) as caught:
        build_hf_config({**GLA, key: value}, byte_tokenizer(), CONTEXT_LENGTH)
    assert (caught.value.name, caught.value.rule) == (
        f"model.config.{key}",
        "needs a GPU, and there is none here; leave it out",
    )
    assert (
        getattr(
            build_hf_config({**GLA, key: value}, byte_tokenizer(), CONTEXT_LENGTH, to_run=False),
            key,
        )
        is not None
    )


@needs_no_gpu
def test_weights_without_a_cpu_form_are_refused_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mesa_net", "architectures": ["MesaNetForCausalLM"]})
    )
    with pytest.raises(
        ConfigError,
        match=f"^{re.escape(str(tmp_path))}: model_type of its config: fla's mesa_net needs a GPU",
    ):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "key", "value", "rule"),
    [
        ("gla", "attn_mode", "fused_chunk", "must not be fused_chunk"),
        ("lightnet", "attn_mode", "fused_chunk", "must not be fused_chunk"),
        ("kda", "attn_mode", "fused_recurrent", "must be chunk"),
        ("gated_deltanet", "attn_mode", "fused_recurrent", "must be chunk"),
        ("rwkv7", "attn", {"layers": [1], "num_heads": 2}, "must be null"),
    ],
)
def test_what_fla_takes_and_fails_at_later_is_refused_by_name(
    model_type: str, key: str, value: object, rule: str
) -> None:
    keys = small_fla(model_type) | {key: value}
    with pytest.raises(InvalidField, match=f"^model.config.{key}: {rule}"):
        build_hf_config(keys, byte_tokenizer(), CONTEXT_LENGTH)


def test_documents_that_cannot_be_kept_apart_need_varlen_false() -> None:
    keys = {"model_type": "mamba", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}
    model = build_model(build_hf_config(keys, byte_tokenizer(), CONTEXT_LENGTH))
    with pytest.raises(InvalidField) as caught:
        CausalLM(model, byte_tokenizer(), varlen=True)
    assert caught.value.name == "varlen"
    assert not CausalLM(model, byte_tokenizer(), varlen=False).varlen
