"""Cleaning: what each step removes and keeps, that every document is accounted for, and that
nothing disturbs the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter

from flame_composer.cleaning import executors, filters
from flame_composer.cleaning import stages as cleaning
from flame_composer.cleaning.filters import UnicodeTokenizer, build_filters, build_mask
from flame_composer.cleaning.parts import Counts, PartsFolder, inputs_of
from flame_composer.cleaning.report import report
from flame_composer.config.clean import (
    C4Config,
    CleanConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    LanguageConfig,
    MinhashConfig,
    PiiConfig,
    RayConfig,
    SlurmConfig,
)
from flame_composer.dataset.plan import plan_units
from flame_composer.errors import ConfigError, DataError
from flame_composer.storage.files import dump_json
from flame_composer.text.sources import find_files
from tests.data_fixtures import (
    WRONG,
    altered,
    byte_tokenizer,
    files_under,
    places,
    write_configurations,
)
from tests.runs import ROOT, Script, check, last_json, run_script

NOUNS = (  # noqa: SIM905
    "river bridge garden window teacher letter market morning village harbour engine question"
    " answer mountain forest story kitchen table winter summer doctor painter farmer island castle"
    " station journey island ladder mirror pencil basket blanket bottle button candle carpet corner"
    " engine feather hammer jacket kettle lantern needle orchard pillow puzzle"
).split()
VERBS = (  # noqa: SIM905
    "crossed found carried painted answered followed measured opened repaired visited described"
    " counted"
).split()
ADJECTIVES = (  # noqa: SIM905
    "old quiet bright narrow distant curious heavy gentle broken empty golden patient hidden simple"
    " careful"
).split()
ALL_OFF = (
    "gopher_repetition=null",
    "gopher_quality=null",
    "c4=null",
    "exact_dedup=false",
    "minhash=null",
    "pii=null",
)


def prose(seed: int, sentences: int = 12) -> str:
    """English that every filter keeps, in paragraphs of four sentences."""
    choose = random.Random(seed)

    def noun() -> str:
        return f"{choose.choice(ADJECTIVES)} {choose.choice(NOUNS)}"

    lines = []
    for _ in range(sentences):
        verb, other = choose.choices(VERBS, k=2)
        lines.append(
            f"The {noun()} {verb} the {noun()} with a {noun()} and {other} {choose.choice(NOUNS)}"
            f" of that {noun()}."
        )
    return "\n\n".join(" ".join(lines[i : i + 4]) for i in range(0, sentences, 4))


def with_changed_words(text: str, count: int, seed: int) -> str:
    words, choose = text.split(" "), random.Random(seed)
    for i in choose.sample(range(len(words)), count):
        words[i] = f"other{seed}"
    return " ".join(words)


def judge(config: CleanConfig, text: str) -> tuple[str, str, str]:
    """The step that removes the text and why, "" if none does, and what the steps made of it."""
    document = Document(text, "id")
    for name, step in build_filters(config).items():
        is_kept, reason = filters.judge(name, step, document)
        if not is_kept:
            return name, reason, document.text
    return "", "", document.text


def config_with(**given: Any) -> CleanConfig:
    off: dict[str, Any] = {
        "gopher_repetition": None,
        "gopher_quality": None,
        "c4": None,
        "minhash": None,
        "pii": None,
    }
    return CleanConfig(source=["s"], out="o", **off | given)


QUALITY = [
    ("gopher_short_doc", prose(1, 2), {"min_doc_words": 30}),
    ("gopher_long_doc", " ".join(prose(seed, 100) for seed in range(60)), {"max_doc_words": 0}),
    ("gopher_below_avg_threshold", "to be of an it as is " * 20, {"min_avg_word_length": 2}),
    (
        "gopher_above_avg_threshold",
        "the of internationalization counterrevolutionaries " * 20,
        {"max_avg_word_length": 20},
    ),
    (
        "gopher_too_many_hashes",
        prose(1).replace("The", "# # # The"),
        {"max_symbol_word_ratio": 0.3},
    ),
    (
        "gopher_too_many_ellipsis",
        prose(1).replace(" ", "… "),
        {"max_symbol_word_ratio": 0.0, "min_alpha_words_ratio": 0.0},
    ),
    (
        "gopher_too_many_bullets",
        "- " + prose(1).replace("\n\n", "\n- "),
        {"max_bullet_lines_ratio": 0.0},
    ),
    (
        "gopher_too_many_end_ellipsis",
        prose(1).replace(".", "…").replace(" The", "\nThe"),
        {"max_ellipsis_lines_ratio": 0.0},
    ),
    (
        "gopher_below_alpha_threshold",
        prose(1) + " 7 + 5 - 3 = 9 ;" * 9,
        {"min_alpha_words_ratio": 0.5},
    ),
    (
        "gopher_enough_stop_words",
        "Katze Hund Garten Fenster Lehrer " * 20,
        {"stop_words": ["Hund", "Katze"]},
    ),
    ("gopher_enough_stop_words", "Katze Hund Garten Fenster Lehrer " * 20, {"min_stop_words": 0}),
]


@pytest.mark.parametrize(
    ("reason", "text", "relaxed"), QUALITY, ids=[reason for reason, *_ in QUALITY]
)
def test_gopher_quality(reason: str, text: str, relaxed: dict[str, Any]) -> None:
    assert judge(config_with(gopher_quality=GopherQualityConfig()), text)[:2] == (
        "gopher_quality",
        reason,
    )
    assert judge(config_with(gopher_quality=GopherQualityConfig(**relaxed)), text)[:2] == (
        "",
        "",
    ), "for no other reason"


PARAGRAPHS = [prose(seed, 4) for seed in range(10)]
REPETITION = [
    ("dup_para_frac", "\n\n".join([*PARAGRAPHS[:5], *["A lone line."] * 6]), "dup_para_frac"),
    (
        "dup_para_char_frac",
        "\n\n".join([*PARAGRAPHS[:7], PARAGRAPHS[0], PARAGRAPHS[1], PARAGRAPHS[2]]),
        "dup_para_char_frac",
    ),
    ("dup_line_frac", "\n".join([*PARAGRAPHS[:5], *["A lone line."] * 6]), "dup_line_frac"),
    (
        "dup_line_char_frac",
        "\n".join([*PARAGRAPHS[:7], PARAGRAPHS[0], PARAGRAPHS[1], PARAGRAPHS[2]]),
        "dup_line_char_frac",
    ),
    (
        "top_2_gram",
        prose(1).replace(" the ", " big international ").replace(" a ", " big international "),
        "top_n_grams",
    ),
    (
        "duplicated_5_n_grams",
        prose(1).replace(" and ", " international organisation committee meeting place "),
        "dup_n_grams",
    ),
]


@pytest.mark.parametrize(
    ("reason", "text", "limit"), REPETITION, ids=[reason for reason, *_ in REPETITION]
)
def test_gopher_repetition(reason: str, text: str, limit: str) -> None:
    others = {
        field.name: 0.0
        for field in dataclasses.fields(GopherRepetitionConfig)
        if field.name.startswith("dup_")
    }
    others |= {"top_n_grams": [0.0] * 3, "dup_n_grams": [0.0] * 6}
    default = getattr(GopherRepetitionConfig(), limit)
    only = config_with(gopher_repetition=GopherRepetitionConfig(**others | {limit: default}))
    assert judge(only, text)[:2] == ("gopher_repetition", reason)
    assert judge(only, prose(1))[:2] == ("", "")
    assert judge(config_with(gopher_repetition=GopherRepetitionConfig(**others)), text)[:2] == (
        "",
        "",
    ), "0 is no limit"


@pytest.mark.parametrize(
    ("line", "switch"),
    [
        ("Two words.", {"min_words_per_line": 0}),
        (f"One word is {'x' * 1001} long.", {"max_word_length": 0}),
        ("Please turn on JavaScript to go on.", {"filter_javascript": False}),
        ("Read our Privacy Policy before that.", {"filter_policy": False}),
    ],
)
def test_c4_removes_lines(line: str, switch: dict[str, Any]) -> None:
    text = prose(1).replace("\n\n", "\n")
    assert judge(config_with(c4=C4Config()), f"{text}\n{line}") == ("", "", text)
    assert judge(config_with(c4=C4Config(**switch)), f"{text}\n{line}") == (
        "",
        "",
        f"{text}\n{line}",
    )


def test_c4_removes_documents_and_marks() -> None:
    text = prose(1)
    c4 = config_with(c4=C4Config())
    assert judge(c4, text + "\nint main() { return 0; } is the code.")[:2] == (
        "c4",
        "curly_bracket",
    )
    assert judge(c4, text + "\nLorem ipsum dolor sit amet.")[:2] == ("c4", "lorem_ipsum")
    assert judge(c4, prose(1, 4))[:2] == ("c4", "too_few_sentences")
    assert judge(config_with(c4=C4Config(min_num_sentences=4)), prose(1, 4))[:2] == ("", "")
    assert judge(config_with(c4=C4Config(min_num_sentences=0)), "Two words.")[:2] == (
        "c4",
        "no_line_left",
    )
    marked = text.replace("that", "that[12]")
    assert judge(c4, marked)[2] == judge(c4, text)[2]
    assert judge(config_with(c4=C4Config(remove_citations=False)), marked)[2].count(
        "[12]"
    ) == marked.count("[12]")
    for switch, line in (
        ("filter_curly_bracket", "int main() { return 0; }."),
        ("filter_lorem_ipsum", "Lorem ipsum."),
    ):
        assert judge(
            config_with(c4=C4Config(**{switch: False}, min_words_per_line=0)), f"{text}\n{line}"
        )[:2] == ("", "")
    unpunctuated = text + "\nA heading without a stop"
    assert judge(c4, unpunctuated)[2].endswith("without a stop")
    assert (
        judge(config_with(c4=C4Config(filter_no_terminal_punct=True)), unpunctuated)[2]
        == judge(c4, text)[2]
    )


def test_sentences() -> None:
    text = (
        'Mr. J. R. Smith paid 3.14 euros. "Why?" he asked! 你好。再见。 U.S. trade...\n'
        "no stop\n"
        "\n"
        "end"
    )
    assert UnicodeTokenizer().sent_tokenize(text) == [
        "Mr.",
        "J. R. Smith paid 3.14 euros.",
        '"Why?"',
        "he asked!",
        "你好。",
        "再见。",
        "U.S. trade...",
        "no stop",
        "end",
    ]
    assert UnicodeTokenizer().word_tokenize("It's 3.14, naïve: a\u200b  b\n") == [
        "It's",
        "3.14",
        ",",
        "naïve",
        ":",
        "a",
        "\u200b",
        "b",
    ]


@pytest.mark.parametrize(
    ("section", "block", "renamed"),
    [
        (
            GopherQualityConfig(),
            GopherQualityFilter,
            {"min_alpha_words_ratio": "max_non_alpha_words_ratio"},
        ),
        (GopherRepetitionConfig(), GopherRepetitionFilter, {}),
        (C4Config(), C4QualityFilter, {}),
    ],
)
def test_every_limit_of_datatrove_is_ours_with_its_default(
    section: Any, block: type, renamed: dict[str, str]
) -> None:
    ours = {renamed.get(name, name): value for name, value in dataclasses.asdict(section).items()}
    theirs = {name: each.default for name, each in inspect.signature(block).parameters.items()}
    for name in ("exclusion_writer", "language", "split_paragraph"):
        theirs.pop(name, None)
    assert theirs.keys() == ours.keys()
    for name in ("top_n_grams", "dup_n_grams"):
        if name in theirs:
            assert [limit for _, limit in theirs.pop(name)] == ours.pop(name)
    if section == C4Config():
        assert theirs.pop("filter_no_terminal_punct") is not ours.pop("filter_no_terminal_punct"), (
            "as in FineWeb"
        )
    if section == GopherQualityConfig():
        from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS

        assert theirs.pop("stop_words") is None
        assert ours.pop("stop_words") == STOP_WORDS
    assert theirs == ours


@pytest.mark.parametrize(
    ("section", "masked"),
    [
        (
            PiiConfig(),
            "Write to email@example.com or email@example.com at 22.214.171.124, not 192.168.0.1.",
        ),
        (
            PiiConfig(emails=None, public_ips_only=False, ips="IP"),
            "Write to a.b+c@site.org or x@y.co.uk at IP, not IP.",
        ),
        (PiiConfig(emails="", ips=None), "Write to  or  at 8.8.8.8, not 192.168.0.1."),
    ],
)
def test_pii(section: PiiConfig, masked: str) -> None:
    mask = build_mask(config_with(pii=section))
    assert mask is not None
    assert (
        mask.format("Write to a.b+c@site.org or x@y.co.uk at 8.8.8.8, not 192.168.0.1.") == masked
    )


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real fastText model that tells our prose from made-up German."""
    import fasttext

    folder = tmp_path_factory.mktemp("language")
    words = [
        "der",
        "die",
        "das",
        "und",
        "ist",
        "nicht",
        "ein",
        "Haus",
        "Wald",
        "Berg",
        "geht",
        "alte",
    ]
    german = [" ".join(random.Random(seed).choices(words, k=30)) for seed in range(50)]
    lines = [f"__label__en {prose(seed, 3)}".replace("\n", " ") for seed in range(50)] + [
        f"__label__de {x}" for x in german
    ]
    (folder / "train.txt").write_text("\n".join(lines))
    # fastText 0.9.2 sets a tenth of its matrix to what it should be for every thread, and leaves
    # the rest as it finds it.
    model = fasttext.train_supervised(
        str(folder / "train.txt"), epoch=30, dim=10, thread=10, verbose=0
    )
    model.save_model(str(folder / "model.bin"))
    return str(folder / "model.bin")


def test_language(language_model: str) -> None:
    config = config_with(language=LanguageConfig(language_model))
    assert judge(config, prose(99))[:2] == ("", "")
    assert judge(config, "der alte Wald und das Haus ist nicht der Berg")[:2] == ("language", "de")
    both = config_with(language=LanguageConfig(language_model, ["de", "en"]))
    assert judge(both, "der alte Wald und das Haus ist nicht der Berg")[:2] == ("", "")
    anything = config_with(language=LanguageConfig(language_model, ["en"], threshold=0.0))
    assert judge(anything, "der alte Wald und das Haus ist nicht der Berg")[:2] == ("", "")


def write_documents(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read_documents(folder: Path) -> list[tuple[str, str]]:
    """Ids and texts, in the order in which convert/to_mds.py reads them."""
    found = [
        json.loads(line) for path in find_files([str(folder)]) for line in lines_of(Path(path))
    ]
    return [(record["id"], record["text"]) for record in found]


def lines_of(path: Path) -> Iterator[bytes]:
    import pyarrow

    compression = "zstd" if path.suffix == ".zst" else "gzip" if path.suffix == ".gz" else None
    with pyarrow.input_stream(str(path), compression=compression) as stream:
        yield from stream.read().splitlines()


def clean(source: Path, out: Path, *keys: str) -> dict[str, Any]:
    return last_json(run_script("convert/clean.py", f"source={source}", f"out={out}", *keys))


def test_of_equal_documents_the_first_stays(tmp_path: Path) -> None:
    """Also where a later unit has the document further to its front, and whatever the units are."""
    texts = [
        prose(1),
        prose(2),
        prose(3),
        prose(4),
        prose(2),
        prose(4),
        prose(5),
        prose(1),
        prose(4),
    ]
    source = write_documents(tmp_path / "a.jsonl", texts)
    for size in (4000, 10**6):
        result = clean(
            source,
            tmp_path / f"out{size}",
            *ALL_OFF[:3],
            *ALL_OFF[4:],
            "exact_dedup=true",
            f"unit_size={size}",
            "num_workers=1",
        )
        assert result["removed"] == {"exact_dedup": 4}
        kept = read_documents(tmp_path / f"out{size}")
        assert [text for _, text in kept] == [prose(1), prose(2), prose(3), prose(4), prose(5)]
        for place, text in kept:
            path, _, position = place.rpartition(":")
            with Path(path).open("rb") as file:
                file.seek(int(position))
                assert json.loads(file.readline())["text"] == text


def test_of_similar_documents_the_first_stays(tmp_path: Path) -> None:
    """Clusters of sizes from 1 to 6, scattered; their members differ in a few words, and never
    from the first only.
    """
    clusters = [
        [
            with_changed_words(prose(100 + i, 60), 4, j) if j else prose(100 + i, 60)
            for j in range(1 + i % 6)
        ]
        for i in range(12)
    ]
    labelled = [(i, text) for i, cluster in enumerate(clusters) for text in cluster]
    random.Random(5).shuffle(labelled)
    source = write_documents(tmp_path / "a.jsonl", [text for _, text in labelled])
    firsts = [text for n, (i, text) in enumerate(labelled) if i not in [j for j, _ in labelled[:n]]]
    for size in (60_000, 10**6):
        result = clean(
            source,
            tmp_path / f"out{size}",
            *ALL_OFF[:4],
            "pii=null",
            f"unit_size={size}",
            "num_workers=1",
        )
        assert result["removed"] == {"minhash": len(labelled) - len(clusters)}
        assert [text for _, text in read_documents(tmp_path / f"out{size}")] == firsts


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of every kind, in several files, and what a cleaning that nothing disturbed made
    of them.
    """

    source: Path
    out: Path
    removed: Path
    result: dict[str, Any]


KEYS = ("unit_size=40000", "gopher_repetition.dup_n_grams=0,0,0,0,0,0")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("clean")
    texts = [prose(seed, 20) for seed in range(60)]
    texts[7] += " Write to somebody@site.org."
    code = "int f() { return 1; }\n" + prose(70, 20)
    extra = [texts[3], with_changed_words(texts[5], 2, 1), prose(80, 2), "", code, texts[3]]
    write_documents(folder / "source/a.jsonl", texts[:40] + extra)
    (folder / "source/b.txt").write_text(texts[41])
    write_documents(folder / "source/c.jsonl", [texts[4], *texts[40:]])
    out, removed = folder / "out", folder / "removed"
    result = clean(folder / "source", out, f"removed_out={removed}", "num_workers=1", *KEYS)
    return Corpus(folder / "source", out, removed, result)


def test_every_document_is_accounted_for(corpus: Corpus) -> None:
    assert corpus.result == {
        "documents": 68,
        "unreadable": 0,
        "empty": 1,
        "removed": {
            "gopher_repetition": 0,
            "gopher_quality": 1,
            "c4": 1,
            "exact_dedup": 4,
            "minhash": 1,
        },
        "changed": {"c4": 65, "pii": 1},
        "documents_out": 60,
        "characters": corpus.result["characters"],
        "characters_out": corpus.result["characters_out"],
    }
    assert (
        corpus.result["documents"]
        == 1 + sum(corpus.result["removed"].values()) + corpus.result["documents_out"]
    )
    kept = read_documents(corpus.out)
    assert len(kept) == 60
    assert not any("site.org" in text for _, text in kept)
    assert sum(len(text) for _, text in kept) == corpus.result["characters_out"]
    removed = {step.name: read_documents(step) for step in (corpus.removed / "documents").iterdir()}
    assert {step: len(found) for step, found in removed.items()} == {
        "gopher_quality": 1,
        "c4": 1,
        "exact_dedup": 4,
        "minhash": 1,
    }
    assert removed["gopher_quality"][0][1] == prose(80, 2)
    ids = [place for place, _ in kept] + [place for found in removed.values() for place, _ in found]
    assert len(set(ids)) == 67, "no document is in two places"


def test_what_is_written_is_a_source_for_conversion(corpus: Corpus, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    check(
        run_script(
            "convert/to_mds.py",
            f"source={corpus.out}",
            f"tokenizer={tmp_path / 'tokenizer'}",
            "num_workers=1",
            f"out={tmp_path / 'mds'}",
            "context_length=64",
        )
    )
    totals = json.loads((tmp_path / "mds/manifest.json").read_text())["totals"]
    assert totals["documents"] == corpus.result["documents_out"]
    ends = sum(
        len(byte_tokenizer()(text)["input_ids"]) + 1 for _, text in read_documents(corpus.out)
    )
    assert totals["tokens_in"] == ends


@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_result_does_not_depend_on_the_workers(
    corpus: Corpus, tmp_path: Path, num_workers: int
) -> None:
    again, removed = tmp_path / "out", tmp_path / "removed"
    assert (
        clean(corpus.source, again, f"removed_out={removed}", f"num_workers={num_workers}", *KEYS)
        == corpus.result
    )
    assert files_under(again / "documents") == files_under(corpus.out / "documents")
    assert files_under(removed / "documents") == files_under(corpus.removed / "documents")
    assert not list(again.glob(".*"))


def test_killed_and_started_again(corpus: Corpus, tmp_path: Path) -> None:
    """Killed in every stage it can be met in, with 1 and 2 workers, over and over; no part is
    mistaken for the whole.
    """
    out, choose = tmp_path / "out", random.Random(0)
    command = ("convert/clean.py", f"source={corpus.source}", f"out={out}", *KEYS)
    kills = 0
    stages = ("filter", "hash", "cluster", "finish")
    for stage in stages:
        script = Script(*command, f"num_workers={choose.choice([1, 1, 2])}")
        while script.process.is_alive() and not list(out.glob(f".work/logs/{stage}/completions/*")):
            time.sleep(0.001)
        time.sleep(choose.random() * 0.02)
        script.process.kill()
        if script.wait().returncode == -signal.SIGKILL:
            kills += 1
            assert not (out / "manifest.json").exists()
            assert (
                run_script(
                    "convert/to_mds.py", f"source={out}", "tokenizer=x", f"out={tmp_path / 'x'}"
                ).returncode
                == 2
            )
    assert kills >= len(stages) - 1
    assert last_json(run_script(*command, "num_workers=1")) == corpus.result
    assert files_under(out / "documents") == files_under(corpus.out / "documents")

    before = files_under(out)
    again = check(run_script(*command, "num_workers=2"))
    assert again.stdout.startswith(f"{out}: already finished, nothing to do\n")
    assert json.loads(again.stdout.splitlines()[-1]) == corpus.result
    assert files_under(out) == before


def test_workers_that_are_stopped_end_with_the_process_in_charge(
    corpus: Corpus, tmp_path: Path
) -> None:
    script = Script(
        "convert/clean.py",
        f"source={corpus.source}",
        f"out={tmp_path / 'out'}",
        *KEYS,
        "num_workers=2",
    )
    pid, started = script.process.pid, []
    assert pid is not None
    while len(started) < 3:  # a fork server and two workers
        assert script.process.is_alive(), script.read("err")
        children = psutil.Process(pid).children(recursive=True)
        started = [each for each in children if "resource_tracker" not in " ".join(each.cmdline())]
    os.killpg(pid, signal.SIGSTOP)
    script.process.kill()
    script.wait()
    try:
        assert psutil.wait_procs(started, timeout=10)[1] == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            # Python's own resource tracker, unless it has ended already
            os.killpg(pid, signal.SIGCONT)


def test_a_source_that_was_mended_is_read_again(tmp_path: Path) -> None:
    texts = [prose(seed, 30) for seed in range(12)]
    source = write_documents(tmp_path / "source/a.jsonl", texts[:6])
    bad = write_documents(tmp_path / "source/b.jsonl", [texts[2], *texts[6:]])
    good = bad.read_bytes()
    damaged = good[:100] + b'"' + good[101:]  # a quotation mark inside the first text
    bad.write_bytes(damaged)
    command = (
        "convert/clean.py",
        f"source={source.parent}",
        "unit_size=12000",
        "num_workers=1",
        "minhash=null",
    )
    failed = run_script(*command, f"out={tmp_path / 'out'}")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"error: {bad}:1: not valid JSON: ")
    assert "Traceback" not in failed.stderr
    skipped = last_json(run_script(*command, f"out={tmp_path / 'skipped'}", "on_error=skip"))
    assert (skipped["documents"], skipped["unreadable"], skipped["documents_out"]) == (13, 1, 12)

    bad.write_bytes(good)
    result = last_json(run_script(*command, f"out={tmp_path / 'out'}"))
    assert (result["documents"], result["removed"]["exact_dedup"], result["documents_out"]) == (
        13,
        1,
        12,
    )
    clean(source.parent, tmp_path / "fresh", "unit_size=12000", "num_workers=1", "minhash=null")
    assert files_under(tmp_path / "out/documents") == files_under(tmp_path / "fresh/documents")


def test_parquet_compressed_and_hugging_face_sources(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    texts = [prose(seed, 20) for seed in range(6)]
    (tmp_path / "set").mkdir()
    parquet.write_table(pa.table({"text": texts}), tmp_path / "set/train.parquet", row_group_size=2)
    write_configurations(tmp_path / "named", one=texts, two=["nothing of it"])
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.txt").write_text(prose(9, 20))
    with pa.output_stream(str(tmp_path / "mixed/b.jsonl.zst"), compression="zstd") as file:
        file.write("".join(json.dumps({"body": text}) + "\n" for text in texts).encode())
    by_source = {
        "parquet": (tmp_path / "set", "compression=gz"),
        "zst": (tmp_path / "mixed", "compression=none", "suffixes=.jsonl.zst", "text_column=body"),
        "dataset": (tmp_path / "named", "split=train", "name=one"),
    }
    for name, (source, *keys) in by_source.items():
        clean(
            source,
            tmp_path / name,
            "c4=null",
            "minhash=null",
            *keys,
            "num_workers=1",
            "unit_size=5000",
        )
        assert [text for _, text in read_documents(tmp_path / name)] == texts
        if keys == ["compression=gz"]:
            part = next((tmp_path / name / "documents").iterdir()).read_bytes()
            assert part[3:8] == bytes(5), "neither a name nor a time, which would differ"
    ids = [place for place, _ in read_documents(tmp_path / "dataset")]
    assert ids == [
        f"dataset:{tmp_path / 'named'}?name=one&split=train:0:{row}" for row in range(1, 7)
    ]


def test_what_is_read_and_counted_is_what_to_mds_reads(tmp_path: Path) -> None:
    """JSON lines in .json, and in parts without an ending; a line that is too long is
    unreadable, like one that is damaged.
    """
    lines = b"".join(
        json.dumps({"text": text}).encode() + b"\n" for text in (prose(1), "x" * 9000, prose(2))
    )
    (tmp_path / "a.json").write_bytes(lines)
    (tmp_path / "part-0.gz").write_bytes(gzip.compress(b"oops\n" + lines))
    files = [str(tmp_path / name) for name in ("a.json", "part-0.gz")]
    folder = PartsFolder(
        "out", str(tmp_path / "out"), {"compression": "zst"}, {}, plan_units(files, 1 << 20)
    )
    config = config_with(max_document_bytes=9000, on_error="skip")
    kept = list(cleaning.Filter(config, folder, None, {})(None, 0, 1))
    assert [document.text for document in kept] == [prose(1), prose(2)] * 2
    counts = json.loads(cleaning.counts_path(folder, "filter", 0).read_bytes())["counts"]
    assert (counts["documents"], counts["unreadable"]) == (7, 3)
    assert [document.id for document in kept] == [
        f"{files[0]}:0",
        f"{files[0]}:{lines.rindex(b'{')}",
        f"{files[1]}:5",
        f"{files[1]}:{lines.rindex(b'{') + 5}",
    ]


def test_a_cleaning_that_an_earlier_version_finished_is_known(
    corpus: Corpus, tmp_path: Path
) -> None:
    """Its manifest says nothing of the length of lines. One that read a file as something else
    is another cleaning.
    """
    out = Path(shutil.copytree(corpus.out, tmp_path / "out"))
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["settings"].pop("max_document_bytes") == 67108864
    (out / "manifest.json").write_bytes(dump_json(manifest))
    process = run_script(
        "convert/clean.py",
        f"source={corpus.source}",
        f"out={out}",
        f"removed_out={corpus.removed}",
        *KEYS,
    )
    assert process.stdout.startswith(f"{out}: already finished, nothing to do\n"), process.stderr
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    lines, json_lines = (plan_units([str(tmp_path / name)], 1000) for name in ("a.jsonl", "a.json"))
    as_text = [
        tuple(dataclasses.replace(part, format="text") for part in unit) for unit in json_lines
    ]
    assert inputs_of(json_lines) != inputs_of(as_text)
    sizes = [[part.path, part.num_bytes] for part in lines[0]]
    assert inputs_of(lines).endswith(hashlib.sha256(dump_json(sizes)).hexdigest()[:8]), (
        "as it always was"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("source=nowhere",), "source: nowhere: no such file or folder"),
        (
            ("c4.min_sentences=3",),
            "command line: c4.min_sentences: unknown key; did you mean c4.min_num_sentences?",
        ),
        (("executor=slurm",), "command line: executor=slurm: "),
        (
            ("language.model=nowhere.bin",),
            "language.model: nowhere.bin: no such file; give that of a fastText model",
        ),
        (("language.model={source}/b.txt",), "language.model: {source}/b.txt: cannot be read: "),
        (
            ("language.model={model}", "language.languages=[eng]"),
            "language.languages: eng: unknown to {model}; did you mean en?",
        ),
        (("out={source}/b.txt",), "out: {source}/b.txt: is a file; name a folder"),
        (
            ("out={source}",),
            (
                "out: {source}: this folder is not empty and holds no cleaning; name a new one or"
                " empty it"
            ),
        ),
        (
            ("removed_out={source}",),
            "removed_out: {source}: this folder is not empty and holds no cleaning; name a new one",
        ),
        (
            ("out={out}", "c4.min_num_sentences=4", "minhash=null"),
            "out: {out}: holds a cleaning with other settings: c4.min_num_sentences (",
        ),
    ],
)
def test_a_mistake_is_one_line_and_touches_nothing(
    corpus: Corpus, language_model: str, tmp_path: Path, keys: tuple[str, ...], message: str
) -> None:
    places = {"source": corpus.source, "out": corpus.out, "model": language_model}
    before = files_under(corpus.source.parent)
    command = [
        key.format(**places)
        for key in (f"source={corpus.source}", f"out={tmp_path / 'out'}", *keys)
    ]
    if keys == ("executor=slurm",):
        message = "command line: slurm: must be set with executor=slurm"
    process = run_script("convert/clean.py", *command)
    assert process.returncode == 2, process.stderr
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith("error: " + message.format(**places).split(" (")[0])
    assert files_under(corpus.source.parent) == before
    assert not (tmp_path / "out").exists()


def test_other_settings_for_the_same_folder_are_named(corpus: Corpus) -> None:
    process = run_script(
        "convert/clean.py",
        f"source={corpus.source}",
        f"out={corpus.out}",
        f"removed_out={corpus.removed}",
        *KEYS,
        "c4.min_num_sentences=4",
        "minhash=null",
    )
    assert process.returncode == 2
    assert (
        process.stderr
        == f"error: out: {corpus.out}: holds a cleaning with other settings: c4.min_num_sentences"
        " (5 there, 4 now), minhash (set there, null now); name another out, or remove this"
        " folder\n"
    )


def test_damage_to_a_finished_folder_is_named(corpus: Corpus, tmp_path: Path) -> None:
    out = Path(shutil.copytree(corpus.out, tmp_path / "out"))
    part = sorted((out / "documents").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-1])
    keys = (f"source={corpus.source}", f"out={out}", f"removed_out={corpus.removed}", *KEYS)
    process = run_script("convert/clean.py", *keys)
    assert process.returncode == 1
    size = part.stat().st_size
    assert process.stderr.startswith(
        f"error: {part}: is {size} bytes long, must be {size + 1}; restore it from a copy, or "
    )


def test_without_the_extra(tmp_path: Path) -> None:
    program = (
        "import runpy, sys; sys.modules['datatrove'] = None; sys.argv[1:] = ['source=x', 'out=y']; "
        "runpy.run_path('convert/clean.py', run_name='__main__')"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 2
    assert (
        process.stderr == "error: datatrove is not installed; pip install 'flame-composer[clean]'\n"
    )


def test_jobs_for_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts that datatrove would submit, and what is said where there is no Slurm and no
    Ray.
    """
    source = write_documents(tmp_path / "a.jsonl", [prose(seed) for seed in range(4)])
    section = SlurmConfig(
        "cpu", "2:00:00", mem_per_cpu_gb=3, qos="long", activate="/env/activate", max_array_size=99
    )
    config = CleanConfig(
        source=[str(source)],
        out=str(tmp_path / "out"),
        executor="slurm",
        slurm=section,
        num_workers=7,
    )
    folder = PartsFolder(
        "out", config.out, {"compression": "zst"}, {}, plan_units([str(source)], 1000)
    )
    stages = cleaning.build_stages(config, folder, None)
    assert [stage.name for stage in stages] == [
        "filter",
        "find equal",
        "hash",
        "find similar",
        "cluster",
        "finish",
        "publish",
    ]
    for stage in stages:
        executor = executors.build_executor(config, folder, stage, None)
        script = executor.get_launch_file_contents(executor.get_sbatch_args(stage.tasks), "run")
        for line in (
            "#SBATCH --partition=cpu",
            "#SBATCH --time=2:00:00",
            "#SBATCH --mem-per-cpu=3G",
            "#SBATCH --cpus-per-task=1",
            f"#SBATCH --array=0-{stage.tasks - 1}%7",
            f"#SBATCH --job-name=clean-{stage.name.replace(' ', '-')}",
            "#SBATCH --qos=long",
            "source /env/activate",
        ):
            assert line in script.splitlines()
        assert executor.max_array_size == 99
    on_ray = dataclasses.replace(
        config, executor="ray", slurm=None, ray=RayConfig("ray://here", mem_per_cpu_gb=2.5)
    )
    assert executors.build_executor(on_ray, folder, stages[0], None).mem_per_cpu_gb == 2.5
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(executors.ConfigError, match="executor=slurm: sbatch: no such command"):
        executors.clean(config, folder, None, lambda *_: None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        executors.ConfigError, match="executor=ray: ray is not installed; pip install ray"
    ):
        executors.clean(on_ray, folder, None, lambda *_: None)
    asked: dict[str, Any] = {}

    def init(**given: Any) -> None:
        asked.update(given)
        raise ConnectionError("there is none")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(
        executors.ConfigError,
        match=r"ray\.address: ray://here: cannot be reached: there is none; give a Ray",
    ):
        executors.clean(on_ray, folder, None, lambda *_: None)
    assert asked["address"] == "ray://here"


def test_near_duplicates_are_found_as_the_keys_say(tmp_path: Path) -> None:
    """The hashes are of datatrove; how close documents have to be is what they are asked for."""
    source = write_documents(tmp_path / "a.jsonl", [prose(1)])
    config = config_with(
        minhash=MinhashConfig(n_grams=3, num_buckets=4, hashes_per_bucket=2, seed=9)
    )
    folder = PartsFolder(
        "out", str(tmp_path / "out"), {"compression": "zst"}, {}, plan_units([str(source)], 1000)
    )
    stages = {stage.name: stage for stage in cleaning.build_stages(config, folder, None)}
    signature = next(
        step
        for stage in stages.values()
        for step in stage.pipeline
        if isinstance(step, MinhashDedupSignature)
    )
    assert (
        signature.config.n_grams,
        signature.config.num_buckets,
        signature.config.hashes_per_bucket,
    ) == (3, 4, 2)
    assert signature.config.seed == 9
    assert stages["find similar"].tasks == 4


def test_whatever_the_manifest_of_a_finished_folder_holds_is_answered_in_one_line(
    tmp_path: Path,
) -> None:
    folder = PartsFolder(
        "out",
        str(tmp_path / "out"),
        {"compression": "none", "step": {"a": 1}},
        {"datatrove": "0"},
        (),
    )
    folder.begin()
    part = folder.part(0)
    part.parent.mkdir()
    part.write_text('{"id": "1", "text": "a"}\n')
    folder.publish(Counts(documents=2, empty=1, out=1, characters=1, characters_out=1))
    content = json.loads((tmp_path / "out/manifest.json").read_text())
    assert folder.finished() == content
    refused = 0
    for path in places(content):
        for value in (..., *WRONG, "../manifest.json", "/etc/passwd"):
            changed = altered(content, path, value)
            (tmp_path / "out/manifest.json").write_text(json.dumps(changed))
            try:
                found = folder.finished()
            except (ConfigError, DataError) as error:
                found = None
                refused += 1
                shown = str(error)
            assert found is not None or "\n" not in shown
            if found is not None:
                report(found)
    assert refused > 100
