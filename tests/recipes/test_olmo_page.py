"""docs/olmo.md: its commands are run, in their order, on a small corpus and a smaller model."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flame_composer.config.load import load
from flame_composer.config.plan import PlanConfig
from flame_composer.config.train import TrainConfig
from flame_composer.dataset.open import open_dataset
from flame_composer.text.tokenizer import load_tokenizer
from tests.recipes.test_recipes import commands_in
from tests.runs import ROOT, check, read_log, run_script

PAGE = (ROOT / "docs/olmo.md").read_text()
# What is shorter here
SHORT = {"250ba": "8ba", "20ba": "3ba", "10ba": "3ba"}
SMALLER = {
    "max_duration": "6ba",
    "global_batch_size": 2,
    "microbatch_size": 1,
    "eval_interval": "6ba",
    "save_interval": "3ba",
}


def real_commands() -> list[list[str]]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    plain = [block for language, block in blocks if not language]
    lines = [line for block in plain for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with a smaller olmo2_tiny, and a corpus."""
    folder = tmp_path_factory.mktemp("olmo")
    for name in ("recipes", "convert", "yamls", "flame_composer", "docs/tasks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "yamls/olmo2_tiny.yaml"
    content: dict[str, Any] = yaml.safe_load(file.read_text()) | SMALLER
    content["scheduler"] |= {"warmup": "2ba", "t_max": "8ba"}
    content["eval_data"]["max_rows"] = 4
    content["model"]["config"] |= {"hidden_size": 64, "num_hidden_layers": 1}
    file.write_text(yaml.dump(content))
    corpus = folder / "data/quickstart/corpus.jsonl"
    corpus.parent.mkdir(parents=True)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:90]
    with corpus.open("w") as text:
        for each in files:
            text.write(json.dumps({"text": each.read_text(encoding="utf-8")}) + "\n")
    return folder


@pytest.fixture(scope="module")
def walked(folder: Path) -> Path:
    """The folder after all commands for the small model."""
    commands = commands_in(PAGE)
    assert len(commands) == 14
    for command in commands:
        env = {}
        if "=" in command[0]:
            name, _, value = command[0].partition("=")
            env, command = {name: value}, command[1:]
        assert command[0] == "python"
        words = [
            re.sub(r"(?<=^max_duration=)\w+", lambda found: SHORT[found[0]], word)
            for word in command[1:]
        ]
        check(run_script(*words, folder=folder, env=env))
    return folder


@pytest.mark.timeout(1500)
def test_every_command_for_the_small_one(walked: Path) -> None:
    rows = read_log(walked / "runs/olmo2_tiny")
    assert [row["current_steps"] for row in rows] == [*range(1, 9)], "made longer"
    assert rows[-1]["learning_rate"] < rows[2]["learning_rate"]
    assert rows[-1]["left_out"].keys() == {"rows", "tokens", "share"}
    assert rows[-1]["loss"] < rows[0]["loss"]
    stage2 = [row["learning_rate"] for row in read_log(walked / "runs/olmo2_stage2")]
    assert stage2 == pytest.approx([2e-4, 2e-4 * 2 / 3, 2e-4 / 3])
    assert (walked / "runs/olmo2_tiny/report/report.html").is_file()
    config = json.loads((walked / "runs/olmo2_tiny/hf/config.json").read_text())
    assert (config["model_type"], config["pad_token_id"]) == ("olmo2", None)
    assert [*walked.rglob("wandb/offline-run-*")]


@pytest.mark.timeout(1500)
def test_commands_for_the_real_one(
    walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a text file and an array of tokens, which make the same rows."""
    tokenizer = walked / "data/olmo/tokenizer"
    corpus = (walked / "data/quickstart/corpus.jsonl").read_text().splitlines()
    documents = [json.loads(line)["text"] for line in corpus]
    made = load_tokenizer(str(tokenizer))
    (tmp_path / "text").mkdir()
    with gzip.open(tmp_path / "text/part-0.json.gz", "wt") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in documents))
    encoded = [[*made(text)["input_ids"], made.eos_token_id] for text in documents]
    (tmp_path / "tokens").mkdir()
    tokens = np.concatenate([np.array(each, "<u4") for each in encoded])
    (tmp_path / "tokens/part-0.npy").write_bytes(tokens.tobytes())
    small = {
        "/data/olmo-mix-1124": f"{tmp_path}/text",
        "/data/preprocessed": f"{tmp_path}/tokens",
        "allenai/OLMo-2-0425-1B": f"{tokenizer}",
        "val_fraction=0.0001": "val_fraction=0.05",
        "context_length=4096": "context_length=512",
    }
    counts = []
    monkeypatch.setenv("DATA_REMOTE", "s3://my-bucket/olmo-mix-1124")
    for command in real_commands():
        if command[1] == "recipes/plan.py":
            assert load(PlanConfig, [f"{ROOT}/{command[2]}", *command[3:]]).nodes == 8
            continue
        if command[0].startswith("DATA_REMOTE="):
            config = load(TrainConfig, [f"{ROOT}/{command[3]}"])
            assert config.train_data.remote == f"{command[0].partition('=')[2]}/train"
            continue
        out = tmp_path / f"out{len(counts)}"
        words = [word.replace("s3://my-bucket/olmo-mix-1124", f"{out}") for word in command[1:]]
        for there, here in small.items():
            words = [word.replace(there, here) for word in words]
        check(run_script(*words, folder=walked))
        both = [open_dataset(f"{out}/{part}").manifest for part in ("train", "val")]
        counts.append([(each.totals.rows, each.context_length) for each in both])
    assert len(counts) == 2
    assert sum(number for number, _ in counts[0]) > 100
    whole = [sum(number for number, _ in each) for each in counts]
    assert whole[0] == pytest.approx(whole[1], abs=2)  # documents are held out by their own hashes
