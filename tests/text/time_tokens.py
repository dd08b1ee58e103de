"""What documents cost to read from tokens that others have made: docs/benchmarks.md.

    python -m tests.text.time_tokens [MILLIONS OF TOKENS] [TURNS]

It writes a file as Dolma's tokenizer does, with documents of 1000 tokens on average, and reads it
in one process in four ways, which take turns: as the conversion does, by eos and by the .csv.gz
beside it, and as OLMo-core's iter_document_indices does, by both. CPU-seconds count, as a machine
may be busy with other things.
"""

from __future__ import annotations

import gzip
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flame_composer.text.given_tokens import Vocabulary
from flame_composer.text.token_files import read_tokens, slice_tokens

EOS = 50279
KNOWN = Vocabulary("uint16", 50280, EOS)


def write(folder: Path, num_tokens: int) -> Path:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50_000, num_tokens, dtype=np.uint16)
    ends = np.unique(np.append(random.integers(1, num_tokens, num_tokens // 1000), num_tokens))
    tokens[ends - 1] = EOS
    tokens.tofile(folder / "a.npy")
    with gzip.open(folder / "a.csv.gz", "wt", newline="", compresslevel=6) as file:
        start = 0
        for number, end in enumerate(ends.tolist()):
            name = random.bytes(16).hex()
            place = f"s3://ai2-llm/sources/dclm/part-{number // 10_000:05}.jsonl.zst,{number}"
            file.write(f"{start},{end},{name},{place}\r\n")
            start = end
    return folder / "a.npy"


def ours(path: Path, borders: Any) -> tuple[int, int]:
    """Read documents as a conversion does, and return how many there are, and their tokens."""
    documents = tokens = 0
    for part in slice_tokens([str(path)], KNOWN, 64 << 20, borders):
        for document in read_tokens(part, KNOWN, lambda _: None, 64 << 20):
            documents += 1
            tokens += len(document.tokens) + 1
    return documents, tokens


def theirs(path: Path, borders: str) -> tuple[int, int]:
    """Read documents by a memory map, without any check."""
    array = np.memmap(path, np.uint16, "r")
    documents = tokens = 0
    for start, end in by_eos(array) if borders == "eos" else by_table(path):
        documents += 1
        tokens += len(np.array(array[start:end]))
    return documents, tokens


def by_eos(array: Any) -> Iterator[tuple[int, int]]:
    start = 0
    for place in (array == EOS).nonzero()[0]:
        yield start, place + 1
        start = place + 1


def by_table(path: Path) -> Iterator[tuple[int, int]]:
    with gzip.open(path.with_suffix(".csv.gz"), "rt") as file:
        for line in file:
            start, end, *_ = line.split(",")
            yield int(start), int(end)


def main(millions: float = 200, turns: int = 3) -> dict[str, float]:
    """Print and return the millions of tokens per CPU-second of each way, the median of turns."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), round(millions * 1e6))
        counts = set()
        for _ in range(turns):
            for way in (ours, theirs):
                for borders in ("eos", "csv"):
                    begin = time.process_time()
                    counts.add(way(path, borders))
                    taken = time.process_time() - begin
                    found.setdefault(f"{way.__name__} {borders}", []).append(millions / taken)
    assert len(counts) == 1, counts
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    for name, speed in medians.items():
        print(f"{name}: {speed:.0f} million tokens per CPU-second")
    return medians


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3]))
