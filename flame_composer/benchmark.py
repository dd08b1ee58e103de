"""What recipes/benchmark.py measures with: whole processes, what they are measured on, and the conversion most people write;
and decoding, token by token.

A process counts with all its descendants: what is wanted is the cost of a command, whatever it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from flame_composer.config import ConfigError, DataError
from flame_composer.corpus import find_files, sample_texts
from flame_composer.manifest import read_manifest
from flame_composer.recipe_config import DecodeBenchmarkConfig

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
BASELINE = (
    "import sys; from flame_composer.benchmark import convert_plainly; "
    "print(convert_plainly(*sys.argv[1:4], int(sys.argv[4])))"
)
BATCH = 1000  # documents that the baseline encodes in one call


# Processes


@dataclass(frozen=True)
class Usage:
    """A command's time, that of all its processes together on all cores, the memory of its largest one, and its stdout."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def measure(command: Sequence[str], env: Mapping[str, str] = MappingProxyType({})) -> Usage:
    """Run a command to its end and that of all its descendants. Raises DataError if it fails, ConfigError off Linux."""
    if sys.platform != "linux":
        raise ConfigError("this benchmark needs Linux, which can hand over the processes that a command leaves behind")
    # Another process runs it: one that has no other children, and is small, for the memory of a new process counts from
    # that of the one it was started from.
    code = "from flame_composer.benchmark import run_and_count; run_and_count()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **env}, start_new_session=True,
    )  # fmt: skip
    try:
        output, lines = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        process.communicate()
        raise
    *errors, last = [line for line in lines.splitlines() if line.strip()]
    if process.returncode != 0:
        reason = errors[-1].removeprefix("error: ") if errors else f"exit status {process.returncode}"
        raise DataError(f"{' '.join(command[:2])}: failed: {reason}")
    seconds, cpu_seconds, peak_bytes = json.loads(last)
    return Usage(seconds, cpu_seconds, peak_bytes, output)


def run_and_count() -> None:
    """Run the command in sys.argv and end as it does; the last line of stderr is what `Usage` holds of it."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whoever is left behind becomes a child of this process
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # nobody waits for what is measured if the benchmark was killed
    started = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:])
    _, code, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    usages = [usage]
    with contextlib.suppress(ChildProcessError):
        while True:
            usages.append(os.wait4(-1, 0)[2])
    process.returncode = os.waitstatus_to_exitcode(code)
    cpu_seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    counted = json.dumps([seconds, cpu_seconds, max(usage.ru_maxrss for usage in usages) << 10])
    print(f"\n{counted}", file=sys.stderr)
    sys.exit(process.returncode)


# What is converted


@contextlib.contextmanager
def workplace(parent: str | None) -> Iterator[Path]:
    """A folder in `parent`, the system's temporary folder if None, that is removed with all that is in it."""
    try:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)
    except OSError as error:
        place = error.filename or parent or tempfile.gettempdir()
        raise DataError(f"folder: {place}: {error.strerror or error}; give another one with folder=...") from None


def mistral_tokenizer(folder: Path) -> Path:
    """Put Mistral-7B's tokenizer, from the SentencePiece model that mistral-common carries, into `folder`."""
    missing = [name for name in ("mistral_common", "gigatoken") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"tokenizer: {' and '.join(missing)} is not installed; pip install 'flame-composer[dev]' or name one")
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None  # noqa: PT018
    model = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
    folder.mkdir()
    state = json.loads(sentencepiece_to_tokenizer_json(model.read_bytes()))
    (folder / "tokenizer.json").write_text(json.dumps(state))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def write_corpus(source: Sequence[str], suffixes: Sequence[str], max_bytes: int, folder: Path) -> tuple[Path, Path]:
    """Distinct documents drawn from all over `source` as JSONL of about `max_bytes`, and the first tenth of them.

    Without a source, the Python files of the standard library and of the installed packages: real text that every
    machine with this environment has.
    """
    if not source:
        source, suffixes = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")], (".py",)
    whole, tenth = folder / "whole.jsonl", folder / "tenth.jsonl"
    seen: set[str] = set()
    with whole.open("w") as file:
        for text in sample_texts(find_files(source, suffixes), "text", sys.maxsize, lambda _: None):
            if text and text not in seen:
                seen.add(text)
                file.write(json.dumps({"text": text}) + "\n")
                if file.tell() >= max_bytes:
                    break
    if not seen:
        raise ConfigError(f"source: {', '.join(source)}: holds no text")
    with whole.open() as file, tenth.open("w") as part:
        while part.tell() < whole.stat().st_size / 10:
            part.write(file.readline())
    return whole, tenth


def convert_plainly(source: str, tokenizer_path: str, out: str, context_length: int) -> int:
    """What most people write: `encode_batch_fast`, an eos after each document, rows cut from the stream, MDSWriter.

    Returns the number of tokens. No work is left out that a careful author would leave in, and none put in: the JSON is
    decoded, shards are hashed; documents' lengths, splits and resumption are not there.
    """
    from streaming import MDSWriter
    from transformers import AutoTokenizer

    from flame_composer.tokenizer import token_dtype, vocab_size_of

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    dtype = token_dtype(vocab_size_of(tokenizer))
    columns = {"input_ids": f"ndarray:{np.dtype(dtype).name}:{context_length}"}
    num_tokens, tail = 0, np.zeros(0, dtype)
    with Path(source).open() as file, MDSWriter(columns=columns, out=out, hashes=["xxh64"]) as writer:
        while texts := [json.loads(line)["text"] for line in itertools.islice(file, BATCH)]:
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            parts = [tail]
            for encoding in encodings:
                parts += np.array(encoding.ids, dtype), np.array([tokenizer.eos_token_id], dtype)
            tokens = np.concatenate(parts)
            num_tokens += len(tokens) - len(tail)
            end = len(tokens) // context_length * context_length
            for row in tokens[:end].reshape(-1, context_length):
                writer.write({"input_ids": row})
            tail = tokens[end:]
    return num_tokens


# The comparison


@dataclass(frozen=True)
class Run:
    """One conversion of a corpus."""

    tokens: int
    usage: Usage


def compare_conversions(
    script: Path, tokenizer: str, whole: Path, tenth: Path, context_length: int, unit_size: int, num_workers: int,
    repeats: int, on_progress: Callable[[], Any],
) -> dict[str, Any]:  # fmt: skip
    """Convert `tenth` and `whole` with `convert_plainly` and with `script`, convert/to_mds.py, on one process and on
    `num_workers`, taking turns, `repeats` times; if more than once, after a first one on `tenth` that does not count.

    `on_progress` is called after each conversion. Raises DataError if their tokens differ.
    """
    settings = [f"tokenizer={tokenizer}", f"context_length={context_length}", f"unit_size={unit_size}"]
    # The script first: it says what is wrong with a tokenizer.
    converters = {"one_worker": 1, "workers": num_workers, "baseline": 1}
    encoders: set[str] = set()

    def convert(name: str, corpus: Path) -> Run:
        with tempfile.TemporaryDirectory(dir=whole.parent) as folder:
            if name == "baseline":
                arguments = [str(corpus), tokenizer, f"{folder}/out", str(context_length)]
                usage = measure([sys.executable, "-c", BASELINE, *arguments], ONE_THREAD)
                tokens = int(usage.output)
            else:
                command = [sys.executable, str(script), *settings, f"source={corpus}", f"out={folder}/out"]
                usage = measure([*command, f"num_workers={converters[name]}"])
                manifest = read_manifest(f"{folder}/out")
                tokens = manifest.totals.tokens_in
                encoders.add(manifest.config["encoder"])
        on_progress()
        return Run(tokens, usage)

    for name in converters if repeats > 1 else ():
        convert(name, tenth)
    turns = [{name: (convert(name, tenth), convert(name, whole)) for name in converters} for _ in range(repeats)]
    counts = {tuple(run.tokens for run in runs) for turn in turns for runs in turn.values()}
    if len(counts) != 1:
        raise DataError(f"the conversions do not agree on the number of tokens: {sorted(counts)}")
    (_, num_tokens), = counts
    return {"tokens": num_tokens, "encoder": ", ".join(encoders), **summary(turns)}


def summary(turns: Sequence[dict[str, tuple[Run, Run]]]) -> dict[str, Any]:
    """Medians over the turns, in each of which every converter made a tenth of the corpus and the whole; the most memory."""
    speeds = [{name: _speeds(*runs) for name, runs in turn.items()} for turn in turns]
    result: dict[str, Any] = {}
    for name, first in speeds[0].items():
        result[name] = {key: _median([turn[name][key] for turn in speeds]) for key in first}
        for key, which in (("peak_mb_of_a_tenth", 0), ("peak_mb", 1)):
            result[name][key] = max(turn[name][which].usage.peak_bytes for turn in turns) >> 20
    for key, above, below, speed in (
        ("one_worker_over_baseline", "one_worker", "baseline", "tokens_per_cpu_second"),
        ("workers_over_one", "workers", "one_worker", "tokens_per_second"),
    ):
        for suffix in ("", "_after_start"):
            result[key + suffix] = _median([turn[above][speed + suffix] / turn[below][speed + suffix] for turn in speeds], 2)
    return result


def _speeds(tenth: Run, whole: Run) -> dict[str, float]:
    """With the start of the processes, and without: what the whole took beyond the tenth, which starts the same way."""

    def speed(tokens: int, seconds: float) -> float:
        return tokens / seconds if seconds > 0 else math.nan  # a corpus that takes no time to measure

    tokens, usage, start = whole.tokens, whole.usage, tenth.usage
    return {
        "tokens_per_cpu_second": speed(tokens, usage.cpu_seconds),
        "tokens_per_cpu_second_after_start": speed(tokens - tenth.tokens, usage.cpu_seconds - start.cpu_seconds),
        "tokens_per_second": speed(tokens, usage.seconds),
        "tokens_per_second_after_start": speed(tokens - tenth.tokens, usage.seconds - start.seconds),
    }


def _median(values: Sequence[float], digits: int | None = None) -> float | None:
    return None if any(map(math.isnan, values)) else round(statistics.median(values), digits)


# Decoding


def decode(config: DecodeBenchmarkConfig) -> None:
    """Prints, and as a JSON line last, what a token takes after each context, and what is kept of the context."""
    import torch
    from transformers import GenerationConfig, LlamaConfig
    from transformers.generation.streamers import BaseStreamer

    from flame_composer import cpu
    from flame_composer.model import build_model

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            value.cpu()  # waits for a GPU
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    cpu.enable()
    from fla.models import GLAConfig

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    longest = max(config.context_lengths) + config.new_tokens
    shape = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
             "max_position_embeddings": longest}
    heads = max(1, config.hidden_size // 128)
    configs = {"gla": GLAConfig(**shape, num_heads=heads), "llama": LlamaConfig(
        **shape, num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=3 * config.hidden_size)}
    torch.manual_seed(0)
    models: dict[str, Any] = {name: build_model(each).eval() for name, each in configs.items()}
    for model in models.values():
        model.to(device, dtype)
    greedy = GenerationConfig(
        max_new_tokens=config.new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True,
    )
    seconds: dict[tuple[str, int], list[float]] = {}
    kept: dict[tuple[str, int], int] = {}
    for _ in range(config.repeats):
        for length, (name, model) in itertools.product(config.context_lengths, models.items()):
            ids, clock = torch.randint(0, config.vocab_size, (1, length), device=device), Clock()
            out: Any = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy, streamer=clock,
                                      use_model_defaults=False)
            seconds.setdefault((name, length), []).extend(b - a for a, b in itertools.pairwise(clock.times[1:]))
            kept[name, length] = sum(tensor.nbytes for tensor in tensors_in(out.past_key_values.layers))
    results = [
        {"model": name, "context_length": length, "milliseconds_per_token": round(1000 * statistics.median(times), 3),
         "state_bytes": kept[name, length]}
        for (name, length), times in seconds.items()
    ]  # fmt: skip
    for row in results:
        print(f"{row['model']:5} after {row['context_length']:6,} tokens: {row['milliseconds_per_token']:8.3f} ms a token, "
              f"{row['state_bytes']:12,} bytes kept")
    print(json.dumps({"benchmark": "decoding", "device": device, "machine": platform.machine(),
                      "threads": torch.get_num_threads(), "repeats": config.repeats, "results": results}))


def tensors_in(content: Any) -> Iterator[Any]:
    """All tensors in lists, dictionaries and the objects of a cache."""
    if hasattr(content, "nbytes"):
        yield content
    elif isinstance(content, (list, tuple, dict)):
        for each in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(each)
    elif hasattr(content, "__dict__") and not isinstance(content, type):
        yield from tensors_in(vars(content))
