"""Clients that docs/serving.md names: its own commands, and lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
import os
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flame_composer.upstream.lm_eval import ending_pools
from tests.conftest import GLA
from tests.runs import ROOT, last_json, run_script
from tests.serve.clients import Server
from tests.serve.test_serve import make
from tests.use.test_harness import write_tasks

PAGE = (ROOT / "docs/serving.md").read_text()
TASKS = ["served_choice", "served_text", "served_written"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients") / "hf"
    make(folder, GLA)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder, "max_new_tokens=80")
    yield server
    assert server.end().returncode == 0


def test_the_commands_of_the_page(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = PAGE.replace("http://127.0.0.1:8000", server.url.removesuffix("/v1"))
    curl = next(block for block in here.split("```bash\n")[1:] if block.startswith("curl"))
    curl = curl.partition("```")[0].replace("curl ", "curl -sf ")
    shown = subprocess.run(["bash", "-c", curl], capture_output=True, check=True).stdout
    assert json.loads(shown)["usage"]["completion_tokens"] > 0
    script = tmp_path / "client.py"
    script.write_text(here.split("```python\n")[1].partition("```")[0])
    runpy.run_path(str(script))
    assert len(capsys.readouterr().out) > 10


def test_the_harness_scores_as_evaluate_does(
    server: Server, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By local-completions: loss on answers, on whole texts, and texts that are written."""
    from lm_eval import evaluator
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    caplog.set_level(logging.ERROR)
    write_tasks(tmp_path, TASKS, 6)
    ours = last_json(
        run_script(
            "recipes/evaluate.py",
            f"model={folder}",
            f"tasks=[{','.join(TASKS)}]",
            f"task_path={tmp_path}",
            "batch_size=4",
        )
    )["tasks"]
    os.environ["NO_PROXY"] = "127.0.0.1"
    # What the page says
    given = PAGE.partition("lm_eval --model local-completions")[2].partition("--model_args ")[2]
    given = given.partition("\n")[0].replace("http://127.0.0.1:8000/v1", server.url)
    given = given.replace("runs/gla_tiny/hf", str(folder))
    assert {f"base_url={server.url}/completions", f"tokenizer={folder}"} < {*given.split(",")}
    with ending_pools():
        theirs = evaluator.evaluate(
            LocalCompletionsAPI.create_from_arg_string(given, {"batch_size": 4, "max_length": 512}),
            TaskManager(include_path=str(tmp_path), include_defaults=False).load(TASKS),
        )
    assert theirs is not None
    for task in TASKS:
        for key, value in theirs["results"][task].items():
            if "," in key and value != "N/A":
                assert ours[task][key.removesuffix(",none")] == pytest.approx(value, rel=1e-5), key
