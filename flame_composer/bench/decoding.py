"""Benchmarks of decoding: token by token, after contexts of several lengths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from flame_composer.bench.measure import Figure, interleaved, median, ratio
from flame_composer.bench.models import build_pair, seconds
from flame_composer.config.bench import DecodeBenchmarkConfig
from flame_composer.model.work import count_parameters
from flame_composer.upstream.transformers import cache_of, with_cache


def decoding(config: DecodeBenchmarkConfig) -> tuple[dict[str, Any], list[Figure]]:
    """Time decoding with GLA's recurrence and with Llama's cache of keys and values.

    It is timed at each context length with each number of sequences.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = build_pair(config.hidden_size, config.num_layers, config.vocab_size, device=device)
    for model in models.values():
        model.eval()
    rows, figures = [], []
    for context_length in config.context_lengths:
        caches = {name: read_prompt(model, context_length) for name, model in models.items()}
        kept = {
            name: sum(tensor.nbytes for tensor in tensors_in(cache.layers))
            for name, cache in caches.items()
        }
        for batch_size in config.batch_sizes:
            what = {
                name: decode(model, caches[name], batch_size, config.new_tokens)
                for name, model in models.items()
            }
            found = interleaved(what, config.repeats, f"decoding {batch_size} x {context_length}")
            rows.append(
                {
                    "batch_size": batch_size,
                    "context_length": context_length,
                    "gla_over_llama": ratio(found["gla"], found["llama"]),
                    **{
                        f"{name}_tokens_per_second": round(median(values), 1)
                        for name, values in found.items()
                    },
                    **{
                        f"{name}_milliseconds": round(1000 * batch_size / median(values), 2)
                        for name, values in found.items()
                    },
                    **{f"{name}_bytes_kept_per_sequence": number for name, number in kept.items()},
                }
            )
            figures.append(
                Figure(
                    f"decoding: GLA over Llama, tokens/s, {batch_size} sequences after"
                    f" {context_length}",
                    rows[-1]["gla_over_llama"],
                )
            )
    if len(config.context_lengths) > 1:
        first, last = config.context_lengths[0], config.context_lengths[-1]
        for batch_size in config.batch_sizes:
            mine = [row["gla_tokens_per_second"] for row in rows if row["batch_size"] == batch_size]
            figures.append(
                Figure(
                    f"decoding: GLA's time per token after {last} over after {first}, {batch_size}"
                    " sequences",
                    round(mine[0] / mine[-1], 3),
                    at_most=1.1,
                )
            )
    return {"parameters": count_parameters(models["gla"]), "results": rows}, figures


@torch.no_grad()
def read_prompt(model: PreTrainedModel, context_length: int) -> Any:
    """Return the cache that a model has after reading one sequence."""
    prompt = torch.randint(0, model.config.vocab_size, (1, context_length), device=model.device)
    return cache_of(model(input_ids=prompt, use_cache=True, logits_to_keep=1))


def decode(
    model: PreTrainedModel, prompt: Any, batch_size: int, new_tokens: int
) -> Callable[[], float]:
    """Return a function that decodes `batch_size` sequences and returns tokens per second.

    All sequences continue the same prompt. Its cache is given, so reading it is not counted.
    """
    cache = copy.deepcopy(prompt)
    for tensor in tensors_in(cache.layers):
        repeated: Any = tensor.repeat(batch_size, *[1] * (tensor.ndim - 1))
        tensor.set_(repeated)
    first = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)

    @torch.inference_mode()  # as generate.py and the server
    def run() -> float:
        def go() -> None:
            nonlocal cache
            token = first
            for _ in range(new_tokens):
                outputs = model(input_ids=token, **with_cache(model, cache))
                cache, token = cache_of(outputs), outputs.logits[:, -1:].argmax(-1)

        return batch_size * new_tokens / seconds(go)

    return run


def tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in lists, tuples, dictionaries and the attributes of objects."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (list, tuple, dict)):
        for each in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(each)
    elif hasattr(content, "__dict__") and not isinstance(content, type):
        yield from tensors_in(vars(content))
