"""The benchmark of recipes/serve.py: requests together, static batches, long contexts, latency."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from flame_composer import cpu
from flame_composer.bench.clients import Answered, answers, percentile
from flame_composer.bench.conversions import write_corpus
from flame_composer.bench.measure import Figure, Progress, interleaved, measure, median, ratio
from flame_composer.config.bench import ServingBenchmarkConfig
from flame_composer.errors import DataError
from flame_composer.model.build import build_model
from flame_composer.model.work import count_parameters
from flame_composer.processes import start_child
from flame_composer.serve.states import States, copies, prepare_weights, read
from flame_composer.text.tokenizer import load_tokenizer
from flame_composer.upstream.transformers import without_model_defaults
from flame_composer.use.generate import in_batches, pad_left

START_SECONDS = 600  # for a server to load its model
STEPS = 16  # tokens written in a turn after a long context
PIECE = 512  # tokens of it that are read at a time

Request = dict[str, Any]


class Server(NamedTuple):
    """A server's address, and its process."""

    address: tuple[str, int]
    pid: int

    def cpu_seconds(self) -> float:
        """Return the processor time that it has taken; it has few threads beside PyTorch's."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Speed(NamedTuple):
    """The tokens that were written in a second, and in a second of a processor."""

    by_clock: float
    by_cpu: float


def compare_serving(
    root: Path, config: ServingBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """Time a server with a GLA of random weights, over HTTP on this machine.

    Requests together are compared with the same one after another, and requests of mixed lengths
    with `generate` in static batches. Also time tokens after long contexts, and what clients wait.
    What is under way, and each part's figures, are told on stderr.
    """
    progress = Progress()
    progress.tell("a tokenizer and a model are made")
    model = make_model(root, config, folder)
    result: dict[str, Any] = {"parameters": count_parameters(model)}
    figures: list[Figure] = []

    def take(part: tuple[dict[str, Any], list[Figure]]) -> None:
        result.update(part[0])
        figures.extend(part[1])
        for figure in part[1]:
            progress.tell(figure.line())

    progress.tell(f"{result['parameters']:,} parameters; recipes/serve.py starts")
    with served(root, config, folder) as server:
        answers(server.address, together(config), config.num_together)  # the first are slower
        take(compare_together(config, server, progress))
        take(compare_batches(config, model, server, progress))
        result["waits"] = []
        for number in config.clients:
            row, found = waits(config, number, server, progress)
            result["waits"].append(row)
            take(({}, found))
    take(compare_contexts(config, model, progress))
    return result, figures


# The model, and its server


def make_model(root: Path, config: ServingBenchmarkConfig, folder: Path) -> PreTrainedModel:
    """Write a GLA of random weights with a tokenizer to `folder`/model, and return it.

    The tokenizer is trained on Python files. Greedy answers never end before their limit.
    """
    cpu.enable()
    from fla.models import GLAConfig

    source, _ = write_corpus((), (), 4_000_000, folder)
    out = folder / "model"
    script = str(root / "convert/train_tokenizer.py")
    keys = [f"source={source}", f"out={folder / 'tokenizer'}", f"vocab_size={config.vocab_size}"]
    measure([sys.executable, script, *keys])
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(str(folder / "tokenizer"))
    torch.manual_seed(0)
    model = build_model(
        GLAConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_heads=max(1, config.hidden_size // 128),
            tie_word_embeddings=False,
        )
    )
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[tokenizer.eos_token_id] = 0  # never the likeliest
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model.eval()


@contextlib.contextmanager
def served(root: Path, config: ServingBenchmarkConfig, folder: Path) -> Iterator[Server]:
    """Serve the model in the body, from a process of its own."""
    keys = [
        f"model={folder / 'model'}",
        "port=0",
        f"max_rows={max(config.num_together, *config.clients)}",
        f"max_waiting={max(config.num_together, *config.clients)}",
    ]
    out, err = folder / "server.out", folder / "server.err"
    with out.open("wb") as to_out, err.open("wb") as to_err:
        command = [sys.executable, str(root / "recipes/serve.py"), *keys]
        process = start_child(command, to_out, to_err)
    try:
        deadline = time.monotonic() + START_SECONDS
        while " is served at " not in (said := out.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                last = (err.read_text().splitlines() or ["no reason given"])[-1]
                raise DataError(f"recipes/serve.py: failed: {last.removeprefix('error: ')}")
            time.sleep(0.05)
        place = urlsplit(said.split(" is served at ")[1].split()[0])
        yield Server((str(place.hostname), int(place.port or 0)), process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# Requests


def together(config: ServingBenchmarkConfig) -> list[Request]:
    """Return requests of one length, with prompts of 32 random tokens."""
    draw = np.random.default_rng(0)
    return [request(draw, 32, config.new_tokens) for _ in range(config.num_together)]


def mixed(config: ServingBenchmarkConfig, number: int, seed: int) -> list[Request]:
    """Return requests whose prompts and answers have lengths as in conversations.

    Both are log-normal: most are short, and few are long. Half of the answers have more than
    `new_tokens` / 2 tokens and one in a hundred ten times as many, but none more than 8 times.
    """
    draw = np.random.default_rng(seed)
    middle = max(1, config.new_tokens // 2)
    prompts = np.clip(draw.lognormal(np.log(32), 1, number), 1, 256).astype(int)
    sizes = np.clip(draw.lognormal(np.log(middle), 1, number), 1, 8 * middle).astype(int)
    return [request(draw, *map(int, each)) for each in zip(prompts, sizes, strict=True)]


def request(draw: np.random.Generator, prompt_tokens: int, new_tokens: int) -> Request:
    """Return a request for a greedy answer to a prompt of random tokens, bytes of UTF-8 apart."""
    ids = draw.integers(300, 500, prompt_tokens)
    return {"prompt": ids.tolist(), "max_tokens": new_tokens, "temperature": 0}


# What is measured


def compare_together(
    config: ServingBenchmarkConfig, server: Server, progress: Progress
) -> tuple[dict[str, Any], list[Figure]]:
    """Time requests at a time against the first quarter of them one after another.

    They are all of one length, and a quarter takes longer than all of them together.
    """
    requests = together(config)
    few = requests[: max(1, len(requests) // 4)]
    progress.tell(f"{len(requests)} requests together, then {len(few)} one after another")
    found = in_turns(
        {
            "together": lambda: asked(server, requests, config.num_together),
            "one_after_another": lambda: asked(server, few, 1),
        },
        config.repeats,
        progress,
    )
    name = f"serving: tokens/s of {config.num_together} requests together over one after another"
    return compared(name, found, at_least=5)


def asked(server: Server, requests: Sequence[Request], at_a_time: int) -> Speed:
    """Return how fast a server answers requests."""
    before = server.cpu_seconds()
    seconds, found = answers(server.address, requests, at_a_time)
    tokens = written(requests, found)
    return Speed(tokens / seconds, tokens / max(0.01, server.cpu_seconds() - before))


def in_turns(
    what: dict[str, Callable[[], Speed]], repeats: int, progress: Progress
) -> dict[str, list[Speed]]:
    """Measure speeds in turns, and tell each; return those of each name."""
    found: dict[str, list[Speed]] = {name: [] for name in what}

    def measured(name: str) -> float:
        speed = what[name]()
        found[name].append(speed)
        turn = f"turn {len(found[name])} of {repeats}"
        progress.tell(f"{name.replace('_', ' ')}, {turn}: {speed.by_clock:.1f} tokens/s")
        return speed.by_clock

    interleaved({name: partial(measured, name) for name in what}, repeats, None, warm=0)
    return found


def compared(
    name: str, found: dict[str, list[Speed]], *, at_least: float
) -> tuple[dict[str, Any], list[Figure]]:
    """Return two sides' speeds, and the ratios of the first to the second.

    That by processor time says what is to be expected of a machine with nothing else to do.
    """
    result: dict[str, Any] = {}
    for side, speeds in found.items():
        result[f"{side}_tokens_per_second"] = round(median([each.by_clock for each in speeds]), 1)
        per_cpu = median([each.by_cpu for each in speeds])
        result[f"{side}_tokens_per_cpu_second"] = round(per_cpu, 1)
    first, second = found.values()
    by_clock = ratio([each.by_clock for each in first], [each.by_clock for each in second])
    by_cpu = ratio([each.by_cpu for each in first], [each.by_cpu for each in second])
    return result, [
        Figure(name, by_clock, at_least=at_least),
        Figure(f"{name}, by processor time", by_cpu),
    ]


def written(requests: Sequence[Request], found: Sequence[Answered]) -> int:
    """Return the number of tokens that were written; raise DataError if any are missing."""
    tokens = sum(each.tokens for each in found)
    wanted = sum(each["max_tokens"] for each in requests)
    if tokens != wanted:
        raise DataError(f"{tokens:,} tokens were written, and {wanted:,} were asked for")
    return tokens


def compare_batches(
    config: ServingBenchmarkConfig, model: PreTrainedModel, server: Server, progress: Progress
) -> tuple[dict[str, Any], list[Figure]]:
    """Time requests of mixed lengths against `generate` in static batches of as many rows.

    A batch has the next requests in their order, padded on the left, and ends with the longest of
    its answers. On both sides, those tokens count that were asked for.
    """
    requests = mixed(config, config.num_mixed, seed=1)
    wanted = sum(each["max_tokens"] for each in requests)
    batches = [*in_batches(requests, config.num_together)]

    def static() -> Speed:
        start, cpu_start = time.perf_counter(), time.process_time()
        for batch in batches:
            generate(model, batch)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return Speed(wanted / seconds, wanted / cpu_seconds)

    progress.tell(
        f"{len(requests)} requests of mixed lengths ({wanted:,} tokens), and generate in"
        f" {len(batches)} static batches"
    )
    generate(model, [{**each, "max_tokens": 2} for each in batches[0]])
    found = in_turns(
        {"mixed": lambda: asked(server, requests, config.num_together), "static": static},
        config.repeats,
        progress,
    )
    name = f"serving: tokens/s of mixed lengths over generate in batches of {config.num_together}"
    result, figures = compared(name, found, at_least=2)
    steps = sum(max(each["max_tokens"] for each in batch) for batch in batches)
    counts = {"mixed_requests": len(requests), "mixed_tokens": wanted, "static_steps": steps}
    return {**counts, **result}, figures


@torch.inference_mode()
def generate(model: PreTrainedModel, batch: Sequence[Request]) -> torch.Tensor:
    """Return what transformers' `generate` writes in a static batch, greedily, [B, T]."""
    ids, mask = pad_left([each["prompt"] for each in batch], 0)
    sampling = GenerationConfig(
        max_new_tokens=max(each["max_tokens"] for each in batch), do_sample=False, pad_token_id=0
    )
    call: Any = model
    with without_model_defaults(model) as options:
        found: torch.Tensor = call.generate(
            ids, attention_mask=mask, generation_config=sampling, **options
        )
    return found[:, ids.shape[1] :]


def waits(
    config: ServingBenchmarkConfig, number: int, server: Server, progress: Progress
) -> tuple[dict[str, Any], list[Figure]]:
    """Time what each of `number` clients waits for the first token and between tokens.

    Each sends a few requests of mixed lengths, one after another; answers are sampled.
    """
    requests = [
        {**each, "temperature": 0.8, "top_p": 0.95, "seed": seed}
        for seed, each in enumerate(mixed(config, 3 * number, seed=number))
    ]
    progress.tell(f"waits of {number} clients, {len(requests)} requests")
    _, found = answers(server.address, requests, number)
    first = [each.to_first for each in found if each.came]
    between = [seconds for each in found for seconds in each.between()]
    row: dict[str, Any] = {"clients": number}
    figures = []
    for name, values in (("to the first token", first), ("between tokens", between)):
        for percent in (50, 99):
            value = round(1000 * percentile(values, percent), 3)
            row[f"p{percent}_{name.replace(' ', '_')}_milliseconds"] = value
            figures.append(Figure(f"serving: p{percent} {name}, ms, {number} clients", value))
    return row, figures


def compare_contexts(
    config: ServingBenchmarkConfig, model: PreTrainedModel, progress: Progress
) -> tuple[dict[str, Any], list[Figure]]:
    """Time a token of one sequence after each context length, as the engine writes it."""
    lengths = sorted(config.context_lengths)
    ids = torch.randint(300, 500, (1, lengths[-1]), generator=torch.Generator().manual_seed(0))
    what: dict[str, Callable[[], float]] = {}
    prepare_weights(model, config.num_together)
    with torch.inference_mode():
        cache = None
        for length, before in zip(lengths, [0, *lengths[:-1]], strict=True):
            progress.tell(f"{length - before:,} tokens are read, {length:,} in all")
            for start, end in pairwise([*range(before, length, PIECE), length]):
                _, cache = read(model, ids[:, start:end], cache)
            what[str(length)] = writing(model, copies(cache, 2)[1])
    progress.tell(f"tokens after {' and '.join(what)}, {4 * config.repeats} turns")
    found = interleaved(what, 4 * config.repeats, None)
    figures = []
    if len(lengths) > 1:
        figures = [
            Figure(
                f"serving: time per token after {lengths[-1]} over after {lengths[0]}",
                ratio(found[str(lengths[-1])], found[str(lengths[0])]),
                at_most=1.1,
            )
        ]
    times = {name: round(1000 * median(values), 2) for name, values in found.items()}
    said = ", ".join(f"{value} ms after {name}" for name, value in times.items())
    progress.tell(f"a token takes {said}")
    return {"milliseconds_per_token_after": times}, figures


def writing(model: PreTrainedModel, cache: Any) -> Callable[[], float]:
    """Return a function that goes on from a text and returns the seconds that a token takes."""
    states = States(model, joined=True)
    states.join([cache])

    @torch.inference_mode()
    def run() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            states.step([300])
        return (time.perf_counter() - start) / STEPS

    return run
