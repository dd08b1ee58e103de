"""The benchmark of fla's models on this machine: a training step of each against Llama's.

Also what a training step keeps in memory, and whether decoding gets slower in longer texts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flame_composer import cpu
from flame_composer.bench.decoding import decode, read_prompt
from flame_composer.bench.measure import Figure, interleaved, median, ratio
from flame_composer.bench.models import memory_per_token, step
from flame_composer.config.bench import ModelsBenchmarkConfig
from flame_composer.cpu.allocator import keep_freed_memory
from flame_composer.model.build import build_model
from flame_composer.model.work import count_parameters

# Heads of 128 channels, for as many as fit into the width; mamba2 has no MLP and more layers.
MLP = {"intermediate_size": 0}  # its width is found
DECAY: dict[str, dict[str, Any]] = {
    "gla": MLP | {"num_heads": 0},
    "hgrn2": MLP | {"expand_ratio": 128},
    "gsa": MLP | {"num_heads": 0, "num_slots": 64},
    "retnet": MLP | {"num_heads": 0},
    "linear_attn": MLP | {"num_heads": 0},
    "lightnet": MLP,
    "rwkv6": MLP | {"num_heads": 0},
    "mamba2": {"head_dim": 64},
}
DELTA: dict[str, dict[str, Any]] = {
    "delta_net": MLP | {"num_heads": 0},
    "gated_deltanet": MLP | {"num_heads": 0, "head_dim": 96, "expand_v": 2},
    "kda": MLP | {"num_heads": 0, "head_dim": 128},
    "gated_deltaproduct": MLP | {"num_heads": 0, "head_dim": 96},
    "comba": MLP | {"num_heads": 0, "head_dim": 96},
    "rwkv7": MLP | {"head_dim": 64},
}
FAMILIES = {"decay": DECAY, "delta rule": DELTA}
LIMITS = {
    "decay": {512: 1.0, 2048: 1.5, 8192: 3.5},
    "delta rule": {512: 0.7, 2048: 1.2, 8192: 3.0},
}
FLAT = 1.2  # times that a token may take at 8192 of what it takes at 512
FLAT_DECODING = 1.1  # the same of a token that is decoded, at 8192 and at 256


def build(name: str, config: ModelsBenchmarkConfig, num_parameters: int) -> PreTrainedModel:
    """Return a model of a family, whose MLP or number of layers gives about as many parameters."""
    keys = {
        key: value for family in FAMILIES.values() for key, value in family.get(name, {}).items()
    }
    keys |= {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
    if "num_heads" in keys:
        keys["num_heads"] = max(1, config.hidden_size // 128)
    if "head_dim" in keys and name == "mamba2":
        keys["num_heads"] = 2 * config.hidden_size // keys["head_dim"]
    by = "intermediate_size" if "intermediate_size" in keys else "num_hidden_layers"
    keys["num_hidden_layers"] = config.num_layers

    def of(size: int) -> Any:
        return AutoConfig.for_model(name, **{**keys, by: size})

    low, high = (32, 64) if by == "intermediate_size" else (2, 4)
    with torch.device("meta"):
        one, two = (count_parameters(build_model(of(size))) for size in (low, high))
    # The number of parameters grows linearly with either
    size = low + round((num_parameters - one) / (two - one) * (high - low))
    size = 32 * max(1, round(size / 32)) if by == "intermediate_size" else max(1, size)
    return build_model(of(size))


def compare_models(config: ModelsBenchmarkConfig) -> tuple[dict[str, Any], list[Figure]]:
    """Time forward and backward of each model and of a Llama (SDPA) of its size, in turns."""
    cpu.enable()
    keep_freed_memory()  # as training does
    torch.manual_seed(0)
    width, heads = config.hidden_size, max(1, config.hidden_size // 128)
    # As `models.build_pair` pairs it with GLA: without anything that `build_model` adds
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=3 * width,
        )
    )
    names = config.names or [name for family in FAMILIES.values() for name in family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla's words on RWKV and Comba, each time a layer is built
        built = {name: build(name, config, count_parameters(llama)) for name in names}
    rows: dict[str, dict[str, Any]] = {
        name: {"parameters": count_parameters(model)} for name, model in built.items()
    }
    for length in config.context_lengths:
        steps = {
            name: step(model, length, config.batch_tokens, config.vocab_size)
            for name, model in {"llama": llama, **built}.items()
        }
        found = interleaved(steps, config.repeats, f"context {length}")
        print(
            f"context {length:,}: Llama (SDPA) {median(found['llama']):,.0f} tokens/s", flush=True
        )
        for name, row in rows.items():
            rate = row[f"tokens_per_second_{length}"] = round(median(found[name]))
            over = row[f"over_llama_{length}"] = ratio(found[name], found["llama"])
            print(f"  {name:20} {rate:8,} tokens/s, ratio {over:.2f}", flush=True)
    llama_bytes = memory_per_token(llama)
    for name, row in rows.items():
        row["bytes_per_token_and_layer"] = memory_per_token(built[name])
        row["decoding_8192_over_256"] = _growth_of_decoding(built[name], config.repeats)
        print(
            f"  {name:20} {row['bytes_per_token_and_layer'] or 0:8,} bytes a token and layer;"
            f" decoding after 8,192 tokens takes {row['decoding_8192_over_256']:.2f} times what it"
            " takes after 256",
            flush=True,
        )
    result = {
        "threads": torch.get_num_threads(),
        "llama_parameters": count_parameters(llama),
        "llama_bytes_per_token_and_layer": llama_bytes,
        "models": rows,
    }
    return result, list(_figures(rows, llama_bytes))


def _growth_of_decoding(model: PreTrainedModel, repeats: int) -> float:
    """Return how many times as long a token takes to decode after 8192 tokens as after 256."""
    was_training = model.training
    model.eval()
    runs = {str(n): decode(model, read_prompt(model, n), 1, 8) for n in (256, 8192)}
    found = interleaved(runs, max(3, repeats), None)
    model.train(was_training)
    return ratio(found["256"], found["8192"])


def _figures(models: dict[str, dict[str, Any]], llama_bytes: int | None = None) -> Iterator[Figure]:
    """Yield the worst of each family: at each context length, and how time and memory grow."""
    for family, shapes in FAMILIES.items():
        rows = {name: row for name, row in models.items() if name in shapes}
        for length, least in LIMITS[family].items():
            found = {
                name: row[key]
                for name, row in rows.items()
                if (key := f"over_llama_{length}") in row
            }
            if found:
                worst = min(found, key=lambda name: found[name])
                title = f"training step: {family}, worst over Llama at {length} ({worst})"
                yield Figure(title, found[worst], at_least=least)
        grown = {
            name: round(row["tokens_per_second_512"] / row["tokens_per_second_8192"], 3)
            for name, row in rows.items()
            if {"tokens_per_second_512", "tokens_per_second_8192"} <= row.keys()
        }
        if grown:
            worst = max(grown, key=lambda name: grown[name])
            title = f"training step: {family}, a token's time at 8192 over 512 ({worst})"
            yield Figure(title, grown[worst], at_most=FLAT)
        yield from _more_figures(family, rows, llama_bytes)


def _more_figures(
    family: str, rows: dict[str, dict[str, Any]], llama_bytes: int | None
) -> Iterator[Figure]:
    decoding = {name: row["decoding_8192_over_256"] for name, row in rows.items()}
    if decoding:
        worst = max(decoding, key=lambda name: decoding[name])
        title = f"decoding: {family}, a token's time after 8192 over after 256 ({worst})"
        yield Figure(title, decoding[worst], at_most=FLAT_DECODING)
    kept = {name: row["bytes_per_token_and_layer"] for name, row in rows.items()}
    if kept and llama_bytes and all(kept.values()):
        worst = max(kept, key=lambda name: kept[name])
        title = f"training step: {family}, memory per token and layer over Llama's ({worst})"
        yield Figure(title, round(kept[worst] / llama_bytes, 3), at_most=1.0)
