"""What OLMo's recipes need: kinds of parameters that are decayed, a cosine that ends beyond the
run, and settings of the loss that stay as they are.
"""

from __future__ import annotations

import importlib.metadata
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Timestamp
from composer.loggers import Logger

from flame_composer.checkpoint.content import needed_by
from flame_composer.config.load import load
from flame_composer.config.sections import LoraConfig, OptimizerConfig, SchedulerConfig
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError
from flame_composer.model.base import Base
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.lora import add_adapters, build_adapter
from flame_composer.model.optimizer import build_optimizer, kinds_of
from flame_composer.train.optim import Schedule, rate_factor
from flame_composer.train.resume import SameLoss
from tests.conftest import CONTEXT_LENGTH, GLA, LLAMA
from tests.data_fixtures import byte_tokenizer
from tests.runs import ROOT, Corpus, Ranks, read_log, run_script
from tests.train.test_optim import plan, resumed

OLMO2 = {**LLAMA, "model_type": "olmo2"}
MODELS: dict[str, dict[str, Any]] = {
    "gla": GLA,
    "mamba": {
        "model_type": "mamba",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "state_size": 4,
        "tie_word_embeddings": False,
    },
    "llama": {**LLAMA, "attention_bias": True},
    "llama_tied": {**LLAMA, "tie_word_embeddings": True},
    "olmo2": OLMO2,
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2},
}
# Without their layers' numbers and the endings .weight
EMBEDDINGS = {
    "gla": {"model.embeddings"},
    "mamba": {"backbone.embeddings"},
    "llama": {"model.embed_tokens"},
    "llama_tied": {"model.embed_tokens", "lm_head"},
    "olmo2": {"model.embed_tokens"},
    "gpt2": {"transformer.wte", "transformer.wpe", "lm_head"},
}


def model_of(name: str) -> torch.nn.Module:
    return build_model(build_hf_config(MODELS[name], byte_tokenizer(), CONTEXT_LENGTH))


def decayed(model: torch.nn.Module, *kinds: str, trained: int | None = None) -> dict[str, bool]:
    """Of every parameter that is trained, by its first name, whether it is decayed."""
    config = OptimizerConfig(weight_decay=0.25, decay=[*kinds])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config).param_groups
    found = {
        names[id(each)]: {0.25: True, 0.0: False}[group["weight_decay"]]
        for group in groups
        for each in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups), "each is in one group"
    assert len(found) == sum(each.requires_grad for each in model.parameters())
    assert all(group["params"] for group in groups)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_kinds_of_parameters(name: str) -> None:
    model = model_of(name)
    kinds = kinds_of(model)
    state = dict(model.named_parameters(remove_duplicate=False))
    assert kinds.keys() == state.keys()
    embeddings = {each.removesuffix(".weight") for each in kinds if kinds[each] == "embeddings"}
    assert embeddings == EMBEDDINGS[name]
    for each, kind in kinds.items():
        assert (kind == "vectors") == (state[each].ndim < 2)
        assert kind != "vectors" or "embed" not in each
    if name in ("gla", "llama", "olmo2"):
        assert kinds["lm_head.weight"] == "matrices"


@pytest.mark.parametrize("name", MODELS)
def test_what_is_decayed_is_what_the_key_names(name: str) -> None:
    model = model_of(name)
    kinds = kinds_of(model)
    for chosen in (
        ("matrices",),
        ("vectors",),
        ("embeddings",),
        ("matrices", "vectors"),
        ("matrices", "embeddings", "vectors"),
    ):
        assert decayed(model, *chosen) == {
            each: kinds[each] in chosen for each, _ in model.named_parameters()
        }
    # By default exactly what it was, in the same order
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    parameters = [*model.parameters()]
    by_shape = [
        [each for each in parameters if each.ndim >= 2],
        [each for each in parameters if each.ndim < 2],
    ]
    for group, expected in zip(groups, by_shape, strict=True):
        assert [id(each) for each in group["params"]] == [id(each) for each in expected]


@pytest.mark.parametrize("name", ["gla", "llama_tied"])
def test_adapters_are_matrices_and_embeddings_stay_embeddings(name: str) -> None:
    model = model_of(name)
    for whole in (False, True):
        adapter = build_adapter(LoraConfig(train_embeddings=whole), model, Base("b", "0" * 64))
        if not whole:
            continue
        add_adapters(model, adapter)
    found = decayed(model, "matrices", "vectors")
    assert {each: value for each, value in found.items() if ".lora_" in each}
    assert all(value for each, value in found.items() if ".lora_" in each)
    embeddings = [each for each in found if "embed" in each]
    assert len(embeddings) == 1
    assert not found[embeddings[0]]
    if name == "gla":
        assert found["lm_head.weight"]


def test_a_checkpoint_needs_the_decay_of_each_parameter() -> None:
    config = TrainConfig(
        optimizer=OptimizerConfig(weight_decay=0.25, decay=["matrices", "vectors"])
    )
    config.model.config = OLMO2
    hf_config = build_hf_config(OLMO2, byte_tokenizer(), CONTEXT_LENGTH)
    needed = needed_by(config, hf_config)
    decays = {name: settings["weight_decay"] for name, settings in needed.settings.items()}
    assert decays.keys() == needed.weights.keys()
    assert decays.pop("model.model.embed_tokens.weight") == 0
    assert set(decays.values()) == {0.25}


# A cosine that ends beyond the run


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_run_ends_on_the_way_of_a_longer_curve(name: Any) -> None:
    config = SchedulerConfig(name=name, min_lr_ratio=0.1)
    short = plan(warmup=10, total=80)._replace(t_max=100)
    for batch in range(80):
        whole = rate_factor(config, batch, plan(warmup=10, total=100))
        assert rate_factor(config, batch, short) == whole
    assert rate_factor(config, 80, short) > 0.15
    same = plan(warmup=10, total=100)._replace(t_max=100)
    assert rate_factor(config, 100, same) == pytest.approx(0.1)


# Steps taken; length of the run and t_max, before and after; the keys that are named.
LENGTHS: list[tuple[int, tuple[int, int | None], tuple[int, int | None], str]] = [
    (9, (20, 40), (40, 40), ""),
    (20, (20, 40), (39, 40), ""),
    (20, (20, None), (20, 20), ""),
    (9, (20, None), (15, 20), ""),
    (20, (20, 40), (40, None), ""),
    (4, (20, 40), (20, 60), ""),
    (9, (20, 40), (20, 60), "scheduler.t_max (40ba before, 60ba now)"),
    (9, (20, None), (20, 40), "scheduler.t_max (None before, 40ba now)"),
    (9, (20, 40), (20, None), "scheduler.t_max (40ba before, None now)"),
]


@pytest.mark.parametrize(("taken", "before", "after", "named"), LENGTHS)
def test_a_run_may_be_made_as_long_as_its_curve(taken, before, after, named) -> None:
    old, new = (
        Schedule(SchedulerConfig(), 3e-4, plan(warmup=4, total=total)._replace(t_max=t_max))
        for total, t_max in (before, after)
    )
    if not named:
        resumed(old, taken, new)
        assert new.num_used == taken
        return
    with pytest.raises(ConfigError, match="trained at other learning rates") as caught:
        resumed(old, taken, new)
    assert named in str(caught.value)


def test_a_checkpoint_of_before_there_was_a_t_max_goes_on() -> None:
    """And so does one without the settings of the loss, which Composer then does not load."""
    old = Schedule(SchedulerConfig(), 3e-4, plan(warmup=4, total=20))
    old.num_used = 9
    state = old.state_dict()
    del state["made_from"]["scheduler.t_max"]
    for t_max in (None, 20):
        new = Schedule(SchedulerConfig(), 3e-4, plan(warmup=4, total=20)._replace(t_max=t_max))
        new.load_state_dict(state)
    new = Schedule(SchedulerConfig(), 3e-4, plan(warmup=4, total=20)._replace(t_max=30))
    with pytest.raises(ConfigError, match=r"scheduler\.t_max \(None before, 30ba now\)"):
        new.load_state_dict(state)


def test_the_recipe_ends_at_the_rate_at_which_olmos_second_stage_begins() -> None:
    """configs/official-0425/OLMo2-1B-stage2-seed42.yaml: learning_rate 0.000074487, which is where
    the cosine is after 4 of 5 T tokens.
    """
    config = load(TrainConfig, [f"{ROOT}/yamls/olmo2_1b.yaml"])
    lengths = config.plan(epoch_batches=10**9)
    last = config.optimizer.lr * rate_factor(config.scheduler, lengths.total, lengths)
    assert last == pytest.approx(0.000074487, rel=1e-4)
    assert (lengths.warmup, lengths.t_max) == (4000, 2_384_186)


def test_settings_of_the_loss_that_are_not_known_are_not_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loss = SameLoss({"z_loss": 0.1}, allow_change=False)
    loss.load_state_dict({"settings": {"z_loss": 0.1, "of_a_later_version": 1}})
    with pytest.raises(ConfigError, match=r"another loss: z_loss \(0\.2 before, 0\.1 now\)"):
        loss.load_state_dict({"settings": {"z_loss": 0.2}})
    SameLoss({"z_loss": 0.1}, allow_change=True).load_state_dict({"settings": {"z_loss": 0.2}})
    caplog.clear()
    for before, told in (("amp_bf16", 0), ("fp32", 1)):
        held = {"settings": {}, "precision": before}
        SameLoss({}, precision="amp_bf16", allow_change=False).load_state_dict(held)
        assert len(caplog.messages) == told
    assert "with 'fp32', and this run continues with amp_bf16: " in caplog.messages[0]
    caplog.clear()
    loss = SameLoss({}, allow_change=False)
    loss.load_state_dict(loss.state_dict())
    loss.load_state_dict({"settings": {}, "packages": "of an attacker"})
    assert caplog.messages == []
    loss.load_state_dict({"settings": {}, "packages": {**loss.packages, "torch": "2.0.1"}})
    now = importlib.metadata.version("torch")
    (told,) = caplog.messages
    assert f"other packages (torch '2.0.1' before, {now} now): on the same rows" in told
    SameLoss({"z_loss": 0.1, "varlen": True}, allow_change=False).load_state_dict(
        {"settings": {"z_loss": 0.1}}
    )


@pytest.mark.parametrize("key", ["z_loss", "repetition_filter.max_count"])
def test_a_checkpoint_of_earlier_versions_was_trained_without(key: str) -> None:
    state: Any = types.SimpleNamespace(timestamp=Timestamp(batch=3))
    known: dict[str, Any] = {"z_loss": 0.0, "repetition_filter.max_count": None, "varlen": False}
    SameLoss(known, allow_change=False).after_load(state, Logger(state))
    loss = SameLoss({**known, key: 32}, allow_change=False)
    with pytest.raises(ConfigError, match=rf"another loss: {key} \((0\.0|None) before, 32 now\)"):
        loss.after_load(state, Logger(state))
    loss = SameLoss({**known, key: 32}, allow_change=False)
    loss.load_state_dict({"settings": {**known, key: 32}})
    loss.after_load(state, Logger(state))
    new: Any = types.SimpleNamespace(timestamp=Timestamp())
    SameLoss({**known, key: 32}, allow_change=False).after_load(new, Logger(new))


# Runs

KEYS = ("scheduler.t_max=12ba", "optimizer.decay=[matrices,vectors]", "optimizer.weight_decay=5")
RUN = ("z_loss=0.001", "save_interval=2ba", "eval_data=null", "scheduler.warmup=1ba")


@pytest.fixture
def olmo(corpus: Corpus) -> str:
    """yamls/gla_tiny.yaml with a tiny OLMo 2."""
    return corpus.yaml_with({**OLMO2, "vocab_size": 300, "tie_word_embeddings": False})


def test_a_run_is_stopped_and_made_longer_and_its_settings_stay(
    corpus: Corpus, olmo: str, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    corpus.train_run(whole, olmo, *RUN, *KEYS, "max_duration=8ba")
    corpus.killed_run(run, olmo, *RUN, *KEYS, "max_duration=6ba", after_step=3)
    corpus.train_run(run, olmo, *RUN, *KEYS, "max_duration=6ba")

    def refused(*keys: str) -> str:
        process = run_script("recipes/train.py", *corpus.keys(run, olmo, *RUN, *KEYS, *keys))
        assert process.returncode == 2
        assert "Traceback" not in process.stderr
        return process.stderr.splitlines()[-1]

    line = refused("max_duration=8ba", "optimizer.decay=[matrices,embeddings]")
    assert line.startswith(f"error: {run}/checkpoints: none of its 3 checkpoints is of this run: ")
    assert "it was trained with another optimizer.weight_decay or optimizer.decay: its opt" in line
    for key, line in {
        "varlen=false": "varlen (True before, False now)",
        "train_data.loss_across_documents=false": "loss_across_documents (True before, False now)",
        "algorithms.label_smoothing.smoothing=0.2": "smoothing (None before, 0.2 now)",
    }.items():
        assert f"{line}; set back what changed" in refused("max_duration=8ba", key)
    line = refused("max_duration=8ba", "z_loss=0.01")
    assert "another loss: z_loss (0.001 before, 0.01 now); set back what changed" in line
    assert "scheduler.t_max (12ba before, 13ba now)" in refused(
        "scheduler.t_max=13ba", "max_duration=8ba"
    )
    corpus.train_run(run, olmo, *RUN, *KEYS, "max_duration=8ba")
    keys = ("loss", "grad_norm", "learning_rate", "batch_hash")
    rows = [[[row[key] for key in keys] for row in read_log(each)] for each in (whole, run)]
    assert rows[0] == rows[1]

    # Norms are decayed here, and embeddings are not
    state = torch.load(whole / "checkpoints/ba8.pt", weights_only=False)["state"]
    assert state["model"]["model.model.norm.weight"].mean() < 0.95


def test_a_sharded_run_decays_the_same(corpus: Corpus, olmo: str, tmp_path: Path) -> None:
    sharded = ("parallelism.cpu_fsdp=true", "parallelism.fsdp.state_dict_type=sharded")

    def keys(run: Path, *more: str) -> list[str]:
        return corpus.keys(run, olmo, *RUN, *KEYS, *more)

    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    corpus.train_run(alone, olmo, *RUN, *KEYS, "optimizer.eps=0.01", "max_duration=5ba")
    Ranks(2, *keys(ranks, *sharded, "optimizer.eps=0.01", "max_duration=4ba")).finish()
    Ranks(2, *keys(ranks, *sharded, "optimizer.eps=0.01", "max_duration=5ba")).finish()
    losses = [[row["loss"] for row in read_log(each)] for each in (alone, ranks)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    default = tmp_path / "default"
    corpus.train_run(
        default,
        *(olmo, *RUN, *KEYS, "optimizer.eps=0.01", "max_duration=5ba"),
        "optimizer.decay=[matrices,embeddings]",
    )
    assert read_log(default)[-1]["loss"] != pytest.approx(losses[0][-1], rel=1e-4)


def test_a_token_that_is_taken_for_padding_is_named(
    corpus: Corpus, olmo: str, tmp_path: Path
) -> None:
    """The config class of OLMo 2 names token 1."""

    def warnings(*keys: str) -> list[str]:
        run = tmp_path / f"run{len(keys)}"
        process = run_script(
            "recipes/train.py", *corpus.keys(run, olmo, *RUN, "max_duration=1ba", *keys)
        )
        assert process.returncode == 0
        return [line for line in process.stderr.splitlines() if "padding" in line]

    (line,) = warnings()
    assert line.startswith("warning: model.config.pad_token_id: the model takes token 1 (")
    assert line.endswith("for a new run, set model.config.pad_token_id=null")
    assert warnings("model.config.pad_token_id=null") == []


def test_rows_that_repeat_are_left_out_while_rows_become_longer(
    corpus: Corpus, olmo: str, tmp_path: Path
) -> None:
    """Sequence length warmup cuts all that a batch has for each token, and nothing else."""
    warmup = "algorithms.seq_length_warmup={duration: 0.5, min_seq_length: 8}"
    keys = (*RUN, warmup, "repetition_filter.max_count=8", "max_duration=4ba", "save_folder=null")
    corpus.train_run(tmp_path / "run", olmo, *keys)
    assert [row["left_out"]["rows"] for row in read_log(tmp_path / "run")] == sorted(
        row["left_out"]["rows"] for row in read_log(tmp_path / "run")
    )
    assert len(read_log(tmp_path / "run")) == 4
