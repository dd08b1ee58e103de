"""lm-evaluation-harness on our models: the harness's own scores, what is refused, and training
that does not notice.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import runpy
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.modules.module import register_module_forward_pre_hook

from flame_composer.checkpoint.to_model import save_hf_folder
from flame_composer.config.load import load
from flame_composer.config.train import TrainConfig
from flame_composer.config.use import EvaluateConfig
from flame_composer.errors import ConfigError, DataError
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.text.ends import Ends, with_ends
from flame_composer.upstream.lm_eval import ending_pools
from tests.conftest import GLA
from tests.data_fixtures import byte_tokenizer, words
from tests.runs import ROOT, Corpus, Script, last_json, read_log, run_script, two_ranks

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the harness's own code

TASKS = ["choice", "text", "written"]


def write_task(folder: Path, name: str, **content: Any) -> None:
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1},
        **content,
    }
    (folder / f"{name}.yaml").write_text(
        yaml.dump({key: value for key, value in task.items() if value is not None})
    )


def write_tasks(folder: Path, names: list[str], number: int) -> None:
    """A task of each kind, with `number` rows: multiple choice, with examples shown before it;
    perplexity; text that is written.
    """
    with (folder / "data.jsonl").open("w") as data:
        for i in range(number):
            choices = [f" {words(1 + j * i % 4, 7 * i + j)}" for j in range(3)]
            data.write(
                json.dumps({"text": words(2 + 9 * i % 50, i), "choices": choices, "answer": i % 3})
                + "\n"
            )
    write_task(
        folder,
        names[0],
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_choice="choices",
        doc_to_target="answer",
        fewshot_split="test",
        num_fewshot=2,
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    write_task(
        folder,
        names[1],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[
            {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    )
    write_task(
        folder,
        names[2],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{text[:3]}}",
        generation_kwargs={"max_gen_toks": 3, "until": ["\n"]},
        metric_list=[{"metric": "exact_match"}],
    )


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, TASKS, 9)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    torch.manual_seed(0)
    tokenizer = with_ends(byte_tokenizer(), Ends(bos=False, eos=True))
    save_hf_folder(
        build_model(build_hf_config(GLA, tokenizer, 64)), tokenizer, folder, dtype="float32"
    )
    return folder


def test_scores_are_those_of_the_harness_itself(
    tasks: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    caplog.set_level(logging.ERROR)
    ours = last_json(
        run_script(
            "recipes/evaluate.py",
            f"model={model_folder}",
            f"tasks=[{','.join(TASKS)}]",
            f"task_path={tasks}",
            "batch_size=4",
            "max_length=40",
        )
    )["tasks"]
    with ending_pools():
        theirs = evaluator.evaluate(
            HFLM(str(model_folder), device="cpu", dtype="float32", batch_size=4, max_length=40),
            TaskManager(include_path=str(tasks), include_defaults=False).load(TASKS),
        )
    assert theirs is not None
    for task in TASKS:
        for key, value in theirs["results"][task].items():
            if "," in key and value != "N/A":
                assert ours[task].pop(key.removesuffix(",none")) == pytest.approx(
                    value, rel=1e-12
                ), key
    assert ours == {task: {} for task in TASKS}


CHAT = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}<|endoftext|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def with_template(model_folder: Path, folder: Path, template: str) -> Path:
    """A copy of the model whose tokenizer has a chat template."""
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"apply_chat_template": True},
        {"apply_chat_template": True, "fewshot_as_multiturn": False},
        {"apply_chat_template": True, "system_instruction": "ne mi"},
        {"system_instruction": "ne mi"},
    ],
)
def test_conversations_are_those_of_the_harness_itself(
    tasks: Path,
    model_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
) -> None:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    caplog.set_level(logging.ERROR)
    model = with_template(model_folder, tmp_path / "model", CHAT)
    keys = [f"{key}={str(value).lower()}" for key, value in options.items()]
    evaluate = (
        "recipes/evaluate.py",
        f"model={model}",
        "tasks=[choice,written]",
        f"task_path={tasks}",
        "max_length=400",
    )
    ours = last_json(run_script(*evaluate, *keys))
    loaded = TaskManager(include_path=str(tasks), include_defaults=False)
    with ending_pools():
        theirs = evaluator.evaluate(
            HFLM(str(model), device="cpu", dtype="float32", batch_size=8, max_length=400),
            loaded.load(["choice", "written"]),
            **{"fewshot_as_multiturn": True, **options},
        )
    assert theirs is not None
    for task, scores in ours["tasks"].items():
        for key, value in theirs["results"][task].items():
            if "," in key and value != "N/A":
                assert scores[key.removesuffix(",none")] == pytest.approx(value, rel=1e-12), key
    assert {key: ours[key] for key in options} == options


def test_the_text_of_a_conversation_is_what_the_keys_say(
    tasks: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing comes before what the template writes, though documents began with bos."""
    from flame_composer.checkpoint.to_model import load_model
    from flame_composer.use import harness
    from flame_composer.use.tasks import load_tasks

    model = with_template(model_folder, tmp_path / "model", CHAT)
    network, tokenizer = load_model(str(model))
    tokenizer = with_ends(tokenizer, Ends(bos=True, eos=True))
    found: dict[str, list[int]] = {}
    for name, keys in {
        "turns": ["apply_chat_template=true", "system_instruction=ne mi"],
        "one turn": ["apply_chat_template=true", "fewshot_as_multiturn=false"],
        "text": ["system_instruction=ne mi"],
    }.items():
        config = load(EvaluateConfig, ["model=m", "tasks=choice", *keys])
        adapter = harness.HarnessModel(
            network, tokenizer, batch_size=4, max_length=400, chat=harness.build_chat(config)
        )
        loaded = load_tasks(["choice"], str(tasks), num_fewshot=1)
        asked: list[list[int]] = []
        with monkeypatch.context() as patch:
            answer = adapter._loglikelihood_tokens

            def note(
                requests: Any, *, asked: Any = asked, answer: Any = answer, **more: Any
            ) -> Any:
                asked.extend(each[1] for each in requests)
                return answer(requests, **more)

            patch.setattr(adapter, "_loglikelihood_tokens", note)
            harness.score(adapter, loaded, limit=1)
        found[name] = asked[0]
    texts = {name: tokenizer.decode(ids) for name, ids in found.items()}
    assert texts["turns"].startswith("[system] ne mi<|endoftext|>[user] ")
    assert texts["turns"].count("[user] ") == 2
    assert texts["turns"].endswith("<|endoftext|>[assistant]")
    assert texts["one turn"].startswith("[user] ")
    assert texts["one turn"].count("[user] ") == 1
    assert texts["text"].startswith("<|endoftext|>ne mi")
    assert "[user]" not in texts["text"]


@pytest.mark.parametrize(
    ("template", "keys", "message"),
    [
        (None, (), "the model's tokenizer has no chat template; set it to false, or set tokenizer"),
        (
            "{{ raise_exception('no user') }}",
            (),
            "the tokenizer's chat template: no user",
        ),
        ("{{ 1 / 0 }}", (), "cannot be written: the tokenizer's chat template: division by zero"),
        ("{% for %}", (), "cannot be written: the tokenizer's chat template: "),
        (
            "{{ messages.__class__.__mro__ }}",
            (),
            "the tokenizer's chat template: access to",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
            ("system_instruction=be brief",),
            "a question after system_instruction cannot be written: the tokenizer's chat",
        ),
    ],
)
def test_chat_templates_that_are_refused(
    tasks: Path,
    model_folder: Path,
    tmp_path: Path,
    template: str | None,
    keys: tuple[str, ...],
    message: str,
) -> None:
    model = model_folder
    if template is not None:
        model = with_template(model_folder, tmp_path / "model", template)
    process = run_script(
        "recipes/evaluate.py",
        f"model={model}",
        "tasks=choice",
        f"task_path={tasks}",
        "apply_chat_template=true",
        *keys,
    )
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: apply_chat_template: ")
    assert message in line


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("apply_chat_template=true data.local=d", "apply_chat_template=true: needs tasks"),
        ("system_instruction=x data.local=d", "system_instruction=x: needs tasks"),
        ("fewshot_as_multiturn=false tasks=choice", "must be true without apply_chat_template"),
        (
            "apply_chat_template=true add_bos=true tasks=choice",
            "must be null with apply_chat_template",
        ),
    ],
)
def test_keys_of_conversations_that_go_together(keys: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(EvaluateConfig, ["model=m", *keys.split()])


def test_a_chat_template_that_fails_or_does_not_end_later(
    tasks: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flame_composer.checkpoint.to_model import load_model
    from flame_composer.upstream import jinja
    from flame_composer.use import harness
    from flame_composer.use.tasks import load_tasks

    monkeypatch.setattr(jinja, "TEMPLATE_SECONDS", 0.3)
    count = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    for number, (what, problem) in enumerate(
        {count: "a text takes more than 0.3 seconds", "{{ 1 / 0 }}": "division by zero"}.items()
    ):
        late = "{% if messages[0].content != 'question' %}" + what + "{% endif %}{{ messages }}"
        model = with_template(model_folder, tmp_path / f"{number}", late)
        adapter = harness.HarnessModel(
            *load_model(str(model)), batch_size=1, chat=harness.Chat(apply_chat_template=True)
        )
        loaded = load_tasks(["choice"], str(tasks), num_fewshot=0)
        with pytest.raises(
            DataError, match=f"templates fails: the tokenizer's chat template: {problem}"
        ):
            harness.score(adapter, loaded, limit=1)


def test_two_ranks_share_the_questions(tasks: Path, model_folder: Path) -> None:
    keys = (
        f"model={model_folder}",
        f"tasks=[{','.join(TASKS)}]",
        f"task_path={tasks}",
        "task_limit=5",
        "num_fewshot=1",
    )
    one = last_json(run_script("recipes/evaluate.py", *keys))["tasks"]
    first, second = two_ranks("recipes/evaluate.py", *keys)
    two = last_json(first)["tasks"]
    assert second.stdout == ""
    assert two.keys() == one.keys()
    for task, values in one.items():
        assert two[task] == pytest.approx(values, rel=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unsafe": (
        {"unsafe_code": True, "doc_to_text": "{{text}}"},
        "tasks: unsafe: runs what the model writes as code, which is",
    ),
    "no_data": (
        {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}, "doc_to_text": "{{text}}"},
        "tasks: no_data: cannot be loaded: Unable to find",
    ),
    "remote_metric": (
        {
            "doc_to_text": "{{text}}",
            "metric_list": [
                {"metric": "rouge_of_the_hub", "aggregation": "mean", "higher_is_better": True}
            ],
        },
        (
            "tasks: remote_metric: the harness has no metric rouge_of_the_hub, and code for it is"
            " never downloaded"
        ),
    ),
    "local_metric": (
        {
            "doc_to_text": "{{text}}",
            "metric_list": [
                {"metric": "{folder}/code.py", "aggregation": "mean", "higher_is_better": True}
            ],
        },
        (
            "tasks: local_metric: the harness has no metric {folder}/code.py, and code for it is"
            " never downloaded"
        ),
    ),
    "template": (
        {"doc_to_text": "{{{{ cycler.__init__.__globals__.os.mkdir('{folder}/marker') }}}}"},
        "tasks: template: cannot be loaded: access to attribute '__init__' of",
    ),
    "function": (
        {"doc_to_text": "!function code.run"},
        (
            "task_path: a task in {folder} runs Python code (!function code.run); set"
            " task_code=true if you trust it"
        ),
    ),
    "pickle": (
        {
            "dataset_path": "pandas",
            "dataset_kwargs": {"data_files": {"test": "{folder}/data.pkl"}},
            "doc_to_text": "{{text}}",
        },
        (
            "task_path: a task's dataset_path is pandas, which reads pickles, and those can run"
            " code; give its data as JSON lines"
        ),
    ),
    "pickle_streamed": (
        {
            "dataset_path": "pandas",
            "dataset_kwargs": {"data_files": {"test": "{folder}/data.pkl"}, "streaming": True},
            "doc_to_text": "{{text}}",
        },
        "task_path: a task's dataset_path is pandas, which reads pickles",
    ),
    "cache": (
        {
            "dataset_kwargs": {
                "data_files": {"test": "{folder}/data.jsonl"},
                "cache_dir": "{folder}/marker",
            },
            "doc_to_text": "{{text}}",
        },
        (
            "task_path: a task's dataset_kwargs have cache_dir={folder}/marker, and no task decides"
            " where files are written"
        ),
    ),
    "generate": (
        {
            "doc_to_text": "{{text}}",
            "generation_kwargs": {"custom_generate": "{folder}", "trust_remote_code": True},
        },
        (
            "tasks: generate: its generation_kwargs have 'custom_generate', which is not allowed;"
            " only do_sample, "
        ),
    ),
    "of_python": (
        {"doc_to_text": "!function os.mkdir"},
        "task_path: a task in {folder} runs Python code (!function os.mkdir); set",
    ),
}


class _Marker:
    """Makes a folder when it comes out of a pickle."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tasks: Path, tmp_path: Path, name: str) -> None:
    from flame_composer.use.tasks import load_tasks

    content, message = REFUSED[name]
    (tmp_path / "data.jsonl").write_bytes((tasks / "data.jsonl").read_bytes())
    (tmp_path / "code.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\nrun = str\n"
    )
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(_Marker(tmp_path / "marker")))
    write_task(
        tmp_path, name, **{"output_type": "generate_until", "doc_to_target": "{{text}}", **content}
    )
    file = tmp_path / f"{name}.yaml"
    text = (
        file.read_text()
        .replace("'!function", "!function")
        .replace(".run'", ".run")
        .replace(".mkdir'", ".mkdir")
    )
    file.write_text(
        text.replace("{folder}", str(tmp_path)).replace("{{{{", "{{").replace("}}}}", "}}")
    )
    with pytest.raises(ConfigError) as caught:
        load_tasks([name], str(tmp_path), num_fewshot=None)
    assert str(caught.value).startswith(message.replace("{folder}", str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists(), "no code of a task is run"


def test_a_task_that_leaves_no_room_for_its_question(
    tasks: Path, model_folder: Path, tmp_path: Path
) -> None:
    """Found before any work; what is found late is one line."""
    (tmp_path / "data.jsonl").write_bytes((tasks / "data.jsonl").read_bytes())
    write_task(
        tmp_path,
        "long",
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "exact_match"}],
    )
    model = ("recipes/evaluate.py", f"model={model_folder}")
    process = run_script(*model, "tasks=long", f"task_path={tmp_path}")
    assert (process.returncode, process.stderr) == (
        2,
        (
            "error: tasks: long: its answers may have 256 tokens, but there are only 64 for"
            " question and answer; set max_gen_toks in its generation_kwargs, or a larger"
            " max_length\n"
        ),
    )
    process = run_script(*model, "tasks=choice", f"task_path={tasks}", "max_length=2")
    assert (process.returncode, process.stderr) == (
        1,
        (
            "error: tasks: choice: the harness gives up: an answer may be longer than the 2 tokens"
            " of max_length\n"
        ),
    )


def test_a_template_that_does_not_end_is_given_up(
    tasks: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sandbox takes a range of 90,000, and another one within."""
    from flame_composer.checkpoint.to_model import load_model
    from flame_composer.upstream import jinja
    from flame_composer.use import harness
    from flame_composer.use.tasks import load_tasks

    monkeypatch.setattr(jinja, "TEMPLATE_SECONDS", 0.3)
    (tmp_path / "data.jsonl").write_bytes((tasks / "data.jsonl").read_bytes())
    count = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    seen = "{% if text == '" + words(2 + 9, 1) + "' %}" + count + "{% endif %}{{text}}"
    for name, template in (("first", count), ("second", seen)):
        write_task(
            tmp_path,
            name,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target=template,
            metric_list=[{"metric": "word_perplexity"}],
        )
    problem = "a text takes more than 0.3 seconds; have it loop over less$"
    with pytest.raises(ConfigError, match=rf"^tasks: first: cannot be loaded: {problem}"):
        load_tasks(["first"], str(tmp_path), num_fewshot=0)
    loaded = load_tasks(["second"], str(tmp_path), num_fewshot=0)
    model = harness.HarnessModel(*load_model(str(model_folder)), batch_size=1)
    with pytest.raises(
        DataError, match=rf"^tasks: second: one of their templates fails: {problem}"
    ):
        harness.score(model, loaded, limit=2)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_on_a_cpu_nothing_is_cast_but_by_linear_layers(model_folder: Path) -> None:
    from flame_composer.checkpoint.to_model import load_model
    from flame_composer.use import harness

    model, tokenizer = load_model(str(model_folder))
    adapter = harness.HarnessModel(model, tokenizer, batch_size=1, precision="amp_bf16")
    ids = torch.arange(64)[None]
    with torch.no_grad():
        assert torch.equal(adapter._model_call(ids), model(ids).logits)


def test_code_that_writes_text_is_not_run_for_a_task(
    tasks: Path, model_folder: Path, tmp_path: Path
) -> None:
    """transformers' `generate` takes a folder with code to generate by, and the word that it is
    trusted, like any argument.
    """
    from flame_composer.checkpoint.to_model import load_model
    from flame_composer.use.harness import HarnessModel, score
    from flame_composer.use.tasks import load_tasks

    code = tmp_path / "folder" / "custom_generate"
    code.mkdir(parents=True)
    (code.parent / "config.json").write_text("{}")
    (code / "generate.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\ngenerate = print\n"
    )
    (tmp_path / "data.jsonl").write_bytes((tasks / "data.jsonl").read_bytes())
    writing = {
        "max_gen_toks": 3,
        "until": ["\n"],
        "custom_generate": str(code.parent),
        "trust_remote_code": True,
    }
    write_task(
        tmp_path,
        "code",
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{text}}",
        generation_kwargs=writing,
        metric_list=[{"metric": "exact_match"}],
    )
    with pytest.raises(
        ConfigError,
        match="tasks: code: its generation_kwargs have 'custom_generate', which is not allowed",
    ):
        score(
            HarnessModel(*load_model(str(model_folder)), batch_size=1),
            load_tasks(["code"], str(tmp_path), num_fewshot=0),
            limit=1,
        )
    assert not (tmp_path / "marker").exists(), "no code of a task is run"


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="reads thousands of tasks: make test-faults"
)
def test_a_task_that_is_not_there(tasks: Path) -> None:
    from flame_composer.use.tasks import load_tasks

    for name, folder, message in (
        (
            "choise",
            str(tasks),
            f"tasks: choise: no such task in {tasks} and the harness; did you mean choice?",
        ),
        (
            "hellaswagg",
            None,
            "tasks: hellaswagg: no such task in the harness; did you mean hellaswag?",
        ),
        (
            "humaneval",
            None,
            "tasks: humaneval: runs what the model writes as code, which is refused here",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            load_tasks([name], folder, num_fewshot=None)
        assert str(caught.value) == message


def test_folders_that_hold_no_tasks(tmp_path: Path) -> None:
    from flame_composer.use.tasks import load_tasks

    (tmp_path / "broken.yaml").write_text("task: [")
    for name in ("pipe", "deep"):
        (tmp_path / name).mkdir()
    (tmp_path / "deep/task.yaml").write_text("[" * 300_000)
    os.mkfifo(tmp_path / "pipe/task.yaml")
    for names, folder, message in (
        (["choice"], str(tmp_path / "none"), f"task_path={tmp_path / 'none'}: no such folder"),
        (
            ["choice"],
            str(tmp_path),
            f"{tmp_path / 'broken.yaml'}: cannot be read as a task: while parsing a flow node",
        ),
        (
            ["choice"],
            str(tmp_path / "pipe"),
            f"{tmp_path / 'pipe/task.yaml'}: cannot be read as a task: it is not a file",
        ),
        (
            ["choice"],
            str(tmp_path / "deep"),
            (
                f"{tmp_path / 'deep/task.yaml'}: cannot be read as a task: lists and mappings in "
                "one another, more than 100 deep"
            ),
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            load_tasks(names, folder, num_fewshot=None)
        assert str(caught.value).startswith(message)


# In training


def without_tasks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "tasks"} for row in rows]


def keys_of(tasks: Path) -> tuple[str, ...]:
    return (
        f"eval_tasks.tasks=[{','.join(TASKS)}]",
        f"eval_tasks.task_path={tasks}",
        "eval_tasks.interval=15ba",
        "eval_tasks.batch_size=3",
        "eval_tasks.limit=4",
        "eval_tasks.num_fewshot=1",
    )


@pytest.fixture(scope="module")
def scored(corpus: Corpus, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "scored"
    corpus.train_run(run, *keys_of(tasks))
    return run


def test_training_does_not_notice(
    tasks: Path, undisturbed: Path, scored: Path, tmp_path: Path
) -> None:
    rows = read_log(scored)
    assert without_tasks(rows) == read_log(undisturbed)
    assert [row["current_steps"] for row in rows if "tasks" in row] == [15, 30, 40]
    result = last_json(
        run_script(
            "recipes/evaluate.py",
            f"model={scored / 'checkpoints'}",
            f"tasks=[{','.join(TASKS)}]",
            f"task_path={tasks}",
            "batch_size=3",
            "task_limit=4",
            "num_fewshot=1",
        )
    )["tasks"]
    for task in TASKS:
        in_training = rows[-1]["tasks"][task]
        assert in_training == {
            name: value for name, value in result[task].items() if "stderr" not in name
        }
    card = tmp_path / "hf/README.md"
    last_line = run_script(
        "convert/to_hf.py", f"checkpoint={scored / 'checkpoints'}", f"out={card.parent}"
    )
    assert last_line.returncode == 0
    assert (
        f"- text bits_per_byte: {rows[-1]['tasks']['text']['bits_per_byte']:.4f}\n"
        in card.read_text()
    )


def test_scores_are_of_the_average_where_there_is_one(
    corpus: Corpus, tasks: Path, tmp_path: Path
) -> None:
    """And training goes on with the weights themselves."""
    keys = ("algorithms.ema.half_life=4ba", "max_duration=8ba", "eval_data=null")
    corpus.train_run(tmp_path / "plain", *keys)
    corpus.train_run(
        tmp_path / "scored",
        *keys,
        f"eval_tasks.task_path={tasks}",
        "eval_tasks.tasks=[text]",
        "eval_tasks.interval=4ba",
        "eval_tasks.batch_size=3",
    )
    rows = read_log(tmp_path / "scored")
    assert without_tasks(rows) == read_log(tmp_path / "plain")
    found = {}
    for which in ("model", "ema"):
        out = tmp_path / which
        exported = run_script(
            "convert/to_hf.py",
            f"checkpoint={tmp_path}/scored/checkpoints",
            f"out={out}",
            f"weights={which}",
        )
        assert exported.returncode == 0, exported.stderr
        scored = run_script(
            "recipes/evaluate.py",
            f"model={out}",
            "tasks=text",
            f"task_path={tasks}",
            "batch_size=3",
        )
        found[which] = last_json(scored)["tasks"]["text"]
    assert rows[-1]["tasks"]["text"] == found["ema"] != found["model"]
    assert [row["current_steps"] for row in rows if "tasks" in row] == [4, 8]


def test_requests_go_through_the_model_as_many_at_a_time_as_the_keys_say(
    corpus: Corpus, tasks: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the scores do not depend on; nor do they have to on the number of examples."""
    from flame_composer.use import tasks as scored

    sizes: list[int] = []
    asked: list[Any] = []
    load_tasks = scored.load_tasks
    monkeypatch.setattr(
        scored,
        "load_tasks",
        lambda *names, **more: asked.append(more) or load_tasks(*names, **more),
    )
    monkeypatch.chdir(ROOT)

    def note(module: torch.nn.Module, arguments: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            sizes.append(len(arguments[0]))

    hook = register_module_forward_pre_hook(note)
    try:
        main = runpy.run_path("recipes/evaluate.py")["main"]
        main(
            load(
                EvaluateConfig,
                [
                    f"model={model_folder}",
                    "tasks=choice",
                    f"task_path={tasks}",
                    "batch_size=5",
                    "num_fewshot=3",
                ],
            )
        )
        assert max(sizes) == 5
        sizes.clear()
        main = runpy.run_path("recipes/train.py")["main"]
        main(
            load(
                TrainConfig,
                corpus.keys(
                    tmp_path / "run",
                    *keys_of(tasks),
                    "max_duration=1ba",
                    "eval_data=null",
                    "eval_tasks.tasks=choice",
                    "scheduler.warmup=0ba",
                ),
            )
        )
        assert max(sizes) == 3
        keys = ("num_fewshot", "task_code")
        assert [[each[key] for key in keys] for each in asked] == [[3, False], [1, False]]
    finally:
        hook.remove()


def test_functions_of_a_task_that_is_trusted_run(
    tasks: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    folder = Path(shutil.copytree(tasks, tmp_path / "tasks"))
    (folder / "code.py").write_text("def text(doc):\n    return doc['text']\n")
    task = (folder / "choice.yaml").read_text().replace("task: choice", "task: own")
    (folder / "own.yaml").write_text(task.replace("'{{text}}'", "!function code.text"))
    main = runpy.run_path("recipes/evaluate.py")["main"]
    main(
        load(
            EvaluateConfig,
            [
                f"model={model_folder}",
                "tasks=[own,choice]",
                f"task_path={folder}",
                "task_code=true",
            ],
        )
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert found["own"] == found["choice"]


STOPPING = """
import os, pathlib, signal

def text(doc):
    now = pathlib.Path(__file__).with_name("now")
    if now.exists():
        now.unlink()
        os.kill(os.getpid(), signal.SIGTERM)
    return doc["text"]
"""


def test_a_signal_does_not_wait_for_tasks_and_the_restart_takes_them(
    corpus: Corpus, tasks: Path, scored: Path, tmp_path: Path
) -> None:
    """Told to stop in the middle of the scores of step 30 by a task of them; the restart
    recomputes blocks besides.
    """
    folder, run = Path(shutil.copytree(tasks, tmp_path / "tasks")), tmp_path / "stopped"
    (folder / "stopping.py").write_text(STOPPING)
    task = (folder / "choice.yaml").read_text().replace("task: choice", "task: stopping")
    (folder / "stopping.yaml").write_text(task.replace("'{{text}}'", "!function stopping.text"))
    keys = (
        *keys_of(folder),
        f"eval_tasks.tasks=[stopping,{','.join(TASKS)}]",
        "eval_tasks.interval=30ba",
        "eval_tasks.task_code=true",
    )
    script = Script("recipes/train.py", *corpus.keys(run, *keys))
    corpus.wait_for_step(script, run, 1)
    (folder / "now").touch()
    stopped = script.wait()
    assert stopped.returncode == 143, stopped.stderr
    assert f"stopped after step 30; saved {run / 'checkpoints/ba30.pt'}" in stopped.stderr
    assert not any("tasks" in row for row in read_log(run))

    corpus.train_run(run, *keys, "parallelism.activation_checkpointing=true")
    rows, expected = read_log(run), read_log(scored)
    assert without_tasks(rows) == without_tasks(expected)
    assert [row["current_steps"] for row in rows if "tasks" in row] == [30, 40]
    for step in (30, 40):
        taken = rows[step - 1]["tasks"]
        assert taken.pop("stopping") == taken["choice"]
        assert taken == expected[step - 1]["tasks"]


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes half a minute: make test-faults"
)
def test_the_average_is_what_takes_the_tasks(corpus: Corpus, tasks: Path, tmp_path: Path) -> None:
    averaged, plain = tmp_path / "averaged", tmp_path / "plain"
    keys = (*keys_of(tasks), "max_duration=8ba", "parallelism.activation_checkpointing=true")
    corpus.train_run(plain, *keys)
    corpus.train_run(averaged, *keys, "algorithms.ema.half_life=4ba")
    assert [row["loss"] for row in read_log(averaged)] == [row["loss"] for row in read_log(plain)]
    taken = read_log(averaged)[-1]["tasks"]["text"]
    assert taken != read_log(plain)[-1]["tasks"]["text"]
    found = last_json(
        run_script(
            "recipes/evaluate.py",
            f"model={averaged / 'checkpoints'}",
            "tasks=[text]",
            f"task_path={tasks}",
            "batch_size=3",
            "task_limit=4",
        )
    )["tasks"]["text"]
    assert taken == {name: value for name, value in found.items() if "stderr" not in name}


def test_mistaken_tasks_are_found_before_training(
    corpus: Corpus, tasks: Path, tmp_path: Path
) -> None:
    keys = corpus.keys(tmp_path / "run", *keys_of(tasks), "eval_tasks.task_path=./nowhere")
    process = run_script("recipes/train.py", *keys)
    assert process.returncode == 2
    assert process.stderr == "error: task_path=./nowhere: no such folder\n"
    assert not (tmp_path / "run").exists()
