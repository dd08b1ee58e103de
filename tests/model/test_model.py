"""The model under Composer: what its config may say, that documents do not see each other, that
weights keep their bits.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flame_composer import cpu
from flame_composer.batch import collate
from flame_composer.checkpoint.to_model import save_hf_folder
from flame_composer.config.load import load
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.model.build import build_model, load_pretrained
from flame_composer.model.causal_lm import (
    CausalLM,
    check_microbatch_size,
    cumulative_lengths,
    positions,
)
from flame_composer.model.hf_config import build_hf_config, check_agrees, read_back_hf_config
from flame_composer.upstream.hf_configs import value_of
from tests.conftest import CONTEXT_LENGTH, GLA, LLAMA
from tests.data_fixtures import byte_tokenizer

ROOT = Path(__file__).parents[2]
VOCABULARY = 400
TINY = {"gla": GLA, "llama": LLAMA}
MODELS: dict[str, dict[str, Any]] = {
    **TINY,
    "olmo": {**LLAMA, "model_type": "olmo", "pad_token_id": None},
    "olmo2": {**LLAMA, "model_type": "olmo2", "pad_token_id": None},
}


def hf_config(config: dict[str, Any], **changes: Any) -> Any:
    return build_hf_config({**config, **changes}, byte_tokenizer(), CONTEXT_LENGTH)


def tiny(name: str, *, varlen: bool = True, **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(
        build_model(hf_config(MODELS[name], **changes)), byte_tokenizer(), varlen=varlen
    )


def batch_of(doc_lengths: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    choose = np.random.default_rng(seed)
    return collate(
        [
            {
                "input_ids": choose.integers(0, VOCABULARY, sum(row)).astype(np.uint16),
                "doc_lengths": np.array(row, np.uint32),
            }
            for row in doc_lengths
        ]
    )


# The Hugging Face config

REFUSED = [
    (
        "gla",
        {"num_hidden_layer": 3},
        "num_hidden_layer",
        "unknown key of GLAConfig; did you mean model.config.num_hidden_layers?",
    ),
    (
        "llama",
        {"num_hidden_layer": 3},
        "num_hidden_layer",
        "unknown key of LlamaConfig; did you mean model.config.num_hidden_layers?",
    ),
    (
        "gla",
        {"num_head": 3},
        "num_head",
        "unknown key of GLAConfig; did you mean model.config.num_heads?",
    ),
    ("gla", {"kwargs": 1}, "kwargs", "unknown key of GLAConfig"),
    ("llama", {"self": 1}, "self", "unknown key of LlamaConfig"),
    ("gla", {"": 1}, "", "unknown key of GLAConfig"),
    ("gla", {"hidden_size": "big"}, "hidden_size", "must be int"),
    ("gla", {"hidden_size": 64.0}, "hidden_size", "must be int"),
    ("gla", {"hidden_size": True}, "hidden_size", "must be int"),
    ("gla", {"hidden_size": None}, "hidden_size", "must be int"),
    ("gla", {"expand_k": "half"}, "expand_k", "must be float"),
    ("gla", {"tie_word_embeddings": "yes"}, "tie_word_embeddings", "must be bool"),
    ("llama", {"hidden_size": "big"}, "hidden_size", "must be int"),
    ("llama", {"hidden_size": None}, "hidden_size", "must be int"),
    ("llama", {"vocab_size": "400"}, "vocab_size", "must be int"),
    ("llama", {"vocab_size": None}, "vocab_size", "must be int"),
    ("llama", {"rms_norm_eps": "tiny"}, "rms_norm_eps", "must be float"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings", "must be bool"),
    *(
        (name, {"vocab_size": 399}, "vocab_size", "must be at least the tokenizer's 400 tokens")
        for name in TINY
    ),
    *((name, {"num_hidden_layers": 0}, "num_hidden_layers", "must be 1 or more") for name in TINY),
    *(
        ("gla", {key: value}, key, "must be 10,000 at most: no model has more")
        for key, value in {
            "num_hidden_layers": 10**9,
            "num_heads": 10_001,
            "attn": {"layers": [0], "num_heads": 10**7},
        }.items()
    ),
    (
        "llama",
        {"num_hidden_layers": 10**9},
        "num_hidden_layers",
        "must be 10,000 at most: no model has more",
    ),
    *(
        ("gla", {"norm_eps": value}, "norm_eps", "must be more than 0")
        for value in (-1, 0, math.nan, math.inf)
    ),
    *(
        ("gla", {key: 0}, key, "must be more than 0")
        for key in ("expand_k", "expand_v", "hidden_ratio")
    ),
    (
        "gla",
        {"clamp_min": 3.0},
        "clamp_min",
        "must be 0 or less: it is the lower bound for the logarithm of a gate",
    ),
    ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps", "must be more than 0"),
    ("llama", {"rope_theta": 0}, "rope_theta", "must be more than 0"),
    *(
        ("llama", {"attention_dropout": value}, "attention_dropout", "must be in [0, 1)")
        for value in (-0.1, 1)
    ),
    *(
        (
            name,
            {"model_type": "glaa"},
            "model_type",
            "neither fla nor transformers has such a model; did you mean gla?",
        )
        for name in TINY
    ),
    (
        "llama",
        {"model_type": "lama"},
        "model_type",
        "neither fla nor transformers has such a model; did you mean llama?",
    ),
    (
        "gla",
        {"model_type": ["gla"]},
        "model_type",
        "neither fla nor transformers has such a model; did you mean gla?",
    ),
    ("gla", {"model_type": 3}, "model_type", "neither fla nor transformers has such a model"),
]


@pytest.mark.parametrize(
    ("name", "changes", "key", "rule"), REFUSED, ids=lambda value: str(value)[:40]
)
def test_refused_config(name, changes, key, rule):
    with pytest.raises(InvalidField) as caught:
        hf_config(TINY[name], **changes)
    assert (caught.value.name, caught.value.rule) == (f"model.config.{key}", rule)


def test_what_is_not_given_comes_from_the_tokenizer_and_the_data():
    for name in TINY:
        config = hf_config(TINY[name])
        assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (400, 0, 0)
        assert config.hidden_size == 32
        assert hf_config(TINY[name], vocab_size=512, eos_token_id=5).vocab_size == 512
        assert hf_config(TINY[name], eos_token_id=5).eos_token_id == 5
    assert hf_config(LLAMA).max_position_embeddings == CONTEXT_LENGTH
    assert hf_config({"model_type": "gpt2"}).n_positions == CONTEXT_LENGTH
    assert hf_config(LLAMA, max_position_embeddings=99).max_position_embeddings == 99
    assert hf_config(GLA, expand_k=1).expand_k == 1, "a whole number is a float"
    assert hf_config(LLAMA, eos_token_id=[1, 2], rope_scaling=None).eos_token_id == [1, 2]


NO_MODEL = [
    (
        "gla",
        {"num_heads": 3},
        (
            "model.config: no gla model can be built from it: key dim must be divisible by"
            " num_heads of 3"
        ),
    ),
    ("gla", {"hidden_size": 33}, "model.config: no gla model can be built from it: "),
    ("gla", {"num_heads": 0}, "model.config.num_heads: must be 1 or more"),
    ("gla", {"hidden_size": -4}, "model.config.hidden_size: must be 1 or more"),
    (
        "gla",
        {"hidden_act": "swishh"},
        "model.config: no gla model can be built from it: unknown value 'swishh'",
    ),
    (
        "gla",
        {"feature_map": "x"},
        "model.config: no gla model can be built from it: unknown value 'x'",
    ),
    ("gla", {"attn_mode": "x"}, "model.config: no gla model can be built from it: "),
    ("gla", {"pad_token_id": 9999}, "model.config: no gla model can be built from it: "),
    ("gla", {"hidden_size": 10**400}, "model.config: no gla model can be built from it: "),
    ("gla", {"hidden_size": 10**30}, "model.config: no gla model can be built from it: "),
    ("gla", {"attn": 3}, "model.config: GLAConfig refuses it: "),
    (
        "llama",
        {"num_key_value_heads": 3},
        "model.config.num_key_value_heads: must divide num_attention_heads=2",
    ),
    ("llama", {"num_attention_heads": 0}, "model.config.num_attention_heads: must be 1 or more"),
    (
        "llama",
        {"head_dim": 3},
        "model.config.num_attention_heads: makes heads of 3 channels, but RoPE rotates channels in"
        " pairs; give a number that makes heads of an even size",
    ),
    (
        "llama",
        {"hidden_act": "swishh"},
        "model.config: no llama model can be built from it: unknown value 'swishh'",
    ),
    ("llama", {"rope_scaling": 3}, "model.config: LlamaConfig refuses it: "),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"), NO_MODEL, ids=lambda value: str(value)[:40]
)
def test_numbers_that_make_no_model(name, changes, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}") as caught:
        build_model(hf_config(TINY[name], **changes))
    assert "\n" not in str(caught.value)


def test_the_340m_recipe_is_flas_own_model_of_341_7_m_parameters():
    cpu.enable()
    from fla.models import GLAConfig, GLAForCausalLM

    recipe = load(TrainConfig, [str(ROOT / "yamls" / "gla_340m.yaml")])
    with torch.device("meta"):
        ours = build_model(hf_config(recipe.model.config))
        theirs = GLAForCausalLM(
            GLAConfig(
                hidden_size=1024,
                num_hidden_layers=24,
                num_heads=4,
                expand_k=0.5,
                expand_v=1.0,
                hidden_ratio=4,
                hidden_act="swish",
                norm_eps=1e-6,
                initializer_range=0.02,
                tie_word_embeddings=True,
                vocab_size=32000,
                clamp_min=None,
                attn_mode="chunk",
            )
        )
    shapes = [
        {name: tensor.shape for name, tensor in model.state_dict().items()}
        for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    assert type(ours) is GLAForCausalLM
    counts = [
        sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)
    ]
    assert counts[0] == counts[1]
    assert round(counts[0] / 1e6, 1) == 341.7


# Documents in rows

document_rows = st.integers(2, 20).flatmap(
    lambda length: st.lists(
        st.sets(st.integers(1, length - 1)).map(
            lambda borders: np.diff([0, *sorted(borders), length]).tolist()
        ),
        min_size=1,
        max_size=4,
    )
)


@given(rows=document_rows)
def test_offsets_and_positions(rows):
    sequence_id = batch_of(rows)["sequence_id"]
    offsets, places = [0], []
    for row in rows:
        places.append([place for length in row for place in range(length)])
        for length in row:
            offsets.append(offsets[-1] + length)
    assert cumulative_lengths(sequence_id).tolist() == offsets
    assert positions(sequence_id).tolist() == places
    assert positions(sequence_id).shape == sequence_id.shape


ROWS = [[5, 1, 20, 6], [32], [1, 31]]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_document_sees_itself_only(name, batch_size):
    """Whatever is written in one document, the logits of every other are the same, and its own
    are not.
    """
    model = tiny(name).eval()
    rows = ROWS[:batch_size]
    batch = batch_of(rows)
    del batch["labels"]
    with torch.no_grad():
        before = model(batch).logits
    assert before.shape == (batch_size, 32, VOCABULARY)
    for r, row in enumerate(rows):
        for number, length in enumerate(row):
            changed = {key: value.clone() for key, value in batch.items()}
            inside = (batch["sequence_id"] == number) & (torch.arange(batch_size)[:, None] == r)
            assert inside.sum() == length
            changed["input_ids"][inside] = (changed["input_ids"][inside] + 1) % VOCABULARY
            with torch.no_grad():
                after = model(changed).logits
            torch.testing.assert_close(
                after[~inside], before[~inside], rtol=0, atol=0 if name == "gla" else 1e-6
            )
            assert not torch.isclose(after[inside], before[inside], atol=1e-4).all(dim=-1).any()


@pytest.mark.parametrize("name", MODELS)
def test_a_document_alone_has_the_same_logits(name):
    model = tiny(name).eval()
    batch = batch_of(ROWS)
    del batch["labels"]
    with torch.no_grad():
        packed = model(batch).logits[0, 6:26]
        alone = model(
            {
                key: value[:1, 6:26] - (2 if key == "sequence_id" else 0)
                for key, value in batch.items()
            }
        ).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_without_varlen_state_runs_across_documents_of_a_row_not_across_rows(name):
    model = tiny(name, varlen=False).eval()
    batch = batch_of([[5, 27], [32]])
    del batch["labels"]
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][0, 2] = (changed["input_ids"][0, 2] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(batch).logits, model(changed).logits
    torch.testing.assert_close(before[0, :2], after[0, :2], rtol=0, atol=1e-6)  # causal
    assert not torch.isclose(before[0, 5:], after[0, 5:], rtol=0, atol=1e-7).all(), (
        "the next document sees it"
    )
    torch.testing.assert_close(before[1], after[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("varlen", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_cross_entropy_of_the_logits(name, varlen):
    model = tiny(name, varlen=varlen)
    batch = batch_of(ROWS)
    with torch.no_grad():
        outputs = model(batch)
        logits = model({key: value for key, value in batch.items() if key != "labels"}).logits
    expected = F.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY).double(), batch["input_ids"][:, 1:].reshape(-1)
    )
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6), (
        "every token but each row's first is predicted"
    )
    evaluated = model.eval_forward({key: value.clone() for key, value in batch.items()})
    assert evaluated.shape == (3, 32, VOCABULARY)
    batch["labels"][1:] = -100
    one_row = F.cross_entropy(logits[0, :-1].double(), batch["input_ids"][0, 1:])
    with torch.no_grad():
        assert model(batch).loss.item() == pytest.approx(one_row.item(), rel=1e-6), (
            "-100 carries no loss"
        )


@pytest.mark.parametrize("name", MODELS)
def test_microbatches_give_one_loss_and_gradient(name):
    """Weighted by their tokens, as Composer's Trainer weights them; norm-wise relative error
    below 1e-5.
    """
    batch = batch_of([[5, 1, 20, 6], [32], [1, 31], [16, 16]])
    batch["labels"][1, 7:] = -100  # so that microbatches have unequal numbers of tokens
    total = int((batch["labels"] != -100).sum())
    results = []
    for size in (4, 2, 1):
        model = tiny(name)
        loss = 0.0
        for start in range(0, 4, size):
            part = {key: value[start : start + size] for key, value in batch.items()}
            weighted = model(part).loss * int((part["labels"] != -100).sum()) / total
            weighted.backward()
            loss += weighted.item()
        gradients = torch.cat(
            [
                parameter.grad.flatten()
                for parameter in model.parameters()
                if parameter.grad is not None
            ]
        )
        results.append((loss, gradients))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert (gradients - results[0][1]).norm() <= 1e-5 * results[0][1].norm()


@pytest.mark.parametrize("name", TINY)
def test_a_microbatch_without_labels_is_no_loss_and_no_gradient(name):
    """As of a row of documents of one token each, without loss across documents."""
    model = tiny(name)
    batch = batch_of([[1] * 32])
    batch["labels"].fill_(-100)
    loss = model(batch).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(
        not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None
    )


@pytest.mark.parametrize("name", TINY)
def test_smoothed_labels_are_trained_on_and_not_evaluated(name):
    model = tiny(name)
    batch = batch_of(ROWS)
    plain = model(batch).loss
    model.label_smoothing = 0.2
    logits = (
        model({key: value for key, value in batch.items() if key != "labels"})
        .logits[:, :-1]
        .double()
    )
    even = -logits.log_softmax(dim=-1).mean()
    assert model(batch).loss.item() == pytest.approx((0.8 * plain + 0.2 * even).item(), rel=1e-6)
    model.eval()
    assert model(batch).loss.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", TINY)
def test_z_loss_is_trained_on_and_not_evaluated(name, smoothing):
    model = tiny(name)
    batch = batch_of(ROWS)
    batch["labels"][0, 5:9] = -100
    model.label_smoothing = smoothing
    plain = model(batch).loss
    logits = model({key: batch[key] for key in ("input_ids", "sequence_id")}).logits
    log_z = logits[:, :-1].double().logsumexp(dim=-1)[batch["labels"][:, 1:] != -100]
    model.z_loss = 0.3
    loss = model(batch).loss
    assert loss.item() == pytest.approx((plain + 0.3 * log_z.square().mean()).item(), rel=1e-6)
    loss.backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert model(empty).loss.item() == 0.0
    model.eval()
    model.label_smoothing = 0.0
    evaluated = model(batch).loss.item()
    model.z_loss = 0.0
    assert evaluated == model(batch).loss.item()


def test_z_loss_needs_logits():
    with pytest.warns(UserWarning, match="fuse_linear_cross_entropy"):  # of precision
        config = hf_config(GLA, fuse_cross_entropy=False, fuse_linear_cross_entropy=True)
    with pytest.raises(InvalidField, match=r"z_loss: needs the logits, which model\.config\.fuse_"):
        CausalLM(build_model(config), byte_tokenizer(), varlen=True, z_loss=1e-5)


def test_flops_count_what_a_token_is_multiplied_with():
    model = tiny("llama")
    matrices = 4 * 32 * 32 + 3 * 32 * 64 + VOCABULARY * 32
    norms, scores = 3 * 32, 32  # of a token with each of the row's 32: hidden size 32
    assert (
        model.flops_per_batch(batch_of(ROWS))
        == (6 * (matrices + norms) + 12 * scores * 32) * 3 * 32
    )
    assert tiny("llama", tie_word_embeddings=True).work.multiplied == matrices + norms, (
        "the embedding is the output's matrix"
    )
    assert tiny("gla").work.softmax_heads == 0


def test_microbatches_are_tried_out_on_gpus_only():
    check_microbatch_size(8)
    if torch.cuda.is_available():
        check_microbatch_size("auto")
    else:
        with pytest.raises(
            InvalidField,
            match=r"^microbatch_size: there is no GPU here, .*; give a number of rows$",
        ):
            check_microbatch_size("auto")


# Weights on disk


@pytest.fixture
def saved(request, tmp_path) -> Path:
    model = tiny(getattr(request, "param", "gla")).model
    save_hf_folder(model, byte_tokenizer(), tmp_path / "hf", dtype="float32")
    return tmp_path / "hf"


@pytest.mark.parametrize("saved", TINY, indirect=True)
def test_saving_and_loading_keeps_every_bit(saved):
    model = load_pretrained(str(saved))
    assert type(model).__name__ in ("GLAForCausalLM", "LlamaForCausalLM")
    original = tiny(model.config.model_type).model.state_dict()
    loaded = model.state_dict()
    assert loaded.keys() == original.keys()
    for name, tensor in original.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor), name


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_text("x" * 100)


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def missing_tensor(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))


def unknown_tensor(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update(stray=torch.zeros(1)))


def wrong_shape(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))


NO_WEIGHTS = "cannot be loaded as a causal language model: "
OTHER_WEIGHTS = "its weights do not fit a gla model with its config: "
DAMAGE = {
    no_config: "not a Hugging Face model folder: it has no config.json",
    broken_config: NO_WEIGHTS,
    no_weights: NO_WEIGHTS,
    truncated: NO_WEIGHTS,
    not_safetensors: NO_WEIGHTS,
    missing_tensor: OTHER_WEIGHTS + "missing keys: model.norm.weight",
    unknown_tensor: OTHER_WEIGHTS + "unexpected keys: stray",
    wrong_shape: "",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_weights_that_do_not_fill_the_model_are_refused(saved, damage, capfd):
    damage(saved)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{saved}: {DAMAGE[damage]}')}") as caught:
        load_pretrained(str(saved))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    if damage is wrong_shape:
        assert "model.norm.weight" in str(caught.value) or "size" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_is_not_there(tmp_path):
    path = str(tmp_path / "nowhere")
    with pytest.raises(
        ConfigError,
        match=f"^{re.escape(path)}: no such folder; give a Hugging Face model folder or id$",
    ):
        load_pretrained(path)


def test_code_that_comes_with_a_model_is_never_run(saved, tmp_path):
    """Neither with a model type of its own, which cannot be loaded then, nor with one that is
    known.
    """
    marker = tmp_path / "marker"
    (saved / "modeling_evil.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\n"
        "from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilForCausalLM\n"
    )
    path = saved / "config.json"
    content = json.loads(path.read_bytes())
    auto_map = {
        "AutoConfig": "modeling_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
    }
    path.write_text(json.dumps(content | {"auto_map": auto_map}))
    assert type(load_pretrained(str(saved))).__name__ == "GLAForCausalLM"
    path.write_text(json.dumps(content | {"auto_map": auto_map, "model_type": "evil"}))
    with pytest.raises(ConfigError, match=f"^{re.escape(str(saved))}: cannot be loaded"):
        load_pretrained(str(saved))
    assert not marker.exists()


def test_a_config_given_beside_weights_may_only_repeat_theirs():
    config = hf_config(GLA)
    check_agrees(config, {})
    check_agrees(config, dict(GLA))
    for change in ({"num_heads": 4}, {"hidden_size": 64}, {"nonsense": 1}, {"model_type": "llama"}):
        ((key, value),) = change.items()
        has = getattr(config, key, None)
        message = (
            f"model.config.{key}: model.pretrained has {has}; leave the key out, or give that value"
        )
        with pytest.raises(InvalidField, match=f"^{re.escape(message)}$"):
            check_agrees(config, {**GLA, key: value})


def test_rotary_settings_beside_weights_may_only_repeat_theirs():
    """Under the names of transformers 4 and of 5, whichever is installed."""
    scaled = {"rope_type": "linear", "factor": 2.0}
    config = hf_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaled})
    for same in (
        {"rope_theta": 5e5},
        {"rope_scaling": scaled},
        {"rope_parameters": {**scaled, "rope_theta": 5e5}},
    ):
        check_agrees(config, same)
    for key, value in (
        ("rope_theta", 1e4),
        ("rope_scaling", None),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("rope_parameters", {**scaled, "rope_theta": 1e4}),
    ):
        with pytest.raises(InvalidField, match=f"^model.config.{key}: model.pretrained has "):
            check_agrees(config, {key: value})


def test_keys_that_transformers_5_takes_without_a_word_are_known(caplog):
    """Among them those of Pythia, whose values it would otherwise replace by its own."""
    neox = {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 5000.0}
    phi = {"model_type": "phi", "partial_rotary_factor": 0.25, "rope_theta": 7e3}
    found = [read_back_hf_config(content, "config.json") for content in (neox, phi)]
    for config, theta, part in zip(found, (5e3, 7e3), (0.5, 0.25), strict=True):
        rotary = value_of(config, "rope_parameters")
        assert (rotary["rope_theta"], rotary["partial_rotary_factor"]) == (theta, part)
    for config, content in zip(found, (neox, phi), strict=True):
        check_agrees(config, content)
    assert not caplog.messages


def test_an_infinite_limit_is_read_back():
    """JSON has no such number; transformers 4 and 5 each write one of their own."""
    given = hf_config({"model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 1})
    for limit in ([0.0, math.inf], [0.0, {"__float__": "Infinity"}]):
        content = json.loads(given.to_json_string()) | {"dt_limit": limit}
        assert list(read_back_hf_config(content, "config.json").dt_limit) == [0.0, math.inf]
    written = json.loads(given.to_json_string())
    assert list(read_back_hf_config(written, "config.json").dt_limit) == [0.0, math.inf]


def test_blocks_are_what_fsdp_wraps_and_recomputes():
    wrapped = tiny("gla", num_hidden_layers=2).model
    blocks = [name for name, module in wrapped.named_modules() if wrapped.fsdp_wrap_fn(module)]
    assert blocks == ["model.layers.0", "model.layers.1"]
    assert wrapped.activation_checkpointing_fn is wrapped.fsdp_wrap_fn
