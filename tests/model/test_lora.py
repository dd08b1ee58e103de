"""Adapters in models: where they go, that training reaches them, that merging changes nothing."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from flame_composer import cpu
from flame_composer.config.sections import LoraConfig, ModelConfig, OptimizerConfig
from flame_composer.errors import InvalidField
from flame_composer.export.merge import BOUND, merge
from flame_composer.model import lora
from flame_composer.model.base import Base, identify_base
from flame_composer.model.build import build_model, build_or_load, meta_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.optimizer import build_optimizer
from flame_composer.model.probe import require_gradients
from flame_composer.model.work import count_parameters, count_work
from tests.data_fixtures import byte_tokenizer

BASE = Base("/nowhere", "0" * 64)
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
# Every kind of model that trains on a CPU: fla's two, and transformers' by their kinds of layers.
MODELS: dict[str, dict[str, Any]] = {
    "gla": {"model_type": "gla", "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2},
    "gla_with_kv_heads": {
        "model_type": "gla",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "tie_word_embeddings": True,
    },
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "llama": {"model_type": "llama", **SMALL},
    "llama_tied": {
        "model_type": "llama",
        **SMALL,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "mistral": {"model_type": "mistral", **SMALL, "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", **SMALL, "num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"model_type": "gemma2", **SMALL, "num_key_value_heads": 1, "head_dim": 16},
    "phi3": {"model_type": "phi3", **SMALL, "pad_token_id": 0},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {"model_type": "gpt_neox", **SMALL},
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "mixtral": {"model_type": "mixtral", **SMALL, "num_key_value_heads": 1, "num_local_experts": 2},
}


def made(name: str, *targets: str, **keys: Any) -> tuple[PreTrainedModel, lora.Adapter]:
    """A model with adapters that are not 0, as after training."""
    torch.manual_seed(3)
    model = build_model(build_hf_config(MODELS[name], byte_tokenizer(), 128))
    config = LoraConfig(rank=4, targets=list(targets) or ["default"], **keys)
    adapter = lora.build_adapter(config, model, BASE)
    lora.add_adapters(model, adapter)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, adapter


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(150).reshape(2, 75) * 11 % 250
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("targets", ["default", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_merged_logits_are_those_with_the_adapter(name: str, targets: str) -> None:
    """Within 1e-4 in fp32, for every kind of model that has a form for CPUs; and the merged model
    has the base's weights by the base's names, all of them trained again.
    """
    model, adapter = made(name, targets)
    base = build_model(model.config)
    assert all(
        parameter.requires_grad == (".lora_" in name)
        for name, parameter in model.named_parameters()
    )
    adapted = logits_of(model)
    frozen = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    merge(model, "here", dtype="float32")
    merged = logits_of(model)
    assert (merged - adapted).abs().max() <= 1e-4
    state = model.state_dict()
    assert list(state) == list(base.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in frozen.items():
        changed = not torch.equal(state[name.replace(".base_layer", "")], tensor)
        assert changed == (name.removesuffix(".base_layer.weight") in adapter.targets), name


@pytest.mark.parametrize("targets", ["default", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_training_reaches_every_adapter(name: str, targets: str) -> None:
    model, adapter = made(name, targets, train_embeddings=True, dropout=0.1)
    wrapped = CausalLM(model, byte_tokenizer(), varlen=name != "mamba", adapter=adapter)
    random, state = torch.get_rng_state(), {**wrapped.state_dict()}
    require_gradients(wrapped, context_length=128, precision="fp32")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in wrapped.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in wrapped.state_dict().items())


def test_which_projections_get_an_adapter() -> None:
    def found(name: str, *targets: str) -> list[str]:
        return lora.endings_of(made(name, *targets)[1].targets)

    mixing = ["q_proj", "k_proj", "v_proj", "g_proj", "gk_proj.0", "gk_proj.1", "o_proj"]
    assert found("gla") == mixing
    assert found("gla", "all") == [*mixing, "gate_proj", "up_proj", "down_proj"]
    assert found("llama") == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert found("gpt2", "all") == ["c_attn", "c_proj", "c_fc"]
    assert found("mamba") == ["in_proj"]
    assert found("gla", "gk_proj.1", "down_proj") == ["gk_proj.1", "down_proj"]
    _, some = made("llama", "layers.1.self_attn.q_proj")
    assert some.targets == ("model.layers.1.self_attn.q_proj",)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("llama", ["q_prj"], "no projection of this model is named 'q_prj'; did you mean q_proj?"),
        ("gla", ["xyz"], "no projection of this model is named 'xyz'; there are q_proj, k_proj,"),
        ("gla", ["q_proj", "g_norm_swish_gate"], "no projection of this model is named 'g_norm_sw"),
        (
            "gla",
            ["lm_head"],
            "lm_head is the output layer, which gets no adapter; leave it out, or",
        ),
        ("mamba", ["out_proj"], "fla's mamba reads the weights of out_proj without calling it"),
    ],
)
def test_targets_that_cannot_be(name: str, targets: list[str], message: str) -> None:
    with pytest.raises(InvalidField) as error:
        made(name, *targets)
    assert error.value.name == "lora.targets"
    assert error.value.rule.startswith(message)


KEYS: dict[str, dict[str, Any]] = {
    "hgrn2": {"expand_ratio": 16},
    "lightnet": {"num_heads": 2},
    "rodimus": {"block_type": "rodimus"},
}


@pytest.mark.parametrize("model_type", sorted({*lora._PASSED_BY} - {"samba"}))
def test_layers_that_fla_passes_by_get_no_adapter(model_type: str) -> None:
    """The table is right as long as a layer's code reads the weights of these projections.

    (Samba, which has the layer of Mamba, cannot be built without flash-attn.)
    """
    cpu.enable()
    keys = {"model_type": model_type, **KEYS.get(model_type, {})}
    if model_type != "log_linear_mamba2":
        keys |= {"num_hidden_layers": 2, "hidden_size": 64}
    model = meta_model(build_hf_config(keys, byte_tokenizer(), 64, to_run=False))
    dead = lora.passed_by_in(model)
    assert {name.rpartition(".")[2] for name in dead} == set(lora._PASSED_BY[model_type])
    for chosen in ("default", "all"):
        adapter = lora.build_adapter(LoraConfig(targets=[chosen]), model, BASE)
        assert dead.isdisjoint(adapter.targets)
    for name in dead:
        owner, _, projection = name.rpartition(".")
        layer = inspect.getmodule(type(model.get_submodule(owner)))
        assert layer is not None
        code = inspect.getsource(layer)
        assert f"self.{projection}.weight" in code, "fla calls it now: remove it from _PASSED_BY"


def test_a_fused_mlp_would_pass_its_adapter_by() -> None:
    """fla's MLP, told to fuse again, reads down_proj's weights only: the probe names it."""
    model, adapter = made("gla", "all")
    wrapped = CausalLM(model, byte_tokenizer(), varlen=True, adapter=adapter)
    for layer in model.model.layers:
        assert not layer.mlp.fuse_swiglu
        layer.mlp.fuse_swiglu = True
    with pytest.raises(
        InvalidField, match=r"no gradient reaches 4 of the 40 .* leave out down_proj$"
    ):
        require_gradients(wrapped, context_length=128, precision="fp32")
    untouched, _ = made("gla")
    assert all(layer.mlp.fuse_swiglu for layer in untouched.model.layers)


def test_unfused_and_fused_mlps_agree() -> None:
    model, adapter = made("gla", "down_proj")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.zeros_(parameter)  # as at the start of training
    torch.manual_seed(3)
    base = build_model(model.config)
    assert adapter.targets[0].endswith("down_proj")
    assert torch.allclose(logits_of(model), logits_of(base), rtol=0, atol=1e-6)


def test_what_composer_sees() -> None:
    """The model keeps its class, its state dict is what is trained, AdamW holds no more, and a
    frozen weight costs 4 FLOPs a token and a trained one 6.
    """
    model, adapter = made("gla", train_embeddings=True)
    base = count_work(build_model(model.config))
    wrapped = CausalLM(model, byte_tokenizer(), varlen=True, adapter=adapter)
    assert wrapped.is_fla
    trained = {name for name, each in wrapped.named_parameters() if each.requires_grad}
    assert set(wrapped.state_dict()) == trained
    assert {name for name in trained if ".lora_" not in name} == {
        "model.model.embeddings.weight",
        "model.lm_head.weight",
    }
    wrapped.should_save_peft_only = False  # Composer sends all weights to the other ranks
    assert set(wrapped.state_dict()) > trained
    groups = build_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [
        (len(trained), 0.1)
    ]
    assert wrapped.get_metadata()["lora"] == adapter.as_plain()
    in_adapters = sum(each.numel() for name, each in model.named_parameters() if ".lora_" in name)
    vocabulary = model.lm_head.weight.numel()
    flops = 4 * (base.multiplied - vocabulary) + 6 * (vocabulary + in_adapters)
    assert wrapped.work.flops_per_token(64) == flops
    assert base.frozen == 0
    assert count_parameters(model) == count_parameters(build_model(model.config)) + in_adapters


def test_a_tied_embedding_is_trained_once() -> None:
    model, adapter = made("llama_tied", train_embeddings=True)
    wrapped = CausalLM(model, byte_tokenizer(), varlen=True, adapter=adapter)
    state = wrapped.state_dict()
    names = ["model.model.embed_tokens.weight", "model.lm_head.weight"]
    assert [name for name in state if ".lora_" not in name] == names
    assert sum(each is model.lm_head.weight for each in wrapped.parameters()) == 1


@pytest.mark.parametrize("name", ["gla", "llama"])
def test_generation_is_the_merged_models(name: str) -> None:
    model, _ = made(name, "all")
    prompt = torch.arange(1, 20)[None]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_adapter = model.eval().generate(prompt, **options)
    lora.merge_adapters(model)
    assert torch.equal(model.generate(prompt, **options), with_adapter)


def test_a_merge_that_changes_the_model_is_refused() -> None:
    """As where a layer reads its weights and passes the adapter by."""
    model, _ = made("gla", "all")
    model.model.layers[0].mlp.fuse_swiglu = True
    with pytest.raises(
        ValueError, match=r"^here: merged, its logits differ by .* nothing was writ"
    ):
        merge(model, "here", dtype="float32")
    model, _ = made("gla", "all")
    first, second = merge(model, "here", dtype="bfloat16")
    assert float(first.split("differ by ")[1].split()[0]) <= BOUND["cpu"]
    assert second.startswith("stored as bfloat16: they differ by ")
    assert 1e-3 < float(second.split("differ by ")[1].split()[0]) < 1


def test_the_hash_of_a_base_is_that_of_sha256sum(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    build_model(build_hf_config(MODELS["llama"], byte_tokenizer(), 64)).save_pretrained(
        folder, max_shard_size=20_000
    )
    (folder / "README.md").write_text("of no consequence")
    found = identify_base(str(folder))
    lines = subprocess.run(
        "sha256sum config.json *.safetensors", shell=True, cwd=folder, capture_output=True
    ).stdout
    assert lines.count(b"\n") > 2
    assert found == Base(str(folder), hashlib.sha256(lines).hexdigest())
    (folder / "README.md").unlink()
    assert identify_base(str(folder)) == found
    last = sorted(folder.glob("*.safetensors"))[-1]
    save_file({"a": torch.zeros(1)}, last)
    assert identify_base(str(folder)).sha256 != found.sha256


def test_settings_reach_the_layers() -> None:
    model, _ = made("llama", alpha=24.0, dropout=0.25)
    layer: Any = model.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": 6.0}
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.lora_A["default"].weight.shape == (4, 32)
    model.train()
    ids = torch.arange(60)[None]
    first, second = (model(input_ids=ids).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_documents_stay_apart() -> None:
    """Changing a document changes no logit of its neighbour, with adapters as without."""
    for name, targets in itertools.product(("gla", "llama"), ("default", "all")):
        model, adapter = made(name, targets)
        wrapped = CausalLM(model, byte_tokenizer(), varlen=True, adapter=adapter).eval()
        ids = torch.arange(80)[None] * 3 % 250
        parts = (torch.arange(80)[None] >= 30).long()
        with torch.no_grad():
            whole = wrapped({"input_ids": ids, "sequence_id": parts}).logits
            ids = torch.where(parts == 0, (ids + 1) % 250, ids)
            changed = wrapped({"input_ids": ids, "sequence_id": parts}).logits
        assert torch.equal(whole[0, 30:], changed[0, 30:])
        assert not torch.equal(whole[0, :30], changed[0, :30])


def test_weights_on_the_meta_device_are_enough_for_names() -> None:
    hf_config = build_hf_config(MODELS["gla"], byte_tokenizer(), 64)
    model = build_or_load(ModelConfig(config=MODELS["gla"]), hf_config, empty=True)
    adapter = lora.build_adapter(LoraConfig(), model, BASE)
    with torch.device("meta"):
        lora.add_adapters(model, adapter)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert lora.trained_names(model) == lora.trained_names(made("gla")[0])


def test_a_loaded_models_adapters_do_not_drop_anything() -> None:
    torch.manual_seed(3)
    model = build_model(build_hf_config(MODELS["llama"], byte_tokenizer(), 128)).eval()
    adapter = lora.build_adapter(LoraConfig(dropout=0.5), model, BASE)
    lora.add_adapters(model, adapter)
    assert not any(module.training for module in model.modules())
