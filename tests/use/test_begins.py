"""Scores, exports and prompts of a run whose tokenizer's own template puts a bos before every text.

They begin as documents did in training.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, GenerationConfig

from flame_composer import cpu
from flame_composer.checkpoint.find import find_newest
from flame_composer.checkpoint.to_model import load_from_checkpoint
from flame_composer.model.build import load_pretrained
from flame_composer.text.ends import Ends, ends_in, ends_of
from flame_composer.text.steady import MARK
from flame_composer.use.generate import Pieces
from tests.data_fixtures import words
from tests.runs import Corpus, check, last_json, read_log, run_script

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the harness's own code

BOS = "ÿ"  # stands for a byte that no text has
LENGTH = 64  # tokens of a row, and of the harness's windows
STEPS = ("max_duration=8ba", "scheduler.warmup=2ba", "save_interval=8ba", "eval_data=null")


@dataclass
class Begun:
    """A run on documents that begin with bos or do not, and its export."""

    add_bos: bool
    tokenizer: Path
    data: Path
    run: Path
    errors: str  # what training wrote beside its log

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def exported(self) -> Path:
        return self.run / "hf"


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus's, with another bos than eos and a template that puts it before every text, as
    Llama's does.
    """
    folder = Path(shutil.copytree(corpus.tokenizer, tmp_path_factory.mktemp("bos") / "tokenizer"))
    content = json.loads((folder / "tokenizer.json").read_bytes())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": BOS, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            BOS: {"id": BOS, "ids": [content["model"]["vocab"][BOS]], "tokens": [BOS]}
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    # transformers 5 writes the first only
    for name in {"tokenizer_config.json", "special_tokens_map.json"} & set(os.listdir(folder)):
        content = json.loads((folder / name).read_bytes())
        (folder / name).write_text(json.dumps({**content, "bos_token": BOS}))
    return folder


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """One that fills more than a window, one of the words that were trained on, one of a single
    token.
    """
    return [words(40, 5), "kat loman miro nevel push", "x"]


@pytest.fixture(scope="module")
def tasks(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": text, "choices": [" kat", " loman", " xq"], "answer": i % 3}
        for i, text in enumerate(texts)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    written: dict[str, dict[str, Any]] = {
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "after": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{choices[0]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
            ],
        },
    }
    for name, content in written.items():
        (folder / f"{name}.yaml").write_text(yaml.dump({"task": name, **common, **content}))
    return folder


TASKS = ("rolling", "after")
WITHOUT = pytest.mark.parametrize("begun", [False], indirect=True, ids=["without bos"])


@pytest.fixture(scope="module", params=[False, True], ids=["without bos", "with bos"])
def begun(
    request: Any,
    corpus: Corpus,
    tokenizer: Path,
    tasks: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Begun:
    folder = tmp_path_factory.mktemp("begun")
    data, run = folder / "train", folder / "run"
    check(
        run_script(
            "convert/to_mds.py",
            f"source={corpus.text}",
            f"tokenizer={tokenizer}",
            f"context_length={LENGTH}",
            f"out={data}",
            f"add_bos={str(request.param).lower()}",
        )
    )
    trained = check(
        run_script(
            "recipes/train.py",
            *corpus.keys(
                run,
                *STEPS,
                f"tokenizer={tokenizer}",
                f"train_data.local={data}",
                f"eval_tasks.tasks=[{','.join(TASKS)}]",
                f"eval_tasks.task_path={tasks}",
                "eval_tasks.interval=8ba",
                "eval_tasks.batch_size=1",
                "callbacks.generate={prompts: [kat loman], interval: 8ba, max_new_tokens: 9, "
                "temperature: 0.0}",
                "model.config.initializer_range=0.3",  # so that it does not say one thing only
            ),
        )
    )
    check(run_script("convert/to_hf.py", f"checkpoint={run / 'checkpoints'}", f"out={run / 'hf'}"))
    return Begun(request.param, tokenizer, data, run, trained.stderr)


def evaluated(model: Path, tasks: Path, *keys: str) -> tuple[dict[str, Any], str, str]:
    """The last line, what is shown and the warnings."""
    process = run_script(
        "recipes/evaluate.py",
        f"model={model}",
        f"tasks=[{','.join(TASKS)}]",
        f"task_path={tasks}",
        "batch_size=1",
        *keys,
    )
    warnings = [
        line for line in process.stderr.splitlines() if line.startswith("warning: ")
    ]  # and the harness's own bars
    return last_json(process), process.stdout, "".join(f"{line}\n" for line in warnings)


Evaluated = tuple[dict[str, Any], str, str]


@pytest.fixture(scope="module")
def right(begun: Begun, tasks: Path) -> Evaluated:
    """What the export scores."""
    return evaluated(begun.exported, tasks)


def bits(model: Any, ids: list[int], start: int) -> float:
    """Of the tokens, LENGTH at a time, each predicted from up to LENGTH before it.

    The first one is predicted from `start`.
    """
    before, total = [start, *ids], 0.0
    for first in range(0, len(ids), LENGTH):
        end = min(first + LENGTH, len(ids))
        begin = max(0, end - LENGTH)
        with torch.no_grad():
            losses = model(torch.tensor([before[begin:end]])).logits[0].double().log_softmax(-1)
        total -= sum(losses[place - begin, ids[place]].item() for place in range(first, end))
    return total / math.log(2)


def test_scores_are_of_texts_that_begin_as_documents_did(
    begun: Begun, tasks: Path, texts: list[str], right: Evaluated
) -> None:
    """Those of the checkpoint, of the export and in training are what is computed here."""
    plain = AutoTokenizer.from_pretrained(begun.tokenizer)
    model = load_pretrained(str(begun.exported)).eval()
    ids = [plain(text, add_special_tokens=False).input_ids for text in texts]
    assert len(ids[0]) > LENGTH
    bos, eos = plain.bos_token_id, plain.eos_token_id
    num_bytes = sum(len(text.encode()) for text in texts)
    expected = sum(bits(model, each, bos if begun.add_bos else eos) for each in ids) / num_bytes

    found, shown, errors = right
    assert found["tasks"]["rolling"]["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert found["texts_begin_with"] == ([BOS] if begun.add_bos else [])
    assert (
        f"texts begin with {BOS if begun.add_bos else 'nothing'}, as documents in training did\n"
        in shown
    )
    assert errors == ""
    of_checkpoint, _, errors = evaluated(begun.checkpoints, tasks)
    assert of_checkpoint["tasks"] == found["tasks"]
    assert errors == ""
    in_training = read_log(begun.run)[-1]["tasks"]
    for task in TASKS:
        assert in_training[task] == {
            key: value for key, value in found["tasks"][task].items() if "stderr" not in key
        }
    assert "does not say" not in begun.errors


@WITHOUT
def test_the_tokenizer_that_training_did_not_show_scores_otherwise(
    begun: Begun, tasks: Path, right: Evaluated
) -> None:
    """What the user sets is done, and said to contradict; another tokenizer's template is not."""
    other = str(not begun.add_bos).lower()
    wrong, _, errors = evaluated(begun.exported, tasks, f"add_bos={other}")
    ends = "with bos" if begun.add_bos else "without bos"
    assert (
        errors
        == f"warning: add_bos={other}: {begun.exported} was trained on documents that begin {ends} "
        "and end with eos\n"
    )
    for task, metric in (("rolling", "bits_per_byte"), ("after", "perplexity")):
        assert wrong["tasks"][task][metric] != pytest.approx(
            right[0]["tasks"][task][metric], rel=1e-4
        )
    for model in (begun.exported, begun.checkpoints):
        own, _, errors = evaluated(model, tasks, f"tokenizer={begun.tokenizer}")
        assert own["tasks"] == right[0]["tasks"]
        contradicts = (
            f"warning: {model}: the tokenizer's template puts {BOS} before a text and nothing after"
            f" it, but documents in training begin {ends} and end with eos: texts begin as they"
            " did\n"
        )
        assert errors == ("" if begun.add_bos else contradicts)


def test_the_export_is_what_any_reader_takes_it_for(
    begun: Begun, tasks: Path, right: Evaluated
) -> None:
    """For transformers, and the harness with its own loading, texts begin as in training."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    cpu.enable()
    plain, exported = (
        AutoTokenizer.from_pretrained(folder) for folder in (begun.tokenizer, begun.exported)
    )
    ids = plain("kat loman", add_special_tokens=False).input_ids
    assert plain("kat loman").input_ids == [plain.bos_token_id, *ids], "its own template"
    assert exported("kat loman").input_ids == ([plain.bos_token_id, *ids] if begun.add_bos else ids)
    start = plain.bos_token_id if begun.add_bos else plain.eos_token_id
    assert GenerationConfig.from_pretrained(begun.exported).bos_token_id == start
    begin = f"texts begin with {BOS if begun.add_bos else 'nothing'}, as documents in training did."
    assert f"With `tokenizer(text)`, {begin}\n" in (begun.exported / "README.md").read_text()
    harness = HFLM(str(begun.exported), device="cpu", dtype="float32", batch_size=1)
    theirs = evaluator.evaluate(
        harness,
        TaskManager(include_path=str(tasks), include_defaults=False).load(["after"]),
        bootstrap_iters=0,  # else it may never end its processes (upstream.lm_eval.ending_pools)
    )
    assert theirs is not None
    value = theirs["results"]["after"]["perplexity,none"]
    assert right[0]["tasks"]["after"]["perplexity"] == pytest.approx(value, rel=1e-9)


def continued(model: Any, ids: list[int]) -> list[int]:
    """The nine likeliest tokens after these."""
    start = len(ids)
    with torch.no_grad():
        for _ in range(9):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids = [*ids, int(logits.argmax())]
    return ids[start:]


def test_what_is_written_after_a_prompt_follows_a_document_begun(begun: Begun) -> None:
    """By the script, and by the callback in training."""
    model = load_pretrained(str(begun.exported)).eval()
    tokenizer = AutoTokenizer.from_pretrained(begun.exported)
    without = tokenizer("kat loman", add_special_tokens=False).input_ids
    bos = [tokenizer.bos_token_id]
    found = [continued(model, before + without) for before in ([], bos)]
    assert found[0] != found[1]
    written = found[begun.add_bos]
    prompt = (bos if begun.add_bos else []) + without
    text = "".join(map(Pieces(tokenizer, prompt).add, written))  # characters that are whole
    model_keys = (f"model={begun.exported}", "max_new_tokens=9", "temperature=0")
    process = check(run_script("recipes/generate.py", *model_keys, "prompt=kat loman"))
    assert process.stdout == f"kat loman{text}\n"
    start = BOS if begun.add_bos else "nothing"
    assert process.stderr == f"texts begin with {start}, as documents in training did\n"
    (sample,) = map(json.loads, (begun.run / "samples.jsonl").read_text().splitlines())
    assert sample["text"] == tokenizer.decode(written, skip_special_tokens=True)


@WITHOUT
def test_datasets_are_compared_with_training(
    begun: Begun, corpus: Corpus, tokenizer: Path, tmp_path: Path
) -> None:
    """On what it was trained on there is nothing to say; on other documents there is."""
    keys = ("recipes/evaluate.py", f"model={begun.exported}")
    process = check(run_script(*keys, f"data.local={begun.data}", "data.max_rows=2"))
    assert "warning" not in process.stderr
    out = tmp_path / "other"
    check(
        run_script(
            "convert/to_mds.py",
            f"source={corpus.text}",
            f"tokenizer={tokenizer}",
            f"context_length={LENGTH}",
            f"out={out}",
            f"add_bos={str(not begun.add_bos).lower()}",
            "add_eos=false",
        )
    )
    process = check(run_script(*keys, f"data.local={out}", "data.max_rows=2"))
    theirs, ours = (
        ("with" if not begun.add_bos else "without"),
        ("with" if begun.add_bos else "without"),
    )
    assert (
        f"warning: {out}: its documents begin {theirs} bos and end without eos; those that "
        f"{begun.exported} was trained on begin {ours} bos and end with eos\n" in process.stderr
    )


# What was made before this was kept


def forget(folder: Path, tokenizer: Path) -> None:
    """An exported folder as earlier versions wrote it."""
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)


@WITHOUT
def test_an_old_export_is_read_as_before_and_says_so(
    begun: Begun, tasks: Path, right: Evaluated, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(begun.exported, tmp_path / "old"))
    forget(folder, begun.tokenizer)
    assert ends_in(str(folder)) is None
    said = (
        f"warning: {folder}: does not say what documents began with in training; {{}}; its "
        f"tokenizer's template puts {BOS} before a text; set add_bos=true or add_bos=false to say "
        "it\n"
    )
    old, shown, errors = evaluated(folder, tasks)
    assert errors == said.format("texts of tasks begin as its tokenizer's template has it")
    assert f"texts begin with {BOS}, as the tokenizer's template has it\n" in shown
    same, _, errors = evaluated(folder, tasks, f"add_bos={str(begun.add_bos).lower()}")
    assert same["tasks"] == right[0]["tasks"]
    assert errors == ""
    assert (old["tasks"]["after"] == right[0]["tasks"]["after"]) == begun.add_bos
    command = (
        "recipes/generate.py",
        f"model={folder}",
        "prompt=kat",
        "max_new_tokens=6",
        "temperature=0",
    )
    process = check(run_script(*command))
    assert process.stderr == said.format("nothing is put before a prompt")
    told = check(run_script(*command, "add_bos=true"))
    assert told.stderr == f"texts begin with {BOS}, as add_bos=true says\n"


@WITHOUT
def test_an_old_checkpoint_is_exported_as_before_and_says_so(begun: Begun, tmp_path: Path) -> None:
    """Told what its documents began with, it is exported as a new one."""
    run = Path(shutil.copytree(begun.run, tmp_path / "run"))
    file = run / "checkpoints/ba8.pt"
    content = torch.load(file, weights_only=False)
    saved = content["state"]["integrations"]["huggingface"]["tokenizer"]
    assert saved["tokenizer_config.json"]["content"][MARK]["documents"] == {
        "bos": begun.add_bos,
        "eos": True,
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        saved[name]["content"] = json.loads((begun.tokenizer / name).read_bytes())
    del content["state"]["callbacks"]["SameData"]["ends"]
    torch.save(content, file)
    process = check(run_script("convert/to_hf.py", f"checkpoint={file}", f"out={tmp_path / 'hf'}"))
    assert (
        process.stderr
        == f"warning: {file}: does not say what documents began with in training; the tokenizer"
        f" goes out as it is; its tokenizer's template puts {BOS} before a text; set"
        " add_bos=true or add_bos=false to say it\n"
    )
    out = tmp_path / "told"
    keys = (f"checkpoint={file}", f"out={out}", f"add_bos={str(begun.add_bos).lower()}")
    told = check(run_script("convert/to_hf.py", *keys))
    assert told.stderr == ""
    assert ends_in(str(out)) == Ends(begun.add_bos, True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (begun.exported / name).read_bytes()


@WITHOUT
def test_a_run_that_goes_on_with_other_documents_says_so(
    begun: Begun, corpus: Corpus, tokenizer: Path, tmp_path: Path
) -> None:
    """Where that is allowed at all. Its next checkpoint says what they begin with now."""
    out, run = tmp_path / "other", Path(shutil.copytree(begun.run, tmp_path / "run"))
    check(
        run_script(
            "convert/to_mds.py",
            f"source={corpus.text}",
            f"tokenizer={tokenizer}",
            f"context_length={LENGTH}",
            f"out={out}",
            f"add_bos={str(not begun.add_bos).lower()}",
        )
    )
    process = check(
        run_script(
            "recipes/train.py",
            *corpus.keys(
                run,
                *STEPS,
                f"tokenizer={tokenizer}",
                f"train_data.local={out}",
                "max_duration=10ba",
                "allow_data_change=true",
                "scheduler.name=constant",
                "allow_schedule_change=true",
            ),
        )
    )
    now, before = ("without", "with") if begun.add_bos else ("with", "without")
    assert (
        f"warning: the checkpoint was trained on documents that begin {before} bos and end with"
        f" eos; now they begin {now} bos and end with eos\n" in process.stderr
    )
    newest = find_newest(str(run / "checkpoints"), tmp_path / "staging")
    assert newest is not None
    assert ends_of(load_from_checkpoint(newest)[1]) == Ends(not begun.add_bos, True)
