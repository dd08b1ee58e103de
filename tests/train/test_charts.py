"""Charts of runs: what is read of a log, what is drawn, and a page that needs nothing from
elsewhere.
"""

from __future__ import annotations

import base64
import html.parser
import itertools
import json
import math
import re
import runpy
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_composer.config.cli import help_text
from flame_composer.config.load import load
from flame_composer.config.use import ReportConfig
from flame_composer.errors import ConfigError, DataError
from flame_composer.train import charts
from flame_composer.train.charts import draw, series, table, write
from flame_composer.train.run_log import CHARTS, KEYS, NUMBERS, Run, read_run
from tests.runs import ROOT, check, last_json, run_script

PNG = b"\x89PNG\r\n\x1a\n"


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "current_steps": step,
        "total_steps": 20,
        "loss": 5.0 / step,
        "learning_rate": 1e-3,
        "epoch": 0.1,
        "percentage": 5.0,
        "num_tokens": 100 * step,
        "throughput": 1000.0 + step,
        **more,
    }


def make_log(
    folder: Path, rows: list[dict[str, Any]], starts: tuple[int, ...] | None = (0,)
) -> str:
    folder.mkdir(parents=True)
    (folder / "train_log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    if starts is not None:
        (folder / "starts.jsonl").write_text(
            "".join(json.dumps({"step": step}) + "\n" for step in starts)
        )
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
        self.refers_to += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


# What is read


def test_rows_of_a_run(tmp_path: Path) -> None:
    run = read_run(
        make_log(
            tmp_path / "a", [row(1), row(2, loss=None), row(3, eval_loss=1.5)], starts=(0, 2, 2, 3)
        )
    )
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
        assert run.num_rows == 1
        assert run.notes == ["the last row of train_log.jsonl was cut short, and is left out"]
    log.write_text(whole[:-1])
    assert read_run(folder).num_rows == 2, "only its newline is missing"


WRONG = [
    ("", DataError, "LOG: holds no whole row yet; wait for the run's first step"),
    ('{"current', DataError, "LOG: holds no whole row yet; wait for the run's first step"),
    (
        "{}\n",
        DataError,
        "LOG:1: damaged: not a row of a training log; restore it from a copy, or delete the line",
    ),
    (
        "GOOD[1]\n",
        DataError,
        "LOG:2: damaged: not a JSON object; restore it from a copy, or delete the line",
    ),
    (
        "GOOD{\nGOOD",
        DataError,
        "LOG:2: damaged: not a JSON object; restore it from a copy, or delete the line",
    ),
    (
        json.dumps(row(1, loss=10**400)) + "\n",
        DataError,
        "LOG:1: damaged: not a row of a training log; restore it from a copy, or delete the line",
    ),
    (
        json.dumps(row(1, loss="low")) + "\n",
        DataError,
        "LOG:1: damaged: not a row of a training log; restore it from a copy, or delete the line",
    ),
    *(
        (
            json.dumps(row(1, **wrong)) + "\n",
            DataError,
            (
                "LOG:1: damaged: not a row of a training log; restore it from a copy, or "
                "delete the line"
            ),
        )
        for wrong in (
            {"current_steps": 10**400},
            {"current_steps": True},
            {"current_steps": -1},
            {"current_steps": 1.0},
            {"num_tokens": 10**400},
            {"total_steps": None},
            {"loss": True},
            {"loss": [1]},
            {"eval_loss": {}},
            {"throughput": "x"},
            {"grad_norm": False},
        )
    ),
    (
        "x" * (1 << 24),
        DataError,
        (
            "LOG:1: damaged: a line of more than 16,777,216 characters; restore it from a copy, or"
            " delete the line"
        ),
    ),
    ("\udcff", DataError, "LOG: cannot be read: not text"),
]


@pytest.mark.parametrize(("content", "error", "message"), WRONG, ids=lambda value: str(value)[:20])
def test_logs_that_are_none(
    tmp_path: Path, content: str, error: type[Exception], message: str
) -> None:
    log = tmp_path / "train_log.jsonl"
    log.write_bytes(
        content.replace("GOOD", json.dumps(row(1)) + "\n").encode("utf-8", "surrogateescape")
    )
    with pytest.raises(error) as caught:
        read_run(str(tmp_path))
    assert str(caught.value) == message.replace("LOG", str(log))


def test_runs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_run(str(tmp_path))
    assert (
        str(caught.value)
        == f"runs: {tmp_path}: has no train_log.jsonl; name the log_folder of a run, e.g."
        " runs/gla_tiny"
    )
    with pytest.raises(ConfigError, match="no such folder"):
        read_run(str(tmp_path / "none"))


# What is drawn


def test_page_needs_nothing_from_elsewhere_and_shows_every_run(tmp_path: Path) -> None:
    evil = '<script src="http://evil">&"$x^2$'
    one = read_run(
        make_log(
            tmp_path / "one",
            [row(step, eval_loss=1.0, eval_perplexity=2.7) for step in (1, 2, 3)],
            (0, 2),
        )
    )
    other = Run.of_rows(
        evil, f"{tmp_path}/{evil}", [row(1, grad_norm=0.5)], [], ["it is <b>odd</b>"]
    )
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
    assert (
        re.findall(r"(?:https?:|//|@import|url\()", without_pictures.replace("http://evil", ""))
        == []
    )


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
    pictures = [
        picture([plain], chart, 1),
        picture([resumed], chart, 1),
        picture([plain, other], chart, 1),
        picture([plain], chart, 5),
    ]
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
    run = read_run(
        make_log(
            tmp_path / "a", [{"current_steps": 1, "total_steps": 1, "num_tokens": 4, "loss": 1e6}]
        )
    )
    assert set(write([run], tmp_path / "out", 1)) == {"loss", "html"}, "exp(1e6) is no number"


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    run = read_run(make_log(tmp_path / "a", [row(1)]))
    with pytest.raises(
        DataError,
        match=r"train_log\.jsonl: cannot be written to: .*; give another folder with out=",
    ):
        write([run], tmp_path / "a/train_log.jsonl", 1)


def test_a_log_of_any_numbers_makes_a_page(tmp_path: Path) -> None:
    values = [0, -1, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, 10**299, None]
    rows = [
        row(10**11 * step, loss=a, grad_norm=b, throughput=b, eval_loss=a)
        for step, (a, b) in enumerate(itertools.product(values, values), 1)
    ]
    run = read_run(make_log(tmp_path / "a", rows, (0, 10**11, 10**400)))
    assert run.resumed_after == [10**11]
    assert set(write([run], tmp_path / "out", 1)) >= {"loss", "grad_norm", "html"}
    assert set(write([run], tmp_path / "out", 7)) >= {"loss", "html"}
    assert "resumed after step" in table([run])[0]


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([*NUMBERS, *KEYS]),
            st.integers(-5, 10**20)
            | st.floats()
            | st.none()
            | st.text(max_size=2)
            | st.booleans()
            | st.lists(st.none(), max_size=1),
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(deadline=None, max_examples=100)
def test_no_log_gives_a_traceback(lines: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = make_log(Path(folder, "run"), [{**row(1), **line} for line in lines])
        try:
            run = read_run(place)
        except DataError as error:
            assert "damaged: not a row" in str(error)  # noqa: PT017 - either is right
        else:
            assert run.num_rows == len(lines)
            table([run])
            assert all(len(series(run, key, 3)[1]) <= len(lines) for key in run.columns)


def test_a_name_that_is_no_text_is_shown_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_log(tmp_path / "r\udcff\x1b[31m", [row(1), row(2)], starts=None)
    main = runpy.run_path(str(ROOT / "recipes/report.py"))["main"]
    main(ReportConfig(runs=[place]))
    out = capsys.readouterr().out
    assert "r<U+DCFF>␛[31m" in out
    assert "\x1b" not in out
    assert (
        "r<U+DCFF>␛[31m" in Page(Path(place, "report/report.html").read_text(encoding="utf-8")).text
    )


def test_a_long_log_is_thinned_and_its_spikes_are_seen(tmp_path: Path) -> None:
    steps = np.arange(1, 200_001, dtype=np.float64)
    values = np.sin(steps / 9000)
    values[[777, 150_001]] = 50, -50
    values[60_000:70_000] = np.nan
    drawn_at, drawn = charts.thinned(steps, values)
    assert len(drawn) < 5 * charts.PIXELS
    assert np.nanmax(drawn) == 50
    assert np.nanmin(drawn) == -50
    assert abs(drawn_at[np.nanargmax(drawn)] - 778) <= 200_000 / charts.PIXELS
    assert (drawn_at[0], drawn_at[-1], drawn[0], drawn[-1]) == (1, 200_000, values[0], values[-1])
    assert (np.diff(drawn_at) >= 0).all()
    gap = drawn_at[np.isnan(drawn)]
    assert gap.min() == pytest.approx(60_001, abs=300)
    assert gap.max() == pytest.approx(70_000, abs=300)
    few = charts.thinned(steps[:1000], values[:1000])
    assert (few[0] == steps[:1000]).all()
    assert (few[1] == values[:1000]).all()
    for odd in (np.zeros(9999), np.arange(9999.0)[::-1]):  # one step again and again, and backwards
        assert np.nanmax(charts.thinned(odd, np.arange(9999.0))[1]) == 9998


def test_the_picture_of_a_thinned_log_is_that_of_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        row(step, loss=math.sin(step / 900) + (step == 777) * 9, total_steps=20_000)
        for step in range(1, 20_001)
    ]
    run = read_run(make_log(tmp_path / "a", rows))
    thin = picture([run], CHARTS[0], 1)
    monkeypatch.setattr(charts, "thinned", lambda steps, values: (steps, values))
    whole = picture([run], CHARTS[0], 1)
    assert thin.shape == whole.shape
    assert (np.abs(thin - whole).max(axis=-1) > 0.5).mean() < 0.003, (
        "but for a pixel here and there"
    )


def test_means_of_many_values_are_exact_and_take_no_time() -> None:
    values = np.arange(200_000, dtype=np.float64)
    values[5] = 1e300
    for width in (2, 3, 7, 1000, 99_999, 200_000):
        means = charts._means(values, width)
        assert len(means) == len(values) - width + 1
        after = means[6:]  # of windows that the huge value is not in
        np.testing.assert_allclose(
            after, np.arange(6, 6 + len(after)) + (width - 1) / 2, rtol=1e-12
        )


def test_a_long_log_takes_little_memory_and_time(tmp_path: Path) -> None:
    line = json.dumps(row(1, grad_norm=1.5))
    folder = tmp_path / "a"
    folder.mkdir()
    with (folder / "train_log.jsonl").open("w") as log:
        log.writelines(
            line.replace('"current_steps": 1,', f'"current_steps": {step},') + "\n"
            for step in range(1, 50_001)
        )
    tracemalloc.start()
    run = read_run(str(folder))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert run.num_rows == 50_000
    assert peak < 12e6, "some 16 bytes a value"
    begin = time.process_time()
    write([run], tmp_path / "out", 1)
    assert time.process_time() - begin < 10


# The script


def test_a_report_is_as_smooth_as_it_is_asked_to_be(tmp_path: Path) -> None:
    rows = [
        {"current_steps": step, "total_steps": 9, "num_tokens": 4, "loss": 1e6 * step % 7}
        for step in range(1, 10)
    ]
    place = make_log(tmp_path / "a", rows)
    main = runpy.run_path(str(ROOT / "recipes/report.py"))["main"]
    main(load(ReportConfig, [str(place), f"out={tmp_path / 'out'}", "smooth=3"]))
    drawn = [
        write([read_run(place)], tmp_path / f"{smooth}", smooth)["loss"].read_bytes()
        for smooth in (1, 3)
    ]
    assert [(tmp_path / "out/loss.png").read_bytes() == picture for picture in drawn] == [
        False,
        True,
    ]


def test_runs_come_first_on_the_command_line() -> None:
    config = load(ReportConfig, ["runs/a", "runs/b,c", "smooth=3"])
    assert (config.runs, config.smooth) == (["runs/a", "runs/b,c"], 3)
    assert load(ReportConfig, ["runs=[a,b]"]).runs == ["a", "b"]
    assert help_text(ReportConfig, "report.py").startswith(
        "usage: report.py RUNS ... [key=value ...]"
    )
    for arguments, message in (
        ([], "command line: runs=[]: must name at least one run's folder, e.g. runs/gla_tiny"),
        (
            ["runs/a", "smooth=3", "runs/b"],
            "command line: runs/b: must be key=value (only the first argument can be a file)",
        ),
        (
            ["a", "--smooth"],
            (
                "command line: --smooth: unknown option; arguments are [file.yaml] [key=value ...],"
                " see --help"
            ),
        ),
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
    assert set(result["files"]) == {
        "loss",
        "perplexity",
        "learning_rate",
        "grad_norm",
        "throughput",
        "html",
    }
    assert all(Path(path).stat().st_size > 0 for path in result["files"].values())
    assert "resumed after step  7" in process.stdout
    text = (tmp_path / "out/report.html").read_text()
    assert "undisturbed" in text
    assert "40 of 40" in text
    (tmp_path / "killed/train_log.jsonl").write_text("")
    process = run_script("recipes/report.py", killed)
    assert process.returncode == 1
    assert (
        process.stderr
        == f"error: {killed}/train_log.jsonl: holds no whole row yet; wait for the run's first"
        " step\n"
    )
    assert check(run_script("recipes/report.py", "--help")).stdout.startswith(
        "usage: report.py RUNS ..."
    )
