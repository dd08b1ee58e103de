"""Models, checkpoints and tokenizers by somebody who means harm: nothing of theirs is run,
written or endless.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.models import HuggingFaceModel
from composer.models.huggingface import get_hf_config_from_composer_state_dict
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MistralConfig, Qwen2Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flame_composer import cpu
from flame_composer.checkpoint.read import Checkpoint, read_checkpoint
from flame_composer.checkpoint.to_model import (
    load_from_checkpoint,
    load_model,
    save_hf_folder,
    tokenizer_from,
)
from flame_composer.errors import ConfigError, DataError
from flame_composer.model.build import build_model, load_pretrained
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config, read_back_hf_config
from flame_composer.text.tokenizer import build_encoder, fingerprint, load_tokenizer
from flame_composer.text.tokenizer_files import FILES
from flame_composer.use.generate import encode
from tests.conftest import CONTEXT_LENGTH, GLA, LLAMA
from tests.data_fixtures import byte_tokenizer, files_under, llama_tokenizer
from tests.stack import TRANSFORMERS, reset_sessions

MARK = "import os\nos.mkdir({!r})\n"  # what the attacker's Python does


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What is there if an attack worked."""
    return tmp_path / "mark"


@pytest.fixture
def content(trained: Any) -> Any:
    return read_checkpoint(Checkpoint("ba3.pt", trained.checkpoints / "ba3.pt"))


def saved(content: Any, tmp_path: Path) -> Checkpoint:
    torch.save(content, tmp_path / "ba9.pt")
    return Checkpoint("ba9.pt", tmp_path / "ba9.pt")


def hf_state(content: Any) -> Any:
    return content["state"]["integrations"]["huggingface"]


# A checkpoint


def evil_folder(folder: Path, mark: Path) -> Path:
    folder.mkdir()
    (folder / "evil.py").write_text(
        MARK.format(str(mark)) + "from transformers import LlamaConfig\n"
        "class EvilConfig(LlamaConfig): model_type = 'evil'\n"
    )
    auto_map = {"AutoConfig": "evil.EvilConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    return folder


def test_a_checkpoint_that_names_a_folder_with_code_runs_none(content, tmp_path, mark):
    folder = evil_folder(tmp_path / "evil", mark)
    config = hf_state(content)["model"]["config"]["content"]
    config.update(model_type="evil", _name_or_path=str(folder), trust_remote_code=True)
    with pytest.raises(DataError) as caught:
        load_from_checkpoint(saved(content, tmp_path))
    assert (
        str(caught.value)
        == "ba9.pt: its model_type 'evil' is not a causal language model of fla or transformers,"
        " and code that comes with a model is never run; convert it to one of theirs"
    )
    assert not mark.exists()


def test_a_checkpoint_of_a_known_model_that_names_code_is_that_model(content, tmp_path, mark):
    folder = evil_folder(tmp_path / "evil", mark)
    config = hf_state(content)["model"]["config"]["content"]
    names = {
        "AutoConfig": f"{folder}--evil.EvilConfig",
        "AutoModelForCausalLM": f"{folder}--evil.EvilConfig",
    }
    config.update(
        auto_map=names,
        _name_or_path=str(folder),
        trust_remote_code=True,
        attn_implementation="kernels-community/evil",
        _attn_implementation="kernels-community/evil",
        transformers_weights="../evil.safetensors",
        to_dict=5,
    )
    model, _ = load_from_checkpoint(saved(content, tmp_path))
    assert type(model).__name__ == "GLAForCausalLM"
    held = model.config.to_dict()
    assert held["model_type"] == "gla"
    assert not {"auto_map", "trust_remote_code", "transformers_weights"} & held.keys()
    assert "evil" not in f"{held} {model.config._attn_implementation} {model.config.name_or_path}"
    assert not mark.exists()


@pytest.mark.parametrize("name", ["/{}", "../../../{}", "{}/x/../y", "sub/{}", "a\\{}", "a\n{}"])
@pytest.mark.parametrize("ending", [".json", ".txt", ".jinja", ".py"])
def test_a_checkpoint_writes_no_file_elsewhere(content, tmp_path, monkeypatch, name, ending):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = tmp_path / "elsewhere"
    out.mkdir()
    name = (
        name.format(f"{out}/planted") if name.startswith("/") else name.format("elsewhere/planted")
    )
    text: Any = {".json": {"a": 1}, ".txt": ["a"]}.get(ending, "import os")
    hf_state(content)["tokenizer"][name + ending] = {"file_extension": ending, "content": text}
    checkpoint = saved(content, tmp_path)
    before = files_under(tmp_path)
    with pytest.raises(
        DataError,
        match=(
            r"^ba9\.pt: refused: its tokenizer has a file '[^\n]+', which is not the name of a"
            " tokenizer's file$"
        ),
    ):
        load_from_checkpoint(checkpoint)
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("name", ["tokenizer.py", "custom"])
def test_code_in_a_tokenizer_of_a_checkpoint_is_refused(content, tmp_path, name):
    hf_state(content)["tokenizer"][name] = {"file_extension": ".py", "content": "import os"}
    with pytest.raises(
        DataError,
        match=(
            r"^ba9\.pt: refused: its tokenizer has a file '\w+\.py', which is not the name of a"
            " tokenizer's file$"
        ),
    ):
        load_from_checkpoint(saved(content, tmp_path))


def test_a_file_of_a_tokenizer_that_is_not_known_is_left_out_and_named(content, tmp_path, caplog):
    hf_state(content)["tokenizer"]["config.json"] = {
        "file_extension": ".json",
        "content": {"model_type": "evil"},
    }
    _, tokenizer = load_from_checkpoint(saved(content, tmp_path))
    assert fingerprint(tokenizer) == fingerprint(byte_tokenizer())
    assert caplog.messages == [
        "warning: ba9.pt: its tokenizer has a file 'config.json', which is not known and was left"
        " out"
    ]


def test_a_checkpoint_without_config_or_tokenizer_or_with_others_is_refused(content, tmp_path):
    def check(change: Callable[[Any], Any], message: str) -> None:
        changed = read_checkpoint(checkpoint)
        change(changed["state"])
        with pytest.raises(DataError, match=f"^ba9.pt: {message}$") as caught:
            load_from_checkpoint(saved(changed, tmp_path / "other"))
        assert "\n" not in str(caught.value)

    checkpoint = saved(content, tmp_path)
    (tmp_path / "other").mkdir()
    config = "its weights are not those of its config: "
    name = "model.norm.weight"
    check(
        lambda state: hf_state({"state": state}).update(tokenizer={}),
        "holds no tokenizer; take another checkpoint",
    )
    check(
        lambda state: hf_state({"state": state}).update(tokenizer=[1]),
        "holds no tokenizer; take another checkpoint",
    )
    check(
        lambda state: hf_state({"state": state}).update(model=[1]),
        "not a training checkpoint of this package: it.*",
    )
    check(
        lambda state: state["model"].pop(f"model.{name}"),
        re.escape(f"{config}{name} is none, the config makes it [32]; take another checkpoint"),
    )
    check(
        lambda state: state["model"].update({f"model.{name}": torch.ones(3)}),
        re.escape(f"{config}{name} is [3], the config makes it [32]; take another checkpoint"),
    )
    check(
        lambda state: state["model"].update({"model.stray": torch.ones(3)}),
        re.escape(f"{config}stray is [3], the config makes it none; take another checkpoint"),
    )
    for key, value in (
        ("hidden_act", "nonsense"),
        ("num_heads", 0),
        ("num_heads", 3),
        ("expand_k", "x"),
        ("norm_eps", [1]),
    ):
        check(
            lambda state: hf_state({"state": state})["model"]["config"]["content"].update(
                {key: value}  # noqa: B023
            ),
            ".+",
        )
    for file, text in (
        ("tokenizer.json", [1]),
        ("tokenizer_config.json", 3),
        ("tokenizer.json", {"model": {}}),
    ):
        check(
            lambda state, file=file, text=text: hf_state({"state": state})["tokenizer"][
                file
            ].update(content=text),
            "its tokenizer: .+",
        )


BOMBS = (
    {"num_hidden_layers": 10**7},
    {"num_hidden_layers": 10**12},
    {"hidden_size": 10**7, "num_heads": 2},
    {"hidden_size": 10**30},
    {"vocab_size": 10**12},
    {"intermediate_size": 10**12},
    {"num_heads": 10**9},
    {"num_labels": 10**12},
)


@pytest.mark.parametrize("bomb", BOMBS, ids=str)
def test_a_config_that_makes_a_boundless_model_is_answered_at_once(content, tmp_path, bomb):
    hf_state(content)["model"]["config"]["content"].update(bomb)
    checkpoint = saved(content, tmp_path)
    start = time.perf_counter()
    if "num_labels" in bomb:
        load_from_checkpoint(checkpoint)  # a language model has none
    else:
        with pytest.raises(DataError, match=r"^ba9\.pt: ") as caught:
            load_from_checkpoint(checkpoint)
        assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5


def refused_checkpoint(checkpoint: Checkpoint, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(DataError, match=rf"^ba9\.pt: {message}") as caught:
        load_from_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("kind", ["of one number", "meta", "sparse", "complex"])
def test_weights_that_are_not_there_are_refused(content, tmp_path, kind):
    """A tensor in a pickle may have any shape, whatever memory is behind it."""
    weights = content["state"]["model"]
    if kind == "of one number":
        hf_state(content)["model"]["config"]["content"]["vocab_size"] = 4 * 10**9
        for name, tensor in weights.items():
            if tensor.ndim == 2 and name.split(".")[-2] in ("embeddings", "lm_head"):
                weights[name] = torch.zeros(1, 1).expand(4 * 10**9, tensor.shape[1])
        refused_checkpoint(
            saved(content, tmp_path),
            "its config makes a model of [0-9,]+ parameters, but its weights hold .+",
        )
        return
    change = {
        "meta": lambda x: x.to("meta"),
        "sparse": lambda x: x.to_sparse(),
        "complex": lambda x: x.to(torch.complex64),
    }
    content["state"]["model"] = {name: change[kind](tensor) for name, tensor in weights.items()}
    refused_checkpoint(saved(content, tmp_path), "its weights are not plain tensors by name")


def test_what_is_no_training_checkpoint_is_one_line(content, tmp_path):
    weights = content["state"]["model"].items()
    endless = {
        "model": {name: {"shape": [10**14], "start": 0, "part": each} for name, each in weights}
    }
    for pieces in ([], [endless], torch.ones(2)):
        refused_checkpoint(
            saved({**content, "pieces": pieces}, tmp_path),
            "not a whole checkpoint: the head of one in pieces",
        )
    refused_checkpoint(saved(torch.zeros(3), tmp_path), "not a training checkpoint of this package")
    other = tmp_path / "other"
    other.mkdir()
    for path in ((), ("model",), ("model", "config"), ("tokenizer",)):
        changed = read_checkpoint(saved(content, tmp_path))
        if path:
            place = hf_state(changed)
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = torch.zeros(3)
        else:
            changed["state"]["integrations"]["huggingface"] = torch.zeros(3)
        refused_checkpoint(
            saved(changed, other), "(not a training checkpoint of this package|holds no tokenizer)"
        )


@pytest.mark.parametrize("place", ["config", "tokenizer", "clock", "text"])
def test_lists_that_hold_one_another_are_refused(content, tmp_path, place):
    """Forty lists in a pickle, each twice in the next: 10**12 parts to whoever goes through
    them.
    """
    nested: Any = ["x"]
    for _ in range(40):
        nested = [nested, nested]
    if place == "config":
        hf_state(content)["model"]["config"]["content"]["norm_eps"] = nested
    elif place == "tokenizer":
        hf_state(content)["tokenizer"]["tokenizer_config.json"]["content"]["more"] = nested
    elif place == "clock":
        content["state"]["dataset_state"] = {"train": {"epoch": -1, "more": nested}}
    else:
        hf_state(content)["tokenizer"]["tokenizer_config.json"]["content"]["more"] = [
            "x" * 1_000_000
        ] * 100_000
    refused_checkpoint(saved(content, tmp_path), "refused: it holds the same parts over and over")


KEYS = {
    "twice": b"X\x01\x00\x00\x00x\x85q\x01" + b"h\x01\x86q\x01" * 60 + b"K\x01s",
    "deep": b"X\x01\x00\x00\x00x" + b"\x85" * 300_000 + b"K\x01s",
    "several": b"(X\x01\x00\x00\x00x\x85q\x01" + b"h\x01\x86q\x01" * 60 + b"K\x01u",
    "made": (
        b"ccollections\nOrderedDict\n((X\x01\x00\x00\x00x\x85q\x01"
        + b"h\x01\x86q\x01" * 60
        + b"K\x01ttR"
    ),
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_without_end_is_refused(content, tmp_path, kind):
    """Python would go through a tuple that holds the one before it twice, 60 times over, to find
    its place in a dict; one of 300,000 tuples in one another ends the process.
    """
    checkpoint = saved({"a": 1}, tmp_path)
    with zipfile.ZipFile(checkpoint.file) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(checkpoint.file, "w") as archive:
        for name, data in parts.items():
            archive.writestr(
                name, b"\x80\x02}" + KEYS[kind] + b"." if name.endswith("data.pkl") else data
            )
    refused_checkpoint(checkpoint, "not a whole checkpoint: a key of a dict in it has no end")


# What earlier versions saved


def old_tokenizer(content: Any, folder: Path) -> Any:
    folder.mkdir()
    return HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(
        hf_state(content), tokenizer_save_dir=str(folder)
    )


def same_folder(tokenizer: Any, other: Any, tmp_path: Path) -> None:
    """They save the same files. transformers 5 gives others what their files do not have."""
    if TRANSFORMERS >= (5, 0):
        return
    for name, each in (("one", tokenizer), ("two", other)):
        each.save_pretrained(tmp_path / name)
    one = files_under(tmp_path / "one")
    assert one == files_under(tmp_path / "two")
    assert len(one) >= 3


def test_a_genuine_checkpoint_has_the_same_config_and_tokenizer_as_ever(content, tmp_path):
    model, tokenizer = load_from_checkpoint(saved(content, tmp_path))
    old = get_hf_config_from_composer_state_dict(content)
    assert model.config.to_dict() == {**old.to_dict(), "_name_or_path": ""} | {
        "architectures": model.config.architectures
    }
    assert json.loads(model.config.to_json_string()) == json.loads(old.to_json_string())
    same_folder(tokenizer, old_tokenizer(content, tmp_path / "old"), tmp_path)


TEMPLATES = "{{ messages[0]['content'] }}"


def odd_tokenizers() -> dict[str, Any]:
    chat = load_tokenizer_copy(byte_tokenizer())
    chat.chat_template = TEMPLATES
    legacy = load_tokenizer_copy(byte_tokenizer())
    legacy.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    legacy.add_tokens(["plain", "ordinary"])
    several = load_tokenizer_copy(byte_tokenizer())
    several.chat_template = {"default": TEMPLATES, "tool_use": "x"}
    return {
        "bytes": byte_tokenizer(),
        "llama": llama_tokenizer(),
        "chat": chat,
        "added": legacy,
        "several": several,
    }


def load_tokenizer_copy(tokenizer: Any) -> Any:
    return copy.deepcopy(tokenizer)


@pytest.mark.parametrize("name", ["bytes", "llama", "chat", "added", "several"])
def test_tokenizers_of_all_kinds_come_out_as_they_did(tmp_path, name):
    tokenizer = odd_tokenizers()[name]
    model = build_model(build_hf_config({**LLAMA, "vocab_size": 700}, tokenizer, CONTEXT_LENGTH))
    metadata = CausalLM(model, tokenizer, varlen=False).get_metadata()
    content = {"state": {"integrations": {"huggingface": metadata}}}
    assert {*metadata["tokenizer"]} <= FILES
    found = tokenizer_from(metadata, "ba1.pt")
    assert fingerprint(found) == fingerprint(tokenizer)
    assert found.get_added_vocab() == tokenizer.get_added_vocab()
    same_folder(found, old_tokenizer(content, tmp_path / "old"), tmp_path)


CONFIGS = {
    "llama": LLAMA,
    "gla": GLA,
    "transformer": {"model_type": "transformer"},
    "mamba": {"model_type": "mamba"},
    "gpt2": {"model_type": "gpt2"},
    "gpt_neox": {"model_type": "gpt_neox"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2"},
    "mixtral": {"model_type": "mixtral"},
    "phi3": {"model_type": "phi3"},
    "falcon": {"model_type": "falcon"},
    "gated_deltanet": {"model_type": "gated_deltanet"},
    "deltanet": {"model_type": "delta_net"},
    "hgrn2": {"model_type": "hgrn2"},
    "rwkv7": {"model_type": "rwkv7"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_come_out_as_they_went_in(name, caplog):
    cpu.enable()
    keys = dict(CONFIGS[name])
    config: Any = CONFIG_MAPPING[keys.pop("model_type")](**keys, dtype="bfloat16")
    config.architectures = ["X"]
    content = json.loads(config.to_json_string())
    again = read_back_hf_config(content, "here")
    assert json.loads(again.to_json_string()) == content
    old = get_hf_config_from_composer_state_dict(
        {
            "state": {
                "integrations": {"huggingface": {"model": {"config": {"content": dict(content)}}}}
            }
        }
    )
    assert again.to_dict() == old.to_dict()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("model_type", "counts"),
    [
        ("ernie4_5_moe", {"moe_num_experts": 10**7}),
        ("dbrx", {"ffn_config": {"moe_num_experts": 10**7}}),
        ("longcat_flash", {"zero_expert_num": 10**7}),
        ("gla", {"num_hidden_layers": 10**7}),
    ],
)
def test_counts_of_layers_and_experts_have_a_limit_by_any_name(model_type, counts):
    with pytest.raises(
        ConfigError, match=r"^here: its config says \w+=10000000, more than any model has"
    ):
        read_back_hf_config({"model_type": model_type, **counts}, "here")


# A model's folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = build_model(build_hf_config(LLAMA, byte_tokenizer(), CONTEXT_LENGTH))
    save_hf_folder(model, byte_tokenizer(), tmp_path / "hf", dtype="float32")
    return tmp_path / "hf"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def test_code_for_generation_in_a_folder_is_never_run(folder, mark):
    """transformers 4.57 runs it, without being told to trust it."""
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(
        MARK.format(str(mark)) + "def generate(model, **kwargs): pass\n"
    )
    model = load_pretrained(str(folder))
    assert not mark.exists()
    assert getattr(model.generate, "__self__", None) is model


def test_kernels_that_a_config_names_are_not_asked_for(folder):
    weights = load_pretrained(str(folder)).state_dict()
    for key in (
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
    ):
        edit(folder / "config.json", **{key: "kernels-community/flash-attn"})
    model = load_pretrained(str(folder))
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_weights_in_another_file_that_a_config_names_are_not_read(folder, tmp_path):
    expected = load_pretrained(str(folder)).state_dict()
    others = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(others, tmp_path / "other.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", transformers_weights="../other.safetensors")
    found = load_pretrained(str(folder)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_an_adapter_does_not_lead_to_another_model(folder):
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/elsewhere"})
    )
    with pytest.raises(
        ConfigError,
        match=r"holds an adapter .adapter_config.json., for which another model would be loaded; ",
    ):
        load_pretrained(str(folder))


def test_weights_that_are_quantized_are_refused_by_name(folder):
    edit(
        folder / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )
    with pytest.raises(
        ConfigError, match=r"its weights are quantized; give the model they were made from$"
    ):
        load_pretrained(str(folder))


def test_a_config_of_endless_size_is_refused(folder):
    with (folder / "config.json").open("ab") as file:
        file.truncate(200 << 30)
    with pytest.raises(
        ConfigError,
        match=r"^[^\n]*config\.json: cannot be read as JSON: has more than 134,217,728 bytes",
    ):
        load_pretrained(str(folder))


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "..", 3, None, "model.bin"]
)
def test_an_index_of_weights_that_leads_elsewhere_is_refused(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": name}})
    )
    message = (
        f"lm_head.weight is said to be in {name!r}, which is not the name of a safetensors file"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_pretrained(str(folder))


LLAMA_BOMBS = (
    *(
        {key: value}
        for key in ("num_hidden_layers", "hidden_size", "vocab_size")
        for value in (10**7, 10**12)
    ),
    {"intermediate_size": 10**9},
    {"num_attention_heads": 10**9},
    {"num_key_value_heads": 10**9},
    {"head_dim": 10**9},
    {"model_type": "qwen2", "num_hidden_layers": 10**12},
    {"model_type": "mixtral", "num_local_experts": 10**9},
    {
        "model_type": "gptj",
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "rotary_dim": 4,
        "n_positions": 10**7,
    },
)


@pytest.mark.parametrize("bomb", LLAMA_BOMBS, ids=str)
def test_a_folder_whose_config_makes_a_boundless_model_is_answered_at_once(folder, bomb):
    edit(folder / "config.json", **bomb)
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_pretrained(str(folder))
    assert time.perf_counter() - start < 5
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    if "num_hidden_layers" in bomb and "model_type" not in bomb:
        value = f"{bomb['num_hidden_layers']:.10g}"
        assert (
            f"its config says num_hidden_layers={value}, more than any model has; get the model"
            " again" in str(caught.value)
        )


def test_a_key_that_a_model_does_not_know_is_named(folder, caplog):
    edit(folder / "config.json", clever_trick=3, _name_or_path="x")
    assert not hasattr(load_pretrained(str(folder)).config, "clever_trick")
    assert [message.partition("its config")[2] for message in caplog.messages] == [
        " has keys that a llama model does not know; they are ignored: 'clever_trick'"
    ]


@pytest.mark.parametrize("config", [Qwen2Config, MistralConfig])
def test_a_folder_of_another_model_of_few_layers_is_loaded(tmp_path, config):
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    model = build_model(config(**sizes, num_key_value_heads=1, vocab_size=400))
    save_hf_folder(model, byte_tokenizer(), tmp_path / "hf", dtype="float32")
    again = load_pretrained(str(tmp_path / "hf"))
    assert all(
        torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items()
    )


# A tokenizer's folder


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def refused(folder: Path, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(
        ConfigError, match=f"^tokenizer: {re.escape(str(folder))}[:/].*{message}"
    ) as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file"])
def test_a_tokenizer_reads_no_file_elsewhere(tokenizer_folder, tmp_path, key):
    byte_tokenizer(300).save_pretrained(tmp_path / "other")
    edit(
        tokenizer_folder / "tokenizer_config.json", **{key: str(tmp_path / "other/tokenizer.json")}
    )
    refused(tokenizer_folder, f"names a file elsewhere, {key}=")


def test_names_of_files_of_earlier_machines_are_no_matter(tokenizer_folder):
    """Many tokenizers on the hub have them."""
    edit(
        tokenizer_folder / "tokenizer_config.json",
        special_tokens_map_file="/etc/passwd",
        vocab_file=None,
        name_or_path="x/y",
    )
    assert fingerprint(load_tokenizer(str(tokenizer_folder))) == fingerprint(byte_tokenizer())


def test_arguments_that_a_tokenizer_names_are_not_passed(tokenizer_folder):
    edit(tokenizer_folder / "tokenizer_config.json", init_inputs=["/etc/passwd"])
    refused(tokenizer_folder, "has init_inputs, which may name files elsewhere; take that key out")


def test_a_tokenizer_of_a_version_leads_to_no_other_folder(tokenizer_folder, tmp_path):
    byte_tokenizer(300).save_pretrained(tmp_path / "other")
    os.rename(tmp_path / "other/tokenizer.json", tmp_path / "other/tokenizer.4.0.0.json")
    edit(
        tokenizer_folder / "tokenizer_config.json",
        fast_tokenizer_files=["../other/tokenizer.4.0.0.json"],
    )
    refused(
        tokenizer_folder, "its fast_tokenizer_files has '../other/tokenizer.4.0.0.json' for a name"
    )


@pytest.mark.parametrize("as_list", [True, False])
def test_templates_are_saved_in_no_other_folder(tokenizer_folder, tmp_path, as_list):
    name = "../../planted"
    templates: Any = [{"name": name, "template": "x"}] if as_list else {name: "x"}
    edit(tokenizer_folder / "tokenizer_config.json", chat_template=templates)
    refused(
        tokenizer_folder,
        "its chat_template has '../../planted' for a name, which would lead to another folder",
    )
    if TRANSFORMERS >= (5, 0):
        with pytest.raises(ValueError, match="Invalid chat template name"):
            AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "out")
        return
    unchecked = AutoTokenizer.from_pretrained(tokenizer_folder)
    (tmp_path / "out/additional_chat_templates").mkdir(parents=True)
    unchecked.save_pretrained(tmp_path / "out")
    assert (tmp_path / "planted.jinja").exists(), "the trap works"


@pytest.mark.parametrize("length", ["many", [1], {}])
def test_a_length_that_is_no_number_is_refused(tokenizer_folder, length):
    """transformers compares it with that of every text."""
    edit(tokenizer_folder / "tokenizer_config.json", model_max_length=length)
    refused(tokenizer_folder, "has model_max_length=.*, must be a number")


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
    ],
)
def test_a_file_of_endless_size_is_refused(tokenizer_folder, name):
    """Made of holes, it takes no room on a disk, nor in an archive."""
    if name == "config.json":
        edit(tokenizer_folder / "tokenizer_config.json", tokenizer_class=None)
        (tokenizer_folder / "special_tokens_map.json").unlink(missing_ok=True)
    with (tokenizer_folder / name).open("ab") as file:
        file.truncate(200 << 30)
    refused(tokenizer_folder, f"{name}:? has more than 134,217,728 bytes")


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
def test_steps_without_end_are_refused(tokenizer_folder, part):
    step = {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "Fuse"},
    }[part]
    name = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[
        part
    ]
    edit(
        tokenizer_folder / "tokenizer.json", **{part: {"type": "Sequence", name: [step] * 100_000}}
    )
    refused(tokenizer_folder, f"its {part} has 100,001 steps, more than 1,000")


def test_a_template_that_puts_endless_tokens_around_a_text_is_refused(tokenizer_folder):
    text, token = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
    )
    special = {"<s>": {"id": "<s>", "ids": [0] * 200_000, "tokens": ["<s>"] * 200_000}}
    template = {
        "type": "TemplateProcessing",
        "single": [token, token, text],
        "pair": [text],
        "special_tokens": special,
    }
    edit(
        tokenizer_folder / "tokenizer.json",
        post_processor={"type": "Sequence", "processors": [template]},
    )
    refused(
        tokenizer_folder, "its template puts up to 600,000 tokens around a text, more than 10,000"
    )


@pytest.mark.parametrize("prefix", ["a" * 20, "a" * 100_000])
def test_a_tokenizer_that_makes_the_library_give_up_is_one_line(tokenizer_folder, prefix):
    """tokenizers panics, which is no Exception, where a merge's part is shorter than the prefix
    of parts.
    """
    path = tokenizer_folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    first, second = list(content["model"]["vocab"])[:2]
    content["model"] |= {"continuing_subword_prefix": prefix, "merges": [[first, second]]}
    content["model"]["vocab"][first + second] = 400
    path.write_text(json.dumps(content))
    refused(tokenizer_folder, "")


def test_code_in_a_tokenizer_folder_is_never_run(tokenizer_folder, mark):
    (tokenizer_folder / "evil.py").write_text(MARK.format(str(mark)) + "class Evil: pass\n")
    edit(
        tokenizer_folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    )
    assert fingerprint(load_tokenizer(str(tokenizer_folder))) == fingerprint(byte_tokenizer())
    edit(tokenizer_folder / "tokenizer_config.json", tokenizer_class="Evil")
    if TRANSFORMERS < (5, 0):
        refused(tokenizer_folder, "not a tokenizer folder")
    else:  # no class is looked for by its name
        load_tokenizer(str(tokenizer_folder))
    assert not mark.exists()


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
GROWING: dict[str, Any] = {
    "replace": {"type": "Sequence", "normalizers": [REPLACE] * 5},
    "nested": {
        "type": "Sequence",
        "normalizers": [{"type": "Sequence", "normalizers": [REPLACE] * 2}] * 3,
    },
    "expression": {
        "type": "Sequence",
        "normalizers": [{**REPLACE, "pattern": {"Regex": ""}, "content": "x"}] * 40,
    },
    "prepend": {"type": "Prepend", "prepend": "x" * 9_000_000},
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_normalizer_that_makes_endless_text_is_refused(tokenizer_folder, kind):
    edit(tokenizer_folder / "tokenizer.json", normalizer=GROWING[kind])
    refused(
        tokenizer_folder,
        r"its normalizer can make \S+ characters of one, more than 1,000; get the tokenizer again",
    )


def test_a_table_of_a_normalizer_that_makes_endless_text_is_refused(tokenizer_folder):
    table = (4).to_bytes(4, "little") + bytes(4) + b"x" * 5000 + b"\0"
    edit(
        tokenizer_folder / "tokenizer.json",
        normalizer={
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(table).decode(),
        },
    )
    refused(tokenizer_folder, r"its normalizer can make 5e\+03 characters of one")


def test_a_decoder_that_makes_endless_text_is_refused(tokenizer_folder):
    edit(
        tokenizer_folder / "tokenizer.json", decoder={"type": "Sequence", "decoders": [REPLACE] * 5}
    )
    refused(tokenizer_folder, "its decoder can make 1e.10 characters of one")


@pytest.mark.parametrize("place", ["vocab", "added", "config"])
def test_an_endless_token_is_refused(tokenizer_folder, place):
    path = tokenizer_folder / "tokenizer.json"
    content, endless = json.loads(path.read_bytes()), "x" * 30_000_000
    if place == "vocab":
        content["model"]["vocab"][endless] = 400
        path.write_text(json.dumps(content))
    elif place == "added":
        content["added_tokens"].append(
            {**content["added_tokens"][0], "id": 400, "content": endless}
        )
        path.write_text(json.dumps(content))
    else:
        edit(tokenizer_folder / "tokenizer_config.json", eos_token=endless)
    refused(tokenizer_folder, "has a (token|text) of .*10,000")


def test_a_tokenizer_nested_without_end_is_refused(tokenizer_folder):
    path = tokenizer_folder / "tokenizer.json"
    path.write_text("[" * 200_000 + "]" * 200_000)
    refused(tokenizer_folder, "not a tokenizer folder: tokenizer.json: ")


def test_a_tokenizer_beside_a_config_of_a_boundless_model_is_answered_at_once(tokenizer_folder):
    path = tokenizer_folder / "tokenizer_config.json"
    content = json.loads(path.read_bytes())
    del content["tokenizer_class"]
    path.write_text(json.dumps(content))
    (tokenizer_folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "num_hidden_layers": 10**12})
    )
    refused(tokenizer_folder, "num_hidden_layers=1e.12, more than any model has")


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_an_expression_that_takes_endless_steps_ends_in_one_line(tokenizer_folder, part):
    step = {"pattern": {"Regex": "(a+)+b"}, "content": "", "behavior": "Isolated", "invert": False}
    kind = {"normalizer": "Replace", "pre_tokenizer": "Split"}[part]
    edit(tokenizer_folder / "tokenizer.json", **{part: {"type": kind, **step}})
    tokenizer = load_tokenizer(str(tokenizer_folder))
    for encode_text in (
        lambda text: encode(tokenizer, [text]),
        lambda text: build_encoder(tokenizer, add_bos=False, add_eos=True)([text]),
    ):
        encode_text("xyz")
        start = time.perf_counter()
        with pytest.raises(
            DataError,
            match=r"^the tokenizer gives up on a text: .*retry-limit.*; take another tokenizer",
        ):
            encode_text("a" * 10_000)
        assert time.perf_counter() - start < 5


@pytest.mark.parametrize("kind", ["bytes", "llama"])
def test_tokenizers_that_are_meant_well_are_taken(tmp_path, kind):
    tokenizer = {"bytes": byte_tokenizer, "llama": llama_tokenizer}[kind]()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert fingerprint(load_tokenizer(str(tmp_path / "tokenizer"))) == fingerprint(tokenizer)


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose subfolders USER/NAME are a hub's repositories, as far as reading them goes."""
    root = tmp_path / "hub"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            api = re.fullmatch(r"/api/models/(me/\w+)/revision/main", self.path)
            file = re.fullmatch(r"/(me/\w+)/resolve/\w+/([\w./-]+)", self.path)
            tree = re.fullmatch(r"/api/models/(me/\w+)/tree/a+\?.*", self.path)  # hub 1
            status, body = 404, b""
            if tree and (root / tree[1]).is_dir():
                sizes = {name: len(each) for name, each in files_under(root / tree[1]).items()}
                kind = {"type": "file", "oid": "b" * 40}
                listed = [{**kind, "path": name, "size": size} for name, size in sizes.items()]
                status, body = 200, json.dumps(listed).encode()
            elif api and (root / api[1]).is_dir():
                files = [{"rfilename": name} for name in files_under(root / api[1])]
                status, body = (
                    200,
                    json.dumps({"id": api[1], "sha": "a" * 40, "siblings": files}).encode(),
                )
            elif file and (root / file[1] / file[2]).is_file():
                status, body = 200, (root / file[1] / file[2]).read_bytes()
            self.send_response(status)
            for name, value in (
                ("Content-Length", len(body)),
                ("ETag", hashlib.sha256(body).hexdigest()),
                ("X-Repo-Commit", "a" * 40),
            ):
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        reset_sessions()  # one that was made without a network refuses to use it
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):
            monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield root
        server.shutdown()
        thread.join()


def test_of_a_repository_only_known_files_are_fetched(folder, tmp_path, hub, mark):
    byte_tokenizer().save_pretrained(folder)
    expected = load_pretrained(str(folder)).state_dict()
    (folder / "custom_generate").mkdir()
    for name in ("custom_generate/generate.py", "modeling.py"):
        (folder / name).write_text(MARK.format(str(mark)))
    (folder / "consolidated.safetensors").write_bytes(b"x")
    (hub / "me").mkdir(parents=True)
    os.rename(folder, hub / "me/model")
    model, tokenizer = load_model("me/model")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert fingerprint(tokenizer) == fingerprint(byte_tokenizer())
    assert tokenizer.name_or_path == "me/model"
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert fetched == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        *(["special_tokens_map.json"] if TRANSFORMERS < (5, 0) else []),
    }
    assert not mark.exists()
    for load, what in (
        (load_pretrained, "cannot be loaded as a causal language model: "),
        (load_tokenizer, ""),
    ):
        with pytest.raises(
            ConfigError,
            match=f"me/none: {what}.*no such folder, and it cannot be fetched from the Hugging",
        ):
            load("me/none")
