"""The benchmark of conversions: the same tokens by all, every process counted, errors in one
line.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from streaming import StreamingDataset

from flame_composer.bench import charts as benchmark_charts
from flame_composer.bench import commands as benchmark
from flame_composer.bench import conversions, decoding, examples, serving
from flame_composer.bench import measure as measuring
from flame_composer.bench import models as timing
from flame_composer.bench import runs as run_timing
from flame_composer.bench.charts import panels
from flame_composer.bench.clients import Answered, answers, percentile
from flame_composer.bench.conversions import (
    Run,
    compare_conversions,
    convert_plainly,
    summary,
    write_corpus,
)
from flame_composer.bench.devices import peak_of
from flame_composer.bench.measure import Figure, Usage, measure
from flame_composer.bench.models import mfu
from flame_composer.config.bench import (
    AllBenchmarksConfig,
    BenchmarkConfig,
    CheckpointBenchmarkConfig,
    ConversionBenchmarkConfig,
    DataBenchmarkConfig,
    DecodeBenchmarkConfig,
    ExamplesBenchmarkConfig,
    ServingBenchmarkConfig,
    StartBenchmarkConfig,
    TrainerBenchmarkConfig,
)
from flame_composer.errors import ConfigError, DataError
from flame_composer.text.tokenizer import build_encoder
from tests.data_fixtures import TEXTS, byte_tokenizer, llama_tokenizer, words, write_jsonl
from tests.runs import ROOT, check, last_json, run_script

# A process that leaves one behind that lives longer; the numbers are megabytes and seconds on a
# processor.
LEAVE_BEHIND = """
import subprocess, sys
work = (
    "import sys, time\\nx = b'x' * (int(sys.argv[1]) << 20)\\n"
    "while time.process_time() < float(sys.argv[2]): pass"
)
subprocess.run([sys.executable, "-c", work, "150", "0.3"])
subprocess.Popen([sys.executable, "-c", work, "250", "0.4"])
print("done")
"""


def test_every_process_counts():
    usage = measure([sys.executable, "-c", LEAVE_BEHIND])
    assert usage.output == "done\n"
    assert 0.7 <= usage.cpu_seconds < 10
    assert usage.peak_bytes > 250 << 20
    alone = measure([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"])
    assert 0.2 <= alone.cpu_seconds < usage.cpu_seconds


def test_a_failure_is_that_of_the_command():
    command = [
        sys.executable,
        "-c",
        "import sys; print('first', file=sys.stderr); sys.exit('error: no room')",
    ]
    with pytest.raises(DataError, match=r"^\S+ -c: failed: no room$"):
        measure(command)
    with pytest.raises(DataError, match=r"failed: exit status 3$"):
        measure([sys.executable, "-c", "import sys; sys.exit(3)"])


@pytest.mark.parametrize("make", [byte_tokenizer, llama_tokenizer])
def test_the_baseline_converts_every_token(tmp_path, make):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [*TEXTS, *(words(300, seed) for seed in range(1200))]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    expected, _ = build_encoder(tokenizer, add_bos=False, add_eos=True)(texts)
    found = convert_plainly(str(corpus), str(tmp_path / "tokenizer"), str(tmp_path / "out"), 100)
    assert found == len(expected)
    dataset = StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False)
    rows = np.stack([dataset[i]["input_ids"] for i in range(len(dataset))])
    assert (rows == expected[: len(expected) // 100 * 100].reshape(-1, 100)).all()


def test_the_corpus_is_distinct_documents_and_its_tenth_begins_it(tmp_path):
    texts = [words(50, seed) for seed in range(300)]
    source = write_jsonl(tmp_path / "source.jsonl", [*texts, *texts, "", *TEXTS])
    whole, tenth = write_corpus([str(source)], (), 1 << 40, tmp_path)
    found = [json.loads(line)["text"] for line in whole.read_text().splitlines()]
    assert sorted(found) == sorted({*texts, *TEXTS} - {""})
    assert whole.read_bytes().startswith(tenth.read_bytes())
    assert tenth.stat().st_size == pytest.approx(whole.stat().st_size / 10, abs=4000)
    part, _ = write_corpus([str(source)], (), 20000, tmp_path)
    assert 20000 <= part.stat().st_size < 24000
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match=r"^source: \S+/empty\.txt: holds no text$"):
        write_corpus([str(tmp_path / "empty.txt")], (), 1000, tmp_path)


def test_figures_are_medians_and_ratios_those_of_a_turn():
    def runs(start: float, seconds: float, cpu_seconds: float, megabytes: int) -> tuple[Run, Run]:
        tenth = Usage(start + seconds / 10, start + cpu_seconds / 10, megabytes << 20, "")
        return Run(100, tenth), Run(
            1000, Usage(start + seconds, start + cpu_seconds, (megabytes + 10) << 20, "")
        )

    turns = [
        {
            "baseline": runs(10, 90, 100 * slow, 500),
            "one_worker": runs(5, 20, 10 * slow, 50),
            "workers": runs(5, 10, 11, 40),
        }
        for slow in (1, 3, 2)
    ]
    result = summary(turns)
    assert result["baseline"] == {
        "tokens_per_cpu_second": round(1000 / 210),
        "tokens_per_cpu_second_after_start": 5,
        "tokens_per_second": 10,
        "tokens_per_second_after_start": round(1000 / 90),
        "peak_mb_of_a_tenth": 500,
        "peak_mb": 510,
    }
    ratios = {key: value for key, value in result.items() if "_over_" in key}
    assert ratios == {
        "one_worker_over_baseline": 8.4,
        "one_worker_over_baseline_after_start": 10.0,
        "workers_over_one": round(25 / 15, 2),
        "workers_over_one_after_start": 2.0,
    }
    no_time = Run(1000, turns[0]["workers"][0].usage)
    timeless = summary([{**turns[0], "workers": (turns[0]["workers"][0], no_time)}])
    assert timeless["workers"]["tokens_per_second_after_start"] is None
    assert timeless["workers_over_one_after_start"] is None
    assert timeless["workers_over_one"] > 0


def test_all_conversions_agree(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [words(1 + i % 700, i) for i in range(200)]
    source = write_jsonl(tmp_path / "source.jsonl", texts)
    (tmp_path / "work").mkdir()
    result = last_json(
        run_script(
            "recipes/benchmark.py",
            "convert",
            f"source={source}",
            f"tokenizer={tmp_path / 'tokenizer'}",
            "repeats=1",
            f"folder={tmp_path / 'work'}",
            "context_length=64",
            "unit_size=20000",
        )
    )
    expected, _ = build_encoder(tokenizer, add_bos=False, add_eos=True)(texts)
    assert result["tokens"] == len(expected)
    for name in ("baseline", "one_worker", "workers"):
        assert result[name]["tokens_per_cpu_second"] > 0
    assert list((tmp_path / "work").iterdir()) == []
    nowhere = run_script("recipes/benchmark.py", "convert", f"folder={tmp_path}/no")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (1, 1)
    assert nowhere.stderr.startswith(f"error: folder: {tmp_path}/no/")
    assert nowhere.stderr.endswith(
        ": No such file or directory; give another one with folder=...\n"
    )


SMALL = ("repeats=1", "hidden_size=64", "num_layers=1", "vocab_size=256")


def test_decoding_and_checkpoints_are_timed(tmp_path):
    decoded = last_json(
        run_script(
            "recipes/benchmark.py",
            "decode",
            *SMALL,
            "context_lengths=[8,16]",
            "batch_sizes=[1,2]",
            "new_tokens=2",
        )
    )
    assert [(row["batch_size"], row["context_length"]) for row in decoded["results"]] == [
        (1, 8),
        (2, 8),
        (1, 16),
        (2, 16),
    ]
    assert len(decoded["figures"]) == 6
    kept = [
        tuple(row[f"{name}_bytes_kept_per_sequence"] for name in ("gla", "llama"))
        for row in decoded["results"]
    ]
    assert kept[0][0] == kept[2][0] > 0
    assert kept[2][1] == 2 * kept[0][1] > 0
    saved = last_json(
        run_script("recipes/benchmark.py", "checkpoint", *SMALL, f"folder={tmp_path}")
    )
    assert all(
        saved[f"{name}_seconds"] > 0 for name in ("save", "torch_save", "read", "torch_load")
    )
    assert list(tmp_path.iterdir()) == []


def test_divided_rows_are_measured_as_the_keys_say():
    keys = ("hidden_size=32", "num_layers=1", "vocab_size=300", "model_type=gated_deltanet")
    lengths = ("context_length=512", "short_context_length=128", "short_steps=2", "ranks=2")
    found = last_json(run_script("recipes/benchmark.py", "context", *keys, *lengths))
    assert (found["context_length"], found["short"], found["ranks"]) == (512, 128, 2)
    ranks = {name: len(each) for name, each in found["found"].items()}
    assert ranks == {"one": 1, "divided": 2, "divided_short": 2}
    sent = {name: {rank["bytes_sent"] for rank in each} for name, each in found["found"].items()}
    # Two heads' states [16, 32] and transitions [16, 16], the gradients of the states, and three
    # inputs of q, k [32] and v [64] with their gradients, all fp32
    state, transition, inputs = 2 * 16 * 32, 2 * 16 * 16, 3 * (32 + 32 + 64)
    size = 4 * (2 * state + transition + 2 * inputs)
    assert sent == {"one": {0}, "divided": {size}, "divided_short": {size}}
    assert len(found["figures"]) == 4


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes a minute: make test-faults"
)
def test_the_data_path_is_timed(tmp_path):
    keys = ("repeats=1", "megabytes=0.2", "epoch_rows=2000", f"folder={tmp_path}")
    read = last_json(run_script("recipes/benchmark.py", "data", *keys))
    assert read["ours_rows_per_second"] > 0
    assert read["first_batch_at_the_end_seconds"] > 0
    assert 0 < read["memory_to_the_first_batch_mb"] < 150
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_misses_what_is_stated():
    high, low = Figure("speed", 0.95, at_least=1), Figure("memory", 1.2, at_most=1)
    assert [figure.is_missed() for figure in (high, low)] == [False, True]
    assert [figure.line().split()[-1] for figure in (high, low)] == ["short", "missed"]
    assert Figure("speed", 1.0, at_least=1).line().endswith("reached")
    assert not Figure("speed", None, at_least=1).is_missed()
    assert "not measured" in Figure("speed", None, at_least=1).line()


def test_growth_is_timed_and_drawn(tmp_path):
    grown = last_json(
        run_script(
            "recipes/benchmark.py", "growth", *SMALL, "batch_tokens=128", "context_lengths=[32,64]"
        )
    )
    assert [row["rows"] for row in grown["by_rows"]] == [1, 2, 4]
    assert [row["layers"] for row in grown["by_layers"]] == [1, 2]
    speeds = [
        row[f"{name}_tokens_per_second"]
        for row in grown["by_rows"] + grown["by_layers"]
        for name in ("gla", "llama")
    ]
    assert min(speeds) > 0
    drawn = {
        "growth": grown,
        "data": {"one_worker_rows_per_second": 5, "two_workers_rows_per_second": 9},
    }
    assert [(panel.x_name, panel.xs) for panel in panels(drawn)] == [
        ("rows of 32", [1, 2, 4]),
        ("layers", [1, 2]),
    ]
    convert = {"num_workers": 2, "workers_over_one_after_start": 1.9}
    workers = list(panels({**drawn, "convert": convert}))[-1]
    assert workers.lines == {"conversion": [1, 1.9], "loading": [1, 1.8]}
    benchmark_charts.write(drawn, str(tmp_path / "growth.png"))
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(
        DataError, match=r"^plot: \S+/no/growth\.png: No such file or directory; give another"
    ):
        benchmark_charts.write(drawn, str(tmp_path / "no/growth.png"))
    with pytest.raises(DataError, match=r"^plot: nothing that is drawn was measured: start$"):
        benchmark_charts.write({"start": {}}, str(tmp_path / "growth.png"))


SAYS = """
import json, sys
if sys.argv[1] == "convert":
    sys.exit(1)
value = {"start": 1.05, "data": 2.0}[sys.argv[1]]
figure = {"name": sys.argv[1], "value": value, "at_least": None, "at_most": 1.0}
print(json.dumps({"figures": [figure]}))
"""


def test_all_ends_with_what_is_missed(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "recipes/benchmark.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "says.py").write_text(SAYS)
    script.__file__ = str(tmp_path / "says.py")
    script.run_all(AllBenchmarksConfig(names=["start"]))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["results"]["start"]["figures"][0]["value"] == 1.05
    with pytest.raises(SystemExit, match=r"^missed by more than a tenth: data$"):
        script.run_all(AllBenchmarksConfig(names=["start", "data"]))
    with pytest.raises(DataError, match=r"^convert: ended with status 1$"):
        script.run_all(AllBenchmarksConfig(names=["convert"]))


def test_the_peak_of_a_gpu():
    names = [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA L4",
    ]
    assert [peak_of(name) for name in names] == [989e12, 756e12, 312e12, 165e12, 121e12]
    assert peak_of("Some Other GPU") is None
    rows = [{"gla_model_flops_per_second": 3e14}, {"gla_model_flops_per_second": 4e14}]
    on_gpu = {"device": "NVIDIA H200", "gemm_flops_per_second": 8e14, "results": rows}
    assert [figure.value for figure in mfu(on_gpu)] == [round(4e14 / 989e12, 3), 0.5]
    assert [figure.value for figure in mfu({**on_gpu, "device": "cpu"})] == [None, None]
    assert [figure.value for figure in mfu({**on_gpu, "device": "Another"})] == [None, 0.5]


def test_which_benchmark():
    helped = check(run_script("recipes/benchmark.py", "--help")).stdout
    assert "usage: benchmark.py train [file.yaml]" in helped
    assert "usage: benchmark.py convert [file.yaml]" in helped
    assert (
        "context_lengths" not in check(run_script("recipes/benchmark.py", "convert", "-h")).stdout
    )
    wrong = run_script("recipes/benchmark.py", "convrt", "repeats=1")
    assert wrong.returncode == 2
    assert (
        wrong.stderr
        == "error: command line: convrt: must be one of train, models, growth, context, decode,"
        " quantize, serve, trainer, data, start, checkpoint, convert, examples, gpu, all, or a YAML"
        " file; did you mean convert?\n"
    )
    unknown = run_script("recipes/benchmark.py", "all", "names=[train,strat]")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    assert unknown.stderr.startswith(
        "error: command line: names=['train', 'strat']: must be among train, models, growth, "
    )
    nowhere = run_script("recipes/benchmark.py", "all", "plot=/proc/no/growth.png")
    assert (nowhere.returncode, nowhere.stdout) == (2, ""), "before anything is measured"
    assert nowhere.stderr.startswith("error: plot=/proc/no/growth.png: /proc/no cannot be made: ")
    for arguments in (
        ["repeats=0"],
        ["train", "repeats=0"],
        ["convert", "repeats=0"],
        ["start", "repeats=0"],
    ):
        failed = run_script("recipes/benchmark.py", *arguments)
        assert (failed.returncode, failed.stderr) == (
            2,
            "error: command line: repeats=0: must be more than 0\n",
        )


# What the keys say. What is run, and that it can be, is tested above: here it is only noted.


def noted(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, stand_in: Callable[..., Any]
) -> list[tuple[Any, ...]]:
    """The positional arguments of every call of a function from now on, in whose place
    `stand_in` is called.
    """
    calls: list[tuple[Any, ...]] = []

    def note(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return stand_in(*arguments, **options)

    monkeypatch.setattr(module, name, note)
    return calls


def test_models_are_timed_as_the_keys_say(monkeypatch, tmp_path):
    shape = {"hidden_size": 64, "num_layers": 1, "vocab_size": 256, "repeats": 4}
    build_pair = timing.build_pair
    built = [
        noted(monkeypatch, module, "build_pair", build_pair)
        for module in (timing, decoding, run_timing)
    ]
    turns = [
        noted(monkeypatch, module, "interleaved", measuring.interleaved)
        for module in (timing, decoding, run_timing)
    ]
    steps, decoded = (
        noted(monkeypatch, module, name, lambda *_: lambda: 1.0)
        for module, name in ((timing, "step"), (decoding, "decode"))
    )
    read = noted(monkeypatch, decoding, "read_prompt", decoding.read_prompt)
    timing.training(BenchmarkConfig(context_lengths=[64, 128], batch_tokens=512, **shape))
    decoding.decoding(
        DecodeBenchmarkConfig(context_lengths=[8], batch_sizes=[3], new_tokens=5, **shape)
    )
    timing.growth(BenchmarkConfig(context_lengths=[32], batch_tokens=64, **shape))
    run_timing.checkpoints(CheckpointBenchmarkConfig(**shape), tmp_path)
    assert built == [[(64, 1, 256)] * 3 + [(64, 2, 256)], [(64, 1, 256)], [(64, 1, 256)]]
    assert [{repeats for _, repeats, _ in found} for found in turns] == [{4}] * 3
    lengths = [
        (64, 512),
        (64, 512),
        (128, 512),
        (128, 512),
        *[(32, number * 32) for number in (1, 1, 2, 2, 1, 1)],
    ]
    assert [arguments for _, *arguments in steps] == [
        [length, tokens, 256] for length, tokens in lengths
    ]
    assert [arguments for _, *arguments in read] == [[8]] * 2
    assert [arguments for _, _, *arguments in decoded] == [[3, 5]] * 2


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list[tuple[Any, ...]]:
    """The commands that are measured, none of which is run."""

    def measure(command: list[str], *_: Any) -> Usage:
        if "recipes/train.py" in str(command):
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run/train_log.jsonl").write_text(
                json.dumps({"throughput": 1.0}) + "\n" + '{"throughput": 1.0}\n' * 3
            )
        numbers = {"read_all;": 3, "read_all_plainly;": 1, "first_batch;": 2}
        for name, number in numbers.items():
            if f"import {name}" in str(command):
                return Usage(1.0, 1.0, 1, f"{[7] * number}\n")
        return Usage(1.0, 1.0, 1, "7\n")

    monkeypatch.setattr(
        conversions,
        "read_manifest",
        lambda _: SimpleNamespace(totals=SimpleNamespace(tokens_in=7), config={"encoder": "hf"}),
    )
    commands = noted(monkeypatch, benchmark, "measure", measure)
    monkeypatch.setattr(conversions, "measure", benchmark.measure)
    return commands


@pytest.fixture
def corpora(monkeypatch, tmp_path) -> list[tuple[Any, ...]]:
    source = write_jsonl(tmp_path / "source.jsonl", TEXTS)
    write = write_corpus
    made = noted(
        monkeypatch, benchmark, "write_corpus", lambda *_: write([str(source)], (), 1000, tmp_path)
    )
    monkeypatch.setattr(conversions, "write_corpus", benchmark.write_corpus)
    return made


def test_runs_are_timed_as_the_keys_say(monkeypatch, commands, corpora, tmp_path):
    def ran(script: str) -> list[str]:
        return [str(command) for command, *_ in commands if script in str(command)]

    benchmark.compare_trainers(
        ROOT, TrainerBenchmarkConfig(megabytes=0.2, repeats=3, steps=5), tmp_path
    )
    assert len(ran("recipes/train.py")) == 3
    assert all("max_duration=5ba" in command for command in ran("recipes/train.py"))
    benchmark.compare_readers(
        ROOT, DataBenchmarkConfig(megabytes=0.3, repeats=3, epoch_rows=77), tmp_path
    )
    assert [len(ran(name)) for name in ("import read_all;", "import first_batch;")] == [3, 6]
    assert all("'77'" in command for command in ran("import first_batch"))
    commands.clear()
    noted(
        monkeypatch,
        subprocess,
        "run",
        lambda command, **_: SimpleNamespace(returncode=0 if "--help" in command else 2),
    )
    benchmark.compare_starts(ROOT, StartBenchmarkConfig(megabytes=0.4, repeats=3), tmp_path)
    assert len(ran("recipes/train.py")) == 3
    assert [max_bytes for _, _, max_bytes, _ in corpora] == [200_000, 300_000, 400_000]


def test_conversions_are_timed_as_the_keys_say(commands, corpora, tmp_path):
    config = ConversionBenchmarkConfig(
        ["s"], [".md"], 0.5, "tok", context_length=64, unit_size=999, num_workers=3, repeats=1
    )
    compare_conversions(ROOT, config, tmp_path)
    assert corpora == [(["s"], [".md"], 500_000, tmp_path)]
    ours = [command for command, *_ in commands if "to_mds.py" in str(command)]
    assert all(
        {"tokenizer=tok", "context_length=64", "unit_size=999"} <= set(command) for command in ours
    )
    assert sorted(command[-1] for command in ours) == [
        "num_workers=1",
        "num_workers=1",
        "num_workers=3",
        "num_workers=3",
    ]
    assert [command[-3:][::2] for command, *_ in commands if "to_mds.py" not in str(command)] == [
        ["tok", "64"]
    ] * 2


def test_examples_are_timed_as_the_keys_say(monkeypatch, corpora, tmp_path):
    """Both sides convert a tenth and all, and agree on the tokens."""
    monkeypatch.setattr(examples, "write_corpus", corpus_of_words)
    config = ExamplesBenchmarkConfig(megabytes=0.5, repeats=1)
    commands = noted(monkeypatch, examples, "measure", examples.measure)
    result, figures = examples.compare_examples(ROOT, config, tmp_path)
    assert len(commands) == 4
    assert result["tokens"] > 1000
    assert figures[0].at_least == 5
    assert figures[0].value == result["ours_over_plain_after_start"]
    assert CORPORA == [500_000]


def test_the_server_is_timed_as_the_keys_say(monkeypatch, tmp_path, capsys):
    """A real one, every request is answered whole, and each part is told when it is there."""
    turns = noted(monkeypatch, serving, "interleaved", serving.interleaved)
    config = ServingBenchmarkConfig(
        hidden_size=64,
        num_layers=1,
        vocab_size=512,
        num_together=3,
        new_tokens=6,
        num_mixed=7,
        clients=[2],
        context_lengths=[40, 8],
        repeats=1,
    )
    result, figures = serving.compare_serving(ROOT, config, tmp_path)
    made = json.loads((tmp_path / "model/config.json").read_text())
    assert (made["hidden_size"], made["num_hidden_layers"], made["vocab_size"]) == (64, 1, 512)
    requests = serving.mixed(config, 7, seed=1)
    sizes = [each["max_tokens"] for each in requests]
    assert (result["mixed_requests"], result["mixed_tokens"]) == (7, sum(sizes))
    assert result["static_steps"] == max(sizes[:3]) + max(sizes[3:6]) + sizes[6]
    assert [row["clients"] for row in result["waits"]] == [2]
    assert [*result["milliseconds_per_token_after"]] == ["8", "40"]
    assert [repeats for _, repeats, _ in turns] == [1, 1, 4]
    assert figures[0].name.startswith("serving: tokens/s of 3 requests together")
    assert [figure.at_least for figure in figures[:4]] == [5, None, 2, None]
    assert all(figure.value is not None and figure.value > 0 for figure in figures), figures
    log = (tmp_path / "server.err").read_text()
    assert log.count(" POST /v1/completions 200 ") == 2 * 3 + 1 + 7 + 6
    assert log.count("32+6 tokens") >= 7, "new_tokens"
    told = [line[8:] for line in capsys.readouterr().err.splitlines()]
    places = [
        told.index(line)
        for line in (
            "3 requests together, then 1 one after another",
            figures[0].line(),
            f"7 requests of mixed lengths ({sum(sizes)} tokens), and generate in 3 static batches",
            figures[2].line(),
            "waits of 2 clients, 6 requests",
            figures[4].line(),
            "32 tokens are read, 40 in all",
            figures[-1].line(),
        )
    ]
    assert places == sorted(places)


def test_requests_that_are_refused_are_no_figures():
    with pytest.raises(DataError, match=r"^5 tokens were written, and 6 were asked for$"):
        serving.written([{"max_tokens": 6}], [Answered(tokens=5)])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        with pytest.raises((DataError, ConnectionError)):
            answers(listener.getsockname(), [{"prompt": "x"}], 1)
        thread.join()
    values = [*range(1, 201)]
    assert [percentile(values, percent) for percent in (50, 99, 100)] == [100, 198, 200]
    assert percentile([7], 99) == 7


CORPORA: list[int] = []


def corpus_of_words(_: Any, __: Any, max_bytes: int, folder: Path) -> tuple[Path, Path]:
    """A corpus and its tenth, of which conversations are made."""
    CORPORA.append(max_bytes)
    whole = write_jsonl(folder / "whole.jsonl", [words(1500, number) for number in range(20)])
    return whole, write_jsonl(folder / "tenth.jsonl", [words(1500, number) for number in range(2)])


@pytest.mark.parametrize(
    ("name", "config", "module", "function"),
    [
        ("trainer", TrainerBenchmarkConfig, benchmark, "compare_trainers"),
        ("data", DataBenchmarkConfig, benchmark, "compare_readers"),
        ("start", StartBenchmarkConfig, benchmark, "compare_starts"),
        ("checkpoint", CheckpointBenchmarkConfig, run_timing, "checkpoints"),
        ("convert", ConversionBenchmarkConfig, conversions, "compare_conversions"),
        ("serve", ServingBenchmarkConfig, serving, "compare_serving"),
        ("examples", ExamplesBenchmarkConfig, examples, "compare_examples"),
    ],
)
def test_where_files_are_put(monkeypatch, tmp_path, name, config, module, function):
    given = noted(monkeypatch, module, function, lambda *_: ({}, []))
    script = runpy.run_path("recipes/benchmark.py")
    run = script.get(name) or functools.partial(script["written"], name)
    run(config(folder=str(tmp_path)))
    assert [arguments[-1].parent for arguments in given] == [tmp_path]


def test_only_what_is_named_is_run_and_drawn(monkeypatch, capsys):
    answer = subprocess.CompletedProcess([], 0, json.dumps({"figures": []}))
    given = noted(monkeypatch, subprocess, "run", lambda *_, **__: answer)
    drawn = noted(monkeypatch, benchmark_charts, "write", lambda *_: None)
    runpy.run_path("recipes/benchmark.py")["run_all"](
        AllBenchmarksConfig(["start", "data"], "growth.png")
    )
    assert drawn == [({"start": {"figures": []}, "data": {"figures": []}}, "growth.png")]
    assert [command[-1] for (command,) in given] == ["start", "data"]
