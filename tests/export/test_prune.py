"""Pruned weights: exactly those that were asked for, and no others; and the folder with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from flame_composer.errors import ConfigError, InvalidField
from flame_composer.export.prune import describe, prune_model, prune_smallest, prune_two_of_four
from flame_composer.export.quantize import save_int8_folder
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.lora import embeddings_of, projections
from flame_composer.model.quantized import quantize
from flame_composer.text.ends import ends_in
from tests.adapters import make_base, sha256, with_moved_base
from tests.conftest import GLA, LLAMA
from tests.data_fixtures import byte_tokenizer
from tests.runs import Corpus, check, last_json, run_script

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}


@st.composite
def weights(draw: st.DrawFn, *, fours: bool = False) -> Tensor:
    """Few different magnitudes, so that many are equal; and none, or all sorts."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6)) * (4 if fours else 1)
    some = st.sampled_from([-2.0, -1.0, 1.0, 2.0, 0.5]) | st.floats(-3, 3, width=32)
    values = draw(st.lists(some, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values).reshape(rows, columns)


def smallest(values: list[float], number: int) -> set[int]:
    """Places of the smallest magnitudes; of equal ones, the first."""
    return set(sorted(range(len(values)), key=lambda place: (abs(values[place]), place))[:number])


@given(weights(), st.floats(0, 1))
def test_the_sparsity_asked_for_is_the_sparsity_got(weight: Tensor, sparsity: float) -> None:
    before = weight.clone()
    pruned = prune_smallest(weight, sparsity)
    values, number = weight.flatten().tolist(), round(sparsity * weight.numel())
    chosen = smallest(values, number)
    assert len(chosen) == number
    expected = [0.0 if place in chosen else value for place, value in enumerate(values)]
    assert pruned.flatten().tolist() == expected
    assert torch.equal(weight, before)
    assert torch.equal(prune_smallest(pruned, sparsity), pruned), "nothing more the second time"


@given(weights(fours=True))
def test_two_of_each_four_in_a_row(weight: Tensor) -> None:
    before = weight.clone()
    pruned = prune_two_of_four(weight)
    for row, kept in zip(weight.tolist(), pruned.tolist(), strict=True):
        for start in range(0, len(row), 4):
            four, chosen = row[start : start + 4], smallest(row[start : start + 4], 2)
            expected = [0.0 if place in chosen else value for place, value in enumerate(four)]
            assert kept[start : start + 4] == expected
            if 0 not in four:
                assert kept[start : start + 4].count(0) == 2
    assert torch.equal(weight, before)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, None])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", [GLA, LLAMA, GPT2], ids=lambda it: it["model_type"])
def test_linear_layers_alone_are_pruned(
    architecture: dict[str, Any], tied: bool, sparsity: float | None
) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    options = {**architecture, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    model = build_model(build_hf_config(options, tokenizer, 64))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    layers = projections(model)
    report = prune_model(model, "m", sparsity)
    assert [layer.name for layer in report.layers] == list(layers)
    for name, number, zeros in report.layers:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert (number, zeros) == (weight.numel(), int((weight == 0).sum()))
        assert zeros == round((0.5 if sparsity is None else sparsity) * number)
        if sparsity is None:  # in the dimension that a product sums over
            rows = weight.t() if isinstance(layers[name], Conv1D) else weight
            assert ((rows.reshape(-1, 4) == 0).sum(1) == 2).all()
        kept = weight != 0
        assert torch.equal(weight[kept], before[f"{name}.weight"][kept])
    changed = {f"{name}.weight" for name in layers}
    others = {name: each for name, each in model.state_dict().items() if name not in changed}
    assert all(torch.equal(each, before[name]) for name, each in others.items())
    embeddings = {f"{name}.weight" for name in embeddings_of(model)}
    assert len(embeddings) == 2
    assert embeddings <= set(report.left_out)
    assert report.num_left_out == sum(
        each.numel() for name, each in model.named_parameters() if name not in changed
    )
    lines = describe(report)
    number, zeros = (sum(layer[part] for layer in report.layers) for part in (1, 2))
    assert [f"{number:,}", f"{zeros:,}"] == lines[-2].split()[2:4]
    assert lines[-1].startswith(f"left out: {report.num_left_out:,} weights, of ")
    assert ("are tied" in lines[-1]) == tied


def test_rows_that_fours_do_not_divide_are_named() -> None:
    tokenizer = byte_tokenizer()
    llama = {**LLAMA, "intermediate_size": 66, "vocab_size": len(tokenizer)}
    model = build_model(build_hf_config(llama, tokenizer, 64))
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    report = prune_model(model, "m", None)
    assert report.uneven == {"model.layers.0.mlp.down_proj": 66}
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)
    assert "left out, 1 layer of rows that fours do not divide: down_proj (of 66)" in describe(
        report
    )
    odd = {**LLAMA, "hidden_size": 6, "num_attention_heads": 1, "intermediate_size": 66}
    model = build_model(build_hf_config({**odd, "vocab_size": len(tokenizer)}, tokenizer, 64))
    with pytest.raises(InvalidField, match="needs a layer whose rows are a multiple of 4 long; m"):
        prune_model(model, "m", None)


def test_nothing_is_pruned_of_a_damaged_model() -> None:
    tokenizer = byte_tokenizer()
    model = build_model(build_hf_config({**GLA, "vocab_size": len(tokenizer)}, tokenizer, 64))
    layer = list(projections(model).values())[-1]
    with torch.no_grad():
        layer.weight[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"m: model\.layers\.0\.mlp\.down_proj holds no finite"):
        prune_model(model, "m", 0.5)
    for each in projections(model).values():
        assert isinstance(each.weight, Tensor)
        assert (each.weight != 0).all()


@pytest.fixture(scope="module")
def half(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "half"
    before = sha256(base)
    summary = last_json(
        run_script("convert/prune.py", f"model={base}", f"out={out}", "sparsity=0.5")
    )
    assert summary["zeros"] * 2 == summary["weights"] == zeros_of(out) * 2
    assert summary["layers"] == 20
    assert sha256(base) == before
    return out


def zeros_of(folder: Path) -> int:
    """How many weights of its projections are zero."""
    return sum(
        int((tensor == 0).sum())
        for name, tensor in load_file(folder / "model.safetensors").items()
        if "_proj" in name and name.endswith("weight")
    )


def test_the_folder_is_a_model_like_any_other(
    corpus: Corpus, base: Path, half: Path, tmp_path: Path
) -> None:
    """It is evaluated and continued, and trained on; no mask is kept in training."""
    assert {file.name for file in half.iterdir()} == {*sha256(base), "README.md"}
    assert "Pruned by magnitude (0.5 of each layer)" in (half / "README.md").read_text()
    losses = [
        last_json(run_script("recipes/evaluate.py", f"model={model}", f"data.local={corpus.val}"))
        for model in (base, half)
    ]
    assert losses[0]["loss"] != losses[1]["loss"]
    check(run_script("recipes/generate.py", f"model={half}", "prompt=ka", "max_new_tokens=4"))
    model = (f"model.pretrained={half}", "model.config.tie_word_embeddings=false")
    keys = corpus.keys(tmp_path / "run", *model, "max_duration=5ba")
    check(run_script("recipes/train.py", *keys))
    trained = tmp_path / "trained"
    checkpoint = f"checkpoint={tmp_path / 'run/checkpoints'}"
    check(run_script("convert/to_hf.py", checkpoint, f"out={trained}"))
    assert zeros_of(trained) < zeros_of(half) / 100


def test_the_pattern(base: Path, tmp_path: Path) -> None:
    """On the command line and in a file, where YAML by itself would take 2:4 for minutes."""
    file = tmp_path / "prune.yaml"
    file.write_text(f"model: {base}\nout: {tmp_path / 'file'}\npattern: 2:4\n")
    keys = (f"model={base}", f"out={tmp_path / 'line'}", "pattern=2:4")
    zeros = [
        last_json(run_script("convert/prune.py", *words))["zeros"] for words in (keys, (file,))
    ]
    assert zeros == [zeros_of(tmp_path / "line")] * 2
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("line", "file")]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    fours = tensors[0]["model.layers.1.mlp.up_proj.weight"].reshape(-1, 4)
    assert ((fours == 0).sum(1) == 2).all()


def test_adapters_are_merged_first(lora_run: Path, base: Path, tmp_path: Path) -> None:
    """Of a checkpoint, whose base has moved."""
    checkpoints, moved = with_moved_base(lora_run, base, tmp_path)
    command = ("convert/prune.py", f"model={checkpoints}", f"out={tmp_path / 'out'}")
    result = run_script(*command, "sparsity=0.25")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "out").exists()
    shown = check(run_script(*command, "sparsity=0.25", f"base={moved}")).stdout
    assert shown.startswith("merged: logits differ by ")
    checkpoint = f"checkpoint={lora_run / 'checkpoints'}"
    check(run_script("convert/to_hf.py", checkpoint, f"out={tmp_path / 'merged'}"))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    assert pruned.keys() == merged.keys()
    for name, tensor in pruned.items():
        is_pruned = "_proj" in name and name.endswith("weight")
        expected = prune_smallest(merged[name], 0.25) if is_pruned else merged[name]
        assert torch.equal(tensor, expected), name
    assert ends_in(str(tmp_path / "out")) == ends_in(str(tmp_path / "merged"))


def test_int8_weights_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = build_model(build_hf_config({**GLA, "vocab_size": len(tokenizer)}, tokenizer, 64))
    folder = tmp_path / "int8"
    save_int8_folder(model, quantize(model, "int8", "m").stored, tokenizer, folder)
    out = tmp_path / "out"
    result = run_script("convert/prune.py", f"model={folder}", f"out={out}", "sparsity=0.5")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "holds int8 weights; give the model they were made from" in result.stderr
    assert not out.exists()


def test_refusals(base: Path, half: Path, corpus: Corpus, tmp_path: Path) -> None:
    """In one line each, and nothing is written."""
    damaged = make_base(tmp_path / "damaged", corpus.tokenizer, seed=1)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = math.inf
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    before = sha256(half)
    for words, message in (
        ((f"model={base}", f"out={half}", "sparsity=0.5"), "already exists and is not empty"),
        ((f"model={base}", "sparsity=1e-9"), "sparsity=1e-09: must be larger: it is no whole w"),
        ((f"model={base}",), "sparsity: must be set (e.g. 0.5), or pattern=2:4, and not both"),
        ((f"model={base}", "pattern=1:4"), "pattern=1:4: must be one of ['2:4'], or null"),
        ((f"model={damaged}", "sparsity=0.5"), "up_proj holds no finite numbers everywhere"),
        ((f"model={tmp_path / 'none'}", "sparsity=0.5"), "no such folder"),
    ):
        more = () if any(word.startswith("out=") for word in words) else (f"out={tmp_path / 'o'}",)
        result = run_script("convert/prune.py", *words, *more)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
    assert sha256(half) == before
