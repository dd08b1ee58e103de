"""How fast things are here, each against another in one run: a training step, a conversion, decoding.

    python recipes/benchmark.py train      # GLA against a Llama of the same size, forward and backward
    python recipes/benchmark.py convert    # convert/to_mds.py against encode_batch_fast and MDSWriter
    python recipes/benchmark.py decode     # a token after a short context and after a long one

One JSON line last: medians of each, and the medians of their ratios.
"""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from tqdm import tqdm

from flame_composer.benchmark import compare_conversions, decode, mistral_tokenizer, workplace, write_corpus
from flame_composer.cli import run_one_of
from flame_composer.recipe_config import BenchmarkConfig, ConversionBenchmarkConfig, DecodeBenchmarkConfig


def train(config: BenchmarkConfig) -> None:
    import torch

    from flame_composer import cpu
    from flame_composer.model import build_model

    cpu.enable()
    from fla.models import GLAConfig
    from transformers import LlamaConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers}
    heads = max(1, config.hidden_size // 128)
    torch.manual_seed(0)
    gla = build_model(GLAConfig(**shape, num_heads=heads)).to(device, dtype)
    # The width of Llama's MLP that makes the two models the same size: parameters grow linearly with it.
    llama_shape = {**shape, "num_attention_heads": heads, "num_key_value_heads": heads}
    with torch.device("meta"):
        one, two = (count(build_model(LlamaConfig(**llama_shape, intermediate_size=width))) for width in (32, 64))
    width = 32 * max(1, 1 + round((count(gla) - one) / (two - one)))
    llama = build_model(LlamaConfig(**llama_shape, intermediate_size=width)).to(device, dtype)
    models = {"gla": gla.train(), "llama": llama.train()}

    def step(model: torch.nn.Module, context_length: int) -> float:
        """Tokens per second of one forward and backward pass."""
        rows = max(1, config.batch_tokens // context_length)
        tokens = torch.randint(0, config.vocab_size, (rows, context_length), device=device)
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return tokens.numel() / (time.perf_counter() - start)

    results = []
    for context_length in config.context_lengths:
        speeds: dict[str, list[float]] = {name: [] for name in models}
        for _ in tqdm(range(config.repeats + 1), desc=f"context {context_length}", disable=None):
            for name, model in models.items():
                speeds[name].append(step(model, context_length))
        warm = {name: values[1:] for name, values in speeds.items()}
        ratio = statistics.median(a / b for a, b in zip(warm["gla"], warm["llama"], strict=True))
        row = {"context_length": context_length, "gla_over_llama": round(ratio, 2)}
        row |= {f"{name}_tokens_per_second": round(statistics.median(values)) for name, values in warm.items()}
        results.append(row)
        print(f"context {context_length:6,}: GLA {row['gla_tokens_per_second']:8,} tokens/s, Llama (SDPA) "
              f"{row['llama_tokens_per_second']:8,} tokens/s, ratio {row['gla_over_llama']:.2f}", flush=True)
    print(json.dumps({
        "benchmark": "train step, forward and backward", "device": device, "machine": platform.machine(),
        "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."), "parameters": count(gla),
        "llama_parameters": count(llama), "repeats": config.repeats, "results": results,
    }))


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def convert(config: ConversionBenchmarkConfig) -> None:
    script = Path(__file__).parent.parent / "convert" / "to_mds.py"
    with workplace(config.folder) as folder, tqdm(unit=" conversions", disable=None) as bar:
        tokenizer = config.tokenizer or str(mistral_tokenizer(folder / "tokenizer"))
        whole, tenth = write_corpus(config.source, config.suffixes, round(config.megabytes * 1e6), folder)
        result = {"benchmark": "conversion", "machine": platform.machine(), "cores": len(os.sched_getaffinity(0)),
                  "corpus_bytes": whole.stat().st_size, "num_workers": config.num_workers, "repeats": config.repeats}
        result |= compare_conversions(script, tokenizer, whole, tenth, config.context_length, config.unit_size,
                                      config.num_workers, config.repeats, bar.update)
    for name in ("baseline", "one_worker", "workers"):
        print(f"{name:10}", ", ".join(f"{key} {value}" for key, value in result[name].items()))
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_one_of({"train": (train, BenchmarkConfig), "convert": (convert, ConversionBenchmarkConfig),
                         "decode": (decode, DecodeBenchmarkConfig)}))
