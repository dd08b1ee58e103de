"""The benchmark of quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flame_composer.bench import measure, quantized
from flame_composer.config.bench import QuantizeBenchmarkConfig
from tests.bench.test_benchmark import noted
from tests.runs import Corpus, check, run_script


def test_quantized_weights_are_timed_as_the_keys_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = noted(monkeypatch, quantized, "interleaved", measure.interleaved)
    decoded = noted(monkeypatch, quantized, "decode", quantized.decode)
    config = QuantizeBenchmarkConfig(
        hidden_size=64, num_layers=2, vocab_size=100, batch_sizes=[1, 3], new_tokens=3, repeats=2
    )
    found, values = quantized.quantizing(config)
    assert [repeats for _, repeats, _ in turns] == [2, 2]
    assert [call[2:] for call in decoded] == [(1, 3)] * 4 + [(3, 3)] * 4
    made: Any = decoded[0][0].config
    assert (made.hidden_size, made.num_hidden_layers, made.vocab_size) == (64, 2, 100)
    assert [row["batch_size"] for row in found["results"]] == [1, 3]
    for base in ("fp32", "fp32_laid_out"):
        assert all(row[f"int8_over_{base}"] > 0 for row in found["results"])
    held = found["bytes_held"]
    assert held["fp32"] == 4 * found["parameters"]
    assert held["fp32"] > held["bf16"] > held["int8"]
    assert "int8: 21 of 21 linear layers and the embeddings" in capsys.readouterr().out
    figures = {each.name: each for each in values}
    assert figures["quantized: int8 over fp32, decoded tokens/s, 1 sequences"].at_least == 1.5
    assert len(figures) == 8


def test_the_loss_of_a_trained_model_is_compared(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    check(run_script("convert/to_hf.py", f"checkpoint={undisturbed / 'checkpoints'}", f"out={hf}"))
    sizes = {"hidden_size": 64, "num_layers": 1, "vocab_size": 100, "new_tokens": 1, "repeats": 1}
    config = QuantizeBenchmarkConfig(**sizes, batch_sizes=[1], model=str(hf), data=str(corpus.val))
    found, figures = quantized.quantizing(config)
    assert len({*found["losses"].values()}) == 3
    assert figures[-1].name == "quantized: int8's held-out loss over fp32's"
    assert figures[-1].at_most == 1.005
    assert figures[-1].value == pytest.approx(1, abs=0.005)
