"""Two hundred requests, 32 at a time, in three rounds: every text is its own, nothing is left."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from openai import OpenAI

from flame_composer.bench.clients import Answered, percentile
from tests.conftest import GLA
from tests.data_fixtures import words
from tests.serve.clients import Server
from tests.serve.test_serve import alone, make

NUM_REQUESTS = 200
AT_A_TIME = 32
MOST_GROWTH = 12 << 20  # bytes from the second round to the third


class Asked(NamedTuple):
    kind: str
    prompt: str
    max_tokens: int
    temperature: float
    seed: int


def requests() -> list[Asked]:
    """Of ten, one leaves early, one is malformed, and four are streamed."""
    draw, found = random.Random(0), []
    for number in range(NUM_REQUESTS):
        kind = ("leave", "wrong", "stream", "stream", "stream", "stream")[number % 10 :][:1]
        size = draw.choice((1, 1, 5, 5, 30, 120))
        tokens, temperature = draw.choice((1, 3, 8, 8, 16, 40)), draw.choice((0.0, 1.0))
        found.append(
            Asked(kind[0] if kind else "whole", words(size, number), tokens, temperature, number)
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load") / "tiny"


@pytest.fixture(scope="module")
def made(folder: Path) -> Any:
    return make(folder, {**GLA, "use_short_conv": True})


@pytest.fixture
def server(made: Any, folder: Path) -> Iterator[Server]:
    server = Server(folder, "max_rows=16", "prefill_tokens=48", "max_new_tokens=400")
    yield server
    ended = server.end()
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


def answer(server: Server, client: OpenAI, asked: Asked) -> Any:
    """What the server says to a request: its text and when that came, or the status."""
    _, prompt, max_tokens, temperature, seed = asked
    given: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "top_p": 1,
    }
    if asked.kind == "wrong":
        wrong = ({**given, "max_tokens": -1}, {**given, "seed": "x"}, b"{", {"prompt": None})
        return server.ask(wrong[seed // 10 % 4])[0]
    if asked.kind == "leave":
        connection = server.post({**given, "max_tokens": 400, "stream": seed % 40 < 20})
        if seed % 20 < 10:
            connection.recv(100)
        connection.close()
        return None
    answered = Answered(asked=time.perf_counter())
    if asked.kind == "whole":
        answered.text = client.completions.create(model="tiny", **given).choices[0].text
        return answered
    for part in client.completions.create(model="tiny", stream=True, **given):
        answered.text += part.choices[0].text
        answered.came.append(time.perf_counter())
    return answered


def require_nothing_left(server: Server, threads: int) -> None:
    """No row, prompt, connection or file; threads that prepare requests stay, and are few."""
    for name in ("rows", "rows_reading", "waiting"):
        server.wait_for(f"flame_{name}", 0)
    process, until = psutil.Process(server.script.process.pid), time.monotonic() + 60
    while open := [each for each in process.net_connections("tcp") if each.status != "LISTEN"]:
        assert time.monotonic() < until, open
        time.sleep(0.02)
    assert server.threads() <= threads + 8


def test_two_hundred_requests_in_three_rounds(made: Any, server: Server) -> None:
    asked = requests()
    expected = {
        each: alone(
            made,
            each.prompt,
            each.seed,
            max_new_tokens=each.max_tokens,
            temperature=each.temperature,
        )
        for each in asked
        if each.kind in ("whole", "stream")
    }
    assert len(expected) == 160
    server.ask({"prompt": "x", "max_tokens": 1})
    threads, process = server.threads(), psutil.Process(server.script.process.pid)
    memory, files, times = [], [], []
    for _ in range(3):
        with ThreadPoolExecutor(AT_A_TIME) as pool, server.client() as client:
            found = [*pool.map(lambda each: answer(server, client, each), asked)]
        for each, got in zip(asked, found, strict=True):
            if each.kind == "wrong":
                assert got == 400, each
            elif each.kind != "leave":
                assert got.text == expected[each], each
        require_nothing_left(server, threads)
        memory.append(process.memory_info().rss)
        files.append(process.num_fds())
        times += [got for got in found if isinstance(got, Answered) and got.came]
    assert memory[2] - memory[1] < MOST_GROWTH, memory
    assert files[2] <= files[0]
    assert server.gauge("flame_time_to_first_token_seconds_count") >= 3 * 160
    for name, values in (
        ("to the first token", [each.to_first for each in times]),
        ("between tokens", [seconds for each in times for seconds in each.between()]),
    ):
        half, most = percentile(values, 50), percentile(values, 99)
        print(f"{name}, {AT_A_TIME} clients: p50 {half * 1000:.1f} ms, p99 {most * 1000:.1f} ms")
        assert 0 < half <= most < 60
