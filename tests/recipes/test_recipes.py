"""The scripts as a user runs them: what they write, what they print, and what they say to a
mistake.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from flame_composer.cpu.linear import multiplies_bf16
from flame_composer.text.examples import REASONS, conversation_of, form_of
from tests.data_fixtures import streaming_dataset
from tests.runs import ROOT, Corpus, Script, check, last_json, read_log, run_script
from tests.stack import wandb_records

COMPOSER = Path(sys.executable).with_name("composer")


def test_log_has_one_row_per_step(undisturbed: Path) -> None:
    rows = read_log(undisturbed)
    steps = list(range(1, 41))
    assert [row["current_steps"] for row in rows] == steps
    assert [row["num_tokens"] for row in rows] == [step * 4 * 64 for step in steps]
    assert [row["percentage"] for row in rows] == [step * 2.5 for step in steps]
    plain = [
        "current_steps",
        "total_steps",
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "percentage",
        "num_tokens",
        "batch_hash",
    ]
    evaluated = {10, 20, 30, 40}
    for row in rows:
        expected = (
            {*plain, "eval_loss", "eval_perplexity"}
            if row["current_steps"] in evaluated
            else {*plain}
        )
        assert set(row) == expected
        if row["current_steps"] in evaluated:
            assert math.isclose(row["eval_perplexity"], math.exp(row["eval_loss"]), rel_tol=1e-5)
    assert max(row["learning_rate"] for row in rows) == 2e-3
    assert rows[-1]["eval_loss"] < rows[9]["eval_loss"] < rows[0]["loss"]


def test_wandb_run_has_the_runs_name_as_its_id(undisturbed: Path) -> None:
    runs = list((undisturbed / "wandb").glob("offline-run-*"))
    assert [path.name.split("-")[-1] for path in runs] == ["undisturbed"] * len(runs)
    records = wandb_records(runs[0] / "run-undisturbed.wandb")
    run = next(each.run for each in records if each.WhichOneof("record_type") == "run")
    assert (run.project, run.entity, run.run_group, list(run.tags)) == (
        "tests",
        "testers",
        "ours",
        ["still", "whole"],
    )


def test_resolved_config_lies_beside_checkpoints_and_log(undisturbed: Path) -> None:
    for folder in (undisturbed, undisturbed / "checkpoints"):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["save_folder"] == str(undisturbed / "checkpoints")
        assert config["model"]["config"]["hidden_size"] == 32


def test_losses_do_not_depend_on_processes_nor_on_microbatches(
    corpus: Corpus, tmp_path: Path
) -> None:
    """One process, 8 rows at a time, and two with one row at a time: the same global batches, and
    losses that agree to fp32 rounding, for gradients are added up in another order. Rows have
    unequal numbers of labels.

    With AdamW's usual eps of 1e-8 a gradient that is nothing but rounding is scaled up to a whole
    step, and from about the 28th step on the losses drift apart (seen: 2e-5 at the 40th); with 1e-5
    they stay within two units of the last place.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    keys = (
        "optimizer.eps=1e-5",
        "global_batch_size=8",
        "max_duration=20ba",
        "train_data.loss_across_documents=false",
    )
    corpus.train_run(one, *keys, "microbatch_size=8")
    process = subprocess.run(
        [COMPOSER, "-n", "2", "recipes/train.py", *corpus.keys(two, *keys, "microbatch_size=1")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    check(process)
    rows, expected = read_log(two), read_log(one)
    assert [row["batch_hash"] for row in rows] == [row["batch_hash"] for row in expected]
    assert [set(row) for row in rows] == [set(row) for row in expected]
    for key in ("loss", "eval_loss"):
        for row, other in zip(rows, expected, strict=True):
            assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-6)


def test_export_and_checkpoint_evaluate_to_the_loss_seen_in_training(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hf"
    checkpoints = undisturbed / "checkpoints"
    check(run_script("convert/to_hf.py", f"checkpoint={checkpoints}", f"out={out}"))
    expected = json.loads((undisturbed / "summary.json").read_text())
    for model, batch_size in ((out, 2), (checkpoints, 7), (checkpoints / "ba40.pt", 3)):
        result = last_json(
            run_script(
                "recipes/evaluate.py",
                f"model={model}",
                f"data.local={corpus.val}",
                "data.max_rows=7",
                f"batch_size={batch_size}",
            )
        )
        assert result["loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]), rel=1e-5)
        assert result["tokens"] == 7 * 63

    # The documented line, in a process that knows nothing of this package's trainer; documents one
    # by one.
    rows = streaming_dataset(shutil.copytree(corpus.val, tmp_path / "rows"))
    pieces = [
        np.split(rows[i]["input_ids"], np.cumsum(rows[i]["doc_lengths"])[:-1]) for i in range(7)
    ]
    (tmp_path / "rows.json").write_text(
        json.dumps([[piece.tolist() for piece in row] for row in pieces])
    )
    program = f"""
import json
from flame_composer import cpu; cpu.enable()
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
model = AutoModelForCausalLM.from_pretrained({str(out)!r}).eval()
assert len(AutoTokenizer.from_pretrained({str(out)!r})) == 300
total = count = 0
for row in json.load(open({str(tmp_path / "rows.json")!r})):
    logits = torch.cat([model(torch.tensor([piece])).logits[0] for piece in row])
    ids = torch.tensor(sum(row, []))
    losses = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="none")
    total += losses.sum().item()
    count += len(ids) - 1
print(total / count)
"""
    process = check(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    )
    assert float(process.stdout) == pytest.approx(expected["eval_loss"], abs=1e-5)

    again = run_script("convert/to_hf.py", f"checkpoint={checkpoints}", f"out={out}")
    assert again.returncode == 2
    assert (
        again.stderr
        == f"error: out={out}: already exists and is not empty; choose another folder\n"
    )


def test_generate_continues_the_prompt(undisturbed: Path) -> None:
    arguments = (
        "recipes/generate.py",
        f"model={undisturbed / 'checkpoints'}",
        "prompt=kat loman: ra",
        "max_new_tokens=8",
    )
    first, second = (check(run_script(*arguments)).stdout for _ in range(2))
    assert first == second
    assert first.startswith("kat loman: ra")
    assert len(first) > len("kat loman: ra\n")
    assert check(run_script(*arguments, "seed=1")).stdout != first
    assert check(run_script(*arguments, "prompt=")).stdout.strip()


def test_pretrained_weights_are_trained_on(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hf"
    check(run_script("convert/to_hf.py", f"checkpoint={undisturbed / 'checkpoints'}", f"out={out}"))
    summary = corpus.train_run(
        tmp_path / "more", f"model.pretrained={out}", "max_duration=2ba", "scheduler.warmup=0ba"
    )
    assert (
        summary["eval_loss_initial"]
        == json.loads((undisturbed / "summary.json").read_text())["eval_loss"]
    )
    keys = corpus.keys(tmp_path / "wrong", f"model.pretrained={out}", "model.config.num_heads=4")
    wrong = run_script("recipes/train.py", *keys)
    assert wrong.returncode == 2
    assert (
        wrong.stderr.splitlines()[-1]
        == "error: command line: model.config.num_heads=4: model.pretrained has 2; leave the key"
        " out, or give that value"
    )


def test_data_from_a_remote_is_cached_and_gives_the_same_run(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    run, cache = tmp_path / "remote", tmp_path / "cache"
    remote = (
        f"train_data.remote={corpus.train}",
        f"train_data.local={cache}",
        f"eval_data.remote={corpus.val}",
        f"eval_data.local={cache}",
    )
    summary = corpus.train_run(run, *remote, "max_duration=20ba", "eval_interval=100ba")
    hashes = [row["batch_hash"] for row in read_log(run)]
    assert hashes == [row["batch_hash"] for row in read_log(undisturbed)[:20]]
    assert (
        summary["eval_loss_initial"]
        == json.loads((undisturbed / "summary.json").read_text())["eval_loss_initial"]
    )
    indexes = {
        json.loads((each / "manifest.json").read_text())["index_sha256"][:16]
        for each in (corpus.train, corpus.val)
    }
    assert {path.name for path in cache.iterdir()} == indexes


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "optimizer.weight_dcay=0.1",
            (
                "command line: optimizer.weight_dcay: unknown key; did you mean"
                " optimizer.weight_decay?"
            ),
        ),
        ("lr=1", "command line: lr: unknown key; did you mean optimizer.lr?"),
        (
            "global_batch_size=0",
            "command line: global_batch_size=0: must be a positive number of rows",
        ),
        (
            "model.config.num_hidden_layer=3",
            (
                "command line: model.config.num_hidden_layer=3: unknown key of GLAConfig; did you"
                " mean model.config.num_hidden_layers?"
            ),
        ),
        (
            "precision=amp_fp16",
            (
                "command line: precision=amp_fp16: there is no GPU here, and CPUs do not train in"
                " fp16; set pre"
            ),
        ),
        (
            "tokenizer=./nowhere",
            "tokenizer: ./nowhere: no such folder; give a Hugging Face tokenizer folder or hub id",
        ),
        ("train_data.local=./nowhere", "./nowhere: no such folder"),
        (
            "context_length=32",
            ": its rows are 64 tokens long, but context_length is 32; set context_length=64 or"
            " convert",
        ),
        (
            "global_batch_size=256",
            ": holds 63 rows, fewer than one global batch (global_batch_size=256)",
        ),
        ("model.config.num_heads=5", ": no gla model can be built from it: "),
    ],
)
def test_mistake_is_one_line_and_touches_nothing(
    corpus: Corpus, tmp_path: Path, argument: str, message: str
) -> None:
    run = tmp_path / "mistaken"
    process = run_script("recipes/train.py", *corpus.keys(run, argument))
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith("error: ")
    assert message in process.stderr
    assert not run.exists()


def test_missing_yaml_and_help(tmp_path: Path) -> None:
    process = run_script("recipes/train.py", "yamls/gla_tiy.yaml")
    assert process.returncode == 2
    assert (
        process.stderr
        == "error: yamls/gla_tiy.yaml: no such file; did you mean yamls/gla_tiny.yaml?\n"
    )
    for script in (*(ROOT / "recipes").glob("*.py"), *(ROOT / "convert").glob("*.py")):
        process = check(run_script(script.relative_to(ROOT), "--help"))
        runs = r"RUNS \.\.\. \[key=value \.\.\.\]"
        keys = r"(\w+ )?\[file\.yaml\] \[key=value \.\.\.\]"
        alone = {"quickstart.py": r"\[-h\]", "tune.py": r"\[-h\]"}
        given = {"report.py": runs, **alone}.get(script.name, keys)
        assert re.match(rf"usage: {script.name} {given}\n", process.stdout)
    process = run_script("recipes/quickstart.py", "yamls/gla_tiny.yaml")
    assert (process.returncode, process.stdout) == (2, "")


@pytest.mark.parametrize("name", ["log_folder", "save_folder"])
def test_a_folder_that_cannot_be_made_is_one_line(
    corpus: Corpus, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    process = run_script(
        "recipes/train.py", *corpus.keys(tmp_path / "run", f"{name}={tmp_path}/file/x")
    )
    assert process.returncode == 2
    assert process.stderr.startswith(
        f"error: {tmp_path}/file/x: cannot be written to: Not a directory; set log_folder and"
    )
    assert process.stderr.count("\n") == 1


def test_mistake_under_the_launcher_exits_with_its_status(corpus: Corpus, tmp_path: Path) -> None:
    process = subprocess.run(
        [
            COMPOSER,
            "-n",
            "2",
            "recipes/train.py",
            *corpus.keys(tmp_path / "run", "optimizer.lr=-1"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 2
    assert process.stderr.count("error: command line: optimizer.lr=-1: must be more than 0") == 1


def test_other_tokenizer_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    other = tmp_path / "other"
    check(
        run_script(
            "convert/train_tokenizer.py", f"source={corpus.text}", f"out={other}", "vocab_size=290"
        )
    )
    process = run_script("recipes/train.py", *corpus.keys(tmp_path / "run", f"tokenizer={other}"))
    assert process.returncode == 2
    assert (
        process.stderr
        == f"error: {corpus.train}: was made with another tokenizer than {other} (vocab_size: 300"
        " there, 290 here); set tokenizer to the one it was converted with, or convert the text"
        " again\n"
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_shard_is_named(corpus: Corpus, tmp_path: Path, num_workers: int) -> None:
    train = tmp_path / "train"
    shutil.copytree(corpus.train, train)
    shard = train / "units/000000/shard.00000.mds"
    whole = shard.read_bytes()
    keys = corpus.keys(
        tmp_path / "run", f"train_data.local={train}", f"train_data.num_workers={num_workers}"
    )

    shard.write_bytes(whole[:-100])
    truncated = run_script("recipes/train.py", *keys)
    assert truncated.returncode == 1
    size = len(whole)
    assert truncated.stderr.startswith(
        f"error: {shard}: shard is {size - 100} bytes long, must be {size}; restore it"
    )

    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    flipped = run_script("recipes/train.py", *keys)
    assert flipped.returncode == 1
    assert flipped.stderr.splitlines()[-1].startswith(f"error: {shard}: damaged shard: ")
    assert "Traceback" not in flipped.stderr
    assert not (tmp_path / "run/train_log.jsonl").exists()


def test_benchmark_compares_models_of_one_size() -> None:
    result = last_json(
        run_script(
            "recipes/benchmark.py",
            "hidden_size=64",
            "num_layers=1",
            "batch_tokens=128",
            "repeats=1",
            "context_lengths=[32,64]",
        )
    )
    assert result["llama_parameters"] == pytest.approx(result["parameters"], rel=0.02)
    assert [row["context_length"] for row in result["results"]] == [32, 64]
    for row in result["results"]:
        ratio = row["gla_tokens_per_second"] / row["llama_tokens_per_second"]
        assert row["gla_over_llama"] == pytest.approx(ratio, rel=0.01)


TUNING = "## Tune it to instructions"  # the section of README.md that docs/tuning.md goes on from


def commands_in(text: str) -> list[list[str]]:
    """The lines of its bash blocks, as lists of words."""
    lines = [
        line
        for block in text.split("```bash\n")[1:]
        for line in block.split("```")[0].replace("\\\n", "").splitlines()
    ]
    return [shlex.split(line) for line in lines if line]


def run_steps(folder: Path, name: str) -> tuple[int, dict[str, Any]]:
    """The number of commands that recipes/`name` runs, each in a process forked from one that has
    the imports, and what it ends with.
    """
    script = runpy.run_path(str(folder / f"recipes/{name}"))
    scope = script["main"].__globals__
    results: list[dict[str, Any]] = []

    def run(*command: str) -> dict[str, Any]:
        output = check(run_script(*command, folder=folder)).stdout.splitlines()
        results.append(json.loads(output[-1]) if output[-1].startswith("{") else {})
        return results[-1]

    here = Path.cwd()
    os.chdir(folder)
    try:
        # As the script starts a command
        assert script["run_and_show"]("recipes/train.py", "--help") == {}
        scope["run_and_show"] = run
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert scope["main"]([]) == 0
    finally:
        os.chdir(here)
    return len(results), json.loads(printed.getvalue().splitlines()[-1])


class Small(NamedTuple):
    """A copy of the checkout with shorter runs, in which the quickstart has run: the number of its
    commands, and what it ended with.
    """

    folder: Path
    number: int
    quickstart: dict[str, Any]

    def start(self, *command: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # What `make test STACK=current` was told is not told here.
        own = {name: os.environ[name] for name in os.environ.keys() - {"MAKEFLAGS", "STACK"}}
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**own, "PATH": path},
            capture_output=True,
            text=True,
            timeout=500,
        )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    for name in ("recipes", "convert", "yamls", "flame_composer", "docs/tasks", "docs/data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("gla_tiny", "sft_tiny"):
        file = folder / f"yamls/{name}.yaml"
        content = yaml.safe_load(file.read_text())
        content |= {"max_duration": "6ba", "global_batch_size": 2, "microbatch_size": 1}
        content |= {"eval_interval": "6ba", "save_interval": "3ba"}
        content["scheduler"]["warmup"] = "2ba"
        content["eval_data"]["max_rows"] = 4
        if name == "gla_tiny":
            content["model"]["config"] |= {"hidden_size": 64, "num_hidden_layers": 1}
        file.write_text(yaml.dump(content))
    tune = folder / "recipes/tune.py"
    short = tune.read_text().replace("LONGEST = 200", "LONGEST = 36")
    short = short.replace("max_examples=100", "max_examples=4").replace("tokens=40", "tokens=4")
    tune.write_text(short)
    return Small(folder, *run_steps(folder, "quickstart.py"))


def test_every_readme_command(small: Small) -> None:
    """And of docs/evaluation.md, in a copy of the checkout with a shorter gla_tiny, in their
    order; `make` targets by what make would run. Those of tuning are in the next test.
    """
    before, _, after = (ROOT / "README.md").read_text().partition(TUNING)
    after = after[after.index("\n## ") :]
    pages = (before, after, (ROOT / "docs/evaluation.md").read_text())
    commands = [
        [word.replace("max_duration=20ba", "max_duration=2ba") for word in command]
        for page in pages
        for command in commands_in(page)
    ]
    assert [command for command in commands if command[0] == "make"] == [
        ["make", "quickstart"],
        ["make", "test"],
    ]
    assert "recipes/quickstart.py" in check(small.start("make", "-n", "quickstart")).stdout
    assert "-m pytest" in check(small.start("make", "-n", "test")).stdout

    assert small.number == 6
    quickstart = small.quickstart
    assert set(quickstart) == {
        "train_tokens",
        "eval_perplexity_initial",
        "eval_perplexity",
        "tokens_per_second",
        "hf_folder",
        "checkpoint_folder",
    }
    assert quickstart["train_tokens"] == 6 * 2 * 512
    assert quickstart["eval_perplexity"] < quickstart["eval_perplexity_initial"]
    assert (small.folder / quickstart["hf_folder"] / "model.safetensors").is_file()
    done = 0
    for command in commands:
        if command[0].startswith("DATA_REMOTE="):
            # Its data is in an object store and its devices are GPUs: the answer here is that there
            # is no GPU.
            assert command[1:] == ["composer", "recipes/train.py", "yamls/gla_340m.yaml"]
            process = Script(
                *command[2:], env={"DATA_REMOTE": command[0].partition("=")[2]}, folder=small.folder
            ).wait()
            assert process.returncode == 2
            key = "parallelism.fsdp" if multiplies_bf16() else "precision=amp_bf16"
            assert f"error: yamls/gla_340m.yaml: {key}: there is no GPU here" in process.stderr
        elif command[0] == "python":
            check(run_script(*command[1:], folder=small.folder))
        elif command[0] == "composer":
            check(small.start(*command))
        else:
            continue
        done += 1
    assert done == len(commands) - 2


@pytest.mark.timeout(1200)
def test_every_command_of_tuning(small: Small) -> None:
    """Those of README.md's section, of docs/tuning.md and of the walk for users of LLaMA-Factory,
    in their order, after what `make tune` runs.
    """
    _, _, section = (ROOT / "README.md").read_text().partition(TUNING)
    docs = [ROOT / "docs" / name for name in ("tuning.md", "migrating-from-llama-factory.md")]
    pages = (section[: section.index("\n## ")], *(path.read_text() for path in docs))
    commands = [command for page in pages for command in commands_in(page)]
    assert [command for command in commands if command[0] != "python"] == [["make", "tune"]] * 2
    assert "recipes/tune.py" in check(small.start("make", "-n", "tune")).stdout

    number, tuned = run_steps(small.folder, "tune.py")
    assert number == 5
    assert set(tuned) == {
        "train_tokens",
        "eval_loss_initial",
        "eval_loss",
        "rouge_l_initial",
        "rouge_l",
        "hf_folder",
    }
    assert tuned["train_tokens"] == 6 * 2 * 512
    assert tuned["eval_loss"] < tuned["eval_loss_initial"]
    assert (small.folder / tuned["hf_folder"] / "chat_template.jinja").is_file()

    fewer = {
        "recipes/predict.py": ("max_examples=4", "max_new_tokens=4"),
        "recipes/train.py": ("max_duration=2ba", "scheduler.warmup=1ba"),
    }
    assert len(commands) > 8
    for _, *words in (command for command in commands if command[0] == "python"):
        is_new_run = any(word.startswith("run_name=") for word in words)
        is_short = words[0] == "recipes/predict.py" or is_new_run
        more = fewer[words[0]] if is_short else ()
        check(run_script(*words, *more, folder=small.folder))


def test_every_command_of_pruning(small: Small) -> None:
    commands = commands_in((ROOT / "docs/pruning.md").read_text())
    assert [words[1] for words in commands if words[1].startswith("convert/")] == [
        "convert/prune.py"
    ] * 2
    shorter = {"=20ba": "=3ba", "=5ba": "=1ba"}
    for program, *words in commands:
        assert program == "python"
        fewer = [re.sub(r"=(20|5)ba$", lambda found: shorter[found[0]], word) for word in words]
        check(run_script(*fewer, folder=small.folder))


@pytest.mark.timeout(1200)
def test_every_command_of_ablations(small: Small) -> None:
    """Its trials are forked (tests/sweep/warm.py), and those of the search are fewer."""
    page = (ROOT / "docs/ablations.md").read_text()
    commands = commands_in(page)
    section = (ROOT / "README.md").read_text().split("### Compare configurations")[1]
    assert shlex.split(section.split("```")[1]) == commands[0]
    ends = []
    for program, script, *words in commands:
        if program == "pip":
            assert [script, *words] == ["install", "-c", "constraints.txt", "-e", ".[sweep]"]
            continue
        assert (program, script) == ("python", "recipes/sweep.py")
        fewer = [word.replace("trials=20", "trials=3") for word in words]
        fewer = [word.replace("eval_interval=20ba", "eval_interval=2ba") for word in fewer]
        process = run_script(
            ROOT / "tests/sweep/warm.py",
            *fewer,
            folder=small.folder,
            env={"OMP_NUM_THREADS": "1"},
        )
        ends.append(json.loads(check(process).stdout.splitlines()[-1]))
    assert [end["num_trials"] for end in ends] == [6, 3, 4]
    assert ends[2]["pruned"] in (1, 2)  # that of 1e-5, and perhaps that of 1e-3
    layout = page.split("runs/sweeps/gla_tiny/\n")[1].split("```")[0]
    for name in re.findall(r"[\w.-]+\.(?:json|html|txt)", layout):
        assert list((small.folder / "runs/sweeps/gla_tiny").rglob(name)), name


@pytest.mark.parametrize("name", ["alpaca", "sharegpt", "messages", "prompt_completion"])
def test_the_examples_of_each_format_are_read(name: Any) -> None:
    """docs/tuning.md shows one of each."""
    page = (ROOT / "docs/tuning.md").read_text()
    example = page.split(f"`format={name}` has")[1].split("```json\n")[1].split("```")[0]
    turns = conversation_of(json.loads(example), form_of(name, {}, {}, ""))
    assert [turn.role for turn in turns][-2:] == ["user", "assistant"]
    assert "system" in [turn.role for turn in turns] or name not in ("alpaca", "messages")


def test_every_reason_for_leaving_an_example_out_is_explained() -> None:
    page = (ROOT / "docs/tuning.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| (.*) \|$", page.split("### What is left out")[1], re.MULTILINE
    )
    assert dict(rows[: len(REASONS)]) == REASONS
