"""The columns that the harness's tasks of our suites read, by dataset, and what is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flame_composer.config.rules import is_text
from flame_composer.text.jsonl import kind_of


class Column(NamedTuple):
    """What a value of a column is, in words and as a check."""

    what: str
    fits: Callable[[Any], bool]


class Layout(NamedTuple):
    """The columns of a dataset that are read, and a check of how they go together.

    `problem` gets a row whose values each fit, and returns what is wrong with it, or "".
    """

    columns: dict[str, Column]
    problem: Callable[[Mapping[str, Any]], str] = lambda _: ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_text(value)


def _is_said(value: Any) -> bool:
    return _is_text(value) and bool(value.strip())


def _is_index(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _are_texts(value: Any, count: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and len(value) == (count or len(value))
        and all(map(_is_text, value))
    )


def _index(count: int) -> Column:
    return Column(f"a number from 0 to {count - 1}", lambda value: _is_index(value, count))


def _texts(count: int) -> Column:
    return Column(f"a list of {count} texts", lambda value: _are_texts(value, count))


def _one_of(*allowed: str) -> Column:
    return Column(f"one of {', '.join(allowed)}", lambda value: value in allowed)


TEXT = Column("a text", _is_text)
SAID = Column("a text that is not empty", _is_said)
DIGITS = ("0", "1", "2", "3")
LETTERS = ("A", "B", "C", "D")


def _is_choices(value: Any) -> bool:
    if not isinstance(value, dict) or not {"text", "label"} <= value.keys():
        return False
    texts, labels = value["text"], value["label"]
    return _are_texts(texts) and _are_texts(labels) and len(texts) == len(labels) > 1


def _labelled(row: Mapping[str, Any]) -> str:
    known = row["answerKey"] in row["choices"]["label"]
    return "" if known else "answerKey must be one of the labels in choices"


def _with_gap(row: Mapping[str, Any]) -> str:
    return "" if "_" in row["sentence"] else "sentence must hold a _, the gap to be filled"


def _of_words(row: Mapping[str, Any]) -> str:
    return "" if " " in row["text"].strip() else "text must have two words or more"


CATEGORIES = (
    "Age",
    "Disability_status",
    "Gender_identity",
    "Nationality",
    "Physical_appearance",
    "Race_ethnicity",
    "Race_x_gender",
    "Race_x_SES",
    "Religion",
    "SES",
    "Sexual_orientation",
)
ANSWERS = ("ans0", "ans1", "ans2")
# The harness's own list, with which it finds the answer that stands for no answer.
UNKNOWN = (
    "Unknown",
    "Cannot answer",
    "Can't be determined",
    "Cannot be determined",
    "Can't answer",
    "Not known",
    "Not enough info",
    "Not enough information",
    "Not answerable",
    "Undetermined",
)


def _is_answer_info(value: Any) -> bool:
    return isinstance(value, dict) and all(_are_texts(value.get(name)) for name in ANSWERS)


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and _are_texts(value.get("stereotyped_groups"))


def _with_unknown(row: Mapping[str, Any]) -> str:
    known = any(row[name] in UNKNOWN for name in ANSWERS)
    return "" if known else "one of ans0, ans1 and ans2 must be an answer like 'Unknown'"


_QUESTION = {"question": SAID, "A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT}
LAYOUTS: dict[str, Layout] = {
    "cais/mmlu": Layout({"question": SAID, "choices": _texts(4), "answer": _index(4)}),
    "Rowan/hellaswag": Layout(
        {
            "activity_label": TEXT,
            "ctx_a": TEXT,
            "ctx_b": TEXT,
            "endings": _texts(4),
            "label": Column("a digit from 0 to 3", lambda value: f"{value}" in DIGITS),
        }
    ),
    "baber/piqa": Layout({"goal": SAID, "sol1": TEXT, "sol2": TEXT, "label": _index(2)}),
    "allenai/winogrande": Layout(
        {"sentence": SAID, "option1": SAID, "option2": SAID, "answer": _one_of("1", "2")},
        _with_gap,
    ),
    "allenai/ai2_arc": Layout(
        {
            "question": SAID,
            "choices": Column("an object with lists `text` and `label`, equally long", _is_choices),
            "answerKey": SAID,
        },
        _labelled,
    ),
    "EleutherAI/lambada_openai": Layout({"text": SAID}, _of_words),
    "ceval/ceval-exam": Layout({**_QUESTION, "answer": _one_of(*LETTERS)}),
    "haonan-li/cmmlu": Layout(
        {"Question": SAID, "A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT, "Answer": _one_of(*LETTERS)}
    ),
    "oskarvanderwal/bbq": Layout(
        {
            "context": SAID,
            "question": SAID,
            "question_polarity": _one_of("neg", "nonneg"),
            "context_condition": _one_of("ambig", "disambig"),
            "category": _one_of(*CATEGORIES),
            "ans0": SAID,
            "ans1": SAID,
            "ans2": SAID,
            "answer_info": Column("an object with lists `ans0`, `ans1`, `ans2`", _is_answer_info),
            "additional_metadata": Column(
                "an object with a list `stereotyped_groups`", _is_metadata
            ),
            "label": _index(3),
        },
        _with_unknown,
    ),
    "jannalu/crows_pairs_multilingual": Layout(
        {"sent_more": SAID, "sent_less": SAID, "bias_type": SAID}
    ),
}


def problem_of(row: Mapping[str, Any], layout: Layout) -> str:
    """Return what is wrong with a row of a dataset of this layout, as words, or ""."""
    for name, column in layout.columns.items():
        if name not in row:
            return f"no column '{name}'; it has {', '.join(map(str, row)) or 'none'}"[:300]
        value = row[name]
        if not column.fits(value):
            shown = f" {value!r}"[:40] if isinstance(value, (str, int, float)) else ""
            return f"column '{name}' must be {column.what}, not {kind_of(value)}{shown}"
    return layout.problem(row)
