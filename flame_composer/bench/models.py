"""Benchmarks of models: training steps of a GLA and of a Llama of the same size."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flame_composer import cpu
from flame_composer.bench.devices import peak_of
from flame_composer.bench.measure import Figure, interleaved, median, ratio
from flame_composer.config.bench import BenchmarkConfig
from flame_composer.cpu.allocator import keep_freed_memory
from flame_composer.cpu.linear import multiplies_bf16, use_bf16
from flame_composer.model.build import build_model
from flame_composer.model.work import count_parameters, count_work

PEAK = Path("/proc/self/clear_refs")  # 5 written to it makes the peak the memory of now


def seconds(run: Callable[[], Any]) -> float:
    """Return the seconds that a call takes, including the work that it starts on a GPU."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# Models of one size


def build_pair(
    hidden_size: int, num_layers: int, vocab_size: int, *, device: str = "cpu"
) -> dict[str, PreTrainedModel]:
    """Return a GLA and a Hugging Face Llama of the same size, under "gla" and "llama".

    The width of Llama's MLP is chosen so that the numbers of parameters match.
    """
    cpu.enable()
    from fla.models import GLAConfig

    num_heads = max(1, hidden_size // 128)

    def llama_config(width: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            intermediate_size=width,
        )

    torch.manual_seed(0)
    gla = build_model(
        GLAConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_heads=num_heads,
        )
    )
    with torch.device("meta"):
        one, two = (count_parameters(build_model(llama_config(width))) for width in (32, 64))
    # The number of parameters grows linearly with the width.
    width = 32 * max(1, 1 + round((count_parameters(gla) - one) / (two - one)))
    # This is transformers' own model, without anything that `build_model` adds.
    llama = LlamaForCausalLM(llama_config(width))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    models: dict[str, Any] = {"gla": gla, "llama": llama}
    return {name: model.to(device, dtype) for name, model in models.items()}


def step(
    model: Any, context_length: int, batch_tokens: int, vocab_size: int
) -> Callable[[], float]:
    """Return a function that runs a forward and backward pass and returns its tokens per second.

    A pass is over `batch_tokens` tokens in rows of `context_length`, but at least one row.
    """
    rows = max(1, batch_tokens // context_length)
    tokens = torch.randint(0, vocab_size, (rows, context_length), device=model.device)

    def go() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    def run() -> float:
        model.zero_grad(set_to_none=True)
        return tokens.numel() / seconds(go)

    return run


def _in_bf16(run: Callable[[], float]) -> Callable[[], float]:
    """Return `run` with linear layers that multiply in bf16."""

    def with_bf16() -> float:
        use_bf16(True)
        try:
            return run()
        finally:
            use_bf16(False)

    return with_bf16


def gemm(device: str) -> Callable[[], float]:
    """Return a function that multiplies large matrices and returns the FLOP/s.

    They are fp32 on a CPU and bfloat16 on a GPU.
    """
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: 8 * 2 * size**3 / seconds(lambda: [a @ b for _ in range(8)])


def training(config: BenchmarkConfig) -> tuple[dict[str, Any], list[Figure]]:
    """Time forward and backward of a GLA and a Llama (SDPA) of its size at each context length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = build_pair(config.hidden_size, config.num_layers, config.vocab_size, device=device)
    in_bf16 = device == "cpu" and multiplies_bf16()
    keep_freed_memory()  # as training does on a CPU
    rows: list[dict[str, Any]] = []
    roofs: list[float] = []
    for context_length in config.context_lengths:
        what: dict[str, Callable[[], float]] = {
            name: step(model, context_length, config.batch_tokens, config.vocab_size)
            for name, model in models.items()
        }
        if in_bf16:
            what["gla in bf16"] = _in_bf16(what["gla"])
        found = interleaved(
            {**what, "gemm": gemm(device)}, config.repeats, f"context {context_length}"
        )
        flops = count_work(models["gla"]).flops_per_token(context_length)
        of_gemm = [value * flops for value in found["gla"]]
        roofs += found["gemm"]
        rows.append(
            {
                "context_length": context_length,
                "gla_over_llama": ratio(found["gla"], found["llama"]),
                **{f"{name}_tokens_per_second": round(median(found[name])) for name in models},
                "gla_model_flops_per_second": round(median(of_gemm)),
                "gla_model_flops_over_gemm": ratio(of_gemm, found["gemm"]),
            }
        )
        print(
            f"context {context_length:6,}: GLA {rows[-1]['gla_tokens_per_second']:8,} tokens/s,"
            f" Llama (SDPA) {rows[-1]['llama_tokens_per_second']:8,} tokens/s, ratio"
            f" {rows[-1]['gla_over_llama']:.2f}",
            flush=True,
        )
        if in_bf16:
            times = rows[-1]["gla_bf16_over_fp32"] = ratio(found["gla in bf16"], found["gla"])
            print(f"  GLA with precision=amp_bf16 over fp32: {times:.2f}", flush=True)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "parameters": count_parameters(models["gla"]),
        "llama_parameters": count_parameters(models["llama"]),
        "repeats": config.repeats,
        "gemm_flops_per_second": round(median(roofs)),
        "results": rows,
    }
    by_context: dict[int, dict[str, Any]] = {row["context_length"]: row for row in rows}
    if 2048 in by_context and device == "cpu":
        kept = {name: memory_per_token(model) for name, model in models.items()}
        result["bytes_per_token_and_layer"] = kept
    return result, [*training_figures(result, by_context), *mfu(result)]


def training_figures(
    result: dict[str, Any], by_context: dict[int, dict[str, Any]]
) -> Iterator[Figure]:
    """Yield the figures of the training step; their limits are stated for CPUs only."""
    on_cpu = result["device"] == "cpu"
    stated = {512: 1.2, 2048: 1.8, 8192: 4.0} if on_cpu else {}
    for context_length, row in by_context.items():
        yield Figure(
            f"training step: GLA over Llama, tokens/s at context {context_length}",
            row["gla_over_llama"],
            at_least=stated.get(context_length),
        )
        if "gla_bf16_over_fp32" in row:
            yield Figure(
                f"training step: GLA with precision=amp_bf16 over fp32 at {context_length}",
                row["gla_bf16_over_fp32"],
                at_least=1.0,
            )
    if {512, 8192} <= by_context.keys():
        slower = (
            by_context[512]["gla_tokens_per_second"] / by_context[8192]["gla_tokens_per_second"]
        )
        yield Figure(
            "training step: GLA's time per token at 8192 over at 512",
            round(slower, 3),
            at_most=1.15 if on_cpu else None,
        )
    if 512 in by_context and on_cpu:
        yield Figure(
            "training step: GLA's model FLOP/s over the rate of an fp32 GEMM, at 512",
            by_context[512]["gla_model_flops_over_gemm"],
            at_least=0.85,
        )
    memory = result.get("bytes_per_token_and_layer", {})
    if memory and all(memory.values()):
        yield Figure(
            "training step: GLA's memory per token and layer over Llama's, at 2048",
            round(memory["gla"] / memory["llama"], 3),
            at_most=1.0,
        )


def mfu(result: dict[str, Any]) -> Iterator[Figure]:
    """Yield the figures of a GPU's utilisation, which are not measured on a CPU.

    They are model FLOP/s over the peak in the data sheet, and over a product of large matrices, in
    bfloat16.
    """
    share = over = None
    if result["device"] != "cpu":
        best = max(row["gla_model_flops_per_second"] for row in result["results"])
        gemm_speed, peak = result["gemm_flops_per_second"], peak_of(result["device"])
        over = round(best / gemm_speed, 3)
        sheet = "no data sheet's peak is known for it"
        if peak is not None:
            share = round(best / peak, 3)
            sheet = f"its data sheet {peak / 1e12:,.0f}"
        print(
            f"roofline of {result['device']}, bf16 TFLOP/s: a GEMM {gemm_speed / 1e12:,.0f},"
            f" {sheet}"
        )
    yield Figure("training step on a GPU: MFU, bf16, of the data sheet's peak", share)
    yield Figure("training step on a GPU: model FLOP/s over a bf16 GEMM's", over)


def growth(config: BenchmarkConfig) -> tuple[dict[str, Any], list[Figure]]:
    """Time the training step with more rows, and with fewer and more layers.

    All steps are at the first of `context_lengths`, with at most `batch_tokens` tokens.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context_length = config.context_lengths[0]
    most = max(1, config.batch_tokens // context_length)
    by_rows = [1 << power for power in range(most.bit_length())]
    by_layers = sorted({max(1, round(config.num_layers * part)) for part in (0.25, 0.5, 1, 2)})

    @functools.cache  # one size is in both lists
    def timed(num_rows: int, num_layers: int) -> dict[str, Any]:
        models = build_pair(config.hidden_size, num_layers, config.vocab_size, device=device)
        batch_tokens = num_rows * context_length
        what = {
            name: step(model, context_length, batch_tokens, config.vocab_size)
            for name, model in models.items()
        }
        found = interleaved(what, config.repeats, f"{num_rows} rows, {num_layers} layers")
        speeds = {
            f"{name}_tokens_per_second": round(median(values)) for name, values in found.items()
        }
        return {"rows": num_rows, "layers": num_layers, **speeds}

    rows = [timed(number, config.num_layers) for number in by_rows]
    layers = [timed(max(1, most // 2), number) for number in by_layers]
    less, more = rows[0]["gla_tokens_per_second"], rows[-1]["gla_tokens_per_second"]
    shallow, deep = layers[0], layers[-1]
    a_layer = (
        deep["layers"]
        / shallow["layers"]
        * deep["gla_tokens_per_second"]
        / shallow["gla_tokens_per_second"]
    )
    return {
        "device": device,
        "context_length": context_length,
        "by_rows": rows,
        "by_layers": layers,
    }, [
        Figure(
            f"growth: GLA's time per token with {by_rows[-1]} rows of {context_length} over with 1",
            round(less / more, 3),
        ),
        Figure(
            f"growth: GLA's time per layer and token with {deep['layers']} layers over with"
            f" {shallow['layers']}",
            round(1 / a_layer, 3),
        ),
    ]


def memory_per_token(model: PreTrainedModel) -> int | None:
    """Return the bytes that a token takes per layer in training; None where Linux cannot tell.

    They are the difference in peak memory between a step of 2048 and one of 256 tokens, per token
    and layer, each above what the process held before it.
    """
    short, long = 256, 2048
    peaks = []
    for length in (short, short, long):  # the first also makes what stays, such as gradients
        run: Callable[[], float] = step(model, length, length, model.config.vocab_size)
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed would count as held
            PEAK.write_text("5")
        except (OSError, AttributeError):  # no Linux, or no glibc
            return None
        before = status("VmRSS")
        run()
        peaks.append(status("VmHWM") - before)
    return round((peaks[2] - peaks[1]) / (long - short) / model.config.num_hidden_layers)


def status(key: str) -> int:
    """Return a number of bytes from this process's status: VmRSS now, VmHWM at its peak."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return 1024 * int(found[1]) if found else 0
