"""StereoSet: scores worked out by hand, likelihoods that are a forward pass's, the files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from flame_composer.errors import ConfigError, DataError
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.text.ends import Ends, with_ends
from tests.benchmark_data import (
    EXAMPLES,
    examples_of,
    sentences_of,
    write_stereoset,
    write_stereoset_of_hub,
)
from tests.conftest import GLA
from tests.data_fixtures import altered, byte_tokenizer, llama_tokenizer, words
from tests.runs import last_json, run_script, two_ranks

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the harness's own code

KINDS = ("intrasentence", "intersentence")


def test_the_scores_worked_out_by_hand() -> None:
    """Likelihoods of the stereotype, its opposite and the unrelated sentence, of four terms.

    intrasentence, gender, "nurse", two examples:
        (-1, -2, -3): the stereotype; both are likelier than the unrelated one
        (-2, -1, -1.5): not the stereotype; one of two
        -> ss 1/2 = 50, lms 3/4 = 75
    intrasentence, gender, "boss": (-1, -2, -0.5): the stereotype; none -> ss 100, lms 0
    intrasentence, race, "Finn": (-2, -2, -2): equal is neither -> ss 0, lms 0
    intersentence, race, "Finn": (-1, -3, -2): the stereotype; one of two -> ss 100, lms 50
    intersentence, religion, "Bible": (-3, -1, -4): not; both -> ss 0, lms 100
    """
    from flame_composer.use.stereoset import summarize
    from flame_composer.use.stereoset_data import Example

    rows = [
        ("intrasentence", "gender", "nurse", (-1.0, -2.0, -3.0)),
        ("intrasentence", "gender", "nurse", (-2.0, -1.0, -1.5)),
        ("intrasentence", "gender", "boss", (-1.0, -2.0, -0.5)),
        ("intrasentence", "race", "Finn", (-2.0, -2.0, -2.0)),
        ("intersentence", "race", "Finn", (-1.0, -3.0, -2.0)),
        ("intersentence", "religion", "Bible", (-3.0, -1.0, -4.0)),
    ]
    examples = [Example(*row[:3], context="", sentences=("", "", "")) for row in rows]
    found = summarize(examples, [row[3] for row in rows])
    by_hand = {
        # nurse (75, 50), boss (0, 100); 37.5 * 25 / 50
        "intrasentence_gender": (37.5, 75, 18.75),
        "intrasentence_race": (0, 0, 0),
        # nurse (75, 50), boss (0, 100), Finn (0, 0)
        "intrasentence": (25, 50, 25),
        "intersentence_race": (50, 100, 0),
        "intersentence_religion": (100, 0, 0),
        # Finn (50, 100), Bible (100, 0)
        "intersentence": (75, 50, 75),
        # nurse (75, 50), boss (0, 100), Finn of both kinds (25, 50), Bible (100, 0)
        "": (50, 50, 50),
    }
    expected = {
        f"{part}_{name}".lstrip("_"): value
        for part, values in by_hand.items()
        for name, value in zip(("lms", "ss", "icat"), values, strict=True)
    }
    # sqrt(sum of squares / 3 / 4): of 25, -50, -25, 50, and of 0, 50, 0, -50
    errors = {"lms_stderr": (6250 / 12) ** 0.5, "ss_stderr": (5000 / 12) ** 0.5}
    assert found == pytest.approx({**expected, **errors}, rel=1e-12)


def model_of(tokenizer: Any, batch_size: int = 3) -> Any:
    from flame_composer.use.harness import HarnessModel

    torch.manual_seed(0)
    config = build_hf_config({**GLA, "initializer_range": 0.3}, tokenizer, 256)
    return HarnessModel(build_model(config).eval(), tokenizer, batch_size=batch_size)


def logs_of(model: Any, before: list[int], ids: list[int]) -> float:
    """The log-likelihood of tokens after others, by one forward pass of its own."""
    with torch.no_grad():
        logits = model.model(torch.tensor([[*before, *ids]])).logits[0].double().log_softmax(-1)
    return sum(logits[len(before) + place - 1, id].item() for place, id in enumerate(ids))


@pytest.mark.parametrize(
    ("ends", "start", "stays"),
    [
        (Ends(True, True), "<s>", True),
        (Ends(False, True), "</s>", False),
        (Ends(False, False), None, False),
        (None, "<s>", True),  # of others, whose template has it
    ],
    ids=["bos", "eos", "nothing", "others"],
)
def test_likelihoods_are_those_of_a_forward_pass(
    ends: Ends | None, start: str | None, stays: bool, tmp_path: Path
) -> None:
    """And do not depend on the batch."""
    from flame_composer.use.stereoset import likelihoods
    from flame_composer.use.stereoset_data import read_examples
    from flame_composer.use.task_data import TaskData

    plain = llama_tokenizer()
    tokenizer = plain if ends is None else with_ends(plain, ends)
    write_stereoset(tmp_path / "stereoset/dev.json")
    examples = read_examples(TaskData(str(tmp_path)), None)
    model = model_of(tokenizer)
    found = likelihoods(model, examples)
    for batch_size in (1, 64):
        again = likelihoods(model_of(tokenizer, batch_size), examples)
        for one, other in zip(found, again, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    begin = [] if start is None else [plain.convert_tokens_to_ids(start)]
    for example, means in zip(examples, found, strict=True):
        for sentence, mean in zip(example.sentences, means, strict=True):
            if example.kind == "intersentence":
                context = [
                    *(begin if stays else []),
                    *plain(f"{example.context}.", add_special_tokens=False).input_ids,
                ]
                both = f"{example.context}. {sentence}"
                whole = [
                    *(begin if stays else []),
                    *plain(both, add_special_tokens=False).input_ids,
                ]
                ids = whole[len(context) :]
                total, count = logs_of(model, whole[: len(context)], ids), len(ids)
            else:
                ids = plain(sentence, add_special_tokens=False).input_ids
                first = 0.0 if start is None else logs_of(model, begin, ids[:1])
                rest = logs_of(model, [*(begin if stays else []), ids[0]], ids[1:])
                total, count = first + rest, len(ids) - (start is None)
            assert mean == pytest.approx(total / count, rel=1e-5)


def test_the_sentences_are_read_by_their_labels(tmp_path: Path) -> None:
    """The same from the authors' file and from the hub's, in whatever order they are."""
    from flame_composer.use.stereoset_data import read_examples
    from flame_composer.use.task_data import TaskData

    write_stereoset(tmp_path / "released/stereoset/dev.json")
    write_stereoset(tmp_path / "other/McGill-NLP/stereoset/dev.json")
    write_stereoset_of_hub(tmp_path / "hub")
    released, other, hub = (
        read_examples(TaskData(str(tmp_path / name)), None) for name in ("released", "other", "hub")
    )
    assert released == other == hub
    assert [(each.kind, each.domain, each.target) for each in released] == [
        row for kind in KINDS for row in EXAMPLES if row[0] == kind
    ]
    for i, example in zip((0, 1, 2, 3, 4, 5, 6), released, strict=True):
        labelled = {label: text for text, label in sentences_of(i)}
        assert example.sentences == tuple(
            labelled[label] for label in ("stereotype", "anti-stereotype", "unrelated")
        )
    few = read_examples(TaskData(str(tmp_path / "hub")), 2)
    assert few == [*released[:2], *released[4:6]]


def test_two_ranks_share_the_sentences(tmp_path: Path) -> None:
    """One of them has an example more than the other."""
    from flame_composer.checkpoint.to_model import save_hf_folder

    torch.manual_seed(0)
    tokenizer = with_ends(byte_tokenizer(), Ends(bos=False, eos=True))
    config = build_hf_config({**GLA, "initializer_range": 0.3}, tokenizer, 256)
    save_hf_folder(build_model(config), tokenizer, tmp_path / "hf", dtype="float32")
    write_stereoset_of_hub(tmp_path / "data")
    keys = (
        "recipes/evaluate.py",
        f"model={tmp_path / 'hf'}",
        "tasks=stereoset",
        f"data_root={tmp_path / 'data'}",
    )
    one = last_json(run_script(*keys))["tasks"]["stereoset"]
    first, second = two_ranks(*keys)
    assert last_json(first)["tasks"]["stereoset"] == one
    assert second.stdout == ""
    assert len(one) > 20


def test_a_sentence_that_is_too_long(tmp_path: Path) -> None:
    from flame_composer.use.stereoset import likelihoods
    from flame_composer.use.stereoset_data import Example

    model = model_of(with_ends(byte_tokenizer(), Ends(False, True)))
    sentences = ("a", "b", words(200, 1))
    example = Example("intrasentence", "race", "x", "BLANK", sentences)
    with pytest.raises(
        DataError, match=r"stereoset: a sentence has \d+ tokens, and max_length is 256"
    ):
        likelihoods(model, [example])


def _altered(path: tuple[Any, ...], value: Any) -> Any:
    """The authors' file with another value at a place, or without it for `...`."""
    return altered({"data": {kind: examples_of(kind) for kind in KINDS}}, path, value)


FIRST = ("data", "intrasentence", 0)
WRONG: dict[str, tuple[Any, str]] = {
    "not_json": ("{", "not valid JSON"),
    "a_list": ([1], "must hold a list of examples at data.intrasentence, not null"),
    "no_kind": (_altered(("data", "intersentence"), ...), "at data.intersentence, not null"),
    "no_examples": (_altered(("data", "intersentence"), []), "at data.intersentence, not an empty"),
    "example": (
        _altered(FIRST, "x"),
        "data.intrasentence: example 1: must be an object, not a str",
    ),
    "target": (
        _altered((*FIRST, "target"), ...),
        "example 1: target must be a text that is not emp",
    ),
    "domain": (
        _altered((*FIRST, "bias_type"), "age"),
        "bias_type must be one of gender, profession,",
    ),
    "sentences": (_altered((*FIRST, "sentences"), []), "example 1: sentences must be three"),
    "lists": (
        _altered((*FIRST, "sentences"), {"sentence": "x"}),
        "sentences must have lists `sentence` and `gold_label`",
    ),
    "sentence": (
        _altered((*FIRST, "sentences", 1), 5),
        "example 1: a sentence must be an object, not a number",
    ),
    "text": (
        _altered((*FIRST, "sentences", 1, "sentence"), " "),
        "sentence must be a text that is",
    ),
    "label": (
        _altered((*FIRST, "sentences", 1, "gold_label"), "unrelated"),
        "must have a sentence for each gold_label: stereotype, anti-stereotype, unrelated",
    ),
    "number": (
        _altered((*FIRST, "sentences", 1, "gold_label"), 7),
        "must have a sentence for each",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_not_stereoset(case: str, tmp_path: Path) -> None:
    from flame_composer.use.stereoset_data import read_examples
    from flame_composer.use.task_data import TaskData

    content, message = WRONG[case]
    file = tmp_path / "stereoset/dev.json"
    file.parent.mkdir()
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError) as caught:
        read_examples(TaskData(str(tmp_path)), None)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_stereoset_is_not_there(tmp_path: Path) -> None:
    from flame_composer.use.stereoset_data import read_examples
    from flame_composer.use.task_data import TaskData

    data = TaskData(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        read_examples(data, None)
    assert "2 files missing, in it: McGill-NLP/stereoset/{intrasentence,intersentence}/val" in str(
        caught.value
    )
    assert str(caught.value).endswith(
        f"or put the authors' dev.json at {tmp_path}/stereoset/dev.json"
    )
    (tmp_path / "stereoset").mkdir()
    os.mkfifo(tmp_path / "stereoset/dev.json")
    with pytest.raises(ConfigError, match=r"dev\.json: is not a file; put the file in its place"):
        read_examples(data, None)
