"""Scores of answers: equal to those of LLaMA-Factory, sacrebleu and rouge-score, for any text."""

from __future__ import annotations

import functools
import json
import marshal
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_chinese import Rouge
from rouge_score import rouge_scorer

from flame_composer.errors import ConfigError
from flame_composer.use import metrics
from flame_composer.use.metrics import (
    common_length,
    factory_scorer,
    is_chinese,
    require_metrics,
    rouge_score,
    says_nothing,
    score,
    table,
)

RECORDED = Path(__file__).parents[1] / "fixtures/metrics/similarity.json"
NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
ENGLISH = [
    ("the cat sat on the mat", "a cat sat on a mat"),
    ("Return the number of lines.", "Return the number of lines in a file."),
    ("No!", "It's a state-of-the-art model, isn't it?"),
]
CHINESE = [
    ("今天天气很好，我们去公园。", "今天天气真好，我们一起去公园吧！"),
    ("你好 world", "你好，世界"),
]
words, scorer = functools.cache(metrics._chinese_words), functools.cache(factory_scorer)
texts = st.text(st.characters(codec="utf-8") | st.sampled_from("ab 的是。？\n"), max_size=40)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def test_every_pair_scores_as_in_llama_factory(recorded: dict[str, Any]) -> None:
    """What its code gave is in the fixture, which tests/fixtures/metrics/record.py made."""
    measure, pairs = factory_scorer(), recorded["pairs"]
    assert len(pairs) >= 60
    for pair in pairs:
        found = dict(zip(NAMES, measure(pair["predict"], pair["label"]), strict=True))
        assert found == {name: pair[name] for name in NAMES}, pair


def test_the_mean_is_that_of_llama_factory(recorded: dict[str, Any]) -> None:
    pairs = [(pair["predict"], pair["label"]) for pair in recorded["pairs"]]
    found = score(pairs)["scores"]
    assert {name: found[f"{name} (LLaMA-Factory)"] for name in NAMES} == {
        name: round(recorded["all"][name], 4) for name in NAMES
    }


@given(texts, texts)
def test_rouge_l_is_that_of_rouge_chinese(answer: str, label: str) -> None:
    hypothesis, reference = (" ".join(words().lcut(text)) for text in (answer, label))
    theirs = 0.0
    if hypothesis.split() and reference.split():
        theirs = Rouge().get_scores(hypothesis, reference)[0]["rouge-l"]["f"]
    assert scorer()(answer, label)[2] == round(theirs * 100, 4)


@given(texts, texts)
def test_rouge_score_is_what_that_package_gives(answer: str, label: str) -> None:
    theirs = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]).score(label, answer)
    assert rouge_score(answer, label) == pytest.approx([100 * t.fmeasure for t in theirs.values()])


@pytest.mark.parametrize(("pairs", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh")])
def test_sacrebleu_of_the_whole_corpus(pairs: list[tuple[str, str]], tokenizer: str) -> None:
    answers, labels = zip(*pairs, strict=True)
    theirs = sacrebleu.corpus_bleu(list(answers), [list(labels)], tokenize=tokenizer)
    found = score(pairs)
    assert found["scores"]["bleu (sacrebleu)"] == round(theirs.score, 4) > 0
    version = sacrebleu.__version__
    assert found["sacrebleu"] == (
        f"nrefs:1|case:mixed|eff:no|tok:{tokenizer}|smooth:exp|version:{version}"
    )


def test_what_rouge_score_cannot_say_is_null_with_the_reason() -> None:
    found = score(CHINESE)
    nulls = [name for name, value in found["scores"].items() if value is None]
    assert nulls == [f"rouge-{kind} (rouge-score)" for kind in ("1", "2", "l")]
    assert "drops most of what is in these labels" in found["notes"]["rouge-score"]
    assert found["notes"]["rouge-score"] in table(found)
    assert score(ENGLISH)["notes"] == {}
    assert None not in score(ENGLISH)["scores"].values()


def test_the_languages_that_decide() -> None:
    assert is_chinese(["今天 ok", "天气"])
    assert not is_chinese(["今天 a word"])
    assert not is_chinese(["", "12 !?"])
    assert not is_chinese(["ひらがなとカタカナ"])
    assert says_nothing(["Это по-русски", "да 1"])
    assert says_nothing(["!?"])
    assert not says_nothing(["naïve café"])


def test_long_answers_take_seconds_and_little_memory() -> None:
    """A table of all pairs of words would have 400 million entries."""
    choose = random.Random(0)
    known = [f"w{number}" for number in range(500)]
    answer, label = (" ".join(choose.choices(known, k=20_000)) for _ in range(2))
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    started = time.monotonic()
    found = score([(answer, label), (rare, rare[::-1]), ("的" * 30_000, "的" * 30_000)])
    assert time.monotonic() - started < 120
    assert found["scores"]["rouge-l (LLaMA-Factory)"] > 0


def test_the_longest_common_subsequence() -> None:
    assert common_length("nematode knowledge", "empty bottle") == 7
    assert common_length("", "a") == common_length("a", "") == common_length("", "") == 0
    assert common_length([1, 2, 3, 4], [4, 1, 2, 4]) == 3


def test_a_planted_dictionary_is_not_read_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """jieba itself reads jieba.cache, marshalled, from the folder for temporary files."""
    script = (
        "from flame_composer.use.metrics import factory_scorer\n"
        "print(factory_scorer()('南京市长江大桥', '南京市长江'))"
    )
    planted = tmp_path / "jieba.cache"
    content = marshal.dumps(({"南京市长江大桥": 10**6, "南京市长江": 10**6}, 10**7))
    planted.write_bytes(content)
    outcomes = []
    for folder in (tmp_path, tmp_path / "clean"):
        folder.mkdir(exist_ok=True)
        before = sorted(os.listdir(folder))
        env = {**os.environ, "TMPDIR": str(folder), "HOME": str(folder)}
        run = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert run.stderr == "", "jieba tells of its dictionary"
        assert [name for name in sorted(os.listdir(folder)) if name != "clean"] == before
        outcomes.append(run.stdout)
    assert outcomes[0] == outcomes[1]
    assert planted.read_bytes() == content


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_metrics()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ConfigError, match="jieba is not installed; pip install"):
        require_metrics()
