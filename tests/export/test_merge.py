"""Adapters that leave: merged into their base, or in peft's layout; and what is refused of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flame_composer.checkpoint import adapter as adapters
from flame_composer.checkpoint.to_model import load_model
from flame_composer.config.convert import ToHfConfig
from flame_composer.config.load import load
from flame_composer.errors import ConfigError, DataError
from flame_composer.model.base import identify_base
from tests.adapters import lora_keys, make_base, sha256, with_moved_base
from tests.conftest import LLAMA
from tests.runs import Corpus, check, last_json, run_script

IDS = torch.arange(2 * 90).reshape(2, 90) * 13 % 250


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def with_peft(base: Path, folder: Path, **options: Any) -> PreTrainedModel:
    """What a user of peft gets, who knows nothing of this package."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, **options)
    return PeftModel.from_pretrained(model, folder)


def to_hf(run: Path, out: Path, *more: str) -> str:
    command = ("convert/to_hf.py", f"checkpoint={run / 'checkpoints'}", f"out={out}", *more)
    return check(run_script(*command)).stdout


@pytest.fixture(scope="module")
def folder(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's adapter in peft's layout."""
    out = tmp_path_factory.mktemp("out") / "adapter"
    to_hf(lora_run, out, "merge=false")
    return out


def test_merged(lora_run: Path, base: Path, tmp_path: Path) -> None:
    """The default: a model like any other, whose logits are those with the adapter; the difference
    is printed, and the base is as it was.
    """
    before, out = sha256(base), tmp_path / "merged"
    printed = to_hf(lora_run, out)
    match = re.match(r"merged: logits differ by (\S+) at most from those with the ada", printed)
    assert match is not None
    assert float(match[1]) <= 1e-4
    adapted, _ = load_model(str(lora_run / "checkpoints"))
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert (logits_of(merged) - logits_of(adapted)).abs().max() <= 1e-4
    original = AutoModelForCausalLM.from_pretrained(base)
    assert (logits_of(merged) - logits_of(original)).abs().max() > 1e-2
    assert (
        load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    )
    assert json.loads((out / "config.json").read_text())["fuse_swiglu"]
    assert sha256(base) == before
    card = (out / "README.md").read_text()
    assert "stored as float32, tuned with flame_composer" in card
    assert "- adapter (LoRA): rank 8, alpha 16, dropout 0.1, on 20 projections (q_proj, " in card
    assert f"- its base: {base}, sha256 {identify_base(str(base)).sha256}" in card


def test_merged_in_bf16(lora_run: Path, tmp_path: Path) -> None:
    """Merged in fp32 all the same, and what rounding does is printed besides."""
    printed = to_hf(lora_run, tmp_path / "merged", "dtype=bfloat16", "merge=true").splitlines()
    assert float(printed[0].split("differ by ")[1].split()[0]) <= 1e-4
    match = re.fullmatch(r"stored as bfloat16: they differ by (\S+) at most", printed[1])
    assert match is not None
    adapted, _ = load_model(str(lora_run / "checkpoints"))
    stored, _ = load_model(str(tmp_path / "merged"))
    difference = (logits_of(stored) - logits_of(adapted)).abs().max()
    assert 1e-3 < difference < 2 * float(match[1])


def test_peft_loads_the_adapter(lora_run: Path, base: Path, folder: Path) -> None:
    """By its own layout, with the logits of ours; its name for the base is where that is."""
    adapted, _ = load_model(str(lora_run / "checkpoints"))
    theirs = with_peft(base, folder, fuse_swiglu=False)
    assert torch.allclose(logits_of(theirs), logits_of(adapted), rtol=0, atol=1e-6)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16.0, 0.1)
    assert config["inference_mode"]
    assert config["target_modules"][:2] == ["q_proj", "k_proj"]
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert f'model = AutoModelForCausalLM.from_pretrained("{base}", fuse_swiglu=False)' in card
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == AutoTokenizer.from_pretrained(base).get_vocab()
    )


def test_the_lines_of_the_card_work(lora_run: Path, folder: Path) -> None:
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER or id", str(folder))
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    adapted, _ = load_model(str(lora_run / "checkpoints"))
    assert torch.allclose(logits_of(names["model"]), logits_of(adapted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_embeddings_go_out(corpus: Corpus, tmp_path: Path, tied: bool) -> None:
    """Also tied ones: merged, and as peft's modules_to_save."""
    base = make_base(tmp_path / "base", corpus.tokenizer, {**LLAMA, "tie_word_embeddings": tied})
    run = tmp_path / "run"
    more = ("max_duration=5ba", "lora.train_embeddings=true", "lora.rank=2")
    check(run_script("recipes/train.py", *lora_keys(corpus, run, base, *more)))
    adapted, _ = load_model(str(run / "checkpoints"))
    embeddings = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(adapted.get_input_embeddings().weight, embeddings)
    to_hf(run, tmp_path / "merged")
    to_hf(run, tmp_path / "adapter", "merge=false")
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        load_model(str(tmp_path / "adapter"))[0],
        with_peft(base, tmp_path / "adapter"),
    ):
        assert (logits_of(model) - logits_of(adapted)).abs().max() <= 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    if tied:  # as most programs write it: once
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        del tensors["base_model.model.lm_head.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        once, _ = load_model(str(tmp_path / "adapter"))
        assert torch.equal(logits_of(once), logits_of(adapted))
        name = "base_model.model.lm_head.weight"  # trained apart from the embeddings
        _tensors(tmp_path / "adapter", lambda held: held.update({name: torch.zeros(300, 32)}))
        with pytest.raises(ConfigError, match="apart, but its base has them tied; untie them in"):
            load_model(str(tmp_path / "adapter"))


def test_adapters_that_peft_made_are_loaded(base: Path, tmp_path: Path) -> None:
    """An adapter without the base's hash, and with peft's own names and defaults."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    ours, _ = load_model(str(tmp_path / "theirs"))
    assert torch.allclose(logits_of(ours), logits_of(model), rtol=0, atol=1e-6)


def test_evaluate_and_generate_take_all_forms(
    corpus: Corpus, lora_run: Path, base: Path, folder: Path, tmp_path: Path
) -> None:
    to_hf(lora_run, tmp_path / "merged")
    losses, texts = [], []
    for model in (lora_run / "checkpoints", folder, tmp_path / "merged"):
        data = f"data.local={corpus.val}"
        losses.append(last_json(run_script("recipes/evaluate.py", f"model={model}", data))["loss"])
        command = ("recipes/generate.py", f"model={model}", "prompt=ka", "temperature=0")
        texts.append(check(run_script(*command, "max_new_tokens=8")).stdout)
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    assert texts == [texts[0]] * 3
    data = f"data.local={corpus.val}"
    before = last_json(run_script("recipes/evaluate.py", f"model={base}", data))["loss"]
    assert losses[0] < before - 0.02


def test_a_base_that_has_moved(
    corpus: Corpus, lora_run: Path, base: Path, folder: Path, tmp_path: Path
) -> None:
    """`base` says where it is now, to all four scripts; without it, a line says to give it."""
    checkpoints, moved = with_moved_base(lora_run, base, tmp_path)
    shutil.copytree(folder, tmp_path / "adapter")
    _change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "gone"))
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    out = tmp_path / "out"
    for command in (
        ("recipes/chat.py", f"model={tmp_path / 'adapter'}"),
        ("recipes/generate.py", f"model={checkpoints}", "prompt=ka", "max_new_tokens=2"),
        ("recipes/generate.py", f"model={tmp_path / 'adapter'}", "prompt=ka", "max_new_tokens=2"),
        ("recipes/evaluate.py", f"model={checkpoints}", f"data.local={corpus.val}"),
        ("convert/to_hf.py", f"checkpoint={checkpoints}", f"out={out}"),
    ):
        result = run_script(*command)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert (
            f"the base of its adapter cannot be loaded: {tmp_path / 'gone'}: no such folder"
            in result.stderr
        )
        assert "give the model it was trained on as base=..." in result.stderr
        assert not out.exists()
        check(run_script(*command, f"base={moved}"))


def _change(folder: Path, **keys: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


FIRST = "base_model.model.model.layers.0.attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: _change(f, peft_type="IA3"), "peft_type is 'IA3', and only LORA can be loaded"),
        (lambda f: _change(f, use_dora=True), "use_dora=True: only plain LoRA can be loaded"),
        (lambda f: _change(f, use_rslora=True), "use_rslora=True: only plain LoRA can be loaded"),
        (
            lambda f: _change(f, rank_pattern={"q_proj": 2}),
            "rank_pattern={'q_proj': 2}: only plain",
        ),
        (lambda f: _change(f, auto_mapping={"x": "y"}), "auto_mapping={'x': 'y'}: only plain LoRA"),
        (lambda f: _change(f, loads_code="os"), "loads_code=os: only plain LoRA can be loaded"),
        (lambda f: _change(f, target_modules=".*"), "target_modules must be a list of names"),
        (lambda f: _change(f, target_modules=[1]), "target_modules must be a list of names"),
        (lambda f: _change(f, r="8"), "its adapter's rank cannot be right"),
        (lambda f: _change(f, r=4), "its adapter does not fit its base: "),
        (lambda f: _change(f, lora_alpha=float("nan")), "its adapter's alpha cannot be right"),
        (lambda f: _change(f, lora_dropout=1.5), "its adapter's dropout cannot be right"),
        (lambda f: _change(f, base_model_name_or_path=None), "names no base_model_name_or_path"),
        (lambda f: _change(f, base_model_name_or_path="a" * 300), "cannot be fetched from the"),
        (
            lambda f: _change(f, base_model_name_or_path="/no"),
            "cannot be loaded: /no: no such fold",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "must hold keys and values"),
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            "safetensors: no such file; get the",
        ),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "damaged: "),
        (
            lambda f: _tensors(f, lambda t: t.pop(FIRST)),
            "'model.layers.0.attn.q_proj.lora_A.default",
        ),
        (
            lambda f: _tensors(
                f, lambda t: t.update({FIRST.replace("q_", "x_"): torch.ones(8, 32)})
            ),
            "is for another base: that has no layer 'model.layers.0.attn.x_proj'",
        ),
        (
            lambda f: _tensors(f, lambda t: t.update({FIRST: torch.ones(8, 31)})),
            "is [8, 31], and mu",
        ),
        (
            lambda f: _tensors(f, lambda t: t.update({"more": torch.ones(1)})),
            "'more' is [1], and mu",
        ),
        (
            lambda f: _tensors(f, lambda t: t[FIRST].view(-1)[3:4].fill_(float("nan"))),
            "lora_A.default.weight' holds no finite numbers everywhere: it is damaged",
        ),
        (
            lambda f: _tensors(
                f, lambda t: t.update({FIRST: torch.ones(8, 32, dtype=torch.int64)})
            ),
            "lora_A.default.weight' holds no finite numbers everywhere: it is damaged",
        ),
    ],
)
def test_folders_that_are_not_an_adapter(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoiled = tmp_path / "spoiled"
    shutil.copytree(folder, spoiled)
    spoil(spoiled)
    with pytest.raises(ConfigError) as error:
        load_model(str(spoiled))
    assert message in str(error.value)
    assert str(error.value).startswith(str(spoiled))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_an_adapter_ends_a_script_in_one_line(
    corpus: Corpus, folder: Path, tmp_path: Path
) -> None:
    spoiled = tmp_path / "spoiled"
    shutil.copytree(folder, spoiled)
    (spoiled / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    for command in (
        ("recipes/evaluate.py", f"model={spoiled}", f"data.local={corpus.val}"),
        ("recipes/generate.py", f"model={spoiled}", "prompt=a"),
    ):
        result = run_script(*command)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr


def test_an_adapter_is_no_model_to_start_from(
    corpus: Corpus, folder: Path, base: Path, tmp_path: Path
) -> None:
    keys = lora_keys(corpus, tmp_path / "run", base, f"model.pretrained={folder}")
    result = run_script("recipes/train.py", *keys)
    assert result.returncode == 2
    assert f"{folder}: holds an adapter (adapter_config.json)" in result.stderr


def test_a_base_that_is_another_one(
    corpus: Corpus, lora_run: Path, base: Path, folder: Path, tmp_path: Path
) -> None:
    """Other weights of the same shapes are known by their hash, in both forms."""
    other = make_base(tmp_path / "other", corpus.tokenizer, seed=1)
    for model in (lora_run / "checkpoints", folder):
        with pytest.raises(
            ConfigError, match=r"its adapter was trained on another base than .*other"
        ):
            load_model(str(model), base=str(other))
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    assert load_model(str(folder), base=str(changed))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "clamp_min": -1.0}))
    with pytest.raises(ConfigError, match="or that has changed since: sha256"):
        load_model(str(folder), base=str(changed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "its adapter's rank cannot be right"),
        ({"rank": True}, "its adapter's rank cannot be right"),
        ({"alpha": float("inf")}, "its adapter's alpha cannot be right"),
        ({"dropout": "0"}, "its adapter's dropout cannot be right"),
        ({"targets": []}, "its adapter's targets cannot be right"),
        ({"targets": [0]}, "its adapter's targets cannot be right"),
        ({"targets": None}, "its adapter (lora) is not described as one"),
        ({"train_embeddings": 1}, "its adapter's train_embeddings cannot be right"),
        ({"base": {"place": "a\nb", "sha256": ""}}, "its adapter's base cannot be right"),
        ({"base": {"place": "x" * 9999, "sha256": ""}}, "its adapter's base cannot be right"),
        ({"base": "here"}, "its adapter (lora) is not described as one"),
        ({"code": "os"}, "its adapter (lora) is not described as one"),
    ],
)
def test_descriptions_that_cannot_be_right(
    lora_run: Path, changes: dict[str, Any], message: str
) -> None:
    content = torch.load(lora_run / "checkpoints" / "ba20.pt", weights_only=False)
    hf_state = content["state"]["integrations"]["huggingface"]
    assert adapters.adapter_in(hf_state, "here") is not None
    hf_state["lora"] |= changes
    with pytest.raises(DataError, match=re.escape(f"here: {message}")):
        adapters.adapter_in(hf_state, "here")


@pytest.mark.parametrize("key", ["merge=true", "merge=false", "base=BASE"])
def test_keys_of_adapters_for_a_whole_model(
    undisturbed: Path, base: Path, tmp_path: Path, key: str
) -> None:
    key, out = key.replace("BASE", str(base)), tmp_path / "out"
    checkpoint = f"checkpoint={undisturbed / 'checkpoints'}"
    result = run_script("convert/to_hf.py", checkpoint, f"out={out}", key)
    assert result.returncode == 2
    assert f"command line: {key}: must be null: " in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()
    config = load(ToHfConfig, [checkpoint, f"out={out}"])
    assert (config.merge, config.base) == (None, None)


def test_the_averaged_adapter_goes_out(corpus: Corpus, base: Path, tmp_path: Path) -> None:
    """With an average, that is what is merged, unless the weights are asked for."""
    run = tmp_path / "run"
    more = ("max_duration=8ba", "algorithms.ema.half_life=5ba")
    check(run_script("recipes/train.py", *lora_keys(corpus, run, base, *more)))
    content = torch.load(run / "checkpoints" / "ba8.pt", weights_only=False)["state"]
    for which in ("ema", "model"):
        to_hf(run, tmp_path / which, "merge=false", f"weights={which}")
    name = "model.layers.0.attn.q_proj.lora_B"
    average = dict(content["algorithms"])["EMA"]["average"]
    for which, weights in (("ema", average), ("model", content["model"])):
        stored = load_file(tmp_path / which / "adapter_model.safetensors")
        held = stored[f"base_model.model.{name}.weight"]
        assert torch.equal(held, weights[f"model.{name}.default.weight"])
