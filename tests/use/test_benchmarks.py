"""Suites of benchmarks on files of the genuine form, and what is said of files that are not."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flame_composer.checkpoint.to_model import load_model, save_hf_folder
from flame_composer.config.load import load
from flame_composer.config.suites import FOLDERS, STEREOSET, SUITES, shots_of, tasks_of
from flame_composer.config.use import EvaluateConfig
from flame_composer.errors import ConfigError, DataError
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.text.ends import Ends, with_ends
from tests.benchmark_data import (
    ROWS,
    row_of,
    splits_of_suites,
    write_csv,
    write_parquet,
    write_rows,
    write_stereoset,
    write_suites,
)
from tests.conftest import GLA
from tests.data_fixtures import byte_tokenizer, llama_tokenizer
from tests.recipes.test_recipes import commands_in
from tests.runs import ROOT, last_json, run_script, two_ranks

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the harness's own code

ALL = tuple(SUITES)
PAGE = (ROOT / "docs/benchmarks_data.md").read_text(encoding="utf-8")
# Nobody answers there: a test that asks the hub for anything fails.
OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_suites(folder, ALL)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    torch.manual_seed(0)
    tokenizer = with_ends(byte_tokenizer(), Ends(bos=False, eos=True))
    config = build_hf_config({**GLA, "hidden_size": 16}, tokenizer, 2048)
    save_hf_folder(build_model(config), tokenizer, folder, dtype="float32")
    return folder


@pytest.mark.parametrize("suite", ALL)
def test_a_suite_without_a_network(
    suite: str, root: Path, model_folder: Path, tmp_path: Path
) -> None:
    """Its commands in docs/benchmarks_data.md, on the first questions."""
    (command,) = (
        words
        for words in commands_in(PAGE)
        if f"suite={suite}" in words and words[-1].startswith("data_root=")
    )
    process = run_script(
        *command[1:2],
        f"model={model_folder}",
        f"suite={suite}",
        f"data_root={root}",
        "task_limit=4",
        env={**OFFLINE, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    found = last_json(process)
    assert not (tmp_path / "cache").exists(), "nothing is left for later"
    assert found["suite"] == suite
    expected = [
        (each.name, metric, chance, each.shots)
        for each in SUITES[suite]
        for metric, chance in each.metrics.items()
    ]
    rows = found["benchmarks"]
    keys = ("benchmark", "metric", "chance", "shots")
    assert [tuple(row[key] for key in keys) for row in rows] == expected
    tasks = {each.name: each.task for each in SUITES[suite]}
    for row in rows:
        assert row["score"] == found["tasks"][tasks[row["benchmark"]]][row["metric"]]
        line = next(
            line
            for line in process.stdout.splitlines()
            if line.split("  ")[0] == row["benchmark"] and row["metric"] in line.split()
        )
        assert line.split()[-1] == f"{row['shots']}"
    assert "task_limit=4: only the first questions of each task count\n" in process.stdout
    beginning = process.stdout.partition("benchmark  ")[0]
    assert beginning == "", "nothing comes before the suite's table, and no other table after it"
    assert len(process.stdout.splitlines()) == 1 + len(rows) + 3
    assert "it/s" not in process.stderr, "no bars in a file"
    if suite == "base":
        assert sum(name.startswith("mmlu_") for name in found["tasks"]) == 57 + 4


def test_the_command_that_needs_a_network(model_folder: Path, tmp_path: Path) -> None:
    (command,) = (words for words in commands_in(PAGE) if "suite=base" in words[-1])
    env = {**OFFLINE, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = run_script(*command[1:2], f"model={model_folder}", *command[3:], env=env)
    assert process.returncode == 2
    line = process.stderr.splitlines()[-1]
    assert line.startswith("error: tasks: mmlu, hellaswag, piqa, ")
    assert line.endswith("without a network, set data_root to a folder that has the data")


def test_two_ranks_share_a_suite(root: Path, model_folder: Path) -> None:
    keys = (
        "recipes/evaluate.py",
        f"model={model_folder}",
        "suite=bias",
        f"data_root={root}",
        "task_limit=5",
    )
    one = last_json(run_script(*keys))
    first, second = two_ranks(*keys)
    two = last_json(first)
    assert second.stdout == ""
    for task, values in one["tasks"].items():
        assert two["tasks"][task] == pytest.approx(values, rel=1e-5), task
    assert [row["shots"] for row in two["benchmarks"]] == [
        row["shots"] for row in one["benchmarks"]
    ]


def reference(root: Path) -> Callable[..., Any]:
    """`datasets.load_dataset`, of the rows that the files were made of."""
    from datasets import Dataset, DatasetDict

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        rows = [row_of(path, i) for i in range(ROWS)]
        return DatasetDict(
            {
                split: Dataset.from_list(rows)
                for split in ("train", "dev", "val", "validation", "test")
            }
        )

    return load_dataset


def test_scores_are_those_of_the_harness_with_its_own_reader(
    root: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the form of the file: Parquet in parts or numbered, JSON lines, CSV."""
    import datasets

    from flame_composer.use import harness
    from flame_composer.use.task_data import TaskData
    from flame_composer.use.tasks import load_tasks

    caplog.set_level(logging.ERROR)
    names = ["hellaswag", "piqa", "winogrande", "arc_easy", "lambada_openai", "bbq"]
    names.append("crows_pairs_english")
    model = harness.HarnessModel(*load_model(str(model_folder)), batch_size=8)

    def scores(data: TaskData | None) -> dict[str, Any]:
        loaded = load_tasks(names, None, num_fewshot=None, shots={}, data=data)
        found = harness.score(model, loaded, limit=None, bootstraps=0)
        assert found is not None
        return harness.scores(found)

    ours = scores(TaskData(str(root)))
    monkeypatch.setattr(datasets, "load_dataset", reference(root))
    theirs = scores(None)
    assert set(ours) == set(names)
    assert ours == theirs
    assert all(len(values) >= 1 for values in ours.values())


def test_the_number_of_examples(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the suite has it, or as num_fewshot says; the split that they come from is then needed."""
    from flame_composer.use.task_data import TaskData
    from flame_composer.use.tasks import load_tasks

    caplog.set_level(logging.ERROR)
    names = ["arc_easy", "ceval-valid"]
    for num_fewshot, data in ((None, TaskData(str(root))), (0, TaskData(str(root)))):
        shots = {"arc_easy": 0, "ceval-valid": 5}
        loaded = load_tasks(names, None, num_fewshot=num_fewshot, shots=shots, data=data)
        found = {
            task.config.num_fewshot for name, task in loaded["tasks"].items() if "ceval" in name
        }
        assert found == {5 if num_fewshot is None else 0}
        assert loaded["tasks"]["arc_easy"].config.num_fewshot == 0
    with pytest.raises(
        ConfigError, match=r"1 file missing, in it: allenai/ai2_arc/ARC-Easy/train.jsonl"
    ):
        load_tasks(["arc_easy"], None, num_fewshot=2, data=TaskData(str(root)))


def test_num_fewshot_overrides_and_says_so(root: Path, model_folder: Path) -> None:
    process = run_script(
        "recipes/evaluate.py",
        f"model={model_folder}",
        "suite=bias",
        "tasks=[crows_pairs_english,stereoset]",
        f"data_root={root}",
        "num_fewshot=1",
        "task_limit=2",
    )
    shots = {row["benchmark"]: row["shots"] for row in last_json(process)["benchmarks"]}
    assert shots == {"BBQ": 1, "CrowS-Pairs": 1, "StereoSet": 0}
    assert "num_fewshot=1 takes the place of the numbers of examples" in process.stdout
    assert "|crows_pairs_english|" in process.stdout, "what is asked for by name is shown in full"
    assert "\nintersentence " in process.stdout


def test_the_folders_of_the_suites_hold_all_of_their_tasks() -> None:
    """So that the harness's other thousands need not be read."""
    from lm_eval.tasks import TaskManager

    from flame_composer.upstream.lm_eval import only_errors, settings_of
    from flame_composer.use.tasks import find

    named = {each.task for suite in SUITES.values() for each in suite} - {STEREOSET}
    assert set(FOLDERS) == named
    few = find(list(FOLDERS), None)
    assert len(few.all_tasks) < 1000
    with only_errors():
        whole = TaskManager()
    ours, theirs = (settings_of(each, list(FOLDERS), False) for each in (few, whole))
    assert {name: str(each.to_dict()) for name, each in ours.items()} == {
        name: str(each.to_dict()) for name, each in theirs.items()
    }


# What is missing


def test_all_that_is_missing_is_named_before_there_is_a_model(tmp_path: Path) -> None:
    process = run_script(
        "recipes/evaluate.py", "model=nowhere", "suite=base", f"data_root={tmp_path}", env=OFFLINE
    )
    assert (process.returncode, process.stdout) == (2, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith(
        f"error: data_root={tmp_path}: {2 * 57 + 6} files missing, in it: cais/mmlu/{{"
    )
    for place in (
        "abstract_algebra,",
        "/{test,dev}.jsonl; Rowan/hellaswag/validation.jsonl; baber/piqa/validation.jsonl; ",
        "allenai/ai2_arc/{ARC-Easy,ARC-Challenge}/test.jsonl; EleutherAI/lambada_openai/default/",
        "docs/benchmarks_data.md says what they hold",
        f"huggingface-cli download cais/mmlu --repo-type dataset --local-dir {tmp_path}/cais/mmlu",
    ):
        assert place in line


def test_what_is_missing_of_stereoset_is_named_with_the_rest(tmp_path: Path) -> None:
    from flame_composer.use import benchmarks

    config = load(EvaluateConfig, ["model=m", "suite=bias", f"data_root={tmp_path}"])
    with pytest.raises(ConfigError) as caught:
        benchmarks.load(config)
    assert (
        "4 files missing, in it: oskarvanderwal/bbq/All/test.jsonl;"
        " jannalu/crows_pairs_multilingual/english/test.jsonl;"
        " McGill-NLP/stereoset/{intrasentence,intersentence}/validation.jsonl"
    ) in str(caught.value)


def test_some_that_are_missing(root: Path, tmp_path: Path) -> None:
    from flame_composer.use.task_data import TaskData

    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    (copy / "Rowan/hellaswag/validation.jsonl").unlink()
    shutil.rmtree(copy / "cais/mmlu/anatomy")
    with pytest.raises(ConfigError) as caught:
        TaskData(str(copy)).find(splits_of_suites(("base",)))
    assert "3 files missing, in it: cais/mmlu/anatomy/{test,dev}.jsonl; Rowan" in str(caught.value)


# Places and kinds of files


def found_in(root: Path, path: str, name: str | None, split: str) -> list[dict[str, Any]]:
    """The rows that a task gets."""
    from flame_composer.use.task_data import Split, TaskData

    data = TaskData(str(root))
    data.find([Split(path, name, split)])
    return data.load(path, name)[split].to_list()


PIQA = "baber/piqa"
PLACES = (
    (None, "validation.jsonl"),
    (None, "data/validation.jsonl"),
    (None, "data/validation-00000-of-00001.parquet"),
    (None, "default/validation/0000.parquet"),
    (None, "validation.csv"),
    ("default", "default/validation.parquet"),
    ("default", "validation.jsonl"),
    ("law", "law/validation.jsonl"),
    ("law", "law/validation-00000-of-00001.parquet"),
    ("law", "validation/law_validation.csv"),
    ("law", "validation/law.csv"),
)


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_places_of_files(name: str | None, place: str, tmp_path: Path) -> None:
    rows = [row_of("ceval/ceval-exam", i) for i in range(ROWS)]
    file = tmp_path / "ceval/ceval-exam" / place
    write = {".jsonl": write_rows, ".parquet": write_parquet, ".csv": write_csv}[file.suffix]
    write(file, rows)
    columns = ("question", "A", "B", "C", "D", "answer")
    assert found_in(tmp_path, "ceval/ceval-exam", name, "validation") == [
        {key: row[key] for key in columns} for row in rows
    ]


def test_what_the_card_names_is_found_last(tmp_path: Path) -> None:
    folder = tmp_path / PIQA
    rows = [row_of(PIQA, i) for i in range(ROWS)]
    write_rows(folder / "files/part-1.jsonl", rows[:3])
    write_rows(folder / "files/part-2.jsonl", rows[3:])
    write_rows(tmp_path / "outside.jsonl", rows)
    configs = [
        {"config_name": "default", "data_files": [{"split": "validation", "path": "files/part-*"}]},
        {
            "config_name": "out",
            "data_files": [{"split": "validation", "path": "../../outside.jsonl"}],
        },
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n# A card\n")
    assert found_in(tmp_path, PIQA, None, "validation") == rows
    with pytest.raises(ConfigError, match="1 file missing"):
        found_in(tmp_path, PIQA, "out", "validation")


@pytest.mark.parametrize(
    "head", ["a: !!bool maybe", "a: !!timestamp x", "a: !!int ''", "- [[", "{"]
)
def test_a_card_that_cannot_be_read_names_nothing(tmp_path: Path, head: str) -> None:
    (tmp_path / PIQA).mkdir(parents=True)
    (tmp_path / PIQA / "README.md").write_text(f"---\n{head}\n---\n")
    with pytest.raises(ConfigError, match="1 file missing"):
        found_in(tmp_path, PIQA, None, "validation")


def test_links_as_the_hub_leaves_them(tmp_path: Path) -> None:
    rows = [row_of(PIQA, i) for i in range(ROWS)]
    write_rows(tmp_path / "blobs/abc", rows)
    folder = tmp_path / "root" / PIQA
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").symlink_to("../../../blobs/abc")
    assert found_in(tmp_path / "root", PIQA, None, "validation") == rows


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    """In the same second, with the same length."""
    rows = [row_of(PIQA, i) for i in range(ROWS)]
    file = tmp_path / PIQA / "validation.jsonl"
    write_rows(file, rows)
    before = file.stat()
    assert found_in(tmp_path, PIQA, None, "validation") == rows
    changed = [{**row, "label": 1 - row["label"]} for row in rows]
    write_rows(file, changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert found_in(tmp_path, PIQA, None, "validation") == changed


# Wrong files


def _lines(*lines: str) -> Callable[[Path], None]:
    return lambda file: (None, file.write_text("".join(f"{line}\n" for line in lines)))[0]


def _rows(path: str, **changes: Any) -> Callable[[Path], None]:
    """Good rows, and then one with other values, or without those that are `...`."""

    def write(file: Path) -> None:
        last = {**row_of(path, 3), **changes}
        last = {key: value for key, value in last.items() if value is not ...}
        write_rows(file, [*(row_of(path, i) for i in range(3)), last])

    return write


def _zeros(file: Path) -> None:
    with file.open("wb") as out:
        out.truncate(40 << 20)


def _loop(file: Path) -> None:
    file.symlink_to(file.name)


GOOD = json.dumps(row_of(PIQA, 0))
WRONG: dict[str, tuple[str, str, Callable[[Path], Any], str]] = {
    "json": (PIQA, ".jsonl", _lines(GOOD, "{'goal'"), "line 2: not valid JSON: Expecting prop"),
    "not_utf_8": (
        PIQA,
        ".jsonl",
        lambda file: file.write_bytes(b'{"goal": "\xff"}\n'),
        "line 1: not valid UTF-8 at byte 10 of the line",
    ),
    "list": (PIQA, ".jsonl", _lines("[1]"), "line 1: must be a JSON object, not a list"),
    "column": (
        PIQA,
        ".jsonl",
        _rows(PIQA, sol2=...),
        "line 4: no column 'sol2'; it has goal, sol1,",
    ),
    "kind": (
        PIQA,
        ".jsonl",
        _rows(PIQA, label="1"),
        "line 4: column 'label' must be a number from 0 to 1, not a string '1'",
    ),
    "range": (PIQA, ".jsonl", _rows(PIQA, label=2), "must be a number from 0 to 1, not a number 2"),
    "half_a_pair": (
        PIQA,
        ".jsonl",
        _rows(PIQA, goal="\ud800"),
        "column 'goal' must be a text that",
    ),
    "no_rows": (PIQA, ".jsonl", _lines(), "has no rows; copy it again"),
    "blank": (PIQA, ".jsonl", _lines("", " "), "has no rows; copy it again"),
    "long": (PIQA, ".jsonl", _zeros, "line 1: has more than 16 MiB"),
    "no_parquet": (PIQA, ".parquet", _lines(GOOD), "not a Parquet file"),
    "no_parquet_rows": (
        PIQA,
        ".parquet",
        lambda file: write_parquet(file, []),
        "has no rows",
    ),
    "parquet_columns": (
        PIQA,
        ".parquet",
        lambda file: write_parquet(file, [{"goal": "x"}]),
        "row 1: no column 'sol1'; it has goal",
    ),
    "csv_values": (PIQA, ".csv", _lines("goal,sol1", "a"), "line 2: has 1 value for 2 columns"),
    "csv_names": (PIQA, ".csv", _lines("goal,goal", "a,b"), "line 1: names a column twice"),
    "csv_long": (
        PIQA,
        ".csv",
        _lines("goal,sol1", "x" * 200_000),
        "line 3: not CSV in UTF-8: field larger than field limit",
    ),
    "gap": (
        "allenai/winogrande",
        ".jsonl",
        _rows("allenai/winogrande", sentence="no gap"),
        "line 4: sentence must hold a _, the gap to be filled",
    ),
    "unanswered": (
        "allenai/winogrande",
        ".jsonl",
        _rows("allenai/winogrande", answer=""),
        "line 4: column 'answer' must be one of 1, 2, not a string ''",
    ),
    "label": (
        "allenai/ai2_arc",
        ".jsonl",
        _rows("allenai/ai2_arc", answerKey="E"),
        "line 4: answerKey must be one of the labels in choices",
    ),
    "choices": (
        "allenai/ai2_arc",
        ".jsonl",
        _rows("allenai/ai2_arc", choices={"text": ["a"], "label": ["A", "B"]}),
        "column 'choices' must be an object with lists `text` and `label`",
    ),
    "endings": (
        "Rowan/hellaswag",
        ".jsonl",
        _rows("Rowan/hellaswag", endings=["a", "b", "c"]),
        "line 4: column 'endings' must be a list of 4 texts, not a list",
    ),
    "one_word": (
        "EleutherAI/lambada_openai",
        ".jsonl",
        _rows("EleutherAI/lambada_openai", text="word"),
        "line 4: text must have two words or more",
    ),
    "unknown": (
        "oskarvanderwal/bbq",
        ".jsonl",
        _rows("oskarvanderwal/bbq", ans2="The neighbour"),
        "line 4: one of ans0, ans1 and ans2 must be an answer like 'Unknown'",
    ),
    "category": (
        "oskarvanderwal/bbq",
        ".jsonl",
        _rows("oskarvanderwal/bbq", category="age"),
        "line 4: column 'category' must be one of Age, Disability_status, ",
    ),
    "mixed": (
        "of/others",
        ".jsonl",
        _lines('{"a": 1}', '{"a": ["x"]}'),
        "column 'a' must hold values of one kind",
    ),
    "folder": (PIQA, ".jsonl", Path.mkdir, "is not a file; put the file in its place"),
    "pipe": (PIQA, ".parquet", os.mkfifo, "is not a file; put the file in its place"),
    "loop": (PIQA, ".jsonl", _loop, "cannot be read: [Errno 40]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    path, kind, make, message = WRONG[case]
    file = tmp_path / path / f"validation{kind}"
    file.parent.mkdir(parents=True)
    make(file)
    with pytest.raises((ConfigError, DataError)) as caught:
        found_in(tmp_path, path, None, "validation")
    text = str(caught.value)
    assert f"{file}: " in text
    assert message in text
    assert "\n" not in text


def test_files_that_are_there_twice_or_in_part(tmp_path: Path) -> None:
    rows = [row_of(PIQA, i) for i in range(ROWS)]
    folder = tmp_path / PIQA
    write_parquet(folder / "data/validation-00001-of-00003.parquet", rows)
    with pytest.raises(ConfigError, match="data/validation: has 1 of its 3 files; copy the others"):
        found_in(tmp_path, PIQA, None, "validation")
    shutil.rmtree(folder / "data")
    write_rows(folder / "validation.jsonl", rows)
    write_csv(folder / "validation.csv", rows)
    with pytest.raises(
        ConfigError, match=r"baber/piqa/validation is there more than once: .*jsonl and"
    ):
        found_in(tmp_path, PIQA, None, "validation")


@pytest.mark.parametrize("path", ["/etc", "../up", "a/../b", "", "a//b"])
def test_names_that_lead_elsewhere(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which is no name of a dataset"):
        found_in(tmp_path, path, None, "validation")


def test_a_task_that_is_at_an_address(tmp_path: Path) -> None:
    from flame_composer.use.task_data import TaskData

    files = {"test": ["https://example.org/data.jsonl"]}
    with pytest.raises(
        ConfigError, match=r"reads https://example.org/data.jsonl \(json\), and with"
    ):
        TaskData(str(tmp_path)).load("json", data_files=files)
    with pytest.raises(ConfigError, match="a task reads who/knows by itself"):
        TaskData(str(tmp_path)).load("who/knows")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "suite=bsae",
            r"suite=bsae: must be one of \['base', 'chinese', 'bias'\], or null; did you mean"
            r" base\?",
        ),
        ("suite=base,bias", "suite=base,bias: must be one of"),
        ("tasks=piqa data_root=nowhere", "data_root=nowhere: no such folder; make it, with a"),
        ("tasks=piqa data_root=README.md", "data_root=README.md: no such folder"),
        ("tasks=piqa data_root=s3://b/data", "data_root=s3://b/data: must be a local folder"),
        ("data.local=d data_root=docs", "data_root=docs: needs tasks or suite"),
        ("suite=bias apply_chat_template=true", "must not be set with stereoset"),
        ("tasks=stereoset system_instruction=x", "system_instruction=x: must not be set with"),
    ],
)
def test_wrong_keys(keys: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=message):
        load(EvaluateConfig, ["model=m", *keys.split()])


def test_a_task_twice_and_a_task_of_a_suite_within_a_group(root: Path) -> None:
    from flame_composer.use.task_data import TaskData
    from flame_composer.use.tasks import TASKS, load_tasks

    with pytest.raises(
        ConfigError, match="cannot be loaded: Duplicate task 'mmlu_anatomy': found in"
    ):
        load_tasks(
            ["mmlu", "mmlu_anatomy"],
            str(TASKS / "mmlu/default"),
            num_fewshot=0,
            data=TaskData(str(root)),
        )


# What texts begin with


@pytest.mark.parametrize(
    ("ends", "starts"),
    [(Ends(True, True), {"<s>"}), (Ends(False, True), {"</s>"}), (Ends(False, False), set())],
    ids=["bos", "eos", "nothing"],
)
def test_scores_begin_as_documents_did(
    ends: Ends,
    starts: set[str],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the requests of every task of the suites, no bos or eos that training did not show."""
    from lm_eval.models.huggingface import HFLM

    from flame_composer.use import harness, stereoset
    from flame_composer.use.stereoset_data import read_examples
    from flame_composer.use.task_data import TaskData
    from flame_composer.use.tasks import load_tasks

    caplog.set_level(logging.ERROR)
    tokenizer = with_ends(llama_tokenizer(), ends)
    torch.manual_seed(0)
    network = build_model(build_hf_config({**GLA, "hidden_size": 16}, tokenizer, 2048))
    model = harness.HarnessModel(network.eval(), tokenizer, batch_size=8)
    asked: list[tuple[list[int], list[int]]] = []
    answer = HFLM._loglikelihood_tokens

    def note(self: Any, requests: Any, *args: Any, **more: Any) -> Any:
        asked.extend((before, scored) for _, before, scored in requests)
        return answer(self, requests, *args, **more)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", note)
    data = TaskData(str(root))
    names = [name for suite in ALL for name in tasks_of(suite) if name != STEREOSET]
    shots = {task: count for suite in ALL for task, count in shots_of(suite).items()}
    loaded = load_tasks(names, None, num_fewshot=None, shots=shots, data=data)
    loaded["tasks"] = {
        name: task
        for name, task in loaded["tasks"].items()
        if name in FOLDERS or name in ("mmlu_anatomy", "ceval-valid_law", "cmmlu_arts")
    }
    harness.score(
        model, {"tasks": loaded["tasks"], "groups": {}, "group_map": {}}, limit=4, bootstraps=0
    )
    harnessed = len(asked)
    stereoset.score(model, read_examples(data, None))
    special = set(tokenizer.convert_tokens_to_ids(["<s>", "</s>"]))
    seen = {token for before, scored in asked for token in [*before, *scored] if token in special}
    assert set(tokenizer.convert_ids_to_tokens(list(seen))) == starts
    assert 0 < harnessed < len(asked)
    for before, scored in asked:
        assert before
        assert not special & {*before[1:], *scored}
        assert not ends.bos or before[0] == tokenizer.bos_token_id


def test_a_text_without_a_question_after_nothing(root: Path) -> None:
    """Its first token is not scored; its other tokens are what a forward pass says."""
    from lm_eval.api.instance import Instance

    from flame_composer.use.harness import HarnessModel

    tokenizer = with_ends(llama_tokenizer(), Ends(False, False))
    torch.manual_seed(0)
    network = build_model(build_hf_config(GLA, tokenizer, 256)).eval()
    model = HarnessModel(network, tokenizer, batch_size=2)
    texts = ["The quick brown fox", "lazy", "over the"]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=("", text), idx=0)
        for text in texts
    ]
    found = [total for total, _ in model.loglikelihood(requests, disable_tqdm=True)]
    rolling = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        for text in texts
    ]
    assert model.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(found, rel=1e-5)
    for text, total in zip(texts, found, strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logs = network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = sum(logs[place - 1, ids[place]].item() for place in range(1, len(ids)))
        assert total == pytest.approx(expected, rel=1e-5)


# docs/benchmarks_data.md


def test_the_page_names_every_benchmark_and_level() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| `([\w-]+)` \| (\d) \| (.+) \|$", PAGE, re.MULTILINE
    )
    assert rows == [
        (
            suite,
            each.name,
            each.task,
            f"{each.shots}",
            ", ".join(
                f"`{metric}`" + ("" if chance is None else f" ({chance:.3g})")
                for metric, chance in each.metrics.items()
            ),
        )
        for suite, benchmarks in SUITES.items()
        for each in benchmarks
    ]


def test_the_page_names_every_folder_configuration_and_split() -> None:
    from flame_composer.upstream.lm_eval import settings_of
    from flame_composer.use.stereoset_data import DATASET, KINDS, RELEASED, SPLIT
    from flame_composer.use.task_data import splits_of
    from flame_composer.use.tasks import find

    manager = find(list(FOLDERS), None)
    part = PAGE.partition("## The data\n")[2]
    written = re.findall(
        r"^\| ([^|`]+) \| `([\w/-]+)` \| ([^|]+) \| ([^|]+) \|$", part, re.MULTILINE
    )
    expected = []
    for benchmark in (each for suite in SUITES.values() for each in suite):
        if benchmark.task == STEREOSET:
            configs = ", ".join(f"`{kind}`" for kind in KINDS)
            expected.append((benchmark.name, DATASET, configs, f"`{SPLIT}`"))
            continue
        settings = settings_of(manager, [benchmark.task], False).values()
        splits = [split for each in settings for split in splits_of(each, benchmark.shots)]
        names = list(dict.fromkeys(split.name for split in splits))
        configs = (
            f"{len(names)} subjects" if len(names) > 1 else f"`{names[0]}`" if names[0] else "-"
        )
        (path,) = {split.path for split in splits}
        which = ", ".join(f"`{each}`" for each in dict.fromkeys(split.split for split in splits))
        expected.append((benchmark.name, path, configs, which))
    assert written == expected
    assert all(f"`{place}`" in part for place in RELEASED)


def test_the_page_names_every_column() -> None:
    from flame_composer.use.columns import LAYOUTS

    for path, layout in LAYOUTS.items():
        columns = "; ".join(f"`{name}`: {each.what}" for name, each in layout.columns.items())
        assert f"| `{path}` | {columns} |\n" in PAGE


def test_what_is_known_of_an_answer_is_what_the_harness_knows() -> None:
    import importlib.util

    from flame_composer.use.columns import UNKNOWN
    from flame_composer.use.tasks import TASKS

    spec = importlib.util.spec_from_file_location("of_bbq", TASKS / "bbq/utils.py")
    assert spec is not None
    assert spec.loader is not None
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    assert list(UNKNOWN) == utils.UNKNOWN_RESPONSES


def test_stereoset_alone(model_folder: Path, tmp_path: Path) -> None:
    write_stereoset(tmp_path / "stereoset/dev.json")
    keys = ("recipes/evaluate.py", f"model={model_folder}", f"data_root={tmp_path}")
    process = run_script(*keys, "tasks=stereoset", env=OFFLINE)
    found = last_json(process)
    assert set(found["tasks"]) == {"stereoset"}
    assert "benchmarks" not in found
    assert f"overall {found['tasks']['stereoset']['lms']:.2f}" in " ".join(process.stdout.split())
