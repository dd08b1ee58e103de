"""recipes/sweep.py: real sweeps of tiny runs. tests/sweep/warm.py forks the trials, except where a
test says otherwise.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from flame_composer.config.axes import name_of, read_axis
from flame_composer.config.sweep import SweepConfig, read_sweep
from flame_composer.errors import ConfigError, DataError, TrainingError
from flame_composer.storage.folders import file_lock
from flame_composer.sweep import record, search
from flame_composer.sweep.driving import Sweep, locked, run_sweep
from flame_composer.sweep.page import set_scale, write_page
from flame_composer.sweep.results import lines, summarize
from flame_composer.sweep.trials import Result, Trial, folder_of, read_result, write_result
from flame_composer.sweep.trials import arguments as arguments_for
from flame_composer.sweep.watching import run_trial
from tests.runs import ROOT, Corpus, Script, check, last_json, read_log, run_script

WARM = "tests/sweep/warm.py"
ENV = {"OMP_NUM_THREADS": "1"}  # as several trials may run on few cores
SHORT = ("max_duration=6ba", "eval_interval=2ba", "save_interval=2ba", "scheduler.warmup=1ba")
GRID = ("optimizer.lr=[1e-3,1e-2]", "optimizer.weight_decay=[0,0.1]")
NAMES = [f"lr_{lr}-weight_decay_{decay}" for lr in ("0.001", "0.01") for decay in ("0", "0.1")]


def keys(corpus: Corpus, folder: Path, *more: str) -> list[str]:
    """The arguments of a sweep of tiny runs in `folder`."""
    given = corpus.keys(folder, *SHORT, "run_name=tiny", f"sweep_folder={folder}", *more)
    places = (f"run_name={folder.name}", "log_folder=", "save_folder=")
    return [key for key in given if not key.startswith(places)]


def start(corpus: Corpus, folder: Path, *more: str) -> Script:
    return Script(WARM, *keys(corpus, folder, *more), env=ENV)


def run(corpus: Corpus, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return start(corpus, folder, *more).wait()


def results_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["trials"]


def starts_of(folder: Path) -> dict[str, list[int]]:
    """The steps after which each trial was started, by its name."""
    return {
        path.parent.name: [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*/starts.jsonl"))
    }


def read(*arguments: str) -> SweepConfig:
    return read_sweep(SweepConfig, ["yamls/gla_tiny.yaml", *arguments])


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished grid of four trials, and what was printed."""
    folder = tmp_path_factory.mktemp("sweeps") / "whole"
    return folder, check(run(corpus, folder, *GRID)).stdout


def test_a_grid_ends_in_a_table_json_and_a_page(whole: tuple[Path, str], corpus: Corpus) -> None:
    folder, printed = whole
    trials = results_of(folder)
    assert [trial["name"] for trial in trials] == NAMES
    assert [trial["values"] for trial in trials] == [
        {"optimizer.lr": lr, "optimizer.weight_decay": decay}
        for lr in (1e-3, 1e-2)
        for decay in (0, 0.1)
    ]
    for trial in trials:
        rows = read_log(folder / trial["name"])
        assert trial["state"] == "finished"
        assert (trial["metric"], trial["step"]) == (rows[-1]["eval_loss"], 6)
    ranked = sorted(trials, key=lambda trial: trial["metric"])

    lines = printed.splitlines()
    for trial in trials:
        begin = next(i for i, line in enumerate(lines) if line.endswith(f": {trial['name']}"))
        evaluated = [row for row in read_log(folder / trial["name"]) if "eval_loss" in row]
        assert [row["current_steps"] for row in evaluated] == [2, 4, 6]
        assert lines[begin + 1 : begin + 3] == [
            f"  step {row['current_steps']} of 6  loss {row['loss']:.4f}"
            f"  eval loss {row['eval_loss']:.4f}"
            for row in evaluated[:2]
        ]
        result = rf"  finished at step 6, eval loss {trial['metric']:.4f} \([0-9.]+ (s|minutes)\)"
        assert re.fullmatch(result, lines[begin + 3])
    head = next(number for number, line in enumerate(lines) if line.startswith("trial  "))
    assert lines[head].split() == ["trial", "lr", "weight_decay", "eval_loss", "step", "state"]
    for line, trial in zip(lines[head + 1 :], ranked, strict=False):
        values = [f"{value}" for value in trial["values"].values()]
        shown = [f"{trial['number'] + 1}", *values, f"{trial['metric']:.4f}", "6", "finished"]
        assert line.split() == shown
    summary = json.loads(lines[-1])
    assert summary["best"] == ranked[0]["name"]
    assert [summary[key] for key in ("num_trials", "finished", "pruned", "failed")] == [4, 4, 0, 0]
    assert summary["files"]["results"] == str(folder / "results.json")

    page = (folder / "report.html").read_text()
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert cells[::6] == [f"{trial['number'] + 1}" for trial in ranked]
    assert f"<pre>{summary['command']}</pre>" in page
    charts = re.findall(r'<img alt="(.*?)" src="data:image/png;base64,(.*?)">', page)
    assert [title for title, _ in charts] == [
        "eval loss over optimizer.lr",
        "eval loss over optimizer.weight_decay",
        "training loss of all trials",
        "evaluation loss of all trials",
    ]
    for _, png in charts:
        picture = Image.open(io.BytesIO(base64.b64decode(png)))
        assert len(set(picture.convert("L").tobytes())) > 20  # something is drawn


def test_the_command_of_the_best_trial_gives_its_losses(
    whole: tuple[Path, str], corpus: Corpus, tmp_path: Path
) -> None:
    folder, printed = whole
    summary = json.loads(printed.splitlines()[-1])
    words = shlex.split(summary["command"])
    assert words[:2] == ["python", "recipes/train.py"]
    assert words[-1] == f"run_name=best-whole-{summary['best']}"
    places = (f"log_folder={tmp_path}", f"save_folder={tmp_path}/checkpoints")
    check(Script(*words[1:], *places, env=ENV).wait())
    assert read_log(tmp_path) == read_log(folder / summary["best"])


def test_names_of_runs_begin_with_the_sweeps(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    for name in NAMES:
        assert f"run_name: whole-{name}\n" in (folder / name / "config.yaml").read_text()
        assert (folder / name / "checkpoints/ba6.pt").is_file()


def test_started_again_it_repeats_nothing(whole: tuple[Path, str], corpus: Corpus) -> None:
    folder, printed = whole
    before = starts_of(folder)
    assert before == {name: [0] for name in NAMES}
    again = last_json(run(corpus, folder, *GRID))
    assert again == json.loads(printed.splitlines()[-1])
    assert starts_of(folder) == before


def test_a_grid_can_grow_and_nothing_else_can_change(
    whole: tuple[Path, str], corpus: Corpus, tmp_path: Path
) -> None:
    folder, _ = whole
    other = tmp_path / "grown"
    check(run(corpus, other, "optimizer.lr=[1e-3]", "optimizer.weight_decay=[0.1]"))
    check(run(corpus, other, *GRID))
    assert starts_of(other) == starts_of(folder)
    assert results_of(other) == results_of(folder)
    for wrong, said in (
        (["optimizer.lr=[1e-2]", GRID[1]], "optimizer.lr: is [0.01] now, but was [0.001, 0.01]"),
        ([GRID[0]], "optimizer.weight_decay: is not an axis now, but was one"),
        ([*GRID, "seed=[1,2]"], "seed: is an axis now, but was not one"),
        ([*GRID, "optimizer.eps=1e-6"], "optimizer.eps: is 1e-06 now, but was 1e-08"),
        ([*GRID, "prune=median"], "prune: is median now, but was null"),
    ):
        process = run(corpus, folder, *wrong)
        assert process.returncode == 2
        assert f"error: {folder}: {said} when this sweep began; give another" in process.stderr
    check(run(corpus, folder, *GRID, "save_num_checkpoints_to_keep=1"))


def test_stopped_and_started_again_it_goes_on(
    whole: tuple[Path, str], corpus: Corpus, tmp_path: Path
) -> None:
    """SIGTERM to the sweep alone: the trial's process saves, and both end."""
    folder = tmp_path / "whole"
    script = start(corpus, folder, *GRID)
    log = folder / NAMES[1] / "train_log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 1:
        assert script.process.is_alive(), script.read("err")
        time.sleep(0.002)
    assert script.process.pid is not None
    os.kill(script.process.pid, signal.SIGTERM)
    stopped = script.wait()
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stdout.endswith("  stopping: the trial saves and ends\n")
    assert "saved" in (folder / NAMES[1] / "errors.txt").read_text()
    done = log.read_text().count("\n")
    assert not (folder / NAMES[2]).exists()
    again = check(run(corpus, folder, *GRID))
    assert f"{folder}: 4 trials, 1 done\n" in again.stdout
    assert starts_of(folder)[NAMES[1]] == [0, done]
    assert results_of(folder) == results_of(whole[0])
    for name in NAMES:
        assert read_log(folder / name) == read_log(whole[0] / name)


def test_ctrl_c_again_ends_the_trial_at_once(corpus: Corpus, tmp_path: Path) -> None:
    """A terminal sends it to both processes; the trial is in a long step at the time."""
    folder = tmp_path / "interrupted"
    size = ("global_batch_size=32", "microbatch_size=1", "model.config.num_hidden_layers=16")
    long = (*size, "max_duration=2ba", "save_interval=1ba")
    script = start(corpus, folder, "seed=[1]", *long)
    errors = folder / "seed_1/errors.txt"
    while not (folder / "seed_1/checkpoints/ba1.pt").exists():
        assert script.process.is_alive(), script.read("err") + script.read("out")
        time.sleep(0.01)
    time.sleep(0.1)  # for the second step to begin
    assert script.process.pid is not None
    os.killpg(script.process.pid, signal.SIGINT)
    while "  stopping: the trial saves and ends; Ctrl-C again ends it at" not in script.read("out"):
        assert script.process.is_alive(), script.read("err")
        time.sleep(0.01)
    while "SIGINT: finishing the current batch" not in errors.read_text():
        time.sleep(0.01)
    os.killpg(script.process.pid, signal.SIGINT)
    assert script.wait().returncode == 130
    check(run(corpus, folder, "seed=[1]", *long))
    assert "stopped after step" not in errors.read_text()
    assert starts_of(folder)["seed_1"] == [0, 1]


def test_two_processes_share_a_sweep(
    whole: tuple[Path, str], corpus: Corpus, tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    both = [start(corpus, folder, *GRID) for _ in range(2)]
    ended = [check(script.wait()) for script in both]
    assert starts_of(folder) == {name: [0] for name in NAMES}
    ran = [re.findall(r"^trial \d of 4: (\S+)$", process.stdout, re.M) for process in ended]
    assert sorted(ran[0] + ran[1]) == NAMES
    assert ran[0]
    assert ran[1]
    assert last_json(ended[0]) == last_json(ended[1])
    assert results_of(folder) == results_of(whole[0])


TPE = ("search=tpe", "trials=5", "random_trials=2", "optimizer.lr=loguniform(1e-4,1e-1)")


def test_tpe(corpus: Corpus, tmp_path: Path) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    folder = tmp_path / "tpe"
    axes = (*TPE, "optimizer.weight_decay=[0,0.1]")
    summary = last_json(run(corpus, folder, *axes))
    trials = results_of(folder)
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3, 4]
    config = read_sweep(SweepConfig, keys(corpus, folder, *axes))
    known: list[tuple[Trial, Result]] = []
    for number, trial in enumerate(trials):
        chosen = Trial.of(config, number, search.choose(config, number, known))
        assert chosen.name == trial["name"]
        assert [float(value) for value in chosen.values] == list(trial["values"].values())
        assert (
            f"lr: {trial['values']['optimizer.lr']}\n"
            in (folder / trial["name"] / "config.yaml").read_text()
        )
        known.append((chosen, Result(trial["state"], trial["metric"], trial["step"])))

    journal = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
    study = optuna.load_study(study_name="tpe", storage=journal)
    assert study.best_trial.user_attrs["name"] == summary["best"]
    assert [trial.value for trial in study.trials] == [trial["metric"] for trial in trials]

    more = last_json(run(corpus, folder, *axes, "trials=6"))
    assert results_of(folder)[:5] == trials
    assert more["num_trials"] == 6
    fewer = run(corpus, folder, *axes, "trials=4")
    assert fewer.returncode == 2
    assert "trials: is 4 now, but was 6 when this sweep began" in fewer.stderr


def known_of(config: SweepConfig, metrics: Sequence[float]) -> list[tuple[Trial, Result]]:
    known: list[tuple[Trial, Result]] = []
    for number, metric in enumerate(metrics):
        values = search.choose(config, number, known)
        known.append((Trial.of(config, number, values), Result("finished", metric, 6)))
    return known


def test_a_suggestion_depends_on_the_seed_the_number_and_the_results() -> None:
    config = read(*TPE, "seed=int(1,1000)")
    known = known_of(config, [3.0, 2.0, 5.0])
    suggested = search.choose(config, 3, known)
    assert suggested == search.choose(config, 3, known)
    assert suggested != search.choose(config, 4, known)
    better = [(trial, Result("finished", -r.metric, 6)) for trial, r in known if r.metric]
    assert suggested != search.choose(config, 3, better)
    other = read(*TPE, "seed=int(1,1000)", "search_seed=1")
    assert suggested != search.choose(other, 3, known)
    failed = [*known[:2], (known[2][0], Result("failed", reason="it did"))]
    assert search.choose(config, 3, failed) == suggested  # the worst of all, as before
    pruned = [*known[:2], (known[2][0], Result("pruned", 5.0, 2))]
    assert len(search.choose(config, 3, pruned)) == 2


def test_the_first_trials_of_tpe_are_random() -> None:
    config = read(*TPE, "random_trials=3", "seed=int(1,1000)")
    drawn = read("search=random", "trials=5", *TPE[3:], "seed=int(1,1000)")
    known = known_of(config, [3.0, 2.0, 5.0])
    for number in range(3):
        assert search.choose(config, number, known) == search.choose(drawn, number, [])
    assert search.choose(config, 3, known) != search.choose(drawn, 3, [])


def test_a_trial_sees_what_parallel_lets_it(tmp_path: Path) -> None:
    def begun(*more: str) -> Sweep:
        sweep = Sweep(read(*TPE, f"sweep_folder={tmp_path}", *more), ROOT / "recipes/train.py")
        sweep.refresh()
        return sweep

    assert set(begun().trials) == {0}
    sweep = begun("parallel=3")
    assert set(sweep.trials) == {0, 1, 2}
    write_result(folder_of(sweep.config, sweep.trials[1]), Result("finished", 2.0, 6))
    assert (tmp_path / sweep.trials[1].name / "result.json").is_file()
    assert set(begun("parallel=3").trials) == {0, 1, 2}, "trial 3 waits for trial 0"
    write_result(folder_of(sweep.config, sweep.trials[0]), Result("finished", 3.0, 6))
    again = begun("parallel=3")
    assert set(again.trials) == {0, 1, 2, 3, 4}
    ours = [(again.trials[0], again.results[0])]
    assert again.trials[3].values == search.choose(again.config, 3, ours)


def test_random_values_are_within_their_ranges_and_rounded() -> None:
    config = read(
        "search=random",
        "trials=9",
        "optimizer.lr=loguniform(1e-4,1e-1)",
        "optimizer.weight_decay=uniform(0,0.1)",
        "seed=int(3,5)",
        "optimizer.name=[adamw,lamb]",
    )
    drawn = [search.choose(config, number, []) for number in range(200)]
    rates = [float(values[0]) for values in drawn]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert sum(rate < 3.16e-3 for rate in rates) in range(70, 130)
    assert all(0 <= float(values[1]) <= 0.1 for values in drawn)
    assert {values[2] for values in drawn} == {"3", "4", "5"}
    assert {values[3] for values in drawn} == {"adamw", "lamb"}
    for values in drawn:
        assert len(re.sub(r"e.*|[.]|^0[.]0*", "", values[0])) <= 4
        assert repr(float(values[0])) == values[0]
    other = read("search=random", "trials=1", "seed=int(1,100000)", "search_seed=1")
    same = read("search=random", "trials=1", "seed=int(1,100000)")
    assert search.choose(other, 0, []) != search.choose(same, 0, [])


def test_a_trial_of_the_same_values_is_not_trained_again(corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "same"
    axes = ("search=random", "trials=4", "optimizer.lr=[1e-3,1e-2]")
    check(run(corpus, folder, *axes))
    first: dict[float, dict[str, Any]] = {}
    for trial in results_of(folder):
        rate = trial["values"]["optimizer.lr"]
        known = first.setdefault(rate, trial)
        if known is not trial:
            assert (trial["same_as"], trial["metric"]) == (known["name"], known["metric"])
    assert set(starts_of(folder)) == {trial["name"] for trial in first.values()}
    assert len(first) < 4


def test_a_bad_trial_is_pruned(corpus: Corpus, tmp_path: Path) -> None:
    """It is stopped some steps after the evaluation that decides, which alone is its result."""
    folder = tmp_path / "pruned"
    axes = ("optimizer.lr=[1e-2,2e-2,1e-5]", "max_duration=150ba", "eval_interval=10ba")
    rule = ("prune=median", "prune_trials=2", "prune_warmup=2", "save_interval=500ba")
    process = check(run(corpus, folder, *axes, *rule))
    trials = results_of(folder)
    assert [trial["state"] for trial in trials] == ["finished", "finished", "pruned"]
    rows = read_log(folder / "lr_1e-05")
    at_30 = next(row for row in rows if row["current_steps"] == 30)
    assert (trials[2]["step"], trials[2]["metric"]) == (30, at_30["eval_loss"])
    assert len(rows) < 150
    assert f"  pruned at step 30, eval loss {at_30['eval_loss']:.4f} (" in process.stdout
    assert json.loads(process.stdout.splitlines()[-1])["pruned"] == 1
    again = check(run(corpus, folder, *axes, *rule))
    assert results_of(folder) == trials
    assert "trial 3" not in again.stdout


def test_where_a_trial_is_pruned() -> None:
    others = [{2: 1.0, 4: 1.0}, {2: 3.0, 4: 3.0}, {2: 2.0}]
    own = {2: 2.5, 4: 2.5, 6: 9.0}
    assert search.pruned_at(own, others, warmup=0, needed=3) == 2
    assert search.pruned_at(own, others, warmup=1, needed=3) is None
    assert search.pruned_at(own, others, warmup=1, needed=2) == 4
    assert search.pruned_at({2: 2.0, 4: 2.0}, others, warmup=0, needed=2) is None


def test_a_trial_that_fails_is_a_line_with_its_reason(corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "failed"
    axes = ("optimizer.lr=[1e30,1e-2]", "optimizer.grad_clip_norm=null")
    process = run(corpus, folder, *axes)
    assert process.returncode == 1
    bad, good = results_of(folder)
    assert (bad["state"], good["state"]) == ("failed", "finished")
    assert "nan" in bad["reason"].lower() or "finite" in bad["reason"], bad
    assert f"  failed: {bad['reason']}\n" in process.stdout
    assert "1 of 2 trials failed: lr_1e30" in process.stderr
    first = starts_of(folder)
    assert run(corpus, folder, *axes).returncode == 1
    assert starts_of(folder) == first
    stopped = run(corpus, tmp_path / "stopped", *axes, "on_failure=stop")
    assert stopped.returncode == 1
    assert "the sweep stops here, as on_failure=stop" in stopped.stderr
    assert not (tmp_path / "stopped/lr_0.01").exists()
    again = run(corpus, folder, *axes, "retry_failed=true")
    assert again.returncode == 1
    assert "trial 1 of 2: lr_1e30" in again.stdout
    assert "trial 2 of 2" not in again.stdout


def test_without_evaluation_the_training_loss_is_the_result(corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "loss"
    process = check(run(corpus, folder, "optimizer.lr=[1e-2]", "metric=loss", "metric_steps=3"))
    (trial,) = results_of(folder)
    losses = [row["loss"] for row in read_log(folder / trial["name"])]
    assert trial["metric"] == pytest.approx(sum(losses[-3:]) / 3, rel=1e-12)
    assert json.loads(process.stdout.splitlines()[-1])["metric"] == "loss"


def test_processes_of_their_own_and_the_launcher(corpus: Corpus, tmp_path: Path) -> None:
    """As a user starts it, for a trial of two processes."""
    folder = tmp_path / "two"
    done = subprocess.run(
        [sys.executable, "recipes/sweep.py", *keys(corpus, folder, "devices=2", "seed=[1]")],
        cwd=ROOT,
        env={**os.environ, **ENV},
        capture_output=True,
        text=True,
        timeout=500,
    )
    summary = last_json(done)
    assert summary["command"].startswith("composer -n 2 recipes/train.py yamls/gla_tiny.yaml ")
    assert "on 2 x cpu" in (folder / "seed_1/output.txt").read_text()
    assert results_of(folder)[0]["state"] == "finished"


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("model.config.num_heads=[2,3]", "num_heads_3-seed_1: model.config: no gla model"),
        ("global_batch_size=[4,4096]", "global_batch_size_4096-seed_1: "),
        ("train_data.local=[TRAIN,missing]", "local_missing-seed_1: "),
        ("eval_data.local=[VAL,missing]", "local_missing-seed_1: "),
    ],
)
def test_what_no_trial_can_have_is_named_before_anything_starts(
    axis: str, said: str, corpus: Corpus, tmp_path: Path
) -> None:
    folder = tmp_path / "wrong"
    axis = axis.replace("TRAIN", f"{corpus.train}").replace("VAL", f"{corpus.val}")
    process = run(corpus, folder, axis, "seed=[1,2]", "train_data.cache_limit=1gb")
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: trial {said}"), process.stderr
    assert process.stderr.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a sweep needs values to try; give a list, e.g. 'optimizer.lr=[1e-3,2e-3]'"),
        (["optimizer.lr=[]"], "must hold at least one value to try"),
        (["optimizer.lr=[1e-3,0.001]"], "0.001 must be given once, not twice"),
        (["optimizer.lr=[a,b]"], "optimizer.lr=a: must be float"),
        (["optimizer.lr=[1e-3,b]"], "trial 2 of 2 (lr_b): command line: optimizer.lr=b"),
        (["seed=[1,2]", "optimizer.lr=[1,-1]"], "trial 2 of 4 (seed_1-lr_-1): command line"),
        (["optimiser.lr=[1,2]"], "optimiser: unknown key; did you mean optimizer?"),
        (["learning_rate=[1,2]"], "learning_rate: unknown key; did you mean optimizer.lr?"),
        (["optimizer.lr=[1,2"], "cannot be read"),
        (["optimizer.lr=[1: 2: 3]"], "cannot be read"),
        (["optimizer.lr=[!!bool maybe]"], "cannot be read: a tag does not fit its value ('maybe')"),
        (["optimizer.lr=[!!timestamp x]"], "cannot be read: a tag does not fit its value"),
        (['optimizer.lr=[!!int ""]'], "cannot be read: a tag does not fit its value"),
        (["model.config.a=[{b: !!float [1]}]"], "cannot be read"),
        (["optimizer.betas=[[0.9,0.95],0.9]"], "must all be lists"),
        (["optimizer.lr=loguniform(1e-4,1e-2)"], "a grid takes lists; give search=tpe or"),
        (["search=tpe", "seed=[1,2]"], "trials: must be a number in [1, 1000] with search=tpe"),
        (["trials=4", "seed=[1,2]"], "trials=4: must be left out with search=grid"),
        (["search=tpe", "trials=2", "seed=normal(0,1)"], "a range must be loguniform(1e-4,1e-2)"),
        (["search=tpe", "trials=2", "seed=int(3,1)"], "two numbers, the lower one first"),
        (["search=tpe", "trials=2", "seed=int(1,x)"], "two numbers, the lower one first"),
        (["search=tpe", "trials=2", "seed=int(1,2.5)"], "the ends of int must be whole numbers"),
        (["search=tpe", "trials=2", "seed=uniform(1,2)"], "seed=1.0: must be int"),
        (["search=tpe", "trials=2", "optimizer.lr=loguniform(0,1)"], "must begin above 0"),
        (["search=tpe", "trials=2", "optimizer.lr=uniform(-1,1)"], "lr=-1.0: must be more"),
        (["search=[grid,tpe]"], "must have one value, as it is the sweep's own"),
        (["run_name=[a,b]"], "must have one value, as it is set by the sweep for each trial"),
        (["seed=[1,2]", "seed=3"], "seed is given after it; give values to try in one place"),
        (["seed=[1,2]", "seed=[3,4]"], "seed is given after it; give values to try in one place"),
        (["model.config=[{num_heads: 2},{num_heads: 4}]", "model.config.num_heads=2"], "after it"),
        (["seed=[1,2]", "log_folder=x"], "log_folder: each trial's is in the sweep's folder"),
        (["seed=[1,2]", "autoresume=false"], "autoresume=false: must be true"),
        (["seed=[1,2]", "sweep_folder=runs/a b"], "sweep_folder=runs/a b: must end in"),
        (["seed=[1,2]", "sweep_folder=.."], "sweep_folder=..: must end in letters, digits"),
        (["seed=[1,2]", "sweep_folder=/"], "sweep_folder=/: must end in letters, digits"),
        (["seed=[1,2]", "sweep_folder=é"], "sweep_folder=é: must end in letters, digits"),
        (["seed=[1,2]", "sweep_folder=s3://a/b"], "sweep_folder=s3://a/b: must be a local folder"),
        (["seed=[1,2]", "eval_data=null", "prune=median"], "prune=median: needs an evaluation"),
        (["seed=[1,2]", "prune=median", "retry_failed=true"], "retry_failed=true: must be false"),
        ([f"seed={[*range(1001)]}"], "the grid has 1,001 trials, and may have 1,000"),
        (["search=random", "trials=2", f"seed={[*range(1001)]}"], "seed: has 1,001 values to try"),
        (["seed=[1,2]", "devices=3"], "must be a multiple of devices x microbatch_size = 3 x 8"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_answered_in_a_line(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_is_not_started_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="a sweep starts the launcher itself; run it with python"):
        read("seed=[1,2]")


def test_keys_of_the_sweep_are_not_the_runs(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text((ROOT / "yamls/gla_tiny.yaml").read_text() + "search: tpe\n")
    with pytest.raises(ConfigError, match="search: is a key of the sweep, not of the run"):
        read_sweep(SweepConfig, [str(file), "seed=[1,2]"])
    process = run_script("recipes/train.py", "yamls/gla_tiny.yaml", "seed=[1,2]")
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        ("s3://bucket/runs/", "s3://bucket/runs/s-seed_1"),
        ("null", "null"),
        ("runs/mine", "some/s/seed_1/checkpoints"),
    ],
)
def test_where_a_trial_saves(given: str, saved: str) -> None:
    config = read("seed=[1,2]", "sweep_folder=some/s", f"save_folder={given}")
    arguments = arguments_for(config, Trial.of(config, 0, ("1",)))
    assert arguments[-2] == f"save_folder={saved}"
    assert "run_name=s-seed_1" in arguments


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["optimizer.lr=[1e-3,1.0]"], ["lr_0.001", "lr_1.0"]),
        (["optimizer.lr=[1e-5]", "seed=[1,2]"], ["lr_1e-05-seed_1", "lr_1e-05-seed_2"]),
        (["max_duration=[60ba,80ba]"], ["max_duration_60ba", "max_duration_80ba"]),
        (
            ["train_data.num_workers=[0,1]", "eval_data.num_workers=[2]"],
            [f"train_data.num_workers_{n}-eval_data.num_workers_2" for n in (0, 1)],
        ),
        (
            ["optimizer.betas=[[0.9,0.95],[0.9,0.99]]"],
            ["betas_0.9_0.95-e9141c8d", "betas_0.9_0.99-a610657c"],
        ),
    ],
)
def test_names_say_the_values(arguments: list[str], names: list[str]) -> None:
    assert list(read(*arguments).to_check) == names


def test_long_and_odd_names_stay_apart() -> None:
    values = [f"/data/{'long' * 40}/{number}" for number in (1, 2)] + ["a b", "a_b", "a/b"]
    axis = read_axis(f"tokenizer={json.dumps(values)}")
    assert axis is not None
    names = [name_of([axis], [value]) for value in values]
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name) for name in names)


def test_names_of_values_with_joints_stay_apart() -> None:
    names = list(read("tokenizer=[1,1-local_2]", "train_data.local=[2-local_3,3]").to_check)
    assert names[1] == "tokenizer_1-local_3"
    assert len(names) == 4
    assert all(re.fullmatch(r"tokenizer_.*-local_.*-[0-9a-f]{8}", names[n]) for n in (0, 2, 3))
    (name,) = read("optimizer.lr=[1e-5]", "z_loss=[0]", "seed=[7]").to_check
    assert name == "lr_1e-05-z_loss_0-seed_7"


def test_values_are_taken_as_written() -> None:
    for argument, values in (
        ("model.config.a=[1e-3, '1', \"x\", true, null, 1_000]", '0.001 "1" x true null 1000'),
        ("run_name=[1.10,no]", "1.10 no"),
        ("algorithms=[{},{ema: {half_life: 10ba}}]", None),
    ):
        axis = read_axis(argument)
        assert axis is not None
        assert axis.values == (
            tuple(values.split()) if values else ("{}", "{ema: {half_life: 10ba}}")
        )
    assert read("z_loss=1", "z_loss=2", "z_loss=1", "seed=[1,2]").z_loss == 1
    config = read("seed=3", "seed=[1,2]", "sweep_folder=s", "varlen=false")
    assert config.shared == ("yamls/gla_tiny.yaml", "varlen=false")
    assert [each.seed for each in config.to_check.values()] == [1, 2]
    for argument in ("optimizer.lr=1e-3", "wandb.tags=[a,b]", "optimizer.betas=[0.9,0.95]"):
        assert read_axis(argument) is None


def test_what_a_sweep_began_with_is_compared_but_for_what_changes_no_loss() -> None:
    before = record.describe(read("seed=[1,2]"))
    for free in ("train_data.num_workers=2", "save_interval=9ba", "stall_timeout=9", "wandb=null"):
        record.require_same("s", before, record.describe(read("seed=[1,2]", free)))
    for key, value in (("global_batch_size", "16"), ("varlen", "false"), ("metric_steps", "3")):
        with pytest.raises(ConfigError, match=f"s: {key}: is {value} now, but was"):
            record.require_same("s", before, record.describe(read("seed=[1,2]", f"{key}={value}")))
    assert not any(key.startswith("seed") for key in before["base"])


@pytest.mark.parametrize("axis", ["seed=[1,2]", "optimizer.weight_decay=[0.1,'${oc.env:LR}']"])
def test_what_an_environment_variable_is_set_to_is_compared_and_not_recorded(
    axis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "optimizer.eps=${oc.env:LR}" if axis.startswith("seed") else "varlen=false"

    def entered(value: str) -> Sweep:
        monkeypatch.setenv("LR", value)
        sweep = Sweep(read(axis, key, f"sweep_folder={tmp_path}"), ROOT / "recipes/train.py")
        if not (tmp_path / "sweep.json").exists():
            record.write(str(tmp_path), sweep.content)
        sweep.enter()
        return sweep

    first, again = entered("0.0123456789"), entered("0.0123456789")
    assert again.content == first.content == record.read(str(tmp_path))
    assert "0.0123456789" not in (tmp_path / "sweep.json").read_text()
    in_axis = 'optimizer.weight_decay="${oc.env:LR}"'
    named = in_axis if key == "varlen=false" else "optimizer.eps"
    with pytest.raises(ConfigError, match=f"{re.escape(named)}: an environment variable in it is"):
        entered("0.1")


def test_passwords_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def described(password: str, salt: str | None = None) -> dict[str, Any]:
        monkeypatch.setenv("STORE_LOGIN", password)
        given = "train_data.remote=s3://user:${oc.env:STORE_LOGIN}@bucket/x"
        return record.describe(read("seed=[1,2]", given), salt)

    before = described("first-password")
    assert list(before["environment"]["prints"]) == ["train_data.remote"]
    now = described("second-password", before["environment"]["salt"])
    record.require_same("s", before, now)


@pytest.mark.parametrize(
    "content",
    [
        '{"state": "finished"}',
        '{"state": "finished", "metric": NaN, "step": 4}',
        '{"state": "finished", "metric": 1.5, "step": 4.5}',
        '{"state": "finished", "metric": true, "step": 4}',
        '{"state": "done", "metric": 1, "step": 4}',
        f'{{"state": "finished", "metric": 1{"0" * 400}, "step": 4}}',
        '{"state": ["finished"], "metric": 1, "step": 4}',
        '{"state": "pruned"}',
        '{"state": "pruned", "metric": "1.5", "step": 4}',
        '{"state": "failed"}',
        '{"state": "failed", "reason": 3}',
        '{"state": "finished", "metric": 1, "step": 4, "same_as": 1}',
        "[" * 100_000,
        "null",
    ],
)
def test_a_damaged_result_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(DataError, match=r"result\.json: damaged: not the result of a trial"):
        read_result(tmp_path)


def test_whole_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    for result in (
        Result("finished", 1.25, 4),
        Result("pruned", 2.5, 2, same_as="lr_1"),
        Result("failed", reason="its log holds no step"),
        Result("failed", step=3, reason="its loss is not a finite number"),
    ):
        write_result(tmp_path, result)
        assert read_result(tmp_path) == result


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[" * 100_000,
        '{"version": 1}',
        {"search": None},
        {"search": {}},
        {"search": {"search": "grid", "trials": "4"}},
        {"axes": {"seed": 1}},
        {"axes": {"seed": [["1"]]}},
        {"base": []},
        {"environment": {"salt": 1, "prints": {}}},
        {"environment": {"salt": "", "prints": None}},
    ],
)
def test_a_damaged_record_is_refused(damage: str | dict[str, Any], tmp_path: Path) -> None:
    sweep = Sweep(read("seed=[1,2]", f"sweep_folder={tmp_path}"), ROOT / "recipes/train.py")
    record.write(str(tmp_path), sweep.content)
    sweep.enter()
    text = json.dumps({**sweep.content, **damage}) if isinstance(damage, dict) else damage
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(DataError, match=r"sweep\.json: damaged, or of another version; give"):
        sweep.enter()


def test_a_trial_that_an_orphan_still_saves_is_waited_for(corpus: Corpus, tmp_path: Path) -> None:
    """Also for longer than the minute that recipes/train.py waits."""
    folder = tmp_path / "orphan"
    trial = folder / "seed_1"
    trial.mkdir(parents=True)
    lock = file_lock(trial / ".lock")
    lock.acquire()
    script = start(corpus, folder, "seed=[1]")
    while "waiting: another process is training this run" not in script.read("out"):
        assert script.process.is_alive(), script.read("err")
        time.sleep(0.05)
    assert not (trial / "output.txt").exists()
    lock.release()
    check(script.wait())
    assert results_of(folder)[0]["state"] == "finished"


FULL = """
import sys
from flame_composer.config.cli import run
from flame_composer.config.sweep import SweepConfig, read_sweep

def main(config):
    with open("/dev/full", "w") as file:
        file.write("x")

sys.argv = ["train.py", "yamls/gla_tiny.yaml", "seed=[1]"]
sys.exit(run(main, SweepConfig, read_sweep))
"""
LOCKED = """
import sys
from pathlib import Path
if Path(sys.argv[0] + ".again").exists():
    sys.exit("error: yes, again")
Path(sys.argv[0] + ".again").touch()
sys.exit("error: a/b: another process is training this run; wait until it has ended")
"""


def test_a_full_disk_stops_a_sweep_whose_trials_depend_on_it(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(FULL)
    plain, ordered = (
        read("seed=[1]", f"sweep_folder={tmp_path}/{name}", *more)
        for name, more in (("plain", ()), ("ordered", ("prune=median",)))
    )
    result = run_trial(plain, Trial.of(plain, 0, ("1",)), script, [])
    assert result.state == "failed"
    assert result.reason is not None
    assert "No space left on device" in result.reason
    with pytest.raises(TrainingError, match=r"^trial seed_1: a disk cannot be written: No"):
        run_trial(ordered, Trial.of(ordered, 0, ("1",)), script, [])


def test_a_trial_that_another_process_trains_has_not_failed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LOCKED)
    config = read("seed=[1]", f"sweep_folder={tmp_path}")
    result = run_trial(config, Trial.of(config, 0, ("1",)), script, [])
    assert result == Result("failed", reason="yes, again")


def test_a_huge_grid_is_counted_not_made() -> None:
    """Its combinations would fill any memory; a long list is read in a time that grows with it."""
    axes = [f"model.config.key{number}={[*range(100)]}" for number in range(10)]
    with pytest.raises(ConfigError, match=r"the grid has 100,000,000,000,000,000,000 trials"):
        read(*axes)
    begun = time.monotonic()
    axis = read_axis(f"model.config.a={[*range(40_000)]}")
    assert axis is not None
    assert len(axis.values) == 40_000
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("search_by", ["grid", "tpe"])
def test_secrets_stand_in_no_file_of_a_sweep(search_by: str, tmp_path: Path) -> None:
    secret, other = "wJalrXUtnFEMI7MDENGbPxRfiCY", "kJalrXUtnFEMI7MDENGbPxRfiCZ"
    login = "AKIAIOSFODNN7EXAMPLE"
    config = read(
        f"train_data.remote=s3://{login}:{secret}@bucket/x",
        f"eval_data.remote=[s3://{login}:{secret}@b/v, s3://{login}:{other}@b/v]",
        f"sweep_folder={tmp_path}",
        *(["search=tpe", "trials=2"] if search_by == "tpe" else []),
    )
    sweep = Sweep(config, ROOT / "recipes/train.py")
    record.write(str(tmp_path), sweep.content)
    for number in range(2):
        values = config.axes[0].values[number : number + 1]
        sweep.trials[number] = Trial.of(config, number, values)
        sweep.results[number] = Result("finished", 1.0, 4)
    sweep.write_results()
    outcome = summarize(config, [(sweep.trials[n], sweep.results[n]) for n in range(2)])
    write_page(config, outcome)
    files = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert {"sweep.json", "results.json", "report.html"} <= set(files)
    assert ("optuna.log" in files) == (search_by == "tpe")
    assert "***@bucket/x" in files["results.json"]
    names = [trial.name for trial in sweep.trials.values()]
    assert len(set(names)) == 2
    for text in (*files.values(), *names, *lines(config, outcome)):
        assert secret not in text
        assert other not in text
        assert login not in text


def ended(config: SweepConfig) -> Sweep:
    """A sweep whose trials have all finished, with nothing in their folders but results."""
    sweep = Sweep(config, ROOT / "recipes/train.py")
    record.write(config.sweep_folder, sweep.content)
    for number in range(sweep.count):
        write_result(folder_of(config, sweep.trial(number)), Result("finished", 1.0 + number, 4))
    sweep.refresh()
    return sweep


def test_a_page_appears_whole_and_never_over_a_larger_sweeps(tmp_path: Path) -> None:
    config = read("seed=[1,2]", f"sweep_folder={tmp_path}")
    sweep = ended(config)
    outcome = summarize(config, [(sweep.trials[n], sweep.results[n]) for n in range(2)])
    page = write_page(config, outcome)
    first = page.read_bytes()
    assert len(first) > 1 << 13
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, hard))
    try:
        with pytest.raises(DataError, match=r"report\.html: cannot be written: File too large"):
            write_page(config, outcome)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert page.read_bytes() == first
    assert [path.name for path in tmp_path.glob("report*")] == ["report.html"]

    ended(read("seed=[1,2,3]", f"sweep_folder={tmp_path}"))
    page.write_text("the larger sweep's")
    assert write_page(config, outcome) == page
    assert page.read_text() == "the larger sweep's"


@pytest.mark.parametrize(
    ("argument", "drawn", "scale", "are_ticks"),
    [
        ("optimizer.lr=[1e-3,2e-3,4e-3]", ["0.001", "0.002", "0.004"], "log", True),
        ("optimizer.weight_decay=[0,0.1]", ["0", "0.1"], "linear", True),
        ("seed=[2,4,6]", ["2", "4", "6"], "linear", True),
        ("seed=[64,128,1024]", ["64", "128", "1024"], "log", True),
        ("seed=[7]", ["7"], "linear", True),
        ("optimizer.lr=[1e-3,1.01e-3,1]", ["0.001", "0.00101", "1.0"], "log", False),
        ("seed=[0,1,100]", ["0", "1", "100"], "linear", False),
        ("seed=int(1,8)", ["2", "3", "7"], "linear", True),
        ("optimizer.lr=loguniform(1e-3,2e-3)", ["0.0012", "0.0018"], "log", False),
        ("optimizer.lr=uniform(1,20)", ["1.5", "19.0"], "linear", False),
    ],
)
def test_the_scale_of_a_chart_goes_by_the_kind_of_axis(
    argument: str, drawn: list[str], scale: str, are_ticks: bool
) -> None:
    """The values are the ticks, or matplotlib chooses others."""
    axes, axis = Figure().add_subplot(), read_axis(argument)
    assert axis is not None
    axes.plot(list(map(float, drawn)), range(len(drawn)), "o")
    set_scale(axes, axis, {float(each): each for each in drawn})
    assert axes.get_xscale() == scale
    labels = [each.get_text() for each in axes.get_xticklabels()]
    assert (labels == drawn) == are_ticks
    assert not (are_ticks and len(axes.get_xticks(minor=True)))
    if argument.startswith("seed"):
        assert all(float(each).is_integer() for each in axes.get_xticks())


def test_a_dollar_in_a_value_is_drawn_as_it_stands(tmp_path: Path) -> None:
    config = read(r"model.config.a$\frac$=['a$\frac$',b]", f"sweep_folder={tmp_path}")
    sweep = ended(config)
    outcome = summarize(config, [(sweep.trials[n], sweep.results[n]) for n in range(2)])
    assert r"eval loss over model.config.a$\frac$</h2>" in write_page(config, outcome).read_text()


def test_the_table_is_printed_before_the_page_is_drawn(tmp_path: Path) -> None:
    """So that a page that cannot be written hides no result."""
    arguments = ["yamls/gla_tiny.yaml", "seed=[1,2]", f"sweep_folder={tmp_path}"]
    ended(read_sweep(SweepConfig, arguments))
    (tmp_path / "report.html").mkdir()
    process = run_script("recipes/sweep.py", *arguments)
    assert process.returncode == 1
    assert "the best is seed_1; its values in a run of their own:" in process.stdout
    assert process.stderr == f"error: {tmp_path}/report.html: cannot be written: Is a directory\n"


def a_link(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to(path.parent.parent / "elsewhere")


def a_pipe(path: Path) -> None:
    path.parent.mkdir(parents=True)
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir(parents=True)


def train_first(sweep: Sweep) -> None:
    sweep.refresh()
    claimed = sweep.claim()
    assert claimed is not None
    sweep.train(claimed[0])


@pytest.mark.parametrize(
    "name", [".sweep.lock", "output.txt", "errors.txt", "train_log.jsonl", "result.json"]
)
@pytest.mark.parametrize("put", [a_link, a_pipe, a_folder])
def test_odd_files_in_a_trials_folder(
    put: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    """They are named in a line; none is followed or waited for."""
    config = read("seed=[1]", f"sweep_folder={tmp_path}")
    path = tmp_path / "seed_1" / name
    put(path)
    sweep = Sweep(config, tmp_path / "missing.py")
    with pytest.raises(DataError, match=rf"^{path}: cannot be \w+: is a link, or no file; mend or"):
        train_first(sweep)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("put", [a_link, a_pipe, a_folder])
def test_odd_files_in_a_sweeps_folder(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / "s/sweep.json")
    with pytest.raises(
        DataError, match=r"sweep\.json: cannot be read: is a link, or no file; mend"
    ):
        record.read(f"{tmp_path}/s")
    sweep = ended(read("seed=[1]", f"sweep_folder={tmp_path}/t"))
    (tmp_path / "t/results.json").mkdir()
    with pytest.raises(DataError, match=r"results\.json: cannot be written: Is a directory; mend"):
        sweep.write_results()
    assert not list((tmp_path / "t").glob("*.tmp"))
    (tmp_path / "u").mkdir()
    (tmp_path / "u/seed_1").touch()
    other = Sweep(read("seed=[1]", f"sweep_folder={tmp_path}/u"), tmp_path / "missing.py")
    with pytest.raises(DataError, match="/u/seed_1: cannot be read: is a file, and must be a fold"):
        other.refresh()


@pytest.mark.parametrize(
    ("arguments", "keys_"),
    [
        (["z_loss=[0,1e-4]", "seed=[1,2]", "metric=loss"], ["z_loss"]),
        (["z_loss=[0,1e-4]", "context_length=[64,128]"], ["context_length"]),
        (["algorithms=[{},{label_smoothing: {smoothing: 0.1}}]", "metric=loss"], ["algorithms"]),
        (["algorithms=[{},{label_smoothing: {smoothing: 0.1}}]"], []),
        (["train_data.local=[a,b]", "eval_data=null"], ["train_data.local"]),
        (["train_data.local=[a,b]"], []),
        (
            [
                "train_data.num_workers=[1,2]",
                "train_data.loss_across_documents=[true,false]",
                "metric=loss",
            ],
            ["train_data.loss_across_documents"],
        ),
        (["eval_data.local=[a,b]", "tokenizer=[a,b]"], ["eval_data.local", "tokenizer"]),
    ],
)
def test_axes_that_change_the_metric_itself_are_known(
    arguments: list[str], keys_: list[str]
) -> None:
    assert read(*arguments).incomparable() == keys_


def test_a_sweep_warns_of_results_that_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read("z_loss=[0,1e-4]", "metric=loss", f"sweep_folder={tmp_path}")
    ended(config)
    run_sweep(config, ROOT / "recipes/train.py")
    said = capsys.readouterr().out
    assert "warning: z_loss: trials with other values of it cannot be compared by loss, as" in said


def test_a_process_that_waits_for_anothers_check_says_so(tmp_path: Path) -> None:
    arguments = ["yamls/gla_tiny.yaml", "seed=[1]", f"sweep_folder={tmp_path}"]
    ended(read_sweep(SweepConfig, arguments))
    with locked(tmp_path):
        script = Script("recipes/sweep.py", *arguments)
        while f"{tmp_path}: waiting for another process, which checks" not in script.read("out"):
            assert script.process.is_alive(), script.read("err")
            time.sleep(0.05)
    check(script.wait())


def test_a_process_that_waits_makes_the_folder_anew_that_a_refused_sweep_has_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found = tmp_path / "refused", list[bool]()

    def wait() -> None:
        with locked(folder):
            found.append((folder / ".lock").is_file())

    waiting, said = threading.Thread(target=wait), ""
    with locked(folder):
        waiting.start()
        while "waiting for another process" not in said:
            said += capsys.readouterr().out
            time.sleep(0.01)
        (folder / ".lock").unlink()
        folder.rmdir()
    waiting.join(timeout=60)
    assert found == [True]
