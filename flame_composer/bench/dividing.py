"""A long row on one rank and divided over several: memory, time a token, and what they send."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flame_composer.bench.measure import Figure, Progress, median
from flame_composer.bench.models import PEAK, status
from flame_composer.config.bench import ContextBenchmarkConfig
from flame_composer.errors import DataError

# What gives each model two heads
HEADS: dict[str, Callable[[int], dict[str, int]]] = {
    "gla": lambda width: {"num_heads": 2},  # noqa: ARG005
    "delta_net": lambda width: {"num_heads": 2},  # noqa: ARG005
    "hgrn2": lambda width: {"expand_ratio": width // 2},
    "gated_deltanet": lambda width: {"num_heads": 2, "head_dim": width // 2},
    "kda": lambda width: {"num_heads": 2, "head_dim": width // 2},
}
WARM_LENGTH = 512  # tokens of the row of the first step, which does not count


def compare_divisions(config: ContextBenchmarkConfig) -> tuple[dict[str, Any], list[Figure]]:
    """Train on a row of one document on one rank, on `ranks`, and on a short row on these.

    Every rank has one thread. The ranks are processes of this machine, and send by gloo.
    """
    progress, long, short = Progress(), config.context_length, config.short_context_length
    found = {}
    for name, ranks, length, steps in (
        ("one", 1, long, 1),
        ("divided", config.ranks, long, 1),
        ("divided_short", config.ranks, short, config.short_steps),
    ):
        progress.tell(f"a row of {length:,} tokens on {ranks} rank{'s' if ranks > 1 else ''}")
        found[name] = _on_ranks(config, ranks, length, steps)
    one, divided, brief = found.values()
    most = max(each["peak_bytes"] for each in divided) / one[0]["peak_bytes"]
    time_of = {
        name: median([each["seconds_per_token"] for each in of]) for name, of in found.items()
    }
    grows = divided[0]["bytes_sent"] / brief[0]["bytes_sent"]
    title = f"a row of {long:,} on {config.ranks} ranks"
    figures = [
        Figure(f"{title}: memory of each over one rank's", round(most, 3), at_most=0.6),
        Figure(
            f"{title}: time a token over a row of {short:,}",
            round(time_of["divided"] / time_of["divided_short"], 3),
            at_most=1.3,
        ),
        Figure(f"{title}: bytes passed on over a row of {short:,}", round(grows, 3), at_most=1.0),
        Figure(f"{title}: tokens/s over one rank's", round(time_of["one"] / time_of["divided"], 3)),
    ]
    return {"context_length": long, "short": short, "ranks": config.ranks, "found": found}, figures


def _on_ranks(
    config: ContextBenchmarkConfig, ranks: int, length: int, steps: int
) -> list[dict[str, Any]]:
    """Return what each rank measured of so many steps on a row."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": f"{ranks}",
        "LOCAL_WORLD_SIZE": f"{ranks}",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
    }
    sizes = (config.hidden_size, config.num_layers, config.vocab_size)
    code = "import sys; from flame_composer.bench.dividing import one_rank; one_rank(*sys.argv[1:])"
    command = [sys.executable, "-c", code, config.model_type, *map(str, (length, steps, *sizes))]
    processes = [
        subprocess.Popen(
            command,
            env={**env, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            last = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            raise DataError(f"a rank of {ranks}, with a row of {length:,} tokens: failed: {last}")
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def one_rank(model_type: str, *numbers: str) -> None:
    """Train on this rank's part of a row of random tokens, and print what was measured as JSON.

    The numbers are the row's length, that of steps, and the model's width, layers and vocabulary.
    """
    import torch
    from composer.utils import dist

    from flame_composer.bench.runs import plain_tokenizer
    from flame_composer.model.build import build_model
    from flame_composer.model.causal_lm import CausalLM
    from flame_composer.model.context import Context
    from flame_composer.model.hf_config import build_hf_config
    from flame_composer.model.ranks import Ranks

    length, steps, width, layers, vocab = map(int, numbers)
    dist.initialize_dist("cpu")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    given = {"model_type": model_type, "hidden_size": width, "num_hidden_layers": layers}
    given |= {"vocab_size": vocab} | HEADS[model_type](width)
    tokenizer = plain_tokenizer(vocab)
    model = build_model(build_hf_config(given, tokenizer, length))
    ranks = Ranks(context=dist.get_world_size())
    context = Context(model, ranks, "cpu") if ranks.context > 1 else None
    trained = CausalLM(model, tokenizer, varlen=True, context=context)

    def step(size: int) -> float:
        tokens = torch.randint(0, vocab, (1, size))
        batch = {"input_ids": tokens, "labels": tokens, "sequence_id": torch.zeros_like(tokens)}
        dist.barrier()
        started = time.perf_counter()
        trained.forward(batch)["loss"].backward()
        return time.perf_counter() - started

    step(WARM_LENGTH)
    with _counted() as sent:
        PEAK.write_text("5")
        before = status("VmRSS")
        seconds = median([step(length) for _ in range(steps)])
        peak = status("VmHWM") - before
    print(
        json.dumps(
            {
                "seconds_per_token": seconds / length,
                "peak_bytes": peak,
                "bytes_sent": sent[0] // steps,
            }
        )
    )


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the bytes that this rank gives to others to gather, in the body."""
    import torch.distributed

    owner: Any = torch.distributed
    gather, sent = owner.all_gather, [0]

    @functools.wraps(gather)
    def counting(found: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        sent[0] += x.numel() * x.element_size()
        return gather(found, x, *args, **kwargs)

    owner.all_gather = counting
    try:
        yield sent
    finally:
        owner.all_gather = gather
