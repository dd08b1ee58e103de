"""What leaves a process by stdout and stderr: no secret, nothing that steers a terminal, and no
work lost where it cannot.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from flame_composer import lines
from flame_composer.config import cli
from flame_composer.config.use import GenerateConfig
from flame_composer.errors import DataError, hide, masked, one_line, without_secrets
from flame_composer.lines import Lines, clean_streams, visible
from tests.runs import ROOT, Corpus, Script, check

PASSWORD = "pa55/w+rd=with@all:of?it"
TOKEN = "hf_" + "aB3" * 12
AWS_KEY = "AKIAIOSFODNN7EXAMPLE"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            f"http://user:{PASSWORD}@host:9000 cannot be reached",
            "http://user:***@host:9000 cannot be reached",
        ),
        (
            "http://user:pass@host/a, ftp://me:word@there",
            "http://user:***@host/a, ftp://me:***@there",
        ),
        ("s3://key:se/cr/et@bucket/run", "s3://key:***@bucket/run"),
        ("s3://key:9/secret@bucket/run", "s3://key:***@bucket/run"),
        (f"s3://{AWS_KEY}:secret@bucket: denied", "s3://***:***@bucket: denied"),
        ("https://token@host/x", "https://***@host/x"),
        (
            "https://h/o?X-Amz-Credential=a%2Fb&X-Amz-Signature=0a1b&x=1",
            "https://h/o?X-Amz-Credential=***&X-Amz-Signature=***&x=1",
        ),
        (
            "https://h/o?AWSAccessKeyId=ab&Signature=c%3D&Expires=12",
            "https://h/o?AWSAccessKeyId=***&Signature=***&Expires=12",
        ),
        ("https://h/o?sig=abc&token=def&sv=1", "https://h/o?sig=***&token=***&sv=1"),
        (
            r'{"url": "https://h/o?x=1\u0026token=def"}',
            r'{"url": "https://h/o?x=1\u0026token=***"}',
        ),
        (
            "command line: wandb.api_key=abc: unknown key",
            "command line: wandb.api_key=***: unknown key",
        ),
        ('{"password": "abc", "user": "me"}', '{"password": "***", "user": "me"}'),
        ("aws_secret_access_key=abc/d+e", "aws_secret_access_key=***"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        (f"401 for {TOKEN} at {AWS_KEY}", "401 for *** at ***"),
        ("ghp_" + "a1" * 18, "***"),
    ],
)
def test_what_signs_a_person_in_is_not_shown(text, shown):
    assert masked(text) == shown
    assert masked(shown) == shown, "once more changes nothing"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c",
        "http://127.0.0.1:9000/data cannot be reached",
        "http://host:80, me@there",
        "https://h/?max-keys=5",
        "eos_token=<|endoftext|>: must not be empty",
        "tokenizer=mistral: no password; set MLFLOW_TRACKING_PASSWORD",
        "authorization is needed",
        "optimizer.lr=0.1",
        "sk-learn",
        "hf_folder",
        "data/{a}.txt",
        "a://b",
        "user@host",
        "",
    ],
)
def test_what_is_no_secret_stays(text):
    assert masked(text) == text


def test_values_of_the_environment_are_shown_by_their_names(monkeypatch):
    secret = 'line one "quoted"\nand línea two, as long'
    hide(secret, "KEY")
    for form in (
        secret,
        json.dumps(secret),
        repr(secret),
        " ".join(secret.split()),
        "x" + secret.splitlines()[1] + "y",
    ):
        assert "línea" not in masked(form)
        assert "quoted" not in masked(form) or form.startswith("x")
        assert "${KEY}" in masked(form)
    for value in ("abc", "1234", "1e-05", "512"):
        hide(value, "SHORT")
        assert masked(f"step {value}, 0.{value}4") == f"step {value}, 0.{value}4", (
            "found in other words and numbers"
        )
    hide("data", "WORD")
    assert masked("data/x and metadata") == "${WORD}/x and metadata"
    hide("12345678", "PIN")
    assert masked("12345678 and 9.123456789") == "${PIN} and 9.123456789"
    assert masked("p%40ss%2Fword at p@ss/word") == "p%40ss%2Fword at p@ss/word"
    hide("p@ss/word", "URL")
    assert masked("p%40ss%2Fword at p@ss/word") == "${URL} at ${URL}"


def test_what_is_cut_is_masked_first():
    hide("0123456789abcdefghij", "SECRET_KEY")
    assert "01234" not in one_line(ValueError("x" * 290 + " 0123456789abcdefghij"))


def test_settings_keep_their_form():
    settings = {"a": [{"b": "https://u:p@h"}], "c": ("http://t@h", 3), "d": None, "e": 1.5}
    assert without_secrets(settings) == {
        "a": [{"b": "https://u:***@h"}],
        "c": ("http://***@h", 3),
        "d": None,
        "e": 1.5,
    }


# Terminals

STEERING = [
    "\x1b[2J",
    "\x1b]0;owned\x07",
    "\x1b[A",
    "\x9b2J",
    "\x9d0;owned\x9c",
    "\x85",
    "\x08\x08",
    "a\rb",
    "\x00",
    "\x7f",
    "\x0b",
    "\x0c",
    "\N{LINE SEPARATOR}",
    "\N{PARAGRAPH SEPARATOR}",
    "\N{RIGHT-TO-LEFT OVERRIDE}",
    "\N{RIGHT-TO-LEFT ISOLATE}",
    "\N{ZERO WIDTH SPACE}",
    "\ufeff",
    "\udce4",
    "\U000e0041",
]


def cleaned(*texts: str) -> str:
    out = io.StringIO()
    stream: Any = Lines(out, "stdout")
    for text in texts:
        stream.write(text)
    return out.getvalue()


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_nothing_steers_a_terminal(text):
    for shown in (
        cleaned(f"error: {text}: bad\n"),
        cleaned("error: ", text, "\n"),
        cleaned("error: ", f"\r{text}", "\n"),
    ):
        assert all(
            each == "\n" or unicodedata.category(each)[0] not in "CZ" or each == " "
            for each in shown
        ), ascii(shown)
    assert visible(text).isprintable()


def test_what_people_write_stays():
    for text in (
        "ünï \N{ZERO WIDTH JOINER}"[:3],
        "日本語\N{IDEOGRAPHIC SPACE}です",
        "a\tb\n\nc\n",
        "e\u0301",
        "🔥",
    ):
        assert cleaned(text) == text
    assert cleaned("\x1b[34m\x1b[1mwandb\x1b[0m: a\r\n") == "wandb: a\n", "colours go"


def test_progress_bars_are_drawn_as_before(monkeypatch):
    def draw(out: Any) -> None:
        always: dict[str, Any] = {
            "file": out,
            "mininterval": 0,
            "miniters": 1,
            "bar_format": "{desc} {n}",
        }
        for _ in tqdm(range(2), desc="outer", ncols=40, **always):
            for _ in tqdm(range(2), desc="inner", position=1, leave=False, **always):
                pass
        # With one bar only: tqdm clears several in any order.
        for number in tqdm(range(2), desc="alone", ncols=40, **always):
            tqdm.write(f"line {number}", file=out)

    plain, out = io.StringIO(), io.StringIO()
    draw(plain)
    draw(Lines(out, "stderr"))
    assert "\x1b[A" in plain.getvalue()
    assert out.getvalue() == plain.getvalue()
    hostile = io.StringIO()
    file: Any = Lines(hostile, "stderr")
    with tqdm(total=1, file=file, desc="\x1b[2Jx\ry", ncols=40):
        pass
    assert "\x1b[2J" not in hostile.getvalue()
    assert "x\ry" not in hostile.getvalue()


def test_every_way_out_is_cleaned(monkeypatch, capsys):
    """Log lines of handlers that were there before, and tracebacks of what is nobody's mistake."""
    handler = logging.StreamHandler()
    logging.getLogger("a.library").addHandler(handler)
    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    clean_streams()
    bad = "\x1b[2J0123456789abcdef http://u:secret@h"
    logging.getLogger("a.library").error(bad)
    try:
        raise ZeroDivisionError(bad)
    except ZeroDivisionError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    print(bad)
    logging.getLogger("a.library").removeHandler(handler)
    out, err = capsys.readouterr()
    assert out == "␛[2J${MY_API_KEY} http://u:***@h\n"
    assert err.count("␛[2J${MY_API_KEY} http://u:***@h\n") == 2
    assert "\x1b" not in err


# Processes of their own

SCRIPT = """
import sys
from flame_composer.config.cli import run
from flame_composer.errors import DataError
from flame_composer.config.use import GenerateConfig

def main(config):
    for number in range(config.max_new_tokens):
        print(f"line {number}" + "." * 100)
    with open(config.model, "w") as file:
        print("done", file=file)
        file.flush()
        {more}
    print("last")

sys.exit(run(main, GenerateConfig))
"""


def shell(
    command: str, folder: Path, more: str = "pass", **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python script.py model=done prompt=x ...` in a shell's line, where it stands for
    SCRIPT.
    """
    (folder / "script.py").write_text(SCRIPT.replace("{more}", more))
    command = command.replace("SCRIPT", f"{sys.executable} script.py model=done prompt=x")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=folder, env=environment
    )


def test_a_reader_that_leaves_does_not_end_the_work(tmp_path):
    process = shell("set -o pipefail; SCRIPT max_new_tokens=9999 | head -1", tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("line 0.")
    assert (tmp_path / "done").read_text() == "done\n"


def test_a_full_disk_behind_stdout_is_said_and_does_not_end_the_work(tmp_path):
    process = shell("SCRIPT max_new_tokens=9999 > /dev/full", tmp_path)
    assert process.returncode == 1
    assert (
        process.stderr == "warning: stdout: cannot be written to: No space left on device; the work"
        " continues without it\nerror: stdout: cannot be written to: No space left on device; the"
        " work is done, but not all of its lines were shown\n"
    )
    assert (tmp_path / "done").read_text() == "done\n"
    process = shell("SCRIPT max_new_tokens=1 > /dev/full", tmp_path)
    assert process.returncode == 1, "found out when the buffer is written"
    assert shell("SCRIPT max_new_tokens=9 2> /dev/full", tmp_path).returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_end_the_work(tmp_path, closed):
    """Nor is what a child writes to its stdout found in a file that happened to be opened next."""
    process = shell(
        f"SCRIPT max_new_tokens=9 {closed}", tmp_path, "import os; os.system('echo from a child')"
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert (tmp_path / "done").read_text() == "done\n"


def test_a_script_with_a_closed_stdout(tmp_path, dataset):
    command = f"{sys.executable} {ROOT}/convert/inspect_mds.py data={dataset} >&-"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


def test_what_a_script_was_asked_for_is_not_lost_without_a_word(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(
        DataError, match=r"^stdout: cannot be written to: No space left on device; send it to"
    ):
        lines.write_content("text")


def test_content_is_as_it_is_but_for_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, shown in ((io.StringIO(), "\x1b[2Jé\n"), (Terminal(), "␛[2Jé\n")):
        monkeypatch.setattr(sys, "stdout", out)
        clean_streams()
        lines.write_content("\x1b[2Jé\n")
        assert out.getvalue() == shown


def test_an_ascii_terminal_takes_every_name(tmp_path):
    process = shell(
        "SCRIPT max_new_tokens=1 | tail -n 2",
        tmp_path,
        'print("né\\udce4")',
        PYTHONIOENCODING="ascii:strict",
    )
    assert (process.returncode, process.stdout) == (0, "n\\xe9<U+DCE4>\nlast\n")


def test_a_warning_of_a_library_is_cleaned(tmp_path):
    process = shell(
        "SCRIPT max_new_tokens=1",
        tmp_path,
        'import warnings; warnings.warn("\\x1b[2J http://u:secret@h")',
    )
    assert "UserWarning: ␛[2J http://u:***@h\n" in process.stderr


def test_a_long_error_keeps_its_ends(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "model=m", "prompt=p"])

    def main(_: Any) -> None:
        raise DataError(f"place: {'x' * 9000}: the rule; the remedy")

    assert cli.run(main, GenerateConfig) == 1
    err = capsys.readouterr().err
    assert len(err) < 1600
    assert err.startswith("error: place: xxx")
    assert err.endswith("xxx: the rule; the remedy\n")


# Real runs

UPLOAD = """
import sys
from pathlib import Path
from flame_composer.checkpoint import upload
from flame_composer.config.cli import run
from flame_composer.config.use import GenerateConfig

def main(config):
    upload.UPLOAD_WAITS = (0.1,)
    upload.upload_file(Path(config.model), config.prompt)

sys.exit(run(main, GenerateConfig))
"""


def test_a_failed_upload_tells_no_password(tmp_path):
    (tmp_path / "upload.py").write_text(UPLOAD)
    env = {
        "S3_ENDPOINT_URL": f"http://user:{PASSWORD}@127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": AWS_KEY,
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for place in ("s3://data/ba1.pt", f"s3://{AWS_KEY}:wJalrXUtnFEMI/K7MDENG@data/ba1.pt"):
        process = Script(
            tmp_path / "upload.py", f"model={tmp_path}/upload.py", f"prompt={place}", env=env
        ).wait()
        assert process.returncode == 2
        warning, error = process.stderr.splitlines()
        assert warning.startswith("warning: s3://")
        assert error.startswith("error: s3://")
        for part in ("pa55", "w+rd", "all:of", "wJalr", "K7MDENG", AWS_KEY):
            assert part not in process.stdout + process.stderr


def test_a_run_keeps_and_logs_no_secret(corpus: Corpus, tmp_path):
    """With every logger, stopped and started again: neither what an environment variable holds,
    nor a password it was given.
    """
    secret = "hunter2-secret"
    env = {
        "SAVE_IN": str(tmp_path / secret),
        "WANDB_MODE": "offline",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    run = tmp_path / "run"
    keys = [key for key in corpus.keys(run) if not key.startswith("save_folder")] + [
        "save_folder=${oc.env:SAVE_IN}/checkpoints",
        "wandb.project=tests",
        "tensorboard=true",
        "loggers.file_logger={}",
        f"loggers.mlflow_logger.tracking_uri=file:{tmp_path}/mlflow",
        "eval_data=null",
    ]
    for length in ("3ba", "6ba"):
        process = check(
            Script(
                "recipes/train.py",
                *keys,
                f"max_duration={length}",
                "scheduler.name=constant",
                "scheduler.warmup=0ba",
                env=env,
            ).wait()
        )
        assert secret not in process.stdout + process.stderr
    assert "resuming from ${SAVE_IN}/checkpoints/ba3.pt" in process.stdout
    assert (
        json.loads(process.stdout.splitlines()[-1])["checkpoint_folder"] == "${SAVE_IN}/checkpoints"
    )
    kept = [
        path
        for folder in (run, tmp_path / "mlflow", tmp_path / secret)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert {path.suffix for path in kept} >= {".yaml", ".jsonl", ".wandb", ".txt", ".pt"}
    assert [str(path) for path in kept if secret.encode() in path.read_bytes()] == []


def test_a_hostile_manifest_does_not_reach_the_terminal(dataset, copy_of, monkeypatch, capsys):
    from flame_composer.config.convert import InspectConfig
    from tests.dataset.test_convert import load_script

    folder = copy_of(dataset)
    manifest = json.loads((folder / "manifest.json").read_text())
    for hostile in (
        "\x1b]0;owned\x07",
        "\x9b2J",
        "\N{RIGHT-TO-LEFT OVERRIDE}",
        "a\N{LINE SEPARATOR}error: b",
    ):
        (folder / "manifest.json").write_text(
            json.dumps(manifest | {"split": hostile, "token_dtype": hostile})
        )
        monkeypatch.setattr(sys, "argv", ["inspect_mds.py", f"data={folder}"])
        assert cli.run(load_script("inspect_mds").main, InspectConfig) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err[:-1].isprintable(), ascii(err)
