"""Models with weights of 8 or 16 bits: what is quantized, what they give, and their folders."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flame_composer.checkpoint.to_model import load_model, save_hf_folder
from flame_composer.config.load import load
from flame_composer.config.use import ChatConfig
from flame_composer.cpu.int8 import int8_product, pack_int8, quantize_rows
from flame_composer.errors import ConfigError
from flame_composer.export.quantize import save_int8_folder
from flame_composer.model import quantized
from flame_composer.model.build import build_model, load_pretrained
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.int8_folder import FILE, METHOD
from flame_composer.model.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    is_quantized,
    quantize,
    try_out,
)
from flame_composer.serve.states import Abilities, probe
from flame_composer.text.tokenizer import load_tokenizer
from flame_composer.use.chat import Conversation
from tests.adapters import with_moved_base
from tests.conftest import GLA, LLAMA
from tests.data_fixtures import byte_tokenizer, words
from tests.runs import Corpus, Script, check, last_json, run_script
from tests.serve.clients import Server
from tests.serve.test_engine import Bench
from tests.stack import TRANSFORMERS

IDS = torch.arange(2 * 90).reshape(2, 90) * 13 % 250
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
FALCON_MAMBA = {"model_type": "falcon_mamba", "hidden_size": 32, "num_hidden_layers": 2}
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    # The number of linear layers, and of those that are quantized
    "gla": (GLA, 11, 11),
    "gla, tied": ({**GLA, "tie_word_embeddings": True}, 11, 11),
    "gla, convolution": ({**GLA, "use_short_conv": True}, 11, 11),
    "llama": (LLAMA, 8, 8),
    "llama, tied": ({**LLAMA, "tie_word_embeddings": True}, 8, 8),
    "qwen2, biases": ({**LLAMA, "model_type": "qwen2", "num_key_value_heads": 1}, 8, 8),
    "gpt2": (GPT2, 9, 9),
    "gemma3": (
        {**LLAMA, "model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 16},
        8,
        8,
    ),
    "mamba": ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}, 9, 9),
    # transformers 5 reads the weights of two layers instead of calling them
    "falcon_mamba": (FALCON_MAMBA, 9, 9 if TRANSFORMERS < (5, 0) else 7),
}


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits


def tiny(keys: dict[str, Any], tokenizer: Any = None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = {**keys, "initializer_range": 0.2}
    return build_model(build_hf_config(config, tokenizer or byte_tokenizer(), 128)).eval()


@pytest.mark.parametrize(("num_out", "num_in"), [(96, 64), (7, 33), (64, 2048), (1, 1)])
def test_the_product_is_that_of_the_rounded_weights(num_out: int, num_in: int) -> None:
    """To 14 bits of a row's largest activation, and each row as it is alone."""
    torch.manual_seed(0)
    weight = torch.randn(num_out, num_in) * torch.logspace(-6, 3, num_out)[:, None]
    numbers, scale = quantize_rows(weight)
    assert numbers.dtype == torch.int8
    assert int(numbers.abs().max()) == 127
    rounded = numbers.double() * scale.double()[:, None]
    assert bool(((rounded - weight).abs() <= scale[:, None] * 0.501).all())
    x = torch.randn(37, num_in) * torch.logspace(-20, 20, 37)[:, None]
    x[5] = 0
    zeros = torch.zeros(num_out, dtype=torch.int32)
    result = int8_product(x, pack_int8(numbers), scale, zeros)
    step = x.abs().amax(1, keepdim=True).double() / (63 * 126)
    bound = step * rounded.abs().sum(1) * 0.51 + 1e-5 * (x.double().abs() @ rounded.abs().T)
    assert bool(((result - x.double() @ rounded.T).abs() <= bound).all())
    assert bool((result[5] == 0).all())
    for number in range(37):
        alone = int8_product(x[number : number + 1], pack_int8(numbers), scale, zeros)
        assert torch.equal(alone[0], result[number])
    assert int8_product(x[:0], pack_int8(numbers), scale, zeros).shape == (0, num_out)


def test_rows_that_are_not_finite_give_no_finite_numbers() -> None:
    numbers, scale = quantize_rows(torch.randn(8, 16))
    x = torch.randn(3, 16)
    x[0, 3], x[1, 4] = math.nan, math.inf
    result = int8_product(x, pack_int8(numbers), scale, torch.zeros(8, dtype=torch.int32))
    assert not result[:2].isfinite().any()
    assert result[2].isfinite().all()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_several_layers_are_given_is_split_once(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the modes that generate.py and the server run in; what was changed is split anew."""
    halves: list[int] = []
    real = torch.quantize_per_tensor

    def noted(*args: Any) -> Any:
        halves.append(1)
        return real(*args)

    monkeypatch.setattr(torch, "quantize_per_tensor", noted)
    (wide, wide_scale), (thin, thin_scale) = (
        quantize_rows(torch.randn(8, number)) for number in (128, 16)
    )
    wide, thin, zeros = pack_int8(wide), pack_int8(thin), torch.zeros(8, dtype=torch.int32)
    with mode():
        x = torch.randn(3, 128)
        first = int8_product(x, wide, wide_scale, zeros)
        assert torch.equal(int8_product(x, wide, wide_scale, zeros), first)
        assert len(halves) == 2
        int8_product(torch.randn(3, 16), thin, thin_scale, zeros)  # as a gate of low rank
        assert torch.equal(int8_product(x, wide, wide_scale, zeros), first)
        assert len(halves) == 4
        x[1, 3] += 1  # which an inference tensor does not tell
        other = int8_product(x, wide, wide_scale, zeros)
        assert len(halves) == 6
        assert torch.equal(other, int8_product(x.clone(), wide, wide_scale, zeros))
        assert not torch.equal(other, first)


def test_rows_of_zeros_and_of_tiny_weights() -> None:
    weight = torch.randn(3, 16)
    weight[0], weight[1] = 0, weight[1] * 1e-42
    numbers, scale = quantize_rows(weight)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert not numbers[0].any()


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_quantized_and_used(name: str) -> None:
    """The logits are near those of fp32, and change with each layer's scales."""
    keys, num_layers, num_quantized = MODELS[name]
    model = tiny(keys)
    expected = logits_of(model)
    line = quantize(model, "int8", "m").line
    assert line.startswith(f"int8: {num_quantized} of {num_layers} linear layers")
    assert ("stays as it is" in line) == (num_quantized < num_layers)
    found = logits_of(model)
    assert (found - expected).norm() < 0.05 * expected.norm()
    layers = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
    assert len(layers) == num_quantized
    tables = [each for each in model.modules() if isinstance(each, QuantizedEmbedding)]
    assert len(tables) == (name != "gemma3")  # its embeddings are no plain table
    for layer in (*layers, *tables):
        scale: Any = layer.weight_scale
        before = scale.clone()
        scale *= 1.5
        assert not torch.equal(logits_of(model), found), layer
        scale.copy_(before)
    assert torch.equal(logits_of(model), found)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_same_model(name: str, tmp_path: Path) -> None:
    model = tiny(MODELS[name][0])
    stored = quantize(model, "int8", "m").stored
    save_int8_folder(model, stored, byte_tokenizer(), tmp_path / "int8")
    again, _ = load_model(str(tmp_path / "int8"))
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert not any(each.requires_grad for each in again.parameters())
    held = load_file(tmp_path / "int8" / FILE)
    int8 = sum(each.numel() for each in held.values() if each.dtype == torch.int8)
    assert int8 == sum(each.numbers.numel() for each in stored.values())


def test_a_layer_whose_weights_are_read_stops_the_model() -> None:
    """fla's MLPs compute with the weights of `down_proj` unless they are told to call it."""
    model: Any = tiny(GLA)
    quantize(model, "int8", "m")
    model.model.layers[0].mlp.fuse_swiglu = True
    with pytest.raises(Exception, match="down_proj"):
        try_out(model)


def test_a_table_that_a_model_computes_with_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its int8 numbers without their scales would be no embeddings."""
    model: Any = tiny(GLA)
    forward = model.forward

    def looking(**options: Any) -> Any:
        output = forward(**options)
        output.logits = output.logits + 0 * model.get_input_embeddings().weight.sum()
        return output

    monkeypatch.setattr(model, "forward", looking)
    done = quantize(model, "int8", "m")
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert done.line.startswith("int8: 11 of 11 linear layers, ")
    assert "model.embeddings.weight" not in done.stored
    monkeypatch.undo()
    plain = tiny(GLA)
    quantize(plain, "int8", "m")
    table: Any = plain.get_input_embeddings()
    assert (table.weight.shape, table.weight.dtype) == ((400, 32), torch.float32)
    with pytest.raises(quantized.ReadDirectlyError, match=r"model\.embeddings"):
        torch.ones(1, 32) @ table.weight.t()


def test_no_linear_layer_is_an_error() -> None:
    model: Any = tiny(GLA)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            other = type("Other", (nn.Linear,), {})
            module.__class__ = other
            assert model.get_submodule(name) is module
    with pytest.raises(ConfigError, match=r"^m: a gla model has no linear layer that could be q"):
        quantize(model, "int8", "m")


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = tiny(GLA)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 2] = math.nan
    with pytest.raises(ConfigError, match=r"^m: lm_head.weight holds values that are infinite"):
        quantize(model, "int8", "m")


def test_bf16_rounds_all_weights() -> None:
    model, plain = tiny(GLA), tiny(GLA)
    assert quantize(model, "bf16", "m").line.startswith("bf16: 11 of 11 linear layers and the em")
    rounded = plain.to(torch.bfloat16).float()
    assert (logits_of(model) - logits_of(rounded)).norm() < 0.02 * logits_of(plain).norm()


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_a_deep_model_s_states_are_joined(dtype: quantized.Dtype) -> None:
    """Rounded activations make more of other sums than fp32's do."""
    keys = {**GLA, "hidden_size": 64, "num_hidden_layers": 12, "vocab_size": 3000}
    torch.manual_seed(0)
    model = build_model(build_hf_config(keys, byte_tokenizer(), 128)).eval()
    quantize(model, dtype, "m")
    assert probe(model) == Abilities(joined=True, in_pieces=True)


def test_a_text_is_the_same_in_a_batch_and_alone() -> None:
    """In the server's engine, at once with others, as a row of its own."""
    model = tiny(GLA)
    quantize(model, "int8", "m")
    found = []
    for rows in (1, 4):
        bench = Bench(model, max_rows=rows)
        bench.engine.start()
        numbers = [bench.submit(words(size, size)) for size in (3, 30, 60, 9, 12)]
        found.append([bench.result(number) for number in numbers])
        bench.engine.close("done")
    assert found[0] == found[1]
    assert len(set(map(str, found[0]))) == 5


# The scripts


class Folders:
    """A trained model, and the folders that convert/quantize.py makes of it."""

    def __init__(self, corpus: Corpus, run: Path, folder: Path):
        self.corpus, self.checkpoints = corpus, run / "checkpoints"
        self.fp32, self.int8, self.bf16 = (folder / name for name in ("fp32", "int8", "bf16"))
        check(run_script("convert/to_hf.py", f"checkpoint={self.checkpoints}", f"out={self.fp32}"))
        check(convert(self.fp32, self.int8))
        check(convert(self.fp32, self.bf16, "bf16"))


def convert(model: Path, out: Path, dtype: str = "int8", *more: str) -> Any:
    return run_script(
        "convert/quantize.py", f"model={model}", f"dtype={dtype}", f"out={out}", *more
    )


@pytest.fixture(scope="module")
def folders(corpus: Corpus, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(corpus, undisturbed, tmp_path_factory.mktemp("quantized"))


def test_the_script_says_what_it_did(folders: Folders, tmp_path: Path) -> None:
    out, plain = tmp_path / "int8", folders.fp32 / "model.safetensors"
    first, second = check(convert(folders.fp32, out)).stdout.splitlines()
    assert first.startswith("int8: 21 of 21 linear layers and the embeddings, 9")
    size = (out / FILE).stat().st_size
    assert second == f"{folders.fp32} -> {out}: int8, {size:,} bytes of weights"
    assert size < 0.4 * plain.stat().st_size
    assert not [*out.glob("*.bin"), *out.glob("*.pt")]
    assert AutoTokenizer.from_pretrained(out).get_vocab()
    again = check(convert(folders.fp32, tmp_path / "bf16", "bf16")).stdout
    size = (tmp_path / "bf16" / "model.safetensors").stat().st_size
    assert again == f"{folders.fp32} -> {tmp_path / 'bf16'}: bf16, {size:,} bytes of weights\n"
    assert 0.4 * plain.stat().st_size < size < 0.6 * plain.stat().st_size


def evaluated(folders: Folders, model: Path, *keys: str) -> dict[str, Any]:
    command = ("recipes/evaluate.py", f"model={model}", f"data.local={folders.corpus.val}", *keys)
    result = last_json(run_script(*command))
    del result["model"]
    return result


def test_evaluate(folders: Folders) -> None:
    """The loss is near that of fp32, and that of the folder is exactly that of the key."""
    plain = evaluated(folders, folders.fp32)
    int8 = evaluated(folders, folders.fp32, "quantize=int8")
    assert int8 == evaluated(folders, folders.int8)
    assert int8 == evaluated(folders, folders.int8, "quantize=int8")
    assert int8 == evaluated(folders, folders.checkpoints, "quantize=int8")
    bf16 = evaluated(folders, folders.fp32, "quantize=bf16")
    assert bf16 == evaluated(folders, folders.bf16, "quantize=bf16")
    for each in (int8, bf16, evaluated(folders, folders.bf16)):
        assert each["loss"] != plain["loss"]
        assert each["loss"] == pytest.approx(plain["loss"], rel=0.005)


def test_generate(folders: Folders) -> None:
    def written(model: Path, *keys: str) -> Any:
        command = ("recipes/generate.py", f"model={model}", "prompt=kat loro", "temperature=2")
        return check(run_script(*command, "max_new_tokens=60", *keys))

    with_key = written(folders.fp32, "quantize=int8")
    assert "int8: 21 of 21 linear layers" in with_key.stderr
    assert with_key.stdout == written(folders.int8).stdout


def test_predict(folders: Folders, tmp_path: Path) -> None:
    """Answers of int8 weights are not gone on with by others."""
    source = tmp_path / "tune.jsonl"
    examples = [{"instruction": words(3, n), "output": words(2, n)} for n in range(4)]
    source.write_text("\n".join(map(json.dumps, examples)))
    check(
        run_script(
            "convert/to_sft.py",
            f"source={source}",
            "format=alpaca",
            "template=alpaca",
            f"tokenizer={folders.corpus.tokenizer}",
            "context_length=512",
            f"out={tmp_path / 'data'}",
        )
    )

    def answered(model: Path, out: str, *keys: str) -> Any:
        keys = (f"model={model}", f"data.local={tmp_path / 'data'}", "max_new_tokens=9", *keys)
        return run_script("recipes/predict.py", f"out={tmp_path / out}", *keys)

    check(answered(folders.fp32, "one", "quantize=int8"))
    check(answered(folders.int8, "two"))
    one, two = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    check(answered(folders.int8, "one"))  # the same model, from another place
    other = answered(folders.fp32, "one")
    assert other.returncode == 2
    assert "model" in other.stderr


def test_serve(folders: Folders) -> None:
    texts = []
    for model, keys in ((folders.fp32, ("quantize=int8",)), (folders.int8, ())):
        server = Server(model, *keys)
        body = {"prompt": "kat loro", "max_tokens": 40, "temperature": 2, "seed": 7}
        status, _, answer = server.ask(body)
        assert status == 200
        texts.append(json.loads(answer)["choices"][0]["text"])
        assert ("int8: 21 of 21" in server.script.read("err")) == bool(keys)
        server.script.process.terminate()
        assert server.script.wait().returncode == 0
    assert texts[0] == texts[1] != ""


def test_chat_takes_the_folder(folders: Folders) -> None:
    model, tokenizer = load_model(str(folders.int8))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert Conversation(model, tokenizer, load(ChatConfig, ["model=m"]))


def test_an_adapter_is_merged_first(lora_run: Path, base: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    check(run_script("convert/to_hf.py", f"checkpoint={lora_run / 'checkpoints'}", f"out={merged}"))
    expected, _ = load_model(str(merged), quantize="int8")
    found, _ = load_model(str(lora_run / "checkpoints"), quantize="int8")
    assert torch.equal(logits_of(found), logits_of(expected))
    checkpoints, moved = with_moved_base(lora_run, base, tmp_path)
    assert convert(checkpoints, tmp_path / "int8").returncode == 2
    check(convert(checkpoints, tmp_path / "int8", "int8", f"base={moved}"))
    again, _ = load_model(str(tmp_path / "int8"))
    assert torch.equal(logits_of(again), logits_of(expected))


def test_transformers_loads_bf16_and_refuses_int8(folders: Folders) -> None:
    assert AutoModelForCausalLM.from_pretrained(folders.bf16, dtype="auto").dtype == torch.bfloat16
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folders.int8)


def test_what_takes_no_quantized_folder(folders: Folders, tmp_path: Path) -> None:
    """Training, an adapter's base, export, and quantizing it again."""
    refusal = "its weights are quantized; give the model they were made from"
    with pytest.raises(ConfigError, match=refusal):
        load_pretrained(str(folders.int8))
    corpus, run = folders.corpus, tmp_path / "run"
    recipe = corpus.yaml_with({"model_type": "gla"})
    file = Path(recipe)
    file.write_text(file.read_text().split("model:")[0])
    keys = corpus.keys(run, recipe, f"model.pretrained={folders.int8}")
    trained = run_script("recipes/train.py", *keys)
    exported = run_script(
        "convert/to_hf.py", f"checkpoint={folders.int8}", f"out={tmp_path / 'hf'}"
    )
    twice = convert(folders.int8, tmp_path / "again")
    other = run_script("recipes/generate.py", f"model={folders.int8}", "prompt=a", "quantize=bf16")
    for result, text in (
        (trained, refusal),
        (exported, "int8"),
        (twice, "holds int8 weights; give the model they were made from"),
        (other, "quantize=bf16: must be null or int8"),
    ):
        assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
        assert text in result.stderr
        assert str(folders.int8) in result.stderr
    assert [path.name for path in tmp_path.iterdir()] in ([], ["run"])


def test_a_folder_that_exists_is_refused(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    result = convert(folders.fp32, tmp_path)
    assert result.returncode == 2
    assert "already exists and is not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_half_a_folder_never_looks_whole(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keys = (f"model={folders.fp32}", "dtype=int8", f"out={out}")
    script = Script("convert/quantize.py", *keys)
    while not list(tmp_path.iterdir()) and script.process.is_alive():
        pass
    script.process.kill()
    script.wait()
    assert not out.exists() or (out / "tokenizer_config.json").exists()


Damage = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
Q = "model.layers.0.attn.q_proj.weight"
DAMAGED: dict[str, tuple[Damage, str]] = {
    "no scales": (lambda t, c: t.pop(f"{Q}_scale"), "q_proj.weight' is 'I8' without scales"),
    "no weights": (lambda t, c: t.pop(Q), "q_proj.weight is missing"),
    "NaN": (lambda t, c: t[f"{Q}_scale"].fill_(math.nan), "finite numbers above 0, in float32"),
    "inf": (lambda t, c: t[f"{Q}_scale"].fill_(math.inf), "finite numbers above 0, in float32"),
    "negative": (lambda t, c: t[f"{Q}_scale"].neg_(), "finite numbers above 0, in float32"),
    "short": (lambda t, c: t.update({f"{Q}_scale": torch.ones(3)}), "must be 16 finite numbers"),
    "half": (
        lambda t, c: t.update({f"{Q}_scale": t[f"{Q}_scale"].half()}),
        "finite numbers above 0, in float32",
    ),
    "whole numbers": (
        lambda t, c: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}),
        "norm.weight' is 'I32' without scales, and must be float32",
    ),
    "half, plain": (
        lambda t, c: (t.pop(f"{Q}_scale"), t.update({Q: t[Q].half()})),
        "q_proj.weight' is 'F16' without scales, and must be float32",
    ),
    "shape": (lambda t, c: t.update({Q: t[Q].t().contiguous()}), "and must be"),
    "type": (lambda t, c: t.update({Q: t[Q].float()}), "is 'F32' with scales, and must be int8"),
    "norm": (
        lambda t, c: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "norm.weight' is 'I8' without scales",
    ),
    "norm with scales": (
        lambda t, c: t.update(
            {
                "model.norm.weight": torch.ones(32, dtype=torch.int8),
                "model.norm.weight_scale": torch.ones(32),
            }
        ),
        "norm.weight",
    ),
    "more": (lambda t, c: t.update({"evil\nname": torch.ones(1)}), "is none of the model's weigh"),
    "huge": (lambda t, c: c.update(num_hidden_layers=9000), "num_hidden_layers"),
    "wide": (lambda t, c: c.update(hidden_size=1 << 16), "config makes a model of"),
    "code": (
        lambda t, c: c.update(auto_map={"AutoConfig": "x.y"}, model_type="mine"),
        "code that comes with a model is never run",
    ),
    "another method": (
        lambda t, c: c.update(quantization_config={"quant_method": "gptq"}),
        "its weights are quantized",
    ),
    "no method": (lambda t, c: c.pop("quantization_config"), "has neither model.safetensors"),
    "all fp32": (
        lambda t, c: [
            t.update({name: t[name].float()})
            for name in list(t)
            if t[name].dtype == torch.int8 and t.pop(f"{name}_scale") is not None
        ],
        "none of its weights are int8",
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_folders(how: str, folders: Folders, tmp_path: Path) -> None:
    damage, message = DAMAGED[how]
    folder = Path(shutil.copytree(folders.int8, tmp_path / "damaged"))
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": METHOD}
    tensors = load_file(folder / FILE)
    damage(tensors, config)
    save_file(tensors, folder / FILE)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        load_model(str(folder))
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(folder))
    assert "\n" not in text


def test_damaged_files(folders: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders.int8, tmp_path / "damaged"))
    whole = (folder / FILE).read_bytes()
    for content, message in ((whole[:-100], "damaged"), (b"", "damaged"), (os.urandom(99), "dama")):
        (folder / FILE).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_model(str(folder))
    # Types that torch has no numbers for
    length = int.from_bytes(whole[:8], "little")
    head = whole[8 : 8 + length].replace(b'"F32","shape":[32]', b'"F4","shape":[256]', 1)
    assert b'"F4"' in head
    (folder / FILE).write_bytes(whole[:8] + head + whole[8 + length :])
    with pytest.raises(ConfigError) as caught:
        load_model(str(folder))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    (folder / FILE).unlink()
    with pytest.raises(ConfigError, match="is missing; write the folder again"):
        load_model(str(folder))
    (folder / FILE).write_bytes(whole)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json: cannot be read"):
        load_model(str(folder))


def test_layers_that_are_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay as they are, and a folder in which they are int8 is refused."""
    whole, partial = tiny(GLA), tiny({**GLA, "num_hidden_layers": 2})
    save_int8_folder(
        whole, quantize(whole, "int8", "m").stored, byte_tokenizer(), tmp_path / "whole"
    )
    monkeypatch.setattr(quantized, "call_down_proj", lambda model: None)
    expected = logits_of(partial)
    done = quantize(partial, "int8", "m")
    assert done.line.endswith(
        "; gla reads the weights of model.layers.0.mlp.down_proj and 1 more without calling the"
        " layer, which stays as it is"
    )
    assert done.line.startswith("int8: 19 of 21 linear layers and the embeddings, ")
    assert (logits_of(partial) - expected).norm() < 0.05 * expected.norm()
    save_int8_folder(partial, done.stored, byte_tokenizer(), tmp_path / "partial")
    again, _ = load_model(str(tmp_path / "partial"))
    assert torch.equal(logits_of(again), logits_of(partial))
    with pytest.raises(ConfigError, match=r"down_proj is int8, but a gla model reads its weights"):
        load_model(str(tmp_path / "whole"))


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_a_gpu_takes_no_quantized_weights(
    dtype: str, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=f"^quantize={dtype}: quantized weights are for a CPU"):
        load_model(str(folders.fp32), quantize=dtype)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES="):
        load_model(str(folders.int8))


def test_a_plain_folder_is_as_before(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(corpus.tokenizer))
    save_hf_folder(tiny(GLA, tokenizer), tokenizer, tmp_path / "hf", dtype="float32")
    assert not is_quantized(load_model(str(tmp_path / "hf"))[0])
