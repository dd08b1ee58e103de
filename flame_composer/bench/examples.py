"""The benchmark of convert/to_sft.py against apply_chat_template and map on the same examples."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from flame_composer.bench.conversions import ONE_THREAD, mistral_tokenizer, write_corpus
from flame_composer.bench.measure import Figure, Usage, measure, median, ratio
from flame_composer.config.bench import ExamplesBenchmarkConfig
from flame_composer.dataset.manifest import read_manifest
from flame_composer.errors import DataError

ROW = 4096  # tokens
PIECE = 600  # characters of a message
TURNS = 4  # messages of an example
SPECIAL = re.compile("<s>|</s>|<unk>")
BASELINE = (
    "import sys; from flame_composer.bench.examples import convert_plainly; "
    "print(convert_plainly(*sys.argv[1:]))"
)


def write_examples(corpus: Path, out: Path) -> Path:
    """Write conversations whose messages are pieces of a corpus's documents, as JSON lines."""
    with corpus.open() as documents, out.open("w") as file:
        for line in documents:
            text = json.loads(line)["text"]
            pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
            # An example with a special token as text would be left out.
            pieces = [each for each in pieces if each.strip() and not SPECIAL.search(each)]
            for first in range(0, len(pieces) - TURNS + 1, TURNS):
                turns = [
                    {"role": role, "content": content}
                    for role, content in zip(
                        ("user", "assistant") * 2, pieces[first : first + TURNS], strict=True
                    )
                ]
                file.write(json.dumps({"messages": turns}) + "\n")
    return out


def with_template(folder: Path) -> Path:
    """Give the tokenizer in `folder` the chat template alpaca, and return the folder."""
    from flame_composer.text.chat import load_template
    from flame_composer.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = load_template("alpaca", tokenizer).source
    tokenizer.save_pretrained(folder)
    return folder


def convert_plainly(source: str, tokenizer_path: str, cache: str) -> int:
    """Convert examples as most people would, and return the number of their tokens.

    `Dataset.map` calls `apply_chat_template`, which returns the assistant's mask, and makes labels
    of both. Nothing is packed, and nothing is left out.
    """
    from datasets import Dataset, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)

    def convert(example: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(
            example["messages"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        pairs = zip(made["input_ids"], made["assistant_masks"], strict=True)
        return {
            "input_ids": made["input_ids"],
            "labels": [id if has_loss else -100 for id, has_loss in pairs],
        }

    loaded = load_dataset("json", data_files=source, split="train", cache_dir=cache)
    assert isinstance(loaded, Dataset)
    mapped = loaded.map(convert, remove_columns=loaded.column_names)
    return sum(len(ids) for ids in mapped.with_format("numpy")["input_ids"])


def compare_examples(
    root: Path, config: ExamplesBenchmarkConfig, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """Time convert/to_sft.py in `root` against `convert_plainly`, taking turns.

    Each converts a tenth of the examples and then all of them; what the whole takes beyond the
    tenth is free of what a process takes to start. Raise DataError if the tokens differ in number.
    """
    tokenizer = with_template(mistral_tokenizer(folder / "tokenizer"))
    corpora = write_corpus((), (), round(config.megabytes * 1e6), folder)
    whole, tenth = (write_examples(each, folder / f"examples.{each.name}") for each in corpora)
    runs: dict[str, list[tuple[Usage, int]]] = {"ours": [], "plain": []}
    for turn in range(config.repeats):
        for source in (tenth, whole):
            out = folder / f"{turn}.{source.stem}"
            keys = [
                f"source={source}",
                "format=messages",
                f"tokenizer={tokenizer}",
                f"context_length={ROW}",
                "too_long=drop",
                "duplicates=keep",
                "num_workers=1",
                f"out={out}",
            ]
            usage = measure([sys.executable, str(root / "convert/to_sft.py"), *keys])
            runs["ours"].append((usage, read_manifest(str(out)).totals.tokens_in))
            arguments = [str(source), str(tokenizer), f"{out}.cache"]
            usage = measure([sys.executable, "-c", BASELINE, *arguments], ONE_THREAD)
            runs["plain"].append((usage, int(usage.output.splitlines()[-1])))
    counts = {name: [tokens for _, tokens in found] for name, found in runs.items()}
    if counts["ours"] != counts["plain"]:
        raise DataError(f"the conversions do not agree on the number of tokens: {counts}")
    whole_speeds = {
        name: [tokens / usage.cpu_seconds for usage, tokens in found[1::2]]
        for name, found in runs.items()
    }
    speeds = {
        name: [
            (all_tokens - few) / (usage.cpu_seconds - start.cpu_seconds)
            for (start, few), (usage, all_tokens) in list(pairwise(found))[::2]
        ]
        for name, found in runs.items()
    }
    over, over_whole = ratio(speeds["ours"], speeds["plain"]), ratio(*whole_speeds.values())
    result = {
        "tokens": counts["ours"][1],
        "tokens_per_cpu_second_after_start": {n: round(median(s)) for n, s in speeds.items()},
        "tokens_per_cpu_second": {n: round(median(s)) for n, s in whole_speeds.items()},
        "ours_over_plain_after_start": over,
        "ours_over_plain": over_whole,
    }
    name = "examples: tokens per CPU-second over apply_chat_template and map"
    return result, [
        Figure(f"{name}, after start", over, at_least=5),
        Figure(f"{name}, with it", over_whole),
    ]
