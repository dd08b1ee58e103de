"""Scores of answers against labels: BLEU and ROUGE, each named by the program that computes it.

Four packages of the extra `metrics` do the counting. None of them downloads anything.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from flame_composer.errors import ConfigError
from flame_composer.quantities import align

PACKAGES = {
    "jieba": "jieba",
    "rouge_chinese": "rouge-chinese",
    "nltk": "NLTK",
    "sacrebleu": "sacrebleu",
    "rouge_score": "rouge-score",
}
FACTORY, SACREBLEU, ROUGE_SCORE = "LLaMA-Factory", "sacrebleu", "rouge-score"
_ROUGE = ("1", "2", "l")
_DIGITS = 4  # after the point, of every score; LLaMA-Factory rounds each answer's scores so


def require_metrics() -> None:
    """Raise ConfigError if a package of the extra `metrics` is not installed."""
    missing = [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ConfigError(
            f"metrics: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
            "; pip install 'flame-composer[metrics]'"
        )


def score(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the scores, in percent, of `pairs` of an answer and its label; there must be some.

    `scores` holds each score by its name and program. A score is None where it would say nothing,
    and `notes` says why. `sacrebleu` is the signature of sacrebleu's BLEU.
    """
    labels = [label for _, label in pairs]
    names = [f"{name} ({FACTORY})" for name in (*(f"rouge-{kind}" for kind in _ROUGE), "bleu-4")]
    measure = factory_scorer()
    each = [measure(*pair) for pair in pairs]
    scores: dict[str, float | None] = {
        name: float(np.mean([found[place] for found in each])) for place, name in enumerate(names)
    }
    scores[f"bleu ({SACREBLEU})"], signature = sacrebleu_score(pairs)
    notes = {}
    if says_nothing(labels):
        means: list[float | None] = [None] * len(_ROUGE)
        notes[ROUGE_SCORE] = (
            "its tokenizer knows a to z and 0 to 9 only, and drops most of what is in these labels"
        )
    else:
        means = [float(mean) for mean in np.mean([rouge_score(*pair) for pair in pairs], axis=0)]
    scores |= {
        f"rouge-{kind} ({ROUGE_SCORE})": mean for kind, mean in zip(_ROUGE, means, strict=True)
    }
    rounded = {
        name: None if value is None else round(value, _DIGITS) for name, value in scores.items()
    }
    return {"examples": len(pairs), "scores": rounded, "sacrebleu": signature, "notes": notes}


def factory_scorer() -> Callable[[str, str], tuple[float, float, float, float]]:
    """Return a function that scores an answer and a label as LLaMA-Factory does.

    It returns ROUGE-1, ROUGE-2 and ROUGE-L over jieba's words, and BLEU-4 over characters with
    NLTK's smoothing method 3, in percent, with 4 decimals. An answer or a label without any word
    has a ROUGE of 0.

    Source: `ComputeSimilarity` in src/llamafactory/train/sft/metric.py of LLaMA-Factory. Its mean
    over all answers is the score that LLaMA-Factory reports.
    """
    words = _chinese_words()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge
    rouge, smooth = Rouge(metrics=["rouge-1", "rouge-2"]), SmoothingFunction().method3

    def score_one(answer: str, label: str) -> tuple[float, float, float, float]:
        hypothesis, reference = (" ".join(words.lcut(text)) for text in (answer, label))
        rouges = [0.0, 0.0, 0.0]
        if hypothesis.split() and reference.split():
            (found,) = rouge.get_scores(hypothesis, reference)
            rouges = [found["rouge-1"]["f"], found["rouge-2"]["f"], 0.0]
            in_sentences = (_words_of(rouge.cut_sent(text)) for text in (hypothesis, reference))
            rouges[2] = _rouge_l(*in_sentences)
        bleu = sentence_bleu([list(label)], list(answer), smoothing_function=smooth)
        first, second, longest, of_four = (round(each * 100, _DIGITS) for each in (*rouges, bleu))
        return first, second, longest, of_four

    return score_one


def _chinese_words() -> Any:
    """Return a jieba tokenizer with its own dictionary, which says nothing and leaves no files.

    jieba would keep the dictionary, marshalled, under a fixed name in the folder for temporary
    files, and load whatever anybody put there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its regular expressions, and pkg_resources
        import jieba
    logging.getLogger("jieba").setLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


def _words_of(sentences: Sequence[str]) -> list[str]:
    """Return the words of a text that was cut into sentences, as rouge-chinese counts them.

    A sentence of nothing but spaces counts as one empty word.
    """
    return [
        word for sentence in sentences if sentence for word in " ".join(sentence.split()).split(" ")
    ]


def _rouge_l(answer: Sequence[str], label: Sequence[str]) -> float:
    """Return rouge-chinese's ROUGE-L of two lists of words.

    Its own function keeps a table with an entry for each pair of words: gigabytes for long answers.
    """
    longest = common_length(answer, label)
    precision, recall = longest / len(answer), longest / len(label)
    return 2.0 * precision * recall / (precision + recall + 1e-8)


def common_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence of `a` and `b`.

    It works on all of `a` at once, in the bits of an integer, in linear memory.

    Source: H. Hyyrö, Bit-parallel LCS-length computation revisited, 2004.
    """
    places: defaultdict[Hashable, int] = defaultdict(int)
    for place, item in enumerate(a):
        places[item] |= 1 << place
    everything = (1 << len(a)) - 1
    unmatched = everything
    for item in b:
        found = unmatched & places.get(item, 0)
        unmatched = ((unmatched + found) | (unmatched - found)) & everything
    return len(a) - unmatched.bit_count()


def sacrebleu_score(pairs: Sequence[tuple[str, str]]) -> tuple[float, str]:
    """Return sacrebleu's BLEU of all pairs as one corpus, and its signature, which says how.

    Texts are split by its tokenizer `zh` if most letters of the labels are Chinese characters, else
    by `13a`.
    """
    from sacrebleu.metrics import BLEU

    answers, labels = map(list, zip(*pairs, strict=True))
    # force: no warnings about texts that look as if they were split already
    bleu = BLEU(tokenize="zh" if is_chinese(labels) else "13a", force=True)
    found = bleu.corpus_score(answers, [labels])
    return found.score, str(bleu.get_signature())


def rouge_score(answer: str, label: str) -> tuple[float, float, float]:
    """Return rouge-score's ROUGE-1, ROUGE-2 and ROUGE-L (F), in percent, without stemming."""
    from rouge_score import rouge_scorer, scoring, tokenize

    found = rouge_scorer.RougeScorer(["rouge1", "rouge2"]).score(label, answer)
    # As in `_rouge_l`, its table of all pairs of words is not needed.
    ours, theirs = (tokenize.tokenize(text, None) for text in (answer, label))
    longest = 0.0
    if ours and theirs:
        common = common_length(ours, theirs)
        longest = scoring.fmeasure(common / len(ours), common / len(theirs))
    first, second = found["rouge1"].fmeasure, found["rouge2"].fmeasure
    return 100 * first, 100 * second, 100 * longest


def is_chinese(texts: Sequence[str]) -> bool:
    """Return whether more than half of the letters in `texts` are Chinese characters."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return 2 * sum(map(_is_chinese, letters)) > len(letters)


def _is_chinese(letter: str) -> bool:
    code = ord(letter)
    return 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFF


def says_nothing(labels: Sequence[str]) -> bool:
    """Return whether rouge-score's tokenizer drops half of the labels' letters and digits or more.

    It keeps a to z and 0 to 9 only.
    """
    signs = [sign for label in labels for sign in label if sign.isalnum()]
    return 2 * sum(sign.isascii() for sign in signs) <= len(signs)


def table(result: dict[str, Any]) -> str:
    """Return the result of `score` as a table with a row for each name and a column a program."""
    rows: dict[str, dict[str, str]] = {}
    for full_name, value in result["scores"].items():
        name, program = full_name.removesuffix(")").split(" (")
        rows.setdefault(name, {})[program] = "-" if value is None else f"{value:.4f}"
    programs = (FACTORY, SACREBLEU, ROUGE_SCORE)
    cells: list[tuple[str, ...]] = [("", *programs)]
    cells += [(name, *(found.get(each, "") for each in programs)) for name, found in rows.items()]
    notes = [f"{program}: {note}" for program, note in result["notes"].items()]
    return "\n".join([*align(cells, left=1), f"sacrebleu: {result['sacrebleu']}", *notes])
