"""Numbers that a config class takes and its model fails at: answered before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flame_composer.errors import ConfigError, InvalidField
from flame_composer.model.build import build_model, load_pretrained
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.probe import require_forward
from tests.conftest import CONTEXT_LENGTH, GLA
from tests.data_fixtures import byte_tokenizer
from tests.runs import Corpus, run_script

WIDTH = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 400}
ATTN = {"layers": [0], "num_heads": 4}


def hf_config(model_type: str, **keys: Any) -> Any:
    return build_hf_config(
        {**WIDTH, "model_type": model_type, **keys}, byte_tokenizer(), CONTEXT_LENGTH
    )


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("delta_net", {"conv_size": 0}, "conv_size: must be 1 or more"),
        ("gsa", {"num_slots": 0}, "num_slots: must be 1 or more"),
        ("gsa", {"exapnd_k": 0.0}, "exapnd_k: must be more than 0"),
        ("gsa", {"gate_logit_normalizer": 0}, "gate_logit_normalizer: must be more than 0"),
        ("rwkv7", {"decay_low_rank_dim": 0}, "decay_low_rank_dim: must be 1 or more"),
        ("rwkv6", {"proj_low_rank_dim": 0}, "proj_low_rank_dim: must be 1 or more"),
        ("hgrn2", {"expand_ratio": -1}, "expand_ratio: must be 1 or more"),
        ("kda", {"lower_bound": 3.0}, "lower_bound: must be below 0"),
        ("kda", {"lower_bound": float("nan")}, "lower_bound: must be below 0"),
        ("transformer", {"num_heads": 3}, "num_heads: must divide hidden_size=64"),
        ("transformer", {"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads: must divide num_heads"),
        ("transformer", {"num_heads": 64}, "num_heads: makes heads of 1 channels, but RoPE"),
        (
            "gated_deltanet",
            {"num_heads": 2, "num_v_heads": 1},
            "num_v_heads: must be a multiple of num_heads=2",
        ),
        ("gla", {"attn": {**ATTN, "num_heads": 3}}, "attn.num_heads: must divide hidden_size=64"),
        ("gla", {"attn": {**ATTN, "num_kv_heads": 3}}, "attn.num_kv_heads: must divide num_heads="),
        (
            "gla",
            {"attn": {**ATTN, "window_sise": 5}},
            "attn.window_sise: fla reads no such key; did you mean model.config.attn.window_size?",
        ),
        ("gla", {"attn": {**ATTN, "qk_norm": True}}, "attn.qk_norm: fla reads no such key"),
        ("gla", {"attn": {**ATTN, "layers": []}}, "attn.layers: must name a layer"),
        # Whether it runs here comes before keys of other models
        ("abc", {"expand_ratio": 1}, "model_type: fla's abc needs a GPU, and there is none here"),
    ],
)
def test_is_refused_by_name(model_type: str, keys: dict[str, Any], message: str) -> None:
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("is about machines without a GPU")
    with pytest.raises(InvalidField) as caught:
        hf_config(model_type, **keys)
    assert str(caught.value).startswith(f"model.config.{message}")


@pytest.mark.parametrize("heads", [0, -1, 3, 10**400])
@pytest.mark.parametrize("model_type", ["transformer", "llama", "gated_deltanet", "gla"])
def test_a_folder_with_such_heads_is_one_line(tmp_path: Path, model_type: str, heads: int) -> None:
    names = {"llama": ["num_attention_heads"]}.get(model_type, ["num_heads", "num_v_heads"])
    written = {**WIDTH, "model_type": model_type, **dict.fromkeys(names, heads)}
    written["attn"] = {"layers": [0], "num_heads": heads} if model_type == "gla" else None
    (tmp_path / "config.json").write_text(json.dumps(written))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        load_pretrained(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}")
    assert "\n" not in str(caught.value)


def test_what_no_rule_knows_is_found_at_the_first_tokens() -> None:
    model = build_model(hf_config("gsa", gate_logit_normalizer=None))
    with pytest.raises(ConfigError) as caught:
        require_forward(model)
    assert str(caught.value).startswith(
        "model.config: a gsa model is built from it, and fails at its first tokens (unsupported"
    )
    assert "\n" not in str(caught.value)


def test_it_is_found_before_a_run_has_a_folder(corpus: Corpus, tmp_path: Path) -> None:
    file = corpus.yaml_with({"model_type": "gsa", "gate_logit_normalizer": None})
    process = run_script("recipes/train.py", *corpus.keys(tmp_path / "run", file))
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert "fails at its first tokens" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_that_computes_is_as_it_was() -> None:
    torch.manual_seed(0)
    model = build_model(build_hf_config(GLA, byte_tokenizer(), CONTEXT_LENGTH)).train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = torch.get_rng_state()
    require_forward(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
