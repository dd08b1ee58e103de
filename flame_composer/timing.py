"""What recipes/benchmark.py times in a process of its own, each against what a user would do instead, taking turns."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from flame_composer import cpu
from flame_composer.benchmark import Figure, interleaved, measure, median, ratio
from flame_composer.model import CausalLM, build_model, count_work
from flame_composer.recipe_config import BenchmarkConfig, SystemBenchmarkConfig


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# Models of one size


def build_pair(hidden_size: int, num_layers: int, vocab_size: int, *, device: str = "cpu") -> dict[str, PreTrainedModel]:
    """A GLA model and a Hugging Face Llama of the same size: Llama's MLP is as wide as it takes."""
    cpu.enable()
    from fla.models import GLAConfig

    shape: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_layers}
    heads = max(1, hidden_size // 128)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    gla = build_model(GLAConfig(**shape, num_heads=heads))
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    with torch.device("meta"):
        one, two = (count(build_model(LlamaConfig(**shape, intermediate_size=width))) for width in (32, 64))
    width = 32 * max(1, 1 + round((count(gla) - one) / (two - one)))  # parameters grow linearly with it
    llama = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=width))  # as transformers has it, and nothing of ours
    return {"gla": gla.to(device, dtype), "llama": llama.to(device, dtype)}  # type: ignore[arg-type]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def step(model: Any, context_length: int, batch_tokens: int, vocab_size: int) -> Callable[[], float]:
    """A forward and backward pass of so many tokens, which returns tokens per second."""
    rows = max(1, batch_tokens // context_length)
    tokens = torch.randint(0, vocab_size, (rows, context_length), device=model.device)

    def go() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    def run() -> float:
        model.zero_grad(set_to_none=True)
        return tokens.numel() / seconds(go)

    return run


def gemm(size: int = 1024) -> Callable[[], float]:
    """The product of two fp32 matrices, which returns FLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return lambda: 8 * 2 * size**3 / seconds(lambda: [a @ b for _ in range(8)])


def one_step(name: str, context_length: int, hidden_size: int, num_layers: int, vocab_size: int) -> None:
    """For a process whose peak memory is measured."""
    model = build_pair(hidden_size, num_layers, vocab_size)[name]
    for _ in range(2):
        step(model, context_length, context_length, vocab_size)()


def training(config: BenchmarkConfig) -> tuple[dict[str, Any], list[Figure]]:
    """Forward and backward of a GLA model and a Llama (SDPA) of its size, at each context length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = build_pair(config.hidden_size, config.num_layers, config.vocab_size, device=device)
    figures, rows = [], []
    for context_length in config.context_lengths:
        what: dict[str, Callable[[], float]] = {
            name: step(model, context_length, config.batch_tokens, config.vocab_size) for name, model in models.items()
        }
        if device == "cpu":
            what["gemm"] = gemm()
        found = interleaved(what, config.repeats, f"context {context_length}")
        flops = count_work(models["gla"]).flops_per_token(context_length)
        of_gemm = [value * flops for value in found["gla"]]
        row: dict[str, Any] = {
            "context_length": context_length, "gla_over_llama": ratio(found["gla"], found["llama"]),
            **{f"{name}_tokens_per_second": round(median(found[name])) for name in models},
            "gla_model_flops_over_gemm": ratio(of_gemm, found["gemm"]) if device == "cpu" else None,
        }  # fmt: skip
        rows.append(row)
        stated = {512: 1.2, 2048: 1.8, 8192: 4.0} if device == "cpu" else {}
        name = f"training step: GLA over Llama, tokens/s at context {context_length}"
        figures.append(Figure(name, row["gla_over_llama"], at_least=stated.get(context_length)))
        print(f"context {context_length:6,}: GLA {row['gla_tokens_per_second']:8,} tokens/s, Llama (SDPA) "
              f"{row['llama_tokens_per_second']:8,} tokens/s, ratio {row['gla_over_llama']:.2f}", flush=True)
    by_context = {row["context_length"]: row for row in rows}
    if {512, 8192} <= by_context.keys():
        slower = by_context[512]["gla_tokens_per_second"] / by_context[8192]["gla_tokens_per_second"]
        figures.append(Figure("training step: GLA's time per token at 8192 over at 512", round(slower, 3), at_most=1.15))
    if 512 in by_context:
        figures.append(Figure("training step: GLA's model FLOP/s over the rate of an fp32 GEMM, at 512",
                              by_context[512]["gla_model_flops_over_gemm"], at_least=0.85))
    result: dict[str, Any] = {
        "device": device, "threads": torch.get_num_threads(), "parameters": count(models["gla"]),
        "llama_parameters": count(models["llama"]), "repeats": config.repeats, "results": rows,
    }  # fmt: skip
    if 2048 in by_context and device == "cpu":
        result["bytes_per_token_and_layer"] = memory = {name: _memory(name, config) for name in models}
        figures.append(Figure("training step: GLA's memory per token and layer over Llama's, at 2048",
                              round(memory["gla"] / memory["llama"], 3), at_most=1.0))
    return result, figures


def _memory(name: str, config: BenchmarkConfig) -> int:
    """Bytes that a token takes in a layer: what the peak of a step of 2048 tokens is above that of 256."""
    code = "import sys; from flame_composer.timing import one_step; one_step(sys.argv[1], *map(int, sys.argv[2:]))"
    shape = [str(value) for value in (config.hidden_size, config.num_layers, config.vocab_size)]
    short, long = (measure([sys.executable, "-c", code, name, str(tokens), *shape]).peak_bytes for tokens in (256, 2048))
    return round((long - short) / (2048 - 256) / config.num_layers)


def decoding(config: SystemBenchmarkConfig) -> tuple[dict[str, Any], list[Figure]]:
    """Tokens per second of GLA's recurrence and of Llama's cache of keys and values, by sequences and context."""
    models = build_pair(config.hidden_size, config.num_layers, config.vocab_size)
    rows, figures = [], []
    for batch_size in config.batch_sizes:
        for context_length in config.context_lengths:
            after = batch_size, context_length, config.new_tokens
            what = {name: decode(model.eval(), *after) for name, model in models.items()}
            found = interleaved(what, config.repeats, f"decoding {batch_size} x {context_length}")
            rows.append({
                "batch_size": batch_size, "context_length": context_length,
                "gla_over_llama": ratio(found["gla"], found["llama"]),
                **{f"{name}_tokens_per_second": round(median(values), 1) for name, values in found.items()},
                **{f"{name}_milliseconds": round(1000 * batch_size / median(values), 2) for name, values in found.items()},
                **{f"{name}_bytes_kept_per_sequence": kept_of_context(model, context_length) for name, model in models.items()},
            })  # fmt: skip
            figures.append(Figure(f"decoding: GLA over Llama, tokens/s, {batch_size} sequences after {context_length}",
                                  rows[-1]["gla_over_llama"]))
        mine = [row["gla_tokens_per_second"] for row in rows if row["batch_size"] == batch_size]
        if len(mine) > 1:
            first, last = config.context_lengths[0], config.context_lengths[-1]
            figures.append(Figure(f"decoding: GLA's time per token after {last} over after {first}, {batch_size} sequences",
                                  round(mine[0] / mine[-1], 3), at_most=1.1))
    return {"parameters": count(models["gla"]), "results": rows}, figures


def decode(model: PreTrainedModel, batch_size: int, context_length: int, new_tokens: int) -> Callable[[], float]:
    """Tokens per second of decoding after a context, whose reading is not counted."""
    prompt = torch.randint(0, model.config.vocab_size, (batch_size, context_length), device=model.device)
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def run() -> float:
        def go() -> None:
            nonlocal cache
            token = prompt[:, -1:]
            for _ in range(new_tokens):
                outputs = model(input_ids=token, past_key_values=cache, use_cache=True)
                cache, token = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)

        return batch_size * new_tokens / seconds(go)

    return run


@torch.no_grad()
def kept_of_context(model: PreTrainedModel, context_length: int) -> int:
    """Bytes that a model keeps of a sequence it has read."""
    prompt = torch.zeros(1, context_length, dtype=torch.long, device=model.device)
    cache: Any = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
    return sum(tensor.nbytes for tensor in tensors_in(cache.layers))


def tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """All tensors in lists, dictionaries and the objects of a cache."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (list, tuple, dict)):
        for each in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(each)
    elif hasattr(content, "__dict__") and not isinstance(content, type):
        yield from tensors_in(vars(content))


# A run's checkpoints


def checkpoints(config: SystemBenchmarkConfig, folder: Path) -> tuple[dict[str, Any], list[Figure]]:
    """Seconds to save a training state as a run does against torch.save of the same, forced to disk; and to read them."""
    from composer import Trainer

    from flame_composer import checkpoint
    from flame_composer.optim import build_optimizer
    from flame_composer.train_config import OptimizerConfig

    model = build_pair(config.hidden_size, config.num_layers, config.vocab_size)["gla"]
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    trainer = Trainer(model=CausalLM(model, plain_tokenizer(config.vocab_size), varlen=False), optimizers=optimizer,
                      device="cpu", progress_bar=False, max_duration="1ba")
    place, plain = folder / "ours", folder / "plain.pt"
    place.mkdir()
    saver = checkpoint.SaveCheckpoints(str(place), folder, batches=1, num_to_keep=1)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def save() -> None:
        saver.saved = None
        saver.save(trainer.state)

    def save_plainly() -> None:
        with plain.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def read() -> None:
        checkpoint.read_checkpoint(checkpoint.Checkpoint("", place / "ba0.pt"))

    timed: dict[str, Callable[[], Any]] = {
        "save": save, "torch_save": save_plainly, "read": read, "torch_load": lambda: torch.load(plain, weights_only=True),
    }  # fmt: skip
    found = interleaved({name: partial(seconds, run) for name, run in timed.items()}, config.repeats, "checkpoint")
    result = {f"{name}_seconds": round(median(values), 3) for name, values in found.items()}
    return {"bytes": plain.stat().st_size, **result}, [
        Figure("checkpoint: training waits, over torch.save and fsync", ratio(found["save"], found["torch_save"]), at_most=1.1),
        Figure("checkpoint: checking and reading, over torch.load", ratio(found["read"], found["torch_load"])),
    ]


def plain_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One that has as many tokens and is never used."""
    from tokenizers import Tokenizer, models

    words = {f"{number}": number for number in range(vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="0")


# Data


@contextlib.contextmanager
def rows_of(folder: str, *, choose: int | None = None, batch_size: int = 8) -> Iterator[Any]:
    """The loader a run has for a dataset; `choose` rows of it an epoch, repeated as often as it takes."""
    from flame_composer import data
    from flame_composer.config import DataError
    from flame_composer.fetch import Dataset
    from flame_composer.manifest import check_shards, read_manifest
    from flame_composer.train_config import DataConfig, StreamConfig

    if not folder:
        raise DataError("no dataset")
    dataset = Dataset(folder, None, read_manifest(folder), check_shards(folder))
    config = DataConfig(num_workers=0, local=folder)
    if choose:
        config = DataConfig(num_workers=0, streams={"all": StreamConfig(local=folder, choose=choose)})
    name = "all" if choose else ""
    yield data.build_train_loader({name: dataset}, config, global_batch_size=batch_size, seed=1).dataloader


def read_all(folder: str, batch_size: int = 8) -> float:
    """Rows per second from shards to collated batches."""
    with rows_of(folder, batch_size=batch_size) as loader:
        count = 0
        start = time.perf_counter()
        for batch in loader:
            count += len(batch["input_ids"])
        return count / (time.perf_counter() - start)


def read_all_plainly(folder: str, batch_size: int = 8) -> float:
    """The same with StreamingDataset alone, its rows as they come."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=folder, batch_size=batch_size, shuffle=True, shuffle_seed=1)
    start = time.perf_counter()
    count = sum(1 for _ in dataset)
    return count / (time.perf_counter() - start)


def first_batch(folder: str, epoch_rows: float, at: float) -> float:
    """Seconds from opening a dataset to the first batch, `at` a fraction of an epoch of so many rows."""
    start = time.perf_counter()
    with rows_of(folder, choose=int(epoch_rows)) as loader:
        rows = loader.dataset
        row = int(epoch_rows * at) // 8 * 8
        state = rows.state_dict(0, True)
        rows.load_state_dict({**state, "sample_in_epoch": row})
        next(iter(loader))
        return time.perf_counter() - start


# The whole trainer


def bare_loop(config_file: str, *overrides: str) -> None:
    """Train as the recipe does with nothing around it: print the median of tokens per second of a step."""
    from flame_composer import data, optim
    from flame_composer.cli import load
    from flame_composer.model import build_hf_config
    from flame_composer.tokenizer import load_tokenizer
    from flame_composer.train_config import TrainConfig

    config = load(TrainConfig, [config_file, *overrides])
    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(config.seed)
    hf_model = build_model(build_hf_config(config.model.config, tokenizer, config.context_length))
    model = CausalLM(hf_model, tokenizer, varlen=config.varlen)
    sets = data.open_train_data(config.train_data, tokenizer=tokenizer, context_length=config.context_length)
    loader = data.build_train_loader(sets, config.train_data, global_batch_size=config.global_batch_size, seed=config.seed)
    plan = config.plan(epoch_batches=10**9)
    batches = [batch for batch, _ in zip(loader.dataloader, range(plan.total), strict=False)]
    optimizer = optim.build_optimizer(model, config.optimizer)
    model.train()
    speeds = []
    for batch in batches:
        def train(batch: Any = batch) -> None:
            optimizer.zero_grad(set_to_none=True)
            outputs = model(batch)
            outputs["loss"].backward()
            if config.optimizer.grad_clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip_norm)
            optimizer.step()

        speeds.append(batch["input_ids"].numel() / seconds(train))
    print(median(speeds[2:]))
