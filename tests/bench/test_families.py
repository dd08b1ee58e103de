"""The benchmark of fla's models: what is timed, and what is made of it."""

from __future__ import annotations

import pytest
import torch

from flame_composer.bench import families
from flame_composer.bench.families import FAMILIES, LIMITS, compare_models
from flame_composer.bench.measure import Figure
from flame_composer.bench.models import memory_per_token
from flame_composer.config.bench import ModelsBenchmarkConfig
from flame_composer.model.work import count_parameters


def test_families_are_timed_as_the_keys_say(monkeypatch):
    steps, turns = [], []

    def step(model, context_length, batch_tokens, vocab_size):
        steps.append((model.config.model_type, context_length, batch_tokens, vocab_size))
        return lambda: 2.0 if model.config.model_type == "llama" else 3.0

    def interleaved(what, repeats, title):
        turns.append((title, repeats))
        return {name: [run() for _ in range(repeats)] for name, run in what.items()}

    monkeypatch.setattr(families, "step", step)
    monkeypatch.setattr(families, "interleaved", interleaved)
    bytes_of = {"llama": 80, "kda": 60, "mamba2": 100}
    monkeypatch.setattr(families, "memory_per_token", lambda m: bytes_of[m.config.model_type])
    monkeypatch.setattr(families, "_growth_of_decoding", lambda model, repeats: 1.05)
    config = ModelsBenchmarkConfig(
        hidden_size=128,
        num_layers=2,
        vocab_size=256,
        context_lengths=[512, 8192],
        batch_tokens=64,
        repeats=3,
        names=["kda", "mamba2"],
    )
    result, figures = compare_models(config)
    assert steps == [
        (name, length, 64, 256) for length in (512, 8192) for name in ("llama", "kda", "mamba2")
    ]
    assert turns == [("context 512", 3), ("context 8192", 3)]
    assert {name: row["over_llama_512"] for name, row in result["models"].items()} == {
        "kda": 1.5,
        "mamba2": 1.5,
    }
    assert figures == [
        Figure("training step: decay, worst over Llama at 512 (mamba2)", 1.5, at_least=1.0),
        Figure("training step: decay, worst over Llama at 8192 (mamba2)", 1.5, at_least=3.5),
        Figure("training step: decay, a token's time at 8192 over 512 (mamba2)", 1.0, at_most=1.2),
        Figure(
            "decoding: decay, a token's time after 8192 over after 256 (mamba2)", 1.05, None, 1.1
        ),
        Figure(
            "training step: decay, memory per token and layer over Llama's (mamba2)",
            1.25,
            None,
            1.0,
        ),
        Figure("training step: delta rule, worst over Llama at 512 (kda)", 1.5, at_least=0.7),
        Figure("training step: delta rule, worst over Llama at 8192 (kda)", 1.5, at_least=3.0),
        Figure(
            "training step: delta rule, a token's time at 8192 over 512 (kda)", 1.0, at_most=1.2
        ),
        Figure(
            "decoding: delta rule, a token's time after 8192 over after 256 (kda)", 1.05, None, 1.1
        ),
        Figure(
            "training step: delta rule, memory per token and layer over Llama's (kda)",
            0.75,
            None,
            1.0,
        ),
    ]


@pytest.mark.filterwarnings("ignore:According to Bo")  # fla's word on its RWKV
@pytest.mark.filterwarnings("ignore:The correction_factor is set to 1 by default")  # Comba's
def test_models_of_a_family_have_the_size_that_is_asked_for():
    """By default, of a Llama of 30 M parameters."""
    config = ModelsBenchmarkConfig()
    assert set(LIMITS) == set(FAMILIES)
    for name in (name for family in FAMILIES.values() for name in family):
        with torch.device("meta"):
            number = count_parameters(families.build(name, config, 29_000_000))
        assert abs(number / 29_000_000 - 1) < 0.06, name


def test_memory_and_decoding_are_those_of_the_model():
    """A layer of twice the width keeps more for each token, and a recurrence takes as long after
    any text.
    """
    torch.manual_seed(0)
    found = []
    for width in (64, 128):
        config = ModelsBenchmarkConfig(hidden_size=width, num_layers=2, vocab_size=256)
        model = families.build("gla", config, 200_000 * width // 64)
        found.append(memory_per_token(model))
    assert None not in found  # Linux can tell
    # What must be kept in fp32: at the least what goes into the layers, and what comes out
    assert 10 * 4 * 64 < found[0] < found[1] < 400 * 4 * 128
    assert families._growth_of_decoding(model, repeats=3) > 0
