"""Generation: what padding must not change, a state that does not grow, text as it comes, and
the sessions.
"""

from __future__ import annotations

import copy
import io
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flame_composer.config.load import load
from flame_composer.config.use import GenerateConfig
from flame_composer.errors import ConfigError, DataError
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.use import generate
from flame_composer.use.generate import (
    Pieces,
    build_sampling,
    continue_prompts,
    encode,
    pad_left,
    read_prompts,
)
from tests.conftest import GLA, LLAMA
from tests.data_fixtures import TEXTS, byte_tokenizer, llama_tokenizer, words
from tests.runs import ROOT, Script, check, run_script

# From one token to more than two chunks of 64, so that every way of reading a prompt is taken.
PROMPTS = ["def", words(3, 1), words(40, 2), "", words(90, 3), "x"]


def tiny(architecture: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = build_hf_config({**architecture, "initializer_range": 0.2}, byte_tokenizer(), 512)
    return build_model(config).eval()


def sampling(**options: Any) -> Any:
    return build_sampling(
        GenerateConfig(model="m", **{"max_new_tokens": 20, "temperature": 0.0, **options}),
        byte_tokenizer(),
    )


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("architecture", [GLA, LLAMA, {**GLA, "use_short_conv": True}])
def test_a_batch_is_what_each_prompt_gives_alone(
    architecture: dict[str, Any], penalty: float
) -> None:
    model, tokenizer = tiny(architecture), byte_tokenizer()
    options: dict[str, Any] = {"repetition_penalty": penalty}
    together = continue_prompts(model, tokenizer, PROMPTS, sampling(), **options)
    shown: list[str] = []
    alone = [
        continue_prompts(model, tokenizer, [prompt], sampling(), show=shown.append, **options)[0]
        for prompt in PROMPTS
    ]
    assert together == alone
    assert "".join(shown) == "".join(alone)
    assert len(set(together)) == len(PROMPTS), (
        "they say something about padding only if they differ"
    )


def test_greedy_is_the_likeliest_token_each_time() -> None:
    model, tokenizer = tiny(GLA), byte_tokenizer()
    ids = tokenizer(PROMPTS[2], add_special_tokens=False).input_ids
    start = len(ids)
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert 0 not in ids[start:], "no text ends here"
    assert continue_prompts(model, tokenizer, [PROMPTS[2]], sampling()) == [
        tokenizer.decode(ids[start:])
    ]


def test_the_state_does_not_grow() -> None:
    model = tiny(GLA)

    def state_size(length: int) -> int:
        ids = torch.arange(length)[None] % 300
        options = {
            "attention_mask": torch.ones_like(ids),
            "generation_config": sampling(max_new_tokens=2),
        }
        state = model.generate(ids, **options, return_dict_in_generate=True).past_key_values
        return sum(layer.state["recurrent_state"].numel() for layer in state.layers)

    assert state_size(16) == state_size(300) == 2 * 8 * 16  # heads x keys x values


def test_seed_and_sampling() -> None:
    model, tokenizer = tiny(GLA), byte_tokenizer()

    def written(seed: int, **options: Any) -> list[str]:
        torch.manual_seed(seed)
        return continue_prompts(
            model, tokenizer, PROMPTS[:2], sampling(**{"temperature": 1.0, **options})
        )

    assert written(1) == written(1) != written(2)
    assert (
        written(1, top_k=1)
        == written(2, top_p=1e-6)
        == continue_prompts(model, tokenizer, PROMPTS[:2], sampling())
    )


def test_stop_ends_with_the_text_that_was_named() -> None:
    model, tokenizer = tiny(GLA), byte_tokenizer()
    (whole,) = continue_prompts(model, tokenizer, [PROMPTS[1]], sampling())
    stop = whole[4:6]
    (cut,) = continue_prompts(
        model, tokenizer, [PROMPTS[1]], sampling(), stop=["never there", "\u4e2d", stop]
    )
    assert whole.startswith(cut)
    assert stop in cut
    assert len(cut) < len(whole)
    others = continue_prompts(model, tokenizer, [PROMPTS[1], PROMPTS[2]], sampling(), stop=[stop])
    assert others[0] == cut


@pytest.mark.parametrize(
    ("text", "stop", "length"),
    [
        ("a\u4e2db", "\u4e2d", 4),
        ("abc", "bc", 3),
        ("abc", "pqab", 2),
        ("abc", "q", None),
        ("qabc", "q", 1),
    ],
)
def test_a_stop_text_is_found_in_whatever_tokens_it_comes(
    text: str, stop: str, length: int | None
) -> None:
    """After a prompt that ends in q, a text of one token a byte: after how many of them it is
    complete.
    """
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.backend_tokenizer.model.dropout = 1.0  # no merges
    prompt, ids = (tokenizer(part, add_special_tokens=False).input_ids for part in ("pq", text))
    assert len(ids) == len(text.encode())
    criterion = generate.StopTexts(tokenizer, [prompt, prompt], ["never there", stop])
    ends = [
        number
        for number, token in enumerate(ids, 1)
        if criterion(torch.tensor([[token], [prompt[0]]]), None)[0]
    ]
    assert ends[:1] == ([] if length is None else [length])
    assert not criterion(torch.tensor([[ids[-1]], [prompt[0]]]), None)[1]


def test_prompts_as_tokens() -> None:
    ids, mask = pad_left(encode(byte_tokenizer(), ["", "<|endoftext|>q", "q9"]), 0)
    pair = byte_tokenizer()("q9").input_ids
    assert len(pair) == 2
    assert ids.tolist() == [[0, 0], [0, pair[0]], pair]
    assert mask.tolist() == [[0, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize("make", [byte_tokenizer, llama_tokenizer])
def test_pieces_are_the_text(make: Any) -> None:
    """Spaces after a line's end, and characters of several tokens, which come whole or not yet."""
    tokenizer = make()
    for text in TEXTS:
        for cut in (0, 3, len(text) // 2):
            prompt = tokenizer(text[:cut], add_special_tokens=False).input_ids
            ids = tokenizer(text, add_special_tokens=False).input_ids
            if not prompt or ids[: len(prompt)] != prompt:
                continue
            pieces = Pieces(tokenizer, prompt)
            added = "".join(map(pieces.add, ids[len(prompt) :]))
            assert tokenizer.decode(prompt, skip_special_tokens=True) + added == tokenizer.decode(
                ids, skip_special_tokens=True
            )


def test_prompts_of_a_file(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_bytes("  indented\n\n \t\nzwei\u2028drei\r\nlast".encode())
    assert read_prompts(str(text)) == ["  indented", "zwei\u2028drei", "last"]
    lines.write_text('{"prompt": "a\\nb"}\n\n{"prompt": "", "id": 1}\n')
    assert read_prompts(str(lines)) == ["a\nb", ""]
    for file, prompts in ((text, ["  indented", "zwei\u2028drei", "last"]), (lines, ["a\nb", ""])):
        file.write_bytes("\ufeff".encode() + file.read_bytes().replace(b"\n", b"\r\n"))
        assert read_prompts(str(file)) == prompts, "as Windows writes it"
    for name, content, message in (
        ("none.txt", None, "cannot be read: No such file or directory"),
        ("b.txt", b"\xff\n", "cannot be read: is not UTF-8"),
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("no.jsonl", b'{"prompt": "a"}\nb\n', 'line 2 must be JSON like {"prompt"'),
        ("key.jsonl", b'{"text": "a"}\n', 'line 1 must be JSON like {"prompt"'),
        ("list.jsonl", b"[]\n", "line 1 must be JSON"),
        ("number.jsonl", b'{"prompt": 1}\n', "line 1: prompt must be a string"),
        (
            "deep.jsonl",
            b"[" * 200_000 + b"]" * 200_000 + b"\n",
            'line 1 must be JSON like {"prompt"',
        ),
        (
            "half.jsonl",
            b'{"prompt": "a\\ud83d"}\n',
            "line 1: prompt holds half a surrogate pair, which is not valid text",
        ),
    ):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read_prompts(str(file))
        assert str(caught.value).startswith(f"prompts={file}: {message}")


def test_a_file_and_a_session_are_continued_as_each_prompt_is(
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is piped in, line by line, is a session; there an empty line is continued from
    nothing.
    """
    model = (
        "recipes/generate.py",
        f"model={undisturbed / 'checkpoints'}",
        "max_new_tokens=8",
        "temperature=0",
    )
    file = tmp_path / "prompts.txt"
    file.write_text("kat loman: ra\n\nmiro puvel\nsit\n")
    process = check(run_script(*model, f"prompts={file}", "batch_size=2"))
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["kat loman: ra", "miro puvel", "sit"]
    lines = [f"{row['prompt']}{row['completion']}\n" for row in rows]
    assert check(run_script(*model, "prompt=kat loman: ra")).stdout == lines[0]

    monkeypatch.setattr(sys, "argv", list(model))
    monkeypatch.setattr(sys, "stdin", io.StringIO("kat loman: ra\n\nsit"))
    on_broken_pipe = signal.getsignal(signal.SIGPIPE)
    try:
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(ROOT / "recipes/generate.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGPIPE, on_broken_pipe)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, (
        "Composer's own would end the session with an answer"
    )
    shown, errors = capsys.readouterr()
    assert shown.startswith(lines[0])
    assert shown.endswith(lines[2])
    assert len(shown) > len(lines[0] + lines[2]) + 1
    assert errors == "texts begin with nothing, as documents in training did\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_piped_in_is_text(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    def piped(content: bytes) -> list[str]:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors=errors)
        )
        return list(generate.asked())

    assert piped("\ufeffkät\r\n\n\ufefflast".encode()) == ["kät", "", "\ufefflast"]
    with pytest.raises(
        ConfigError, match=r"^standard input: line 1 or one soon after it is not UTF-8$"
    ):
        piped(b"k\xe4t\n")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(
        ConfigError,
        match=r"^there is no standard input to read prompts from; set prompt=... or prompts=FILE$",
    ):
        list(generate.asked())


def test_a_prompt_longer_than_the_model_was_trained_on(
    caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    model, tokenizer = tiny(GLA), byte_tokenizer()
    continue_prompts(model, tokenizer, ["x" * 512], sampling(max_new_tokens=1))
    assert caplog.messages == []
    (written,) = continue_prompts(model, tokenizer, [words(400, 1)], sampling(max_new_tokens=2))
    assert written
    (message,) = caplog.messages
    assert message.endswith(
        "tokens, but the model was trained on rows of 512; the text it writes may be worse"
    )
    assert capfd.readouterr().err == ""


def test_a_file_is_continued_as_the_keys_say(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, float, list[str]]] = []
    proceed, on_broken_pipe = generate.continue_prompts, signal.getsignal(signal.SIGPIPE)

    def note(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[str]:
        asked.append((len(prompts), options["repetition_penalty"], options["stop"]))
        return proceed(model, tokenizer, prompts, **options)

    monkeypatch.setattr(generate, "continue_prompts", note)
    (tmp_path / "prompts.txt").write_text("kat\nloman\nra\n")
    keys = (
        f"prompts={tmp_path / 'prompts.txt'}",
        "batch_size=2",
        "repetition_penalty=1.5",
        "max_new_tokens=2",
        "stop=[x]",
    )
    try:
        main = runpy.run_path(str(ROOT / "recipes/generate.py"))["main"]
        main(load(GenerateConfig, [f"model={undisturbed / 'checkpoints'}", *keys]))
    finally:
        signal.signal(signal.SIGPIPE, on_broken_pipe)
    assert asked == [(2, 1.5, ["x"]), (1, 1.5, ["x"])]


def test_ctrl_c_ends_it_quietly(undisturbed: Path) -> None:
    arguments = (
        f"model={undisturbed / 'checkpoints'}",
        "prompt=kat",
        "max_new_tokens=1000000",
        "temperature=0",
    )
    script = Script("recipes/generate.py", *arguments)
    while len(script.read("out")) < 10:
        assert script.process.is_alive(), script.read("err")
        time.sleep(0.02)
    assert script.process.pid is not None
    os.kill(script.process.pid, signal.SIGINT)
    process = script.wait()
    assert process.returncode == 130
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_whose_scores_are_no_numbers_says_so(temperature: float, value: float) -> None:
    model: Any = build_model(build_hf_config(LLAMA, byte_tokenizer(), 64)).eval()
    with torch.no_grad():
        model.lm_head.weight.fill_(value)
    sampling = build_sampling(
        load(GenerateConfig, ["model=x", f"temperature={temperature}"]), byte_tokenizer()
    )
    with pytest.raises(
        DataError,
        match=r"^the model's scores for the next token are not numbers: .*; take an earlier check",
    ):
        continue_prompts(model, byte_tokenizer(), ["a"], sampling)


def test_nothing_is_left_of_the_prompt_in_a_streamed_piece() -> None:
    shown: list[str] = []
    pieces = Pieces(byte_tokenizer(), byte_tokenizer()("def").input_ids)
    streamer = generate.Streamer(pieces, shown.append)
    streamer.put(torch.tensor([byte_tokenizer()("def").input_ids]))
    for token in byte_tokenizer()(" é").input_ids:
        streamer.put(torch.tensor([token]))
    assert "".join(shown) == " é"
