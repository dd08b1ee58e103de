"""Charts of runs: what is read of a log, what is drawn, and a page that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import html.parser
import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_composer import charts
from flame_composer.charts import CHARTS, draw, read_run, series, table, write
from flame_composer.cli import help_text
from flame_composer.config import ConfigError, DataError
from flame_composer.loading import load
from flame_composer.recipe_config import ReportConfig
from tests.runs import ROOT, check, last_json, run_script

PNG = b"\x89PNG\r\n\x1a\n"


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "current_steps": step, "total_steps": 20, "loss": 5.0 / step, "learning_rate": 1e-3, "epoch": 0.1, "percentage": 5.0,
        "num_tokens": 100 * step, "throughput": 1000.0 + step, **more,
    }  # fmt: skip


def make_log(folder: Path, rows: list[dict[str, Any]], starts: tuple[int, ...] | None = (0,)) -> str:
    folder.mkdir(parents=True)
    (folder / "train_log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    if starts is not None:
        (folder / "starts.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in starts))
    return str(folder)


class Page(html.parser.HTMLParser):
    """What a page holds: its tags, its text, and whatever its attributes refer to."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.refers_to: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.refers_to += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


# What is read


def test_rows_of_a_run(tmp_path: Path) -> None:
    run = read_run(make_log(tmp_path / "a", [row(1), row(2, loss=None), row(3, eval_loss=1.5)], starts=(0, 2, 2, 3)))
    assert (run.name, run.place, run.notes) == ("a", str(tmp_path / "a"), [])
    assert run.resumed_after == [2], "a start after the last step has come to nothing yet"
    steps, values = series(run, "loss", 1)
    assert steps.tolist() == [1, 2, 3]
    assert values[0] == 5.0
    assert math.isnan(values[1])
    assert series(run, "perplexity", 1)[1][0] == math.exp(5.0)
    assert [values.tolist() for values in series(run, "eval_loss", 1)] == [[3], [1.5]]
    assert len(series(run, "grad_norm", 1)[0]) == 0


def test_a_log_by_itself(tmp_path: Path) -> None:
    folder = make_log(tmp_path / "a", [row(1)], starts=None)
    run = read_run(f"{folder}/train_log.jsonl")
    assert run.name == "a"
    assert run.notes == ["there is no starts.jsonl beside the log, so resumes are not marked"]


def test_a_start_that_was_cut_short_costs_no_report(tmp_path: Path) -> None:
    folder = make_log(tmp_path / "a", [row(1), row(2), row(3)], (0,))
    with (tmp_path / "a/starts.jsonl").open("a") as starts:
        starts.write('{"st{"step": 1}\n{"step": 2}\n')
    run = read_run(folder)
    assert run.resumed_after == [2]
    assert run.notes == ["line 2 of starts.jsonl is damaged, and is left out"]


def test_smoothing_is_a_mean_of_the_last_steps(tmp_path: Path) -> None:
    run = read_run(make_log(tmp_path / "a", [row(step, loss=float(step)) for step in range(1, 7)]))
    steps, values = series(run, "loss", 3)
    assert (steps.tolist(), values.tolist()) == ([3, 4, 5, 6], pytest.approx([2, 3, 4, 5]))
    assert series(run, "learning_rate", 3)[0].tolist() == [1, 2, 3, 4, 5, 6], "it is exact"
    assert len(series(run, "loss", 100)[1]) == 1


def test_a_row_cut_in_half_at_the_end_is_left_out_and_noted(tmp_path: Path) -> None:
    folder = make_log(tmp_path / "a", [row(1), row(2)])
    log = tmp_path / "a/train_log.jsonl"
    whole = log.read_text()
    for cut in range(len(json.dumps(row(1))) + 3, len(whole) - 1):
        log.write_text(whole[:cut])
        run = read_run(folder)
        assert len(run.rows) == 1
        assert run.notes == ["the last row of train_log.jsonl was cut short, and is left out"]
    log.write_text(whole[:-1])
    assert len(read_run(folder).rows) == 2, "only its newline is missing"


WRONG = [
    ("", DataError, "LOG: holds no whole row yet; wait for the run's first step"),
    ('{"current', DataError, "LOG: holds no whole row yet; wait for the run's first step"),
    ("{}\n", DataError, "LOG:1: damaged: not a row of a training log; restore it from a copy, or delete the line"),
    ("GOOD[1]\n", DataError, "LOG:2: damaged: not a JSON object; restore it from a copy, or delete the line"),
    ("GOOD{\nGOOD", DataError, "LOG:2: damaged: not a JSON object; restore it from a copy, or delete the line"),
    (json.dumps(row(1, loss=10**400)) + "\n", DataError, "LOG:1: damaged: not a row of a training log; restore it from a copy, "
     "or delete the line"),
    (json.dumps(row(1, loss="low")) + "\n", DataError, "LOG:1: damaged: not a row of a training log; restore it from a copy, "
     "or delete the line"),
    ("\udcff", DataError, "LOG: cannot be read: not text"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "error", "message"), WRONG, ids=lambda value: str(value)[:20])
def test_logs_that_are_none(tmp_path: Path, content: str, error: type[Exception], message: str) -> None:
    log = tmp_path / "train_log.jsonl"
    log.write_bytes(content.replace("GOOD", json.dumps(row(1)) + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(error) as caught:
        read_run(str(tmp_path))
    assert str(caught.value) == message.replace("LOG", str(log))


def test_runs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_run(str(tmp_path))
    assert str(caught.value) == f"runs: {tmp_path}: has no train_log.jsonl; name the log_folder of a run, e.g. runs/gla_tiny"
    with pytest.raises(ConfigError, match="no such folder"):
        read_run(str(tmp_path / "none"))


# What is drawn


def test_page_needs_nothing_from_elsewhere_and_shows_every_run(tmp_path: Path) -> None:
    evil = '<script src="http://evil">&"$x^2$'
    one = read_run(make_log(tmp_path / "one", [row(step, eval_loss=1.0, eval_perplexity=2.7) for step in (1, 2, 3)], (0, 2)))
    other = charts.Run(evil, f"{tmp_path}/{evil}", [{**row(1), "perplexity": 2.0, "grad_norm": 0.5}], [], ["it is <b>odd</b>"])
    files = write([one, other], tmp_path / "out", 1)
    assert set(files) == {chart.name for chart in CHARTS} | {"html"}
    text = files["html"].read_text()
    page = Page(text)
    assert page.tags.count("img") == len(CHARTS)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert evil in page.text
    assert "it is <b>odd</b>" in page.text
    assert "one" in page.text
    for source, chart in zip(page.refers_to, CHARTS, strict=True):
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        png = base64.b64decode(content)
        assert png.startswith(PNG)
        assert png == files[chart.name].read_bytes()
    without_pictures = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert re.findall(r"(?:https?:|//|@import|url\()", without_pictures.replace("http://evil", "")) == []


def picture(*arguments: Any) -> np.ndarray:
    import io

    from matplotlib.image import imread

    png = draw(*arguments)
    assert png is not None
    return imread(io.BytesIO(png))


def test_resumes_and_further_runs_are_seen_in_the_picture(tmp_path: Path) -> None:
    chart = CHARTS[0]
    rows = [row(step) for step in range(1, 11)]
    plain = read_run(make_log(tmp_path / "a" / "x", rows))
    resumed = read_run(make_log(tmp_path / "b" / "x", rows, (0, 5)))
    other = read_run(make_log(tmp_path / "c", [row(step, loss=1.0) for step in range(1, 11)]))
    pictures = [picture([plain], chart, 1), picture([resumed], chart, 1), picture([plain, other], chart, 1),
                picture([plain], chart, 5)]  # fmt: skip
    for i, one in enumerate(pictures):
        for two in pictures[:i]:
            assert not np.array_equal(one, two)
    assert charts.labels([plain, resumed, other]) == [plain.place, resumed.place, "c"]


def test_what_no_run_has_is_not_drawn(tmp_path: Path) -> None:
    run = read_run(make_log(tmp_path / "a", [row(1, loss=None), row(2, loss=None)]))
    other = read_run(make_log(tmp_path / "b", [row(1), row(2)]))
    assert draw([run, other], CHARTS[1], 1) is not None, "one of two has it"
    out = tmp_path / "out"
    out.mkdir()
    (out / "grad_norm.png").write_bytes(b"of an earlier report")
    assert set(write([run], out, 1)) == {"learning_rate", "throughput", "html"}
    assert not (out / "grad_norm.png").exists()
    assert table([run])[1][0][3:7] == ["none", "none", "none", "none"]


def test_a_log_without_number_still_makes_a_page(tmp_path: Path) -> None:
    run = read_run(make_log(tmp_path / "a", [{"current_steps": 1, "total_steps": 1, "num_tokens": 4, "loss": 1e6}]))
    assert set(write([run], tmp_path / "out", 1)) == {"loss", "html"}, "exp(1e6) is no number"


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    run = read_run(make_log(tmp_path / "a", [row(1)]))
    with pytest.raises(DataError, match=r"train_log\.jsonl: cannot be written to: .*; give another folder with out="):
        write([run], tmp_path / "a/train_log.jsonl", 1)


# The script


def test_a_report_is_as_smooth_as_it_is_asked_to_be(tmp_path: Path) -> None:
    rows = [{"current_steps": step, "total_steps": 9, "num_tokens": 4, "loss": 1e6 * step % 7} for step in range(1, 10)]
    place = make_log(tmp_path / "a", rows)
    main = runpy.run_path(str(ROOT / "recipes/report.py"))["main"]
    main(load(ReportConfig, [str(place), f"out={tmp_path / 'out'}", "smooth=3"]))
    drawn = [write([read_run(place)], tmp_path / f"{smooth}", smooth)["loss"].read_bytes() for smooth in (1, 3)]
    assert [(tmp_path / "out/loss.png").read_bytes() == picture for picture in drawn] == [False, True]


def test_runs_come_first_on_the_command_line() -> None:
    config = load(ReportConfig, ["runs/a", "runs/b,c", "smooth=3"])
    assert (config.runs, config.smooth) == (["runs/a", "runs/b,c"], 3)
    assert load(ReportConfig, ["runs=[a,b]"]).runs == ["a", "b"]
    assert help_text(ReportConfig, "report.py").startswith("usage: report.py RUNS ... [key=value ...]")
    for arguments, message in (
        ([], "command line: runs=[]: must name at least one run's folder, e.g. runs/gla_tiny"),
        (["runs/a", "smooth=3", "runs/b"], "command line: runs/b: must be key=value (only the first argument can be a file)"),
        (["a", "--smooth"], "command line: --smooth: unknown option; arguments are [file.yaml] [key=value ...], see --help"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(ReportConfig, arguments)
        assert str(caught.value).startswith(message)


def test_report_of_real_runs(undisturbed: Path, tmp_path: Path) -> None:
    run = read_run(str(undisturbed))
    assert [start["step"] for start in run.starts] == [0]
    assert run.starts[0]["devices"] == 1
    killed = make_log(tmp_path / "killed", [row(step) for step in range(1, 20)], (0, 7))
    process = run_script("recipes/report.py", undisturbed, killed, f"out={tmp_path / 'out'}")
    result = last_json(process)
    assert result["runs"] == [str(undisturbed), killed]
    assert set(result["files"]) == {"loss", "perplexity", "learning_rate", "grad_norm", "throughput", "html"}
    assert all(Path(path).stat().st_size > 0 for path in result["files"].values())
    assert "resumed after step  7" in process.stdout
    text = (tmp_path / "out/report.html").read_text()
    assert "undisturbed" in text
    assert "40 of 40" in text
    (tmp_path / "killed/train_log.jsonl").write_text("")
    process = run_script("recipes/report.py", killed)
    assert process.returncode == 1
    assert process.stderr == f"error: {killed}/train_log.jsonl: holds no whole row yet; wait for the run's first step\n"
    assert check(run_script("recipes/report.py", "--help")).stdout.startswith("usage: report.py RUNS ...")
