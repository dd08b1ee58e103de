"""Tiny files in the genuine form of every dataset that the suites read.

Which splits there are is asked of the harness's own settings of its tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.data_fixtures import words

ROWS = 7  # of a file; five are shown before a question


def row_of(path: str, i: int) -> dict[str, Any]:
    """Row `i` of a dataset, with columns that nobody reads, too."""
    text = words(4, i)
    letter = "ABCD"[i % 4]
    options = {each: words(2, 10 * i + n) for n, each in enumerate("ABCD")}
    groups = [["old"], ["nonOld"], ["unknown"]]
    return {
        "cais/mmlu": {
            "question": f" {text}?",
            "subject": "a subject",
            "choices": [words(2, 10 * i + n) for n in range(4)],
            "answer": i % 4,
        },
        "Rowan/hellaswag": {
            "ind": i,
            "activity_label": "Cooking",
            "ctx_a": text,
            "ctx_b": "" if i % 2 else "then he",
            "ctx": text,
            "endings": [f"{words(3, 10 * i + n)} [step]" for n in range(4)],
            "source_id": f"s~{i}",
            "split": "val",
            "split_type": "indomain",
            "label": f"{i % 4}",
        },
        "baber/piqa": {
            "goal": text,
            "sol1": words(3, i + 50),
            "sol2": words(3, i + 90),
            "label": i % 2,
        },
        "allenai/winogrande": {
            "sentence": f"{text} because _ was {words(1, i)}.",
            "option1": "Ann",
            "option2": "Bob",
            "answer": f"{1 + i % 2}",
        },
        "allenai/ai2_arc": {
            "id": f"Mercury_{i}",
            "question": f"{text}?",
            "choices": {
                "text": [words(2, 10 * i + n) for n in range(4)],
                "label": list("1234" if i % 3 == 0 else "ABCD"),
            },
            "answerKey": "1234"[i % 4] if i % 3 == 0 else letter,
        },
        "EleutherAI/lambada_openai": {"text": f"{text} {words(1, i + 3)}"},
        "ceval/ceval-exam": {
            "id": i,
            "question": f"{text} 是____",
            **options,
            "answer": letter,
            "explanation": "",
        },
        "haonan-li/cmmlu": {"Question": f"{text} 是?", **options, "Answer": letter},
        "oskarvanderwal/bbq": {
            "example_id": i,
            "question_index": "1",
            "question_polarity": ("neg", "nonneg")[i % 2],
            "context_condition": ("ambig", "disambig")[i // 2 % 2],
            "category": ("Age", "Religion")[i % 2],
            "answer_info": {
                f"ans{n}": [f"{text.split()[0]}", *group] for n, group in enumerate(groups)
            },
            "additional_metadata": {
                "subcategory": "None",
                "stereotyped_groups": ["old"],
                "version": "a",
                "source": "b",
            },
            "context": f"{text}.",
            "question": f"Who was {words(1, i)}?",
            "ans0": "The grandfather",
            "ans1": "The grandson",
            "ans2": "Not enough info",
            "label": i % 3,
        },
        "jannalu/crows_pairs_multilingual": {
            "id": i,
            "sent_more": f"{text} {words(3, i + 60)}.",
            "sent_less": f"{text} {words(3, i + 80)}.",
            "stereo_antistereo": "stereo",
            "bias_type": "age",
        },
    }[path]


def splits_of_suites(suites: tuple[str, ...]) -> list[Any]:
    """Every split that the suites read, by the harness's own settings."""
    from flame_composer.config.suites import FOLDERS, STEREOSET, SUITES
    from flame_composer.upstream.lm_eval import settings_of
    from flame_composer.use.task_data import splits_of
    from flame_composer.use.tasks import find

    manager = find(list(FOLDERS), None)
    return [
        split
        for suite in suites
        for benchmark in SUITES[suite]
        if benchmark.task != STEREOSET
        for settings in settings_of(manager, [benchmark.task], False).values()
        for split in splits_of(settings, benchmark.shots)
    ]


def write_suites(root: Path, suites: tuple[str, ...]) -> None:
    """The data of the suites, as JSON lines but for a Parquet file and a CSV file here and there,
    in the places where people leave them.
    """
    for number, split in enumerate(splits_of_suites(suites)):
        rows = [row_of(split.path, i) for i in range(ROWS)]
        folder = root / split.path / (split.name or "")
        if split.path == "haonan-li/cmmlu" and number % 2:
            write_csv(root / split.path / split.split / f"{split.name}.csv", rows)
        elif split.path == "ceval/ceval-exam" and number % 2:
            write_csv(root / split.path / split.split / f"{split.name}_{split.split}.csv", rows)
        elif split.path in ("cais/mmlu", "baber/piqa", "allenai/ai2_arc"):
            below = "data" if split.path == "baber/piqa" else ""
            write_parquet(folder / below / f"{split.split}-00000-of-00002.parquet", rows[:3])
            write_parquet(folder / below / f"{split.split}-00001-of-00002.parquet", rows[3:])
        elif split.path == "EleutherAI/lambada_openai":
            write_parquet(folder / split.split / "0000.parquet", rows)
        else:
            write_rows(folder / f"{split.split}.jsonl", rows)
    if "bias" in suites:
        write_stereoset(root / "stereoset/dev.json")


def write_rows(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: list[Any]) -> None:
    """With the number of the row first, in a column without a name, as in CMMLU's archive."""
    import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *rows[0]])
        writer.writerows([i, *row.values()] for i, row in enumerate(rows))


# StereoSet: kind, domain, target; each example's sentences are of words of its own
EXAMPLES = (
    ("intrasentence", "gender", "schoolgirl"),
    ("intrasentence", "gender", "schoolgirl"),
    ("intrasentence", "gender", "grandfather"),
    ("intrasentence", "race", "Sierra Leon"),
    ("intersentence", "race", "Sierra Leon"),
    ("intersentence", "profession", "chess player"),
    ("intersentence", "religion", "Bible"),
)
LABELS = ("unrelated", "stereotype", "anti-stereotype")  # in no order of importance


def sentences_of(i: int) -> Iterator[tuple[str, str]]:
    """The sentences of example `i` with their labels, in an order of its own."""
    for n in range(3):
        which = (n + i) % 3
        yield f"{words(3, 100 * i)} {words(1 + which, 100 * i + which)}.", LABELS[which]


def examples_of(kind: str) -> list[dict[str, Any]]:
    """The examples of a kind, as in the authors' file."""
    return [
        {
            "id": f"{i:032x}",
            "target": target,
            "bias_type": domain,
            "context": f"{words(3, i)} BLANK" if kind == "intrasentence" else words(5, i),
            "sentences": [
                {
                    "sentence": text,
                    "id": f"{i}{n}",
                    "labels": [{"label": label, "human_id": "1"}] * 5,
                    "gold_label": label,
                }
                for n, (text, label) in enumerate(sentences_of(i))
            ],
        }
        for i, (which, domain, target) in enumerate(EXAMPLES)
        if which == kind
    ]


def write_stereoset(path: Path) -> None:
    """The authors' file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {kind: examples_of(kind) for kind in ("intersentence", "intrasentence")}
    path.write_text(json.dumps({"version": "1.1", "data": data}))


def write_stereoset_of_hub(root: Path) -> None:
    """The hub's files: sentences as lists beside each other, labels as numbers."""
    numbers = {"anti-stereotype": 0, "stereotype": 1, "unrelated": 2}
    for kind in ("intersentence", "intrasentence"):
        rows = []
        for row in examples_of(kind):
            each = row["sentences"]
            rows.append(
                {
                    **row,
                    "sentences": {
                        "sentence": [one["sentence"] for one in each],
                        "id": [one["id"] for one in each],
                        "gold_label": [numbers[one["gold_label"]] for one in each],
                    },
                }
            )
        write_parquet(
            root / "McGill-NLP/stereoset" / kind / "validation-00000-of-00001.parquet", rows
        )
