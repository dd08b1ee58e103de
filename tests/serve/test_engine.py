"""The parts of the server: states, the engine and its failures, the text of an answer."""

from __future__ import annotations

import asyncio
import copy
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flame_composer.cpu.coverage import ON_CPU
from flame_composer.errors import ConfigError, DataError
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.serve import engine as engines
from flame_composer.serve import inbox as inboxes
from flame_composer.serve import prepare, protocol
from flame_composer.serve.answers import Choice, Form
from flame_composer.serve.engine import Closed, Engine, Event, Failure, Full, Job, Piece
from flame_composer.serve.inbox import Inbox
from flame_composer.serve.metrics import Metrics
from flame_composer.serve.prepare import Preparation
from flame_composer.serve.protocol import Limits
from flame_composer.serve.states import Abilities, States, describe, prepare_weights, probe
from flame_composer.serve.writing import Answer, BlockedTexts, TokenScore
from flame_composer.text.surfaces import surfaces_of
from flame_composer.text.tokenizer import bare
from tests.conftest import GLA, LLAMA, small_fla
from tests.data_fixtures import byte_tokenizer, words
from tests.serve.clients import Server
from tests.stack import FLA

LIMITS = Limits(max_rows=8, max_waiting=8, max_new_tokens=1000, vocab_size=300)


def tiny(architecture: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = build_hf_config({**architecture, "initializer_range": 0.2}, byte_tokenizer(), 512)
    return build_model(config).eval()


def with_positions() -> PreTrainedModel:
    """A model that looks at how much it has seen, as those with rotary embeddings do."""
    model = tiny(GLA)
    forward = model.forward

    def looking(input_ids: Any, past_key_values: Any, **options: Any) -> Any:
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        output = forward(input_ids=input_ids, past_key_values=past_key_values, **options)
        places = seen + torch.arange(input_ids.shape[1])[-output.logits.shape[1] :]
        output.logits = output.logits * (1 + 0.1 * torch.sin(places))[None, :, None]
        return output

    model.forward = looking  # type: ignore[method-assign]
    return model


MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}


def test_what_states_allow_is_found_out() -> None:
    assert probe(tiny(GLA)) == Abilities(joined=True, in_pieces=True)
    assert probe(tiny({**GLA, "use_short_conv": True})) == Abilities(True, True)
    assert probe(tiny(MAMBA)) == Abilities(joined=True, in_pieces=False)
    assert probe(tiny(LLAMA)) == Abilities(joined=False, in_pieces=True)
    for window, in_pieces in ((None, True), (16, False), (400, False)):
        attn = {"layers": [0], "num_heads": 2, "window_size": window}
        hybrid = {**GLA, "num_hidden_layers": 2, "attn": attn}
        assert probe(tiny(hybrid)) == Abilities(joined=False, in_pieces=in_pieces)
    assert probe(with_positions()).joined is False
    assert "take turns" in describe(Abilities(False, True), 8)
    assert "reads a prompt whole" in describe(Abilities(True, False), 8)


@pytest.mark.filterwarnings("ignore:According to Bo")  # fla's word on its RWKV
@pytest.mark.filterwarnings("ignore:The correction_factor is set to 1 by default")  # Comba's
@pytest.mark.parametrize("name", ON_CPU)
def test_what_the_states_of_each_model_allow(name: str) -> None:
    """Rotary embeddings count a batch's tokens together, and attention's states grow."""
    abilities = probe(tiny(small_fla(name)))
    assert abilities.joined == (name not in ("retnet", "transformer"))
    whole = ("mamba", "mamba2", "lightnet") if FLA < (0, 6) else ("mamba", "mamba2")
    assert abilities.in_pieces == (name not in whole)


def test_a_model_that_cannot_be_served_is_refused() -> None:
    jamba = {
        "model_type": "jamba",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 2,
        "use_mamba_kernels": False,
    }
    with pytest.raises(ConfigError, match=r"jamba: cannot be served: .*generate.py may run"):
        probe(tiny(jamba))
    broken = tiny(GLA)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(DataError, match="take an earlier checkpoint"):
        probe(broken)


def test_weights_are_laid_out_where_a_model_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does otherwise with them keeps them, and is served as before."""
    wide = {**GLA, "hidden_size": 512}
    model, other = tiny(wide), tiny(wide)
    prepare_weights(model, 4)
    assert any(weight.is_mkldnn for weight in model.parameters())
    assert probe(model) == Abilities(joined=True, in_pieces=True)
    o_proj = other.model.layers[0].attn.o_proj
    monkeypatch.setattr(o_proj, "forward", lambda x: x @ o_proj.weight.t())
    prepare_weights(other, 4)
    assert not any(weight.is_mkldnn for weight in other.parameters())
    benches = [Bench(each) for each in (model, other)]
    found = []
    for bench in benches:
        bench.engine.start()
        found.append([bench.result(bench.submit(words(size, size))) for size in (3, 30)])
        bench.engine.close("done")
    assert found[0] == found[1]


class Bench:
    """An engine with a thread, and what came of the jobs it was given."""

    def __init__(self, model: PreTrainedModel, **options: Any):
        abilities = probe(model)
        given = {"max_rows": 4, "max_waiting": 8, "prefill_tokens": 32, **options}
        self.engine = Engine(model, abilities, Metrics(), **given)
        self.preparation = Preparation(
            model,
            byte_tokenizer(),
            abilities,
            max_prompt_tokens=500,
            blocked=BlockedTexts([]),
        )
        self.events: dict[int, list[Event]] = {}
        self.ended = threading.Condition()

    def jobs(self, prompt: Any, **options: Any) -> list[Job]:
        content = {"prompt": prompt, "max_tokens": 12, "temperature": 0, **options}
        request = protocol.parse_completion(content, "m", LIMITS)
        number = len(self.events)
        self.events[number] = []

        def deliver(event: Event) -> None:
            with self.ended:
                self.events[number].append(event)
                self.ended.notify_all()

        return self.preparation.jobs(request, None, deliver)

    def submit(self, prompt: Any, **options: Any) -> int:
        jobs = self.jobs(prompt, **options)
        self.engine.submit(jobs)
        return len(self.events) - 1

    def result(self, number: int) -> str | Failure:
        """The text of a job with one answer, or why it failed."""

        def last() -> Any:
            events = self.events[number]
            return events[-1] if events else None

        def is_done() -> bool:
            event = last()
            is_end = isinstance(event, Piece) and event.written.finish is not None
            return is_end or isinstance(event, Failure)

        with self.ended:
            assert self.ended.wait_for(is_done, 120)
        if isinstance(last(), Failure):
            return last()
        return "".join(e.written.text for e in self.events[number] if isinstance(e, Piece))


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(tiny(GLA))
    bench.engine.start()
    yield bench
    bench.engine.close("the test has ended")
    assert bench.engine.gauges() == {"rows": 0, "rows_reading": 0, "waiting": 0}


def test_a_model_that_reads_prompts_whole_writes_the_same() -> None:
    model = tiny(MAMBA)
    alone, together = (Bench(model, max_rows=rows) for rows in (1, 4))
    prompts, found = [words(size, size) for size in (3, 30, 60, 9)], []
    for bench in (alone, together):
        bench.engine.start()
        numbers = [bench.submit(prompt) for prompt in prompts]
        found.append([bench.result(number) for number in numbers])
        bench.engine.close("done")
    assert found[0] == found[1]
    assert len(set(map(str, found[0]))) == 4


def test_scores_that_are_no_numbers_disturb_nobody(bench: Bench) -> None:
    with torch.no_grad():
        bench.engine.model.get_input_embeddings().weight[7] = float("nan")
    good = [bench.submit(words(5, seed)) for seed in range(3)]
    bad = bench.submit([5, 7, 5])
    failure = bench.result(bad)
    assert isinstance(failure, Failure)
    assert (failure.status, "are not numbers" in failure.message) == (500, True)
    assert all(isinstance(bench.result(number), str) for number in good)


def test_a_failure_of_the_model_is_told_and_does_not_last(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = bench.result(bench.submit("def"))
    forward, calls = bench.engine.model.forward, []

    def fail(**options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return forward(**options)

    fail.__signature__ = None  # type: ignore[attr-defined]
    monkeypatch.setattr(bench.engine.model, "_supports_logits_to_keep", lambda: True)
    monkeypatch.setattr(bench.engine.model, "forward", fail)
    failure = bench.result(bench.submit("def"))
    assert failure == Failure(500, "the model failed; see the server's log")
    assert "out of memory" in caplog.text
    assert bench.result(bench.submit("def")) == before


def test_a_prompt_that_cannot_join_fails_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, with a line of log; what is being written goes on."""
    copied = engines.copies

    def copies(cache: Any, number: int) -> list[Any]:
        if number > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copied(cache, number)

    monkeypatch.setattr(engines, "copies", copies)
    before = bench.result(bench.submit("def"))
    good = bench.submit("def", max_tokens=12)
    failure = bench.result(bench.submit("def", n=3))
    assert failure == Failure(500, "the model failed; see the server's log")
    assert caplog.text.count("OutOfMemoryError: CUDA out of memory") == 1
    assert bench.result(good) == before
    # And so does all that joins at once, if the states cannot be put together
    monkeypatch.setattr(engines, "copies", copied)
    with monkeypatch.context() as within:
        within.setattr(States, "join", lambda *_: copies(None, 2))
        assert bench.result(bench.submit("def", n=3)) == failure
    assert bench.result(bench.submit("def")) == before


def test_a_failure_that_cannot_be_delivered_disturbs_nobody(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Event) -> None:
        raise RuntimeError("nobody is there")

    [job] = bench.jobs("def")
    job.deliver = fail
    bench.engine.submit([job])
    assert isinstance(bench.result(bench.submit("def")), str)
    assert "not delivered: nobody is there" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_thread_has_failed_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tiny(GLA))

    def fail(*_: Any) -> None:
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(bench.engine, "_write_tokens", fail)
    monkeypatch.setattr(bench.engine, "_fail_all", fail)
    numbers = [bench.submit("def") for _ in range(6)]
    bench.engine.start()
    assert [bench.result(number) for number in numbers] == [
        Failure(503, "the server failed; see its log")
    ] * 6
    bench.engine.close("over")
    with pytest.raises(Closed):
        bench.submit("def")


def test_no_more_wait_than_may() -> None:
    bench = Bench(tiny(GLA), max_waiting=3)
    bench.submit(["a", "b"])
    with pytest.raises(Full):
        bench.submit(["c", "d"])
    bench.submit("e")
    assert bench.engine.gauges()["waiting"] == 3
    bench.engine.is_draining = True
    with pytest.raises(Closed):
        bench.submit("f")


def test_no_more_is_prepared_than_there_is_room_for() -> None:
    """Nothing is decoded for a request that cannot be taken, or that nobody waits for."""
    bench = Bench(tiny(GLA), max_waiting=3, max_rows=2)
    with pytest.raises(Full), bench.engine.room_for(4):
        pass
    three, two, one = bench.engine.room_for(3), bench.engine.room_for(2), bench.engine.room_for(1)
    with three, two, pytest.raises(Full), one:
        pass
    bench.submit(["a", "b"])
    with pytest.raises(Full), bench.engine.room_for(2):
        pass
    with bench.engine.room_for(1):
        bench.engine.is_draining = True
    with pytest.raises(Closed), bench.engine.room_for(1):
        pass
    checks = iter([True, True, True, False])
    content = {"prompt": ["a", "b", "c"], "n": 2}
    request = protocol.parse_completion(content, "m", LIMITS)
    jobs = bench.preparation.jobs(request, None, lambda _: None, lambda: next(checks))
    assert [len(job.rows) for job in jobs] == [2]
    with pytest.raises(protocol.BadRequest, match="n: must make 8 answers at most"):
        protocol.parse_completion({"prompt": ["a", "b", "c"], "n": 3}, "m", LIMITS)


def test_the_end_fails_what_is_left() -> None:
    bench = Bench(tiny(GLA))
    bench.engine.start()
    numbers = [bench.submit("x", max_tokens=1000, logit_bias={"0": -100}) for _ in range(6)]
    bench.engine.close("over")
    assert [bench.result(number) for number in numbers] == [Failure(503, "over")] * 6


def test_between_two_tokens_there_are_few_passes() -> None:
    """Also where prompts are short, or have many short turns; all are read in the end."""
    bench = Bench(tiny(GLA), prefill_tokens=256, max_rows=20, max_waiting=20)
    end = next(iter(bench.preparation.ends_of_turns))
    many = [token for _ in range(9) for token in (*[5] * 32, end)]
    for prompt in (many, *([7] * 3 for _ in range(10))):
        bench.submit(prompt, max_tokens=1)
    passes, read = [], engines.read
    bench.engine._wait()
    with torch.inference_mode(), pytest.MonkeyPatch.context() as within:
        within.setattr(engines, "read", lambda *a, **o: (passes.append(1), read(*a, **o))[1])
        total = 0
        while bench.engine.reading:
            passes.clear()
            bench.engine._join(bench.engine._read_prompts())
            assert 0 < len(passes) <= 4
            total += len(passes)
    assert total == 19
    assert bench.engine.metrics.prompt_tokens == len(many) + 30


def test_prompts_take_turns() -> None:
    """A short prompt is read while a long one still is."""
    bench = Bench(tiny(GLA))
    order: list[int] = []
    for size in (400, 300, 8):
        [job] = bench.jobs([5] * size, max_tokens=1)
        deliver = job.deliver
        job.deliver = lambda event, size=size, then=deliver: (order.append(size), then(event))
        bench.engine.submit([job])
    bench.engine.start()
    for number in range(3):
        bench.result(number)
    bench.engine.close("done")
    assert order == [8, 300, 400]


def written(text: str, stop: list[str], blocked: list[str]) -> tuple[str, str, list[str]]:
    """What is shown of a text that a model writes, the reason of its end, and the pieces."""
    tokenizer = byte_tokenizer()
    answer = Answer(tokenizer, [5], stop, BlockedTexts(blocked))
    shown: list[str] = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        part = answer.add(token, None)
        shown.append(part.text)
        if part.finish is not None:
            return "".join(shown), part.finish, shown
    part = answer.end("length")
    return "".join([*shown, part.text]), str(part.finish), shown


def test_the_end_of_a_text() -> None:
    """Of many texts of two letters: cut before the first stop text, whatever the tokens are."""
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("abé", k=30))
        stop = ["".join(draw.choices("abé", k=draw.randint(1, 5))) for _ in range(2)]
        places = [text.find(each) for each in stop if each in text]
        shown, finish, _ = written(text, stop, [])
        if places:
            ends = min(text.find(each) + len(each) for each in stop if each in text)
            assert finish == "stop"
            # A token may hold two stop texts; the first to end decides when there is one a token
            assert shown == text[: min(places)] or len(shown) <= ends
            assert not any(each in shown for each in stop)
        else:
            assert (shown, finish) == (text, "length")


@pytest.mark.parametrize(
    ("text", "shown", "finish"),
    [
        ("It is a Secret, they say", "It is a ", "content_filter"),
        ("It is secretly so", "It is secretly so", "length"),
        ("It is a secret", "It is a ", "content_filter"),
        ("nosecret", "nosecret", "length"),
        ("这是禁止的", "这是", "content_filter"),
        ("a secret END", "a ", "content_filter"),
        ("a sec END secret", "a sec ", "stop"),
    ],
)
def test_blocked_texts_are_not_shown(text: str, shown: str, finish: str) -> None:
    found = written(text, ["END"], ["secret", "禁止"])
    assert found[:2] == (shown, finish)


@pytest.mark.parametrize(
    ("text", "shown", "finish"),
    [
        ("It is Secretly so", "It is ", "content_filter"),
        ("It is a secret", "It is a ", "content_filter"),
        ("nosecret", "nosecret", "length"),
        ("the topmost drawer", "the ", "content_filter"),
        ("the innermost drawer", "the ", "content_filter"),
        ("the innermosts", "the innermosts", "length"),
        ("a fork, a flunk and so on", "a fork, a ", "content_filter"),
        ("a funk fu nk", "a ", "content_filter"),
        ("a flun k", "a flun k", "length"),
        ("这是禁止的", "这是", "content_filter"),
        (f"a fl{'u' * 40}nk", f"a fl{'u' * 40}nk", "length"),
        (f"a fl{'u' * 31}nk", "a ", "content_filter"),
    ],
)
def test_a_star_stands_for_letters(text: str, shown: str, finish: str) -> None:
    found = written(text, ["END"], ["secret*", "*most", "f*nk", "禁*"])
    assert found[:2] == (shown, finish)


def test_stars_cost_no_time() -> None:
    blocked = BlockedTexts(["a*ab", "*ab", "ab*", "a*b"])
    began = time.process_time()
    assert blocked.find("a" * 300_000) is None
    assert time.process_time() - began < 20


def test_a_prompt_is_put_into_words_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many answers show it: its tokens' texts, and their likeliest others."""
    tokenizer, decoded = copy.deepcopy(byte_tokenizer()), []
    decode = tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **options: decoded.append(ids) or decode(ids, **options)
    )
    ids = tokenizer("prompt é 禁" * 30).input_ids
    content = {"prompt": ids, "n": 4, "echo": True, "logprobs": 2, "max_tokens": 1}
    surfaces = surfaces_of(bare(tokenizer))
    form = Form(protocol.parse_completion(content, "m", LIMITS), "m", tokenizer, surfaces)
    scores = [TokenScore(id, 0, -1.0, [(id, -1.0), (5, -2.0)]) for id in ids]
    last = TokenScore(7, 99, -3.0, [])
    choices = [Choice("text", [last], "length", of_prompt=scores) for _ in range(4)]
    made = json.loads(form.whole(choices, {"total_tokens": 1}))
    assert len(decoded) <= len({5, 7, *ids})
    assert made["usage"] == {"total_tokens": 1}
    assert [choice["index"] for choice in made["choices"]] == [0, 1, 2, 3]
    for choice in made["choices"]:
        found = choice["logprobs"]
        assert found == made["choices"][0]["logprobs"]
        assert [len(each) for each in found.values()] == [len(ids) + 1] * 4
        assert found["text_offset"][-1] == 99
        places = zip(found["tokens"][:-1], found["text_offset"], strict=False)
        text = "prompt é 禁" * 30
        whole = [(token, at) for token, at in places if not token.startswith("bytes:")]
        assert all(text[at : at + len(token)] == token for token, at in whole)


def test_a_part_of_a_character_is_shown_as_bytes() -> None:
    """As OpenAI does, and not as letters, which could be taken for text."""
    tokenizer = byte_tokenizer()
    ids, surfaces = tokenizer("é禁a\ufffd").input_ids, surfaces_of(bare(tokenizer))
    scores = [TokenScore(id, 0, -1.0, [(id, -1.0)]) for id in ids]
    chat = protocol.parse_chat(
        {"messages": [{"role": "user", "content": "x"}], "logprobs": True}, "m", LIMITS
    )
    text = protocol.parse_completion({"prompt": "x", "logprobs": 1}, "m", LIMITS)
    made = Form(chat, "m", tokenizer, surfaces).chunk(0, Choice("", scores))
    entries = made["choices"][0]["logprobs"]["content"]
    assert bytes(byte for each in entries for byte in each["bytes"]).decode() == "é禁a\ufffd"
    assert entries == [
        {**each["top_logprobs"][0], "top_logprobs": each["top_logprobs"]} for each in entries
    ]
    found = Form(text, "m", tokenizer, surfaces).chunk(0, Choice("", scores))
    columns, num_parts = found["choices"][0]["logprobs"], 0
    for entry, token, top in zip(entries, columns["tokens"], columns["top_logprobs"], strict=True):
        shown, own = entry["token"], bytes(entry["bytes"])
        assert list(top) == [token]
        if own.decode(errors="ignore").encode() == own:
            assert shown == token == own.decode()
            continue
        num_parts += 1
        assert token == f"bytes:{shown}"
        assert shown.encode().decode("unicode_escape").encode("latin-1") == own
        assert shown.startswith("\\x")
    assert num_parts >= 2
    unknown = Form(chat, "m", tokenizer, None).chunk(0, Choice("", scores))
    assert None in [each["bytes"] for each in unknown["choices"][0]["logprobs"]["content"]]


def test_more_log_probabilities_than_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tiny(GLA))
    monkeypatch.setattr(prepare, "MOST_SCORES", 3 * 2 * (10 + 12))
    asked = {"prompt": [5] * 10, "logprobs": 2, "n": 2}
    assert len(bench.jobs(**asked, echo=True)) == 1
    bench.jobs(**{**asked, "prompt": [5] * 100})
    with pytest.raises(protocol.BadRequest, match="could have more than 132 log prob"):
        bench.jobs(**{**asked, "prompt": [5] * 11}, echo=True)
    with pytest.raises(protocol.BadRequest, match="could have more than 132 log prob"):
        bench.jobs(**{**asked, "prompt": [[5], [5]]})


def test_a_slow_reader_takes_no_memory() -> None:
    async def read() -> None:
        inbox = Inbox()
        for number in range(inboxes.MOST_EVENTS + 10):
            inbox.deliver(Failure(500, f"{number}"))
        await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        assert await inbox.get() == Failure(503, "the answer is read too slowly")

    asyncio.run(read())


def test_connections_do_not_wait_for_ever(tmp_path: Path) -> None:
    """One that sends half a head or body, or nothing, or reads nothing, is cut; its row is free."""
    tokenizer = copy.deepcopy(byte_tokenizer())
    tiny(GLA).save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    hurried = tmp_path / "serve.py"
    hurried.write_text(
        "import runpy, socket\n"
        "from flame_composer.serve import app, connections\n"
        "connections.HEAD_SECONDS = connections.READ_SECONDS = app.BODY_SECONDS = 1\n"
        "bind = connections.bind\n"
        "def bind_small(*address):  # else megabytes are sent before a reader is found slow\n"
        "    listener = bind(*address)\n"
        "    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)\n"
        "    return listener\n"
        "connections.bind = bind_small\n"
        'runpy.run_path("recipes/serve.py", run_name="__main__")\n'
    )
    server = Server(tmp_path / "hf", script=hurried)
    halves = (b"", b"GET /health HTTP/1.1\r\nHost: 127.", b"\x16\x03\x01")
    for connection in [server.raw(sent) for sent in halves]:
        connection.settimeout(60)
        assert connection.recv(1000)[:12] in (b"", b"HTTP/1.1 400")
        connection.close()
    body = server.raw(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b'Content-Length: 1000\r\n\r\n{"prompt"'
    )
    body.settimeout(60)
    assert body.recv(12) == b"HTTP/1.1 408"
    body.close()
    # One that goes on asking is not cut, however long ago its first head came
    asking = http.client.HTTPConnection(*server.address, timeout=60)
    asking.auto_open = 0
    asking.connect()
    for _ in range(12):
        asking.request("GET", "/health")
        assert asking.getresponse().read() == b'{"status":"ok"}'
        time.sleep(0.2)
    asking.close()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(server.address)
    asked = {"prompt": "x", "n": 8, "max_tokens": 2000, "logprobs": 20, "stream": True}
    slow.sendall(server.request({**asked, "logit_bias": {"0": -100}}))
    server.wait_for("flame_rows", 8)
    server.wait_for("flame_rows", 0)
    assert server.gauge("flame_written_tokens_total") < 16000, "it was cut"
    slow.close()
    assert server.end().returncode == 0
