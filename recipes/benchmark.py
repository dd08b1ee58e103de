"""How fast a training step is here: GLA against a Llama of the same size, in one process, taking turns.

    python recipes/benchmark.py            # or: make bench

One JSON line last: tokens per second forward and backward of both (medians), and the medians of their ratios.
"""

import json
import platform
import statistics
import sys
import time

from flame_composer.cli import run
from flame_composer.recipe_config import BenchmarkConfig


def main(config: BenchmarkConfig) -> None:
    import torch
    from tqdm import tqdm

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


if __name__ == "__main__":
    sys.exit(run(main, BenchmarkConfig))
