"""Layers that are divided over ranks compute as whole ones, and what they save is whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flame_composer.checkpoint.sharded import HEAD
from flame_composer.config.load import load
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError
from flame_composer.train.assemble import check as check_run
from tests.data_fixtures import byte_tokenizer
from tests.runs import Corpus, Ranks, Script, check, last_json, read_log, run_ranks
from tests.train.test_parallelism import (
    SHARDED,
    assert_close,
    assert_equal,
    losses,
    norms,
    slow,
    weights,
)

SIZES = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gla": {"model_type": "gla", "num_heads": 4},
    "gla with everything": {
        "model_type": "gla",
        "num_heads": 4,
        "num_kv_heads": 2,
        "use_short_conv": True,
        "clamp_min": -3.0,
        "tie_word_embeddings": True,
    },
    "gla, nothing fused": {
        "model_type": "gla",
        "num_heads": 4,
        "fuse_norm": False,
        "use_output_gate": False,
        "fuse_swiglu": False,
    },
    "gated_deltanet": {"model_type": "gated_deltanet", "num_heads": 4, "head_dim": 16},
    "gated_deltanet with everything": {
        "model_type": "gated_deltanet",
        "num_heads": 2,
        "num_v_heads": 4,
        "head_dim": 16,
        "expand_v": 1.0,
        "allow_neg_eigval": True,
        "use_gate": False,
    },
    "gla with attention": {
        "model_type": "gla",
        "num_heads": 4,
        "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 40},
    },
    "transformer": {"model_type": "transformer", "num_heads": 4, "qk_norm": True},
    "llama": {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
}

COMPARE = """
import json
import sys
import torch
from composer.utils import dist, get_device
from torch.distributed.device_mesh import init_device_mesh
from flame_composer.model.build import build_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.tensor import divide, require_even_parts
from tests.data_fixtures import byte_tokenizer

dist.initialize_dist(get_device())
size = dist.get_world_size()
found = {}
for name, config in json.loads(sys.argv[1]).items():
    hf_config = build_hf_config(config, byte_tokenizer(), 96)
    torch.manual_seed(3)
    batch = {"input_ids": torch.randint(0, 400, (2, 96))}
    lengths = torch.tensor([[17, 73, 6], [1, 95, 0]])
    batch["sequence_id"] = torch.stack([torch.arange(3).repeat_interleave(n) for n in lengths])
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 0] = -100
    varlen = not name.endswith("across documents")
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(CausalLM(build_model(hf_config), byte_tokenizer(), varlen=varlen))
    names = list(models[0].state_dict())
    for model in models:
        if model is models[1]:
            require_even_parts(model.model, tensor=size, devices=size)
            divide(model, init_device_mesh("cpu", (size,)))
        model.train()
        model(dict(batch))["loss"].backward()
    whole, parts = models
    theirs, ours = (each(dict(batch)) for each in models)
    assert list(parts.state_dict()) == names
    gradients = {key: each.grad.full_tensor() for key, each in parts.named_parameters()}
    local = sum(each.to_local().numel() for each in parts.parameters())
    found[name] = {
        "logits": ((ours.logits - theirs.logits).abs().max() / theirs.logits.abs().max()).item(),
        "gradients": {
            key: ((gradients[key] - each.grad).abs().max() / each.grad.abs().max()).item()
            for key, each in whole.named_parameters()
        },
        "share": local / sum(each.numel() for each in whole.parameters()),
    }
print(json.dumps(found))
"""


def test_divided_models_have_the_logits_and_gradients_of_whole_ones(tmp_path: Path) -> None:
    """Of packed documents, to fp32 rounding."""
    (tmp_path / "compare.py").write_text(COMPARE)
    configs = {name: {**SIZES, **config} for name, config in MODELS.items()}
    configs["gated_deltanet across documents"] = configs["gated_deltanet"]
    results = run_ranks(2, tmp_path / "compare.py", json.dumps(configs))
    for result in results:
        found = json.loads(result.stdout.splitlines()[-1])
        assert list(found) == list(configs)
        for name, differences in found.items():
            assert differences["logits"] < 1e-5, name
            far = {key: value for key, value in differences["gradients"].items() if value > 1e-5}
            assert far == {}, name
            assert 0.5 < differences["share"] < 0.8, name


DIVIDED = (*SHARDED, "parallelism.tensor=2")


@pytest.fixture(scope="module")
def divided(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, each of which has half of every layer, that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "divided"
    Ranks(2, *corpus.keys(run, *DIVIDED)).finish()
    return run


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    keys = corpus.keys(run, *SHARDED, "parallelism.fsdp=null")
    check(Script("recipes/train.py", *keys).wait())
    return run


def assert_as_whole(run: Path, name: str, whole: Path, clipped_at: float = 0.5) -> None:
    """Each row of the log, and the weights in the end, are as one rank's; to fp32 rounding."""
    assert losses(run)[0] == pytest.approx(losses(whole)[0], rel=1e-6), "the same weights at first"
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
    assert norms(run) == pytest.approx(norms(whole), rel=1e-3)
    assert min(norms(whole)) > clipped_at, "clipped, every one"
    counted = ("batch_hash", "num_tokens", "num_samples", "lr")
    ours, theirs = (
        [{name: row[name] for name in counted if name in row} for row in read_log(each)]
        for each in (run, whole)
    )
    assert ours == theirs
    assert_close(weights(run, name), weights(whole, "ba12.pt"))


def test_a_divided_model_is_trained_as_a_whole_one(divided: Path, whole: Path) -> None:
    assert_as_whole(divided, "ba12", whole)
    folder = divided / "checkpoints/ba12"
    assert torch.load(folder / HEAD, weights_only=False)["pieces"] == 2
    for number in range(2):
        piece = torch.load(folder / f"piece{number}.pt", weights_only=True)
        parts = {
            name: (part["start"] / part["shape"][0], len(part["part"]) / part["shape"][0])
            for name, part in piece["model"].items()
        }
        assert set(parts.values()) == {(number / 2, 0.5)}, "whole rows, of every tensor"


def test_a_killed_divided_run_goes_on_bit_for_bit_and_divided_otherwise(
    corpus: Corpus, divided: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    keys = corpus.keys(run, *DIVIDED)
    Ranks(2, *keys).kill_after(run / "train_log.jsonl", 6)
    Ranks(2, *keys).finish()
    assert read_log(run) == read_log(divided)
    assert_equal(weights(run, "ba12"), weights(divided, "ba12"))

    # On one rank, and on two again, which take on from its file
    longer = ("allow_schedule_change=true",)
    alone = (*keys, *longer, "parallelism.tensor=1", "parallelism.fsdp=null")
    assert last_json(Script("recipes/train.py", *alone, "max_duration=14ba").wait())["steps"] == 14
    Ranks(2, *keys, *longer, "max_duration=16ba").finish()
    # The same steps, of one rank from beginning to end
    other = tmp_path / "alone"
    more = (*SHARDED, "parallelism.fsdp=null")
    check(Script("recipes/train.py", *corpus.keys(other, *more)).wait())
    for steps in (14, 16):
        again = corpus.keys(other, *more, *longer, f"max_duration={steps}ba")
        check(Script("recipes/train.py", *again).wait())
    assert losses(run) == pytest.approx(losses(other), rel=1e-4)
    assert_close(weights(run, "ba16"), weights(other, "ba16.pt"))


@slow
@pytest.mark.faults
def test_two_by_two_ranks(corpus: Corpus, tmp_path: Path) -> None:
    """Divided over two, and sharded over two: trained as one, killed, and divided otherwise."""
    run, undisturbed, whole = (tmp_path / name for name in ("killed", "undisturbed", "whole"))
    keys = (*DIVIDED, "model.config.num_heads=4")
    Ranks(4, *corpus.keys(run, *keys)).kill_after(run / "train_log.jsonl", 6)
    Ranks(4, *corpus.keys(run, *keys)).finish()
    Ranks(4, *corpus.keys(undisturbed, *keys)).finish()
    assert read_log(run) == read_log(undisturbed)
    assert_equal(weights(run, "ba12"), weights(undisturbed, "ba12"))
    alone = (*keys, "parallelism.tensor=1", "parallelism.fsdp=null")
    check(Script("recipes/train.py", *corpus.keys(whole, *alone)).wait())
    assert_as_whole(run, "ba12", whole)

    longer = ("allow_schedule_change=true", "save_num_checkpoints_to_keep=-1")
    for steps, ranks, tensor in ((14, 2, 1), (16, 4, 4), (18, 4, 2)):
        more = (*longer, f"max_duration={steps}ba")
        divided = (*keys, *more, f"parallelism.tensor={tensor}")
        Ranks(ranks, *corpus.keys(run, *divided)).finish()
        check(Script("recipes/train.py", *corpus.keys(whole, *alone, *more)).wait())
        assert_close(weights(run, f"ba{steps}"), weights(whole, f"ba{steps}.pt"))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)


@slow
@pytest.mark.faults
@pytest.mark.parametrize("name", ["gated_deltanet", "llama"])
def test_other_models_are_divided_as_well(corpus: Corpus, tmp_path: Path, name: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": name == "llama"}
    file = corpus.yaml_with({**MODELS[name], **sizes})
    divided, whole = tmp_path / "divided", tmp_path / "whole"
    Ranks(4, *corpus.keys(divided, file, *DIVIDED)).finish()
    keys = corpus.keys(whole, file, *SHARDED, "parallelism.fsdp=null")
    check(Script("recipes/train.py", *keys).wait())
    assert_as_whole(divided, "ba12", whole)


@slow
@pytest.mark.faults
def test_all_that_a_divided_run_may_have(corpus: Corpus, divided: Path, tmp_path: Path) -> None:
    """Recomputed blocks, gathered ones, muP, decay of all kinds and one file, which exports the
    same; and is trained on, divided again.
    """
    run = tmp_path / "run"
    more = (
        "parallelism.activation_checkpointing=true",
        "parallelism.fsdp.sharding_strategy=SHARD_GRAD_OP",
        "parallelism.fsdp.state_dict_type=full",
        "optimizer.name=decoupled_adamw",
        "optimizer.weight_decay=1e-3",
        "model.mup_base_width=16",
        "optimizer.grad_clip_norm=0.25",
    )
    keys = (*DIVIDED, *more)
    Ranks(2, *corpus.keys(run, *keys)).kill_after(run / "train_log.jsonl", 6)
    Ranks(2, *corpus.keys(run, *keys)).finish()
    pieces = tmp_path / "pieces"
    changed = "parallelism.fsdp.state_dict_type=sharded"
    Ranks(2, *corpus.keys(pieces, *keys, changed)).finish()
    whole = tmp_path / "whole"
    alone = ("parallelism.tensor=1", "parallelism.fsdp=null")
    kept = [key for key in keys if not key.startswith(("parallelism.fsdp", "parallelism.tensor"))]
    check(Script("recipes/train.py", *corpus.keys(whole, *kept, *alone)).wait())
    assert read_log(run) == read_log(pieces)
    assert_as_whole(run, "ba12.pt", whole, clipped_at=0.25)
    exports = []
    for each in (run, pieces):
        out = tmp_path / f"{each.name}_export"
        check(Script("convert/to_hf.py", f"checkpoint={each}/checkpoints", f"out={out}").wait())
        exports.append((out / "model.safetensors").read_bytes())
    assert exports[0] == exports[1]

    tuned, alone = tmp_path / "tuned", tmp_path / "alone"
    base = f"model.pretrained={tmp_path}/run_export"
    Ranks(2, *corpus.keys(tuned, *DIVIDED, base)).finish()
    on_one = (*SHARDED, "parallelism.fsdp=null", base)
    check(Script("recipes/train.py", *corpus.keys(alone, *on_one)).wait())
    assert losses(tuned) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(tuned)[0] < losses(whole)[0], "what it had learned"


@slow
@pytest.mark.faults
def test_muon_makes_whole_matrices_of_divided_ones_orthogonal(
    corpus: Corpus, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    keys = (*SHARDED, "optimizer.name=muon")
    Ranks(4, *corpus.keys(run, *keys, "parallelism.tensor=2")).kill_after(
        run / "train_log.jsonl", 6
    )
    Ranks(4, *corpus.keys(run, *keys, "parallelism.tensor=2")).finish()
    check(Script("recipes/train.py", *corpus.keys(whole, *keys, "parallelism.fsdp=null")).wait())
    assert_as_whole(run, "ba12", whole)


GLA_OF_3 = ("model.config.num_heads=3", "model.config.hidden_size=48")
REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no fsdp": (("parallelism.fsdp=null",), 2, "parallelism.tensor=2: needs parallelism.fsdp={}"),
    "a fallback": (
        ("parallelism.cpu_fsdp=false", "parallelism.cpu_fallback=true"),
        2,
        "parallelism.cpu_fsdp: must be true with parallelism.tensor=2, where there is no GPU",
    ),
    "nothing": (("parallelism.tensor=0",), 2, "parallelism.tensor=0: must be 1 device or more"),
    "ranks": ((), 3, "parallelism.tensor=2: tensor x context = 2 x 1 must divide the 3 devices"),
    "heads": (GLA_OF_3, 2, "parallelism.tensor: must divide model.config.num_heads=3"),
    "heads of keys": (
        ("model.config.num_heads=4", "model.config.num_kv_heads=1"),
        2,
        "parallelism.tensor: must divide model.config.num_kv_heads=1",
    ),
    "heads of values": (
        (
            "model.config.model_type=gated_deltanet",
            "model.config.head_dim=16",
            "model.config.num_heads=1",
            "model.config.num_v_heads=4",
        ),
        2,
        "parallelism.tensor: must divide model.config.num_heads=1",
    ),
    "heads of attention": (
        ("model.config.attn={layers: [0], num_heads: 1}",),
        2,
        "parallelism.tensor: must divide model.config.attn.num_heads=1",
    ),
    "channels": (
        ("model.config.intermediate_size=50", "global_batch_size=8"),
        4,
        "parallelism.tensor: cannot divide model.layers.0.mlp.gate_proj, whose 50 output channels"
        " are not a multiple of the 4 devices",
    ),
    "a model": (
        ("model.config.model_type=gsa",),
        2,
        "parallelism.tensor: must be 1 with a gsa model; it is for gla, gated_deltanet, llama,"
        " transformer",
    ),
    "biases": (
        ("model.config.model_type=llama", "model.config.attention_bias=true"),
        2,
        "parallelism.tensor: must be 1 with model.config.attention_bias",
    ),
    "lamb": (
        ("optimizer.name=lamb",),
        2,
        "optimizer.name: must be adamw, decoupled_adamw or muon with parallelism.tensor=2",
    ),
    "replicas": (
        ("parallelism.fsdp.sharding_strategy=HYBRID_SHARD", "parallelism.fsdp.replicas=1"),
        2,
        "parallelism.fsdp.sharding_strategy: must be FULL_SHARD or SHARD_GRAD_OP with",
    ),
    "compiled": (
        ("parallelism.compile=true",),
        2,
        "parallelism.compile: must be false with parallelism.tensor=2",
    ),
    "kernels that differ": (
        ("deterministic=false",),
        2,
        "deterministic: must be true with parallelism.tensor=2",
    ),
    "offloading": (
        ("parallelism.activation_cpu_offload=true",),
        2,
        "parallelism.activation_cpu_offload: ",
    ),
    "a monitor": (
        ("callbacks.optimizer_monitor=null", "loggers.file_logger={}"),
        2,
        "callbacks.optimizer_monitor: must be false with parallelism.tensor=2",
    ),
    "adapters": (
        ("lora={}", "model.pretrained=somewhere"),
        2,
        "lora: must be null with parallelism.tensor=2",
    ),
    "an algorithm": (("algorithms.ema.half_life=5ba",), 2, "must not be set together with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_divided_is_named(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, ranks, problem = REFUSED[case]
    monkeypatch.setenv("WORLD_SIZE", f"{ranks}")
    byte_tokenizer().save_pretrained(tmp_path)
    given = {
        "run_name": "refused",
        "max_duration": "5ba",
        "global_batch_size": ranks,
        "microbatch_size": 1,
        "context_length": 64,
        "tokenizer": tmp_path,
        "train_data.local": tmp_path,
        "model.config.model_type": "gla",
        "model.config.hidden_size": 64,
        "model.config.num_hidden_layers": 1,
        "parallelism.fsdp": "{}",
        "parallelism.cpu_fsdp": "true",
        "parallelism.tensor": 2,
    }
    with pytest.raises(ConfigError, match=re.escape(problem)):
        check_run(load(TrainConfig, [*(f"{key}={value}" for key, value in given.items()), *keys]))


@slow
@pytest.mark.faults
def test_layers_and_rows_are_divided_at_once(corpus: Corpus, tmp_path: Path) -> None:
    """Four ranks of which each has half of every layer, and half of every row."""
    source, tokenizer = f"source={corpus.text}", f"tokenizer={corpus.tokenizer}"
    data = ("context_length=128", f"out={tmp_path}/train", "val_fraction=0.15")
    made = Script("convert/to_mds.py", source, tokenizer, *data, f"val_out={tmp_path}/val").wait()
    check(made)
    keys = (
        *SHARDED,
        "context_length=128",
        f"train_data.local={tmp_path}/train",
        f"eval_data.local={tmp_path}/val",
        "microbatch_size=1",
        "global_batch_size=2",
    )
    run, whole = tmp_path / "run", tmp_path / "whole"
    divided = (*keys, "parallelism.tensor=2", "parallelism.context=2")
    Ranks(4, *corpus.keys(run, *divided)).kill_after(run / "train_log.jsonl", 6)
    Ranks(4, *corpus.keys(run, *divided)).finish()
    check(Script("recipes/train.py", *corpus.keys(whole, *keys, "parallelism.fsdp=null")).wait())
    assert_as_whole(run, "ba12", whole)
