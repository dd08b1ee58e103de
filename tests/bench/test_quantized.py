"""The benchmark of quantized weights."""

from __future__ import annotations

from pathlib import Path

from tests.runs import Corpus, check, last_json, run_script


def test_quantized_weights_are_timed_as_the_keys_say(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    check(run_script("convert/to_hf.py", f"checkpoint={undisturbed / 'checkpoints'}", f"out={hf}"))
    process = run_script(
        "recipes/benchmark.py",
        "quantize",
        "hidden_size=64",
        "num_layers=2",
        "vocab_size=100",
        "batch_sizes=[1,3]",
        "new_tokens=3",
        "repeats=2",
        f"model={hf}",
        f"data={corpus.val}",
    )
    found = last_json(process)
    assert [row["batch_size"] for row in found["results"]] == [1, 3]
    for base in ("fp32", "fp32_laid_out"):
        assert all(row[f"int8_over_{base}"] > 0 for row in found["results"])
    held = found["bytes_held"]
    assert held["fp32"] == 4 * found["parameters"]
    assert held["fp32"] > held["bf16"] > held["int8"]
    assert "int8: 21 of 21 linear layers and the embeddings" in process.stdout
    figures = {each["name"]: each for each in found["figures"]}
    (rise,) = (each for name, each in figures.items() if "held-out loss" in name)
    assert rise["at_most"] == 1.005
    assert abs(rise["value"] - 1) < 0.005
    first = figures["quantized: int8 over fp32, decoded tokens/s, 1 sequences"]
    assert first["at_least"] == 1.5
    assert len(figures) == 9
