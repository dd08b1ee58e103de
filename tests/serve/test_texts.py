"""The log of requests with their texts."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path

import pytest

from flame_composer.errors import InvalidField
from flame_composer.serve.texts import TextLog
from tests.conftest import GLA
from tests.data_fixtures import byte_tokenizer
from tests.runs import run_script
from tests.serve.clients import KEY, Server
from tests.serve.test_engine import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "tiny"
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    )
    tiny(GLA).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(path: Path, count: int) -> list[dict[str, object]]:
    """The lines of a file, once there are so many."""
    until = time.monotonic() + 60
    while path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < until
        time.sleep(0.02)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_are_written_where_the_key_says(folder: Path, tmp_path: Path) -> None:
    """Of all that is answered, and nothing of what is refused; the key is not among them."""
    path, env = tmp_path / "texts.jsonl", {"SERVE_KEY": KEY}
    server = Server(folder, f"log_texts={path}", "api_key_env=SERVE_KEY", env=env)
    assert f"the texts of all requests and answers are written to {path}" in server.script.read(
        "err"
    )
    asked = {"prompt": ["def 禁", [5, 6]], "max_tokens": 5, "temperature": 0, "seed": 3}
    status, _, content = server.ask(asked)
    assert status == 200
    messages = [{"role": "user", "content": "hello"}]
    chat = {"messages": messages, "max_tokens": 4, "stream": True}
    streamed = server.ask(chat, "/v1/chat/completions")[2].decode()
    assert server.ask({"prompt": "a secret", "max_tokens": -1})[0] == 400
    assert server.ask({"prompt": "a secret"}, Authorization="Bearer wrong")[0] == 401
    first, second = lines(path, 2)
    answer = json.loads(content)
    assert (first["id"], first["path"], first["status"]) == (answer["id"], "/v1/completions", 200)
    assert (first["prompt"], first["temperature"], first["seed"]) == (asked["prompt"], 0, 3)
    assert first["answers"] == [
        {"text": choice["text"], "finish_reason": choice["finish_reason"]}
        for choice in answer["choices"]
    ]
    assert first["tokens"] == {
        "prompt": answer["usage"]["prompt_tokens"],
        "written": answer["usage"]["completion_tokens"],
        "cached": 0,
    }
    parts = [json.loads(line[6:]) for line in streamed.split("\n\n") if line.startswith("data: {")]
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert second["messages"] == messages
    assert [each["text"] for each in second["answers"]] == [text]  # type: ignore[attr-defined]
    # A client that leaves has asked, too
    leaving = server.post({"prompt": "bye", "max_tokens": 2000, "logit_bias": {"0": -100}})
    server.wait_for("flame_rows", 1)
    leaving.close()
    third = lines(path, 3)[2]
    assert (third["prompt"], third["status"]) == (["bye"], 499)
    assert server.end().returncode == 0
    assert KEY not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    # It is added to
    server = Server(folder, f"log_texts={path}")
    server.ask({"prompt": "def", "max_tokens": 1})
    assert server.end().returncode == 0
    assert len(lines(path, 4)) == 4


def test_a_full_disk_stops_no_answer(folder: Path, tmp_path: Path) -> None:
    """And is told once."""
    full = tmp_path / "serve.py"
    full.write_text(
        "import os, runpy\n"
        "from flame_composer.serve import texts\n"
        "texts._opened = lambda _: os.open('/dev/full', os.O_WRONLY)\n"
        'runpy.run_path("recipes/serve.py", run_name="__main__")\n'
    )
    server = Server(folder, "log_texts=texts.jsonl", script=full)
    for _ in range(3):
        assert server.ask({"prompt": "def", "max_tokens": 3})[0] == 200
    ended = server.end()
    assert ended.returncode == 0
    assert ended.stderr.count("requests are left out of texts.jsonl: No space left on device") == 1


def test_a_file_that_others_may_read_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open").touch(0o644)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, reason in (
        ("open", "is there, and others may read or write it; chmod 600 it, or name another"),
        ("folder", "cannot be opened: Is a directory"),
        ("link", "cannot be opened: Too many levels of symbolic links"),
        ("pipe", "must be a file"),
        ("nowhere/file", "cannot be opened: No such file or directory"),
    ):
        with pytest.raises(InvalidField, match=reason):
            TextLog(str(tmp_path / name))
    ended = run_script(
        "recipes/serve.py", f"model={folder}", f"log_texts={tmp_path / 'open'}", "port=0"
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "log_texts" in ended.stderr


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.touch(0o600)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(InvalidField, match="belongs to another user"):
        TextLog(str(path))


def test_a_file_that_ends_in_half_a_line_is_gone_on_with(tmp_path: Path) -> None:
    """As a server leaves it that was killed; a whole line is not followed by an empty one."""
    path = tmp_path / "log"
    path.touch(0o600)
    for before, after in (
        (b"", b'{"a":1}\n'),
        (b'{"a":1}\n', b'{"a":1}\n{"a":1}\n'),
        (b'{"text":"hal', b'{"text":"hal\n{"a":1}\n'),
    ):
        path.write_bytes(before)
        log = TextLog(str(path))
        log._entries.put({"a": 1})
        log.close()
        assert path.read_bytes() == after


def test_a_line_after_half_a_line_is_whole(tmp_path: Path) -> None:
    log = TextLog(str(tmp_path / "log"))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.dup2(writer, log._file)
    os.set_blocking(log._file, False)
    os.close(writer)
    log._entries.put({"text": "x" * 1_000_000})
    until = time.monotonic() + 60
    while not log._has_failed:
        assert time.monotonic() < until
        time.sleep(0.01)
    found = os.read(reader, 1 << 20)  # as much as a pipe holds
    log._entries.put({"text": "half a pair: \udc80"})
    log.close()
    while part := os.read(reader, 1 << 20):
        found += part
    os.close(reader)
    torn, whole = found.splitlines()
    assert torn.startswith(b'{"text":"xxx')
    assert json.loads(whole) == {"text": "half a pair: \udc80"}
