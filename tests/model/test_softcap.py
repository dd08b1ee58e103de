"""Capped logits: in training, loaded again, quantized and in text, whatever the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flame_composer.checkpoint.to_model import save_hf_folder
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.export.card import model_card
from flame_composer.model.build import build_model, load_pretrained
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config, read_back_hf_config
from flame_composer.model.quantized import quantize
from flame_composer.model.softcap import cap_logits
from tests.conftest import CONTEXT_LENGTH, GLA, LLAMA
from tests.data_fixtures import byte_tokenizer

CAP = 2.0  # below the logits of a new model, so that it changes them


def hf_config(config: dict[str, Any], **changes: Any) -> Any:
    return build_hf_config({**config, **changes}, byte_tokenizer(), CONTEXT_LENGTH)


def model_of(config: dict[str, Any], cap: float | None) -> Any:
    torch.manual_seed(0)
    model = build_model(
        hf_config({**config, "initializer_range": 0.2}, final_logit_softcapping=cap)
    )
    return model.eval()


@pytest.mark.parametrize("config", [GLA, LLAMA], ids=["gla", "llama"])
def test_logits_and_loss_are_capped(config: dict[str, Any]) -> None:
    plain, capped = model_of(config, None), model_of(config, CAP)
    tokens = torch.randint(0, 400, (2, 32))
    expected = CAP * torch.tanh(plain(tokens).logits / CAP)
    assert expected.abs().max() < CAP < plain(tokens).logits.abs().max()
    torch.testing.assert_close(capped(tokens).logits, expected, rtol=0, atol=1e-6)
    wrapped = CausalLM(capped.train(), byte_tokenizer(), varlen=False)
    loss = wrapped({"input_ids": tokens, "labels": tokens})["loss"]
    theirs = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    loss.backward()
    assert all(each.grad.isfinite().all() for each in capped.parameters())


def test_a_cap_is_kept_in_folders_and_when_quantized(tmp_path: Path) -> None:
    plain, capped = model_of(GLA, None), model_of(GLA, CAP)
    save_hf_folder(capped, byte_tokenizer(), tmp_path / "hf", dtype="float32")
    loaded = load_pretrained(str(tmp_path / "hf")).eval()
    tokens = torch.randint(0, 400, (2, 32))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, capped(tokens).logits)
        quantize(loaded, "int8", "hf")
        cap_logits(loaded)  # not twice
        quantize(plain, "int8", "hf")
        assert torch.equal(loaded(tokens).logits, CAP * torch.tanh(plain(tokens).logits / CAP))
    # The largest logit stays the largest
    texts = [
        model.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False)
        for model in (plain, loaded)
    ]
    assert torch.equal(*texts)


def test_a_model_that_has_its_own_cap_is_left_alone() -> None:
    torch.manual_seed(0)
    config = {**LLAMA, "model_type": "gemma2", "head_dim": 16, "num_key_value_heads": 2}
    model = build_model(hf_config(config, final_logit_softcapping=5.0))
    assert not model.lm_head._forward_hooks


@pytest.mark.parametrize(
    "cap", [0, -1.0, 1e-9, 1e300, 10**400, float("inf"), float("nan"), True, "30", [30]]
)
def test_a_cap_that_is_none(cap: Any) -> None:
    rule = r"model\.config\.final_logit_softcapping: must be a number from 0\.001 to 1e\+06"
    with pytest.raises(InvalidField, match=rule):
        hf_config(GLA, final_logit_softcapping=cap)
    written = hf_config(GLA).to_dict() | {"final_logit_softcapping": cap}
    with pytest.raises(ConfigError, match=r"there: .*must be a number from"):
        read_back_hf_config(written, "there")


@pytest.mark.parametrize(
    ("model_type", "scale"),
    [
        ("granite", "logits_scaling"),
        ("cohere", "logit_scale"),
        ("recurrent_gemma", "logits_soft_cap"),
        ("falcon_h1", "lm_head_multiplier"),
    ],
)
def test_logits_that_are_scaled_otherwise_cannot_be_capped(model_type: str, scale: str) -> None:
    with pytest.raises(InvalidField, match=rf"softcapping: must be null: .* by {scale}$"):
        hf_config({"model_type": model_type}, final_logit_softcapping=30.0)


@pytest.mark.filterwarnings("ignore:`fuse_linear_cross_entropy` is enabled")  # of precision
def test_a_loss_without_logits_cannot_be_capped() -> None:
    changes = {"fuse_cross_entropy": False, "fuse_linear_cross_entropy": True}
    with pytest.raises(InvalidField, match=r"softcapping: needs the logits, which model\.config\."):
        hf_config(GLA, final_logit_softcapping=30.0, **changes)


def test_the_card_says_so() -> None:
    time = {"batch": 1, "token": 2, "sample": 3}
    content = {"state": {"timestamp": {"Timestamp": time}}}
    card, plain = (
        model_card(model_of(GLA, cap), content, None, dtype="float32", name="x")
        for cap in (30.0, None)
    )
    assert " Its logits are capped: 30 * tanh(logits / 30)." in card
    assert "capped" not in plain
