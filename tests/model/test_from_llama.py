"""Llama and Mistral checkpoints as GLA models: every tensor accounted for, every bit kept, what
is not whole refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from flame_composer.config.convert import FromLlamaConfig
from flame_composer.config.data import DataConfig
from flame_composer.config.load import load
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError, DataError
from flame_composer.loader.batches import build_train_loader
from flame_composer.loader.datasets import open_for_model
from flame_composer.model.build import build_model, load_pretrained, meta_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.llama import Source, open_source
from flame_composer.model.transplant import describe, make_fresh, plan_conversion, read_target
from flame_composer.storage.folders import new_folder, require_new
from flame_composer.text.tokenizer import fingerprint, load_tokenizer
from tests.data_fixtures import byte_tokenizer, files_under
from tests.runs import ROOT, Corpus, Script, check, read_log, run_script
from tests.stack import TRANSFORMERS

SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 3e-5,
    "initializer_range": 0.3,
    "bos_token_id": 5,
    "eos_token_id": 7,
}
GLA = {"model_type": "gla", "feature_map": "relu", "use_output_gate": False}
MAIN = runpy.run_path(str(ROOT / "convert/from_llama.py"))["main"]


def save_source(
    folder: Path,
    kind: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: int = 10**9,
    tokenizer: Any = None,
    **changes: Any,
) -> Any:
    torch.manual_seed(1)
    config, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    model: Any = model_class(config(**{**SMALL, **changes})).to(dtype)
    with torch.no_grad():  # norms and biases too, which begin as ones and zeros
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return model.eval()


def convert(
    model: Path | str, out: Path, keys: dict[str, Any] | str = GLA, *arguments: str
) -> None:
    if isinstance(keys, dict):
        target = out.with_name("gla.json")
        target.write_text(json.dumps(keys))
        keys = str(target)
    MAIN(load(FromLlamaConfig, [f"model={model}", f"config={keys}", f"out={out}", *arguments]))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of all files of a folder; none of them in two."""
    weights: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert name not in weights
            weights[name] = tensor
    return weights


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_source(tmp_path / "source")
    return tmp_path / "source"


PAIRS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    **{f"self_attn.{name}_proj": f"attn.{name}_proj" for name in "qkvo"},
    **{f"mlp.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
GATES = (
    "attn.gk_proj.0.weight",
    "attn.gk_proj.1.weight",
    "attn.gk_proj.1.bias",
    "attn.g_norm.weight",
)


@pytest.mark.parametrize("shard_size", [10**9, 20000], ids=["one file", "sharded"])
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped", "full heads"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_every_tensor_is_copied_bit_for_bit_or_listed(
    tmp_path, capsys, kind, tied, kv_heads, shard_size
):
    dtype = torch.bfloat16 if kind == "mistral" else torch.float32
    biases = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    model = save_source(
        tmp_path / "source",
        kind,
        dtype=dtype,
        tie_word_embeddings=tied,
        num_key_value_heads=kv_heads,
        shard_size=shard_size,
        **biases,
    )
    convert(tmp_path / "source", tmp_path / "out", GLA, f"max_shard_size={shard_size}")
    theirs, ours = model.state_dict(), weights_of(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists() == (shard_size == 10**9)

    expected = {"model.embeddings.weight": theirs["model.embed_tokens.weight"]}
    expected["model.norm.weight"] = theirs["model.norm.weight"]
    if not tied:
        expected["lm_head.weight"] = theirs["lm_head.weight"]
    for layer in range(2):
        for there, here in PAIRS.items():
            expected[f"model.layers.{layer}.{here}.weight"] = theirs[
                f"model.layers.{layer}.{there}.weight"
            ]
    gates = {f"model.layers.{layer}.{name}" for layer in range(2) for name in GATES}
    assert ours.keys() == expected.keys() | gates
    for name, tensor in expected.items():
        assert ours[name].dtype == dtype
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name

    *table, _, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    num_biases = 14 if biases else 0
    assert (result["copied"], result["fresh"], result["dropped"]) == (len(expected), 8, num_biases)
    assert result["parameters"] == sum(tensor.numel() for tensor in ours.values())
    fates = [line.split()[0] for line in table]
    assert (fates.count("copied"), fates.count("fresh"), fates.count("dropped")) == (
        len(expected) - 9,
        4,
        num_biases // 2,
    )
    for there, here in PAIRS.items():
        pattern = (
            rf"copied +model\.layers\.\*\.{there}\.weight +-> +model\.layers\.\*\.{here}\.weight +2"
            r" x \[[0-9, ]+\]"
        )
        assert sum(re.fullmatch(pattern, line) is not None for line in table) == 1, there
    if biases:
        assert sum(line.endswith("GLA's q_proj has no bias") for line in table) == 1

    loaded = load_pretrained(str(tmp_path / "out")).eval()
    by_hand = build_model(loaded.config).eval()
    by_hand.load_state_dict(
        {"lm_head.weight": expected["model.embeddings.weight"], **ours, **expected}
    )
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, by_hand(ids).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"head_dim": 12},
        {"tie_word_embeddings": True, "shard_size": 20000},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_blocks_compute_what_the_sources_do_but_for_softmax_and_positions(tmp_path, kind, changes):
    """Norms and MLPs alike; with all gates at one, attention is the sum over the past of relu(q)
    relu(k) v, unnormalised.
    """
    llama = save_source(tmp_path / "source", kind, **changes)
    convert(tmp_path / "source", tmp_path / "out", {**GLA, "clamp_min": 0.0})
    gla: Any = load_pretrained(str(tmp_path / "out")).eval()
    hidden = torch.randn(2, 70, 32)
    torch.testing.assert_close(
        gla.model.embeddings.weight, llama.model.embed_tokens.weight, rtol=0, atol=0
    )
    with torch.no_grad():
        torch.testing.assert_close(gla.model.norm(hidden), llama.model.norm(hidden))
        for ours, theirs in zip(gla.model.layers, llama.model.layers, strict=True):
            torch.testing.assert_close(ours.attn_norm(hidden), theirs.input_layernorm(hidden))
            torch.testing.assert_close(
                ours.mlp_norm(hidden), theirs.post_attention_layernorm(hidden)
            )
            torch.testing.assert_close(ours.mlp(hidden), theirs.mlp(hidden), rtol=1e-4, atol=1e-4)

            attention, dim = theirs.self_attn, theirs.self_attn.head_dim
            q, k, v = (
                getattr(attention, f"{name}_proj")(hidden).unflatten(-1, (-1, dim)).transpose(1, 2)
                for name in "qkv"
            )
            k, v = (x.repeat_interleave(4 // x.shape[1], dim=1) for x in (k, v))
            scores = (q.relu() @ k.relu().transpose(-1, -2) * dim**-0.5).tril()
            mixed = (scores @ v).transpose(1, 2)
            # G_norm, as it begins
            normed = mixed * (mixed.square().mean(-1, keepdim=True) + gla.config.norm_eps).rsqrt()
            torch.testing.assert_close(
                ours.attn(hidden)[0], attention.o_proj(normed.flatten(2)), rtol=1e-3, atol=1e-3
            )


def test_config_tokenizer_and_generation_config_are_carried_over(tmp_path):
    save_source(
        tmp_path / "source",
        "mistral",
        max_position_embeddings=123,
        eos_token_id=[7, 9],
        pad_token_id=7,
    )
    GenerationConfig(
        bos_token_id=5,
        eos_token_id=[7, 9],
        pad_token_id=7,
        do_sample=True,
        temperature=0.5,
        cache_implementation="static",
    ).save_pretrained(tmp_path / "source")
    convert(
        tmp_path / "source",
        tmp_path / "out",
        {**GLA, "architectures": ["X"], "torch_dtype": "float16", "norm_eps": None},
    )
    config = load_pretrained(str(tmp_path / "out")).config
    has = {
        "model_type": "gla",
        "vocab_size": 400,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 48,
        "norm_eps": 3e-5,
        "bos_token_id": 5,
        "eos_token_id": 7,
        "pad_token_id": None,
        "max_position_embeddings": 123,
        "tie_word_embeddings": False,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "architectures": ["GLAForCausalLM"],
        "feature_map": "relu",
        "use_output_gate": False,
    }
    assert {key: getattr(config, key) for key in has} == has
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (
        5,
        [7, 9],
        7,
    )
    assert (generation.do_sample, generation.temperature, generation.cache_implementation) == (
        True,
        0.5,
        None,
    )
    assert fingerprint(load_tokenizer(str(tmp_path / "out"))) == fingerprint(byte_tokenizer())


WRAPPERS = ("module.", "_orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.")


def rename(folder: Path, change: Callable[[str], str]) -> None:
    weights = {
        change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", [*WRAPPERS, "inside"])
def test_names_of_a_model_in_a_wrapper_are_taken_without_it(tmp_path, source, caplog, prefix):
    convert(source, tmp_path / "plain")
    inside = {
        ".layers.0.": ".layers.0._checkpoint_wrapped_module.",
        ".layers.1.": "._orig_mod.layers.1.",
    }

    def change(name: str) -> str:
        if prefix != "inside":
            return prefix + name
        return re.sub(r"\.layers\.[01]\.", lambda match: inside[match[0]], name)

    rename(source, change)
    convert(source, tmp_path / "wrapped")
    assert files_under(tmp_path / "wrapped") == files_under(tmp_path / "plain")
    (message,) = caplog.messages
    first = "model.layers.1.input_layernorm.weight" if prefix == "inside" else "lm_head.weight"
    assert (
        message == f"{source}: its tensors have names like {change(first)}, which a wrapper (DDP,"
        f" torch.compile) gave them; they are read as {first}"
    )


def test_a_tensor_with_and_without_a_wrapper_is_refused(tmp_path, source):
    weights = load_file(source / "model.safetensors")
    weights["module.model.norm.weight"] = torch.zeros(32)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    message = (
        "holds module.model.norm.weight as well as model.norm.weight, which name the same tensor;"
        " keep one of them"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        convert(source, tmp_path / "out")


def test_weights_that_are_no_numbers_are_named(tmp_path, source, caplog):
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][:3] = torch.nan
    weights["model.layers.1.self_attn.q_proj.weight"][0] = torch.inf
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out")
    (message,) = caplog.messages
    start = f"warning: {source}: values that are infinite or not a number in "
    assert message.startswith(start)
    assert set(message.removeprefix(start).split(", ")) == {
        "model.norm.weight (3)",
        "model.layers.1.self_attn.q_proj.weight (32)",
    }


@pytest.mark.parametrize(
    "bomb",
    [{"num_hidden_layers": 10**7}, {"num_hidden_layers": 5000}, {"num_attention_heads": 10**9}],
)
def test_a_source_whose_config_makes_a_boundless_model_is_answered_at_once(tmp_path, source, bomb):
    edit_config(**bomb)(source)
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=f"its config says {next(iter(bomb))}="):
        convert(source, tmp_path / "out")
    assert time.perf_counter() - start < 5


def test_several_ends_of_text_are_kept_without_a_generation_config(tmp_path, source):
    edit_config(eos_token_id=[7, 9])(source)
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "out")
    assert load_pretrained(str(tmp_path / "out")).config.eos_token_id == 7
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [7, 9]


def test_tied_source_can_be_untied(tmp_path):
    model = save_source(tmp_path / "source", tie_word_embeddings=True)
    byte_tokenizer(300).save_pretrained(tmp_path / "tokenizer")
    arguments = ({**GLA, "tie_word_embeddings": False}, f"tokenizer={tmp_path / 'tokenizer'}")
    convert(tmp_path / "source", tmp_path / "out", *arguments)
    assert fingerprint(load_tokenizer(str(tmp_path / "out"))) == fingerprint(byte_tokenizer(300))
    weights = weights_of(tmp_path / "out")
    for name in ("lm_head.weight", "model.embeddings.weight"):
        assert torch.equal(weights[name], model.model.embed_tokens.weight)


def test_buffers_and_a_spare_head_are_listed_as_dropped(tmp_path):
    """Old releases of transformers saved the frequencies of the rotary embedding; some tied
    models come with a head.
    """
    save_source(tmp_path / "source", tie_word_embeddings=True)
    file = tmp_path / "source/model.safetensors"
    spare = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": torch.ones(400, 32),
    }
    save_file({**load_file(file), **spare}, file, metadata={"format": "pt"})
    _, plan = plan_conversion(
        gla_target(tmp_path, GLA), open_source(str(tmp_path / "source")), byte_tokenizer()
    )
    assert {entry.source: entry.reason for entry in plan if entry.fate == "dropped"} == {
        "model.layers.0.self_attn.rotary_emb.inv_freq": "GLA has no position embedding",
        "lm_head.weight": "the embeddings take its place (tie_word_embeddings)",
    }


def gla_target(folder: Path, keys: dict[str, Any]) -> Any:
    (folder / "target.json").write_text(json.dumps(keys))
    return read_target(str(folder / "target.json"))


# What is made anew


def test_fresh_tensors_begin_as_in_a_new_model(tmp_path, source):
    keys = {"model_type": "gla", "use_short_conv": True, "expand_k": 0.5, "initializer_range": 0.01}
    convert(source, tmp_path / "out", keys, "fresh=[q_proj,k_proj]")
    weights = weights_of(tmp_path / "out")
    layer = {
        name.removeprefix("model.layers.1."): weights[name]
        for name in weights
        if name.startswith("model.layers.1.")
    }
    drawn = {
        "attn.q_proj.weight": (16, 32),
        "attn.k_proj.weight": (8, 32),
        "attn.g_proj.weight": (32, 32),
        "attn.gk_proj.0.weight": (16, 32),
        "attn.gk_proj.1.weight": (8, 16),
        "attn.q_conv1d.weight": (16, 1, 4),
        "attn.k_conv1d.weight": (8, 1, 4),
        "attn.v_conv1d.weight": (16, 1, 4),
    }
    assert {name: tuple(layer[name].shape) for name in drawn} == drawn
    for name in drawn:
        assert layer[name].std().item() == pytest.approx(0.01, rel=0.5), name
        assert not torch.equal(layer[name], weights[f"model.layers.0.{name}"]), "each layer its own"
    together = torch.cat([layer[name].flatten() for name in drawn])
    assert together.std().item() == pytest.approx(0.01, rel=0.1)
    assert together.mean().item() == pytest.approx(0, abs=0.001)
    assert torch.equal(layer["attn.gk_proj.1.bias"], torch.zeros(8))
    assert torch.equal(layer["attn.g_norm_swish_gate.weight"], torch.ones(8))
    theirs = load_file(source / "model.safetensors")
    assert torch.equal(
        layer["attn.v_proj.weight"], theirs["model.layers.1.self_attn.v_proj.weight"]
    )


def test_the_same_command_gives_the_same_bytes_and_another_seed_other_gates_only(tmp_path, source):
    state = torch.random.get_rng_state()
    for name, seed, size in (("a", 1, 10**9), ("b", 1, 10**9), ("c", 2, 10**9), ("d", 1, 5000)):
        convert(source, tmp_path / name, GLA, f"seed={seed}", f"max_shard_size={size}")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert files_under(tmp_path / "a") == files_under(tmp_path / "b")
    a, c, d = (weights_of(tmp_path / name) for name in "acd")
    differ = {name for name in a if not torch.equal(a[name], c[name])}
    assert differ == {
        f"model.layers.{layer}.attn.gk_proj.{i}.weight" for layer in (0, 1) for i in (0, 1)
    }
    assert all(torch.equal(a[name], d[name]) for name in a), (
        "nor does it matter which file a tensor is in"
    )


def test_only_what_is_fresh_is_ever_made(tmp_path, source):
    model, plan = plan_conversion(
        gla_target(tmp_path, GLA), open_source(str(source)), byte_tokenizer()
    )
    for entry in plan:
        if entry.fate == "fresh":
            assert make_fresh(model, entry.target, 0).device.type == "cpu"
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_the_7b_recipe_takes_all_of_mistral_7b(monkeypatch):
    """Real shapes, on the meta device."""
    for name in ("WORLD_SIZE", "DATA_REMOTE"):
        monkeypatch.delenv(name, raising=False)
    # V0.1's
    config = MistralConfig(vocab_size=32000, rms_norm_eps=1e-5, max_position_embeddings=32768)
    shapes = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    source = Source(Path("mistral"), config, {}, shapes, dict.fromkeys(shapes, torch.bfloat16))
    recipe = str(ROOT / "yamls/gla_7b_continual.yaml")
    model, plan = plan_conversion(read_target(recipe), source, byte_tokenizer())
    assert sum(entry.fate == "copied" for entry in plan) == len(shapes) == 291
    assert sum(entry.fate == "dropped" for entry in plan) == 0
    assert {entry.target.split(".", 3)[3] for entry in plan if entry.fate == "fresh"} == set(GATES)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 7244.4
    assert len(list(describe(plan))) == 16
    given = load(TrainConfig, [recipe]).model.config
    assert {key: getattr(model.config, key) for key in given} == given, "so that training takes it"
    train = load(TrainConfig, [recipe])
    assert train.model.pretrained == "runs/gla_7b_continual/start"
    assert (
        train.optimizer.lr,
        train.scheduler.warmup,
        train.max_duration,
        train.global_batch_size,
        train.context_length,
    ) == (3e-5, "512ba", "10240ba", 256, 2048)


def test_the_documented_commands_are_understood():
    """They need a download, 8 GPUs and an object store; but their keys and files are right."""
    block = (ROOT / "docs/continual.md").read_text().split("```bash\n")[1].split("```")[0]
    commands = [shlex.split(line) for line in block.splitlines()]
    assert commands[0][:2] == ["python", "convert/from_llama.py"]
    converted = load(FromLlamaConfig, commands[0][2:])
    assert commands[1][1:3] == ["composer", "recipes/train.py"]
    trained = load(TrainConfig, [str(ROOT / commands[1][3]), *commands[1][4:]])
    assert converted.out == trained.model.pretrained
    assert converted.config == commands[1][3]
    assert converted.model == trained.tokenizer


# What is refused


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html>404</html>")


def shard(folder: Path) -> None:
    """Two files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in weights}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncated_shard(folder: Path) -> None:
    shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def change_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        shard(folder)
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return edit


def empty_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


NORM = "model.norm.weight"
BAD_SOURCES: list[tuple[Callable[[Path], None], type[Exception], str]] = [
    (
        edit_config(model_type="qwen2"),
        ConfigError,
        "model: {}: is a qwen2 model; only llama and mistral ones can be converted",
    ),
    (
        edit_config(model_type=None),
        ConfigError,
        "model: {}: is a None model; only llama and mistral ones can be converted",
    ),
    (
        edit_config(quantization_config={"bits": 4}),
        ConfigError,
        "model: {}: its weights are quantized; give the model they",
    ),
    (
        edit_config(hidden_act="gelu"),
        ConfigError,
        "model: {}: its MLPs have hidden_act=gelu, but only silu can be converted to GLA",
    ),
    (
        edit_config(num_hidden_layers=3),
        DataError,
        "{}: config.json says num_hidden_layers=3, but its weights have 2 layers; get",
    ),
    (
        edit_config(num_hidden_layers="2"),
        DataError if TRANSFORMERS < (5, 0) else ConfigError,
        "{}/config.json: ",
    ),
    (
        edit_config(vocab_size=410),
        DataError,
        (
            "{}: lm_head.weight is [400, 32], but config.json makes it [410, 32]; one of the two"
            " belongs to another model"
        ),
    ),
    (
        edit_config(num_key_value_heads=3),
        DataError,
        "{}/config.json: model.config.num_key_value_heads: must divide num_",
    ),
    (no_config, ConfigError, "model: {}: not a Hugging Face model folder: it has no config.json"),
    (broken_config, ConfigError, "{}/config.json: cannot be read as JSON: "),
    (
        pickled,
        ConfigError,
        (
            "model: {}: holds its weights as pytorch_model.bin, which is refused, because such a"
            " file can run code"
        ),
    ),
    (
        no_weights,
        ConfigError,
        "model: {}: has neither model.safetensors nor model.safetensors.index.json",
    ),
    (truncated, DataError, "{}/model.safetensors: damaged: "),
    (not_safetensors, DataError, "{}/model.safetensors: damaged: "),
    (
        missing_shard,
        DataError,
        (
            "{}/model-00002-of-00002.safetensors: is missing, though model.safetensors.index.json"
            " names it"
        ),
    ),
    (truncated_shard, DataError, "{}/model-00002-of-00002.safetensors: damaged: "),
    (empty_index, DataError, "{}/model.safetensors.index.json: has no weight_map"),
    (
        change_index(lambda files: files.update({NORM: "../x.safetensors"})),
        DataError,
        (
            "{}/model.safetensors.index.json: model.norm.weight is said to be in"
            " '../x.safetensors', which is not the name of a safetensors file"
        ),
    ),
    *(
        (
            change_index(lambda files, name=name: files.update({NORM: name})),
            DataError,
            (
                f"{{}}/model.safetensors.index.json: model.norm.weight is said to be in {name!r},"
                " which is not the name of a safetensors file"
            ),
        )
        for name in ("", ".", "..", "/etc/passwd", "a\\b", "a\0b", 7)
    ),
    (
        change_index(lambda files: files.update({"stray": files[NORM]})),
        DataError,
        "{}/model-00001-of-00002.safetensors: lacks stray, which the index says it holds",
    ),
    (
        change_index(lambda files: files.pop(NORM)),
        DataError,
        "{}: its weights lack model.norm.weight; get the checkpoint",
    ),
    (
        edit_weights(lambda weights: (weights.pop(NORM), weights.pop("lm_head.weight"))),
        DataError,
        "{}: its weights lack model.norm.weight and 1 more; get the checkpoint again",
    ),
    (
        edit_weights(
            lambda weights: weights.update(
                {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
            )
        ),
        DataError,
        (
            "{}: its weights hold model.layers.0.self_attn.q_norm.weight, which no llama model with"
            " this config.json has; the nearest is model.layers.0.self_attn.q_proj.weight"
        ),
    ),
    (
        edit_weights(lambda weights: weights.update({NORM: torch.ones(7)})),
        DataError,
        (
            "{}: model.norm.weight is [7], but config.json makes it [32]; one of the two belongs to"
            " another model"
        ),
    ),
    (
        edit_weights(lambda weights: weights.update({NORM: torch.ones(32, dtype=torch.int8)})),
        ConfigError,
        "{}/model.safetensors: model.norm.weight is of type I8, but must be one of F32, F16, BF16",
    ),
]


@pytest.mark.parametrize(
    ("damage", "kind", "message"), BAD_SOURCES, ids=[message[:70] for _, _, message in BAD_SOURCES]
)
def test_a_source_that_is_refused(tmp_path, source, damage, kind, message):
    damage(source)
    with pytest.raises(
        (ConfigError, DataError), match=f"^{re.escape(message.format(source))}"
    ) as caught:
        convert(source, tmp_path / "out")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gla.json", "source"]


BAD_KEYS = [
    ({"model_type": "llama"}, "model_type=llama: must be gla"),
    ({"num_head": 4}, "num_head=4: unknown key of GLAConfig; did you mean num_heads?"),
    ({"feature_map": 3}, "feature_map=3: must be str | null"),
    (
        {"vocab_size": 512},
        "vocab_size=512: the source has vocab_size=400; leave it out, or set 400",
    ),
    (
        {"num_hidden_layers": 1},
        "num_hidden_layers=1: the source has num_hidden_layers=2; leave it out, or set 2",
    ),
    ({"hidden_size": 64}, "hidden_size=64: the source has hidden_size=32; leave it out, or set 32"),
    (
        {"intermediate_size": 64},
        "intermediate_size=64: the source has intermediate_size=48; leave it out, or set 48",
    ),
    (
        {"norm_eps": 1e-6},
        "norm_eps=1e-06: the source has rms_norm_eps=3e-05; leave it out, or set 3e-05",
    ),
    (
        {"num_heads": 2, "num_kv_heads": 1},
        "num_heads=2: the source has num_attention_heads=4; leave it out, or set 4",
    ),
    (
        {"num_kv_heads": 4},
        "num_kv_heads=4: the source has num_key_value_heads=2; leave it out, or set 2",
    ),
    (
        {"tie_word_embeddings": True},
        (
            "tie_word_embeddings=True: the source's embeddings are not tied; leave it out, or set"
            " false"
        ),
    ),
    (
        {"attn": {"layers": [0], "num_heads": 4}},
        "attn={'layers': [0], 'num_heads': 4}: layers of softmax attention cannot be ",
    ),
    ({"hidden_act": "powlu"}, "hidden_act=powlu: must be swish, which is the source's silu"),
    ({"feature_map": "x"}, "model.config: no gla model can be built from it: unknown value 'x'"),
    (
        {"expand_k": 0.5},
        (
            "expand_k=0.5: makes model.layers.0.attn.q_proj.weight [16, 32], but the source's"
            " model.layers.0.self_attn.q_proj.weight is [32, 32]; leave it out, or make the"
            " projections anew with fresh=q_proj,k_proj"
        ),
    ),
    (
        {"expand_v": 2.0},
        (
            "expand_v=2.0: makes model.layers.0.attn.v_proj.weight [32, 32], but the source's"
            " model.layers.0.self_attn.v_proj.weight is [16, 32]; leave it out, or make the"
            " projections anew with fresh=v_proj,o_proj"
        ),
    ),
]


@pytest.mark.parametrize(
    ("keys", "message"), BAD_KEYS, ids=[message[:40] for _, message in BAD_KEYS]
)
def test_a_config_that_is_refused(tmp_path, source, keys, message):
    with pytest.raises(
        ConfigError, match=f"^{re.escape(f'{tmp_path}/gla.json: {message}')}"
    ) as caught:
        convert(source, tmp_path / "out", {**GLA, **keys})
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gla.json", "source"]


def test_other_refusals(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((ROOT / "yamls/gla_tiny.yaml").read_text())
    for changes, message in (
        (
            {},
            (
                "r.yaml: model.config.vocab_size=4096: the source has vocab_size=400; leave it out,"
                " or set 400"
            ),
        ),
        (
            {"model": {"config": {**GLA, "num_head": 4}}},
            (
                "r.yaml: model.config.num_head=4: unknown key of GLAConfig; did you mean"
                " model.config.num_heads?"
            ),
        ),
        (
            {"model": {"config": {"model_type": "llama"}}},
            "r.yaml: model.config.model_type=llama: must be gla",
        ),
        ({"sed": 42}, "r.yaml: sed: unknown key; did you mean seed?"),
    ):
        Path("r.yaml").write_text(yaml.dump(recipe | changes))
        refused(message, source, "r.yaml")
    refused("r.yml: no such file; did you mean r.yaml?", source, "r.yml")
    refused("config: nowhere.json: no such file", source, "nowhere.json")
    Path("list.json").write_text("[]")
    refused("list.json: must hold keys and values (a JSON object)", source, "list.json")
    Path("gla.json").write_text(json.dumps(GLA))
    refused(
        "model: ./nowhere: no such folder; give a Hugging Face model folder or id",
        "./nowhere",
        "gla.json",
    )
    byte_tokenizer(420).save_pretrained("large")
    refused(
        f"tokenizer: has 420 tokens, but {source} has only 400; give the model's own",
        source,
        "gla.json",
        "tokenizer=large",
    )
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/mine.txt").write_text("x")
    refused("out=out: already exists and is not empty; choose another folder", source, "gla.json")
    assert files_under(Path("out")) == {"mine.txt": b"x"}


def refused(message: str, source: Path | str, target: str, *arguments: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        convert(source, Path("out"), target, *arguments)


def test_a_hub_id_is_read_from_the_hubs_cache(tmp_path, source, monkeypatch):
    """As it lies on disk after a download; without a network there is no other."""
    from huggingface_hub import constants

    repository = tmp_path / "hub/models--some--llama"
    shutil.copytree(source, repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert("some/llama", tmp_path / "out")
    convert(source, tmp_path / "same")
    assert files_under(tmp_path / "out") == files_under(tmp_path / "same")
    with pytest.raises(
        ConfigError,
        match=r"^model: other/llama: no such folder, and it cannot be fetched from the Hugging",
    ):
        convert("other/llama", tmp_path / "other")


# The folder is whole or not there


def test_places_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    for out, message in (
        ("/proc", "is a mount point, which no folder can take the place of; name a folder in it"),
        (tmp_path / "file/out", f"{tmp_path}/file is a file; choose another folder"),
        (tmp_path / "file", "already exists and is not empty; choose another folder"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(f'out={out}: {message}')}$"):
            require_new(Path(out))


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(tmp_path, source, exists):
    (tmp_path / "link").symlink_to(tmp_path / "place")
    if exists:
        (tmp_path / "place").mkdir()
    convert(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert weights_of(tmp_path / "place")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gla.json",
        "link",
        "place",
        "source",
    ]


WRITERS = {
    "text": lambda folder: (folder / "config.json").write_text("x" * 9999),
    "weights": lambda folder: save_file({"a": torch.zeros(9999)}, folder / "model.safetensors"),
    "tokenizer": lambda folder: byte_tokenizer().save_pretrained(folder),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_that_takes_no_more(tmp_path, kind):
    """As a limit on the size of files, which each writer meets in its own way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        message = f"^{re.escape(str(tmp_path))}/out: cannot be written: .*File too large"
        with (
            pytest.raises(DataError, match=message) as caught,
            new_folder(tmp_path / "out") as folder,
        ):
            WRITERS[kind](folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_is_ended_in_the_middle(tmp_path):
    config = LlamaConfig(
        **{**SMALL, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8000}
    )
    made_up_source(tmp_path / "source", config, num_files=2)
    (tmp_path / "gla.json").write_text(json.dumps(GLA))
    keys = [
        f"model={tmp_path}/source",
        f"config={tmp_path}/gla.json",
        f"out={tmp_path}/out",
        "max_shard_size=500000",
    ]
    for number, left in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
        script = Script("convert/from_llama.py", *keys)
        while not list(tmp_path.glob(".out-*.unfinished/*.safetensors")):
            assert script.process.is_alive(), script.read("err")
            time.sleep(0.001)
        assert script.process.pid is not None
        os.kill(script.process.pid, number)
        process = script.wait()
        assert "Traceback" not in process.stderr
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
        assert len(list(tmp_path.glob(".out-*.unfinished"))) == left
        assert not (tmp_path / "out").exists()
    check(run_script("convert/from_llama.py", *keys))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gla.json", "out", "source"]
    assert load_pretrained(str(tmp_path / "out")).config.hidden_size == 512


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "a/out"

    def fail(error: Exception) -> None:
        with new_folder(out) as folder:
            (folder / "file").write_text("half")
            raise error

    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())
    with pytest.raises(
        DataError, match=f"^{re.escape(str(out))}: cannot be written: .*No space left on device"
    ):
        fail(OSError(28, "No space left on device"))
    assert list((tmp_path / "a").iterdir()) == []
    with new_folder(out) as folder:
        (folder / "file").write_text("whole")
        assert not out.exists()
    assert files_under(tmp_path / "a") == {"out/file": b"whole"}
    with pytest.raises(ConfigError, match="already exists and is not empty"), new_folder(out):
        pass


def test_what_a_killed_conversion_left_is_removed_unless_it_is_still_at_work(tmp_path):
    names = (".out-dead.unfinished", ".out-alive.unfinished", ".outer-dead.unfinished", ".out-mine")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    other = os.open(tmp_path / names[1], os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with new_folder(tmp_path / "out"):
        pass
    os.close(other)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names[1:]}


def made_up_source(folder: Path, config: LlamaConfig | MistralConfig, num_files: int) -> int:
    """A checkpoint of zeros, in files with a hole for all that comes after their heads: it takes
    no disk. Its bytes.
    """
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    names, weight_map, total = list(shapes), {}, 0
    for number in range(num_files):
        file, head, size = f"model-{number + 1:05}-of-{num_files:05}.safetensors", {}, 0
        for name in names[
            number * len(names) // num_files : (number + 1) * len(names) // num_files
        ]:
            begin, size = size, size + 2 * shapes[name].numel()
            head[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [begin, size],
            }
            weight_map[name] = file
        text = json.dumps(head).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + size)
        total += size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def peak_memory(*arguments: str) -> float:
    """GB at which a conversion peaks, the pages of mapped files among them."""
    command = [sys.executable, "convert/from_llama.py", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    return usage.ru_maxrss * 1024 / 1e9


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes a minute: make test-faults"
)
def test_no_more_than_a_file_is_in_memory(tmp_path):
    """1.3 GB of weights from one file into files of 200 MB: what is beyond that is the imports."""
    wide = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 12,
        "vocab_size": 32000,
    }
    config = LlamaConfig(**{**SMALL, **wide, "num_attention_heads": 32, "num_key_value_heads": 8})
    assert made_up_source(tmp_path / "source", config, num_files=1) > 1.2e9
    save_source(tmp_path / "small")
    (tmp_path / "gla.json").write_text(json.dumps(GLA))
    imports, peak = (
        peak_memory(
            f"config={tmp_path}/gla.json",
            f"model={tmp_path / name}",
            f"out={tmp_path / name}_out",
            *more,
        )
        for name, more in (("small", ()), ("source", ("max_shard_size=200000000",)))
    )
    assert peak < imports + 0.3
    assert sum(path.stat().st_size for path in (tmp_path / "source_out").iterdir()) > 1.2e9


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_7B" not in os.environ, reason="writes 14.5 GB: set FLAME_COMPOSER_7B=1"
)
def test_a_7b_model_is_converted_within_4_gb(tmp_path):
    """Mistral-7B-v0.1's shapes, in two files as on the hub."""
    config = MistralConfig(vocab_size=32000, rms_norm_eps=1e-5, max_position_embeddings=32768)
    assert made_up_source(tmp_path / "source", config, num_files=2) > 14.4e9
    start = time.monotonic()
    peak = peak_memory(
        f"model={tmp_path}/source", "config=yamls/gla_7b_continual.yaml", f"out={tmp_path}/out"
    )
    print(f"peak {peak:.2f} GB, {time.monotonic() - start:.0f} s")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    shutil.rmtree(tmp_path / "out")
    assert written > 14.4e9
    assert peak < 4


# Training goes on from it


def test_training_goes_on_from_the_converted_weights(corpus: Corpus, tmp_path):
    """The first loss logged is the converted model's on that batch."""
    tokenizer = load_tokenizer(str(corpus.tokenizer))
    save_source(
        tmp_path / "source",
        "mistral",
        tokenizer=tokenizer,
        vocab_size=300,
        bos_token_id=0,
        eos_token_id=0,
    )
    convert(tmp_path / "source", tmp_path / "out")
    file = tmp_path / "continual.yaml"
    recipe = yaml.safe_load((ROOT / "yamls/gla_tiny.yaml").read_text())
    file.write_text(yaml.dump({key: value for key, value in recipe.items() if key != "model"}))
    summary = corpus.train_run(
        tmp_path / "run", str(file), f"model.pretrained={tmp_path / 'out'}", "max_duration=6ba"
    )
    rows = read_log(tmp_path / "run")

    dataset = open_for_model(
        str(shutil.copytree(corpus.train, tmp_path / "rows")),
        None,
        tokenizer=tokenizer,
        context_length=64,
    )
    loader = build_train_loader(
        {"": dataset}, DataConfig(local="rows", num_workers=0), global_batch_size=4, seed=42
    )
    batch = next(iter(loader.dataloader))
    torch.manual_seed(0)
    losses = []
    converted = load_pretrained(str(tmp_path / "out"))
    for model in (converted, build_model(converted.config)):
        with torch.no_grad():
            outputs = CausalLM(model, tokenizer, varlen=True)(
                {key: value.clone() for key, value in batch.items()}
            )
        losses.append(outputs.loss.item())
    assert rows[0]["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[1] - losses[0]) > 0.1, "a new model would have another"
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert summary["eval_loss"] < summary["eval_loss_initial"]


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes half a minute: make test-faults"
)
def test_a_converted_model_recovers_and_is_ahead_of_one_from_scratch(corpus: Corpus, tmp_path):
    """docs/continual.md on a smaller corpus: train a Mistral, export and convert it, and train
    on, against a new model.
    """
    shape = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    mistral = corpus.yaml_with(
        {**shape, "model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 2}
    )
    gla = corpus.yaml_with(
        {
            **shape,
            "model_type": "gla",
            "num_heads": 4,
            "num_kv_heads": 2,
            "expand_k": 1.0,
            "expand_v": 1.0,
            "feature_map": "relu",
            "use_output_gate": False,
        }
    )
    source = corpus.train_run(tmp_path / "mistral", mistral, "max_duration=120ba")
    for script, *keys in (
        (
            "convert/to_hf.py",
            f"checkpoint={tmp_path / 'mistral/checkpoints'}",
            f"out={tmp_path / 'hf'}",
        ),
        (
            "convert/from_llama.py",
            f"model={tmp_path / 'hf'}",
            f"config={gla}",
            f"out={tmp_path / 'gla'}",
        ),
    ):
        check(run_script(script, *keys))
    keys = (gla, "max_duration=40ba", "scheduler.warmup=4ba")
    converted = corpus.train_run(
        tmp_path / "converted", *keys, f"model.pretrained={tmp_path / 'gla'}"
    )
    scratch = corpus.train_run(tmp_path / "scratch", *keys)
    assert converted["train_tokens"] == scratch["train_tokens"]
    assert converted["eval_perplexity_initial"] > 1.2 * source["eval_perplexity"], (
        "softmax and positions are gone"
    )
    assert converted["eval_perplexity"] < 0.9 * converted["eval_perplexity_initial"], "it recovers"
    assert converted["eval_perplexity"] < 0.9 * scratch["eval_perplexity"], "and is ahead"
