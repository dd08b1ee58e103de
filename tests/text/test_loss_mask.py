"""Tokens of conversations, and which of them carry loss."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from flame_composer.text.chat import ChatTemplate, Message, load_template, require_stop
from flame_composer.text.dataset_info import read_registry
from flame_composer.text.examples import LeftOut, conversation_of
from flame_composer.text.jsonl import InvalidRecord
from flame_composer.text.loss_mask import Masker, Tokens
from flame_composer.text.surfaces import surfaces_of
from flame_composer.text.tokenizer import bare, build_encoder, load_tokenizer
from tests.data_fixtures import byte_tokenizer

RECORDED = Path(__file__).parent.parent / "fixtures/llama_factory"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# Our templates for theirs, and the default system prompt
TEMPLATES = {
    "alpaca": ("alpaca", None),
    "chatml": ("chatml", None),
    "qwen": ("chatml", QWEN_SYSTEM),
    "qwen3_nothink": ("chatml", None),
}
TRAIN_ON = {"neither": "all", "mask_history": "last", "train_on_prompt": "prompt_too"}
# Tokenizers for which line breaks at the end of a piece of text are other tokens than those in the
# middle of the whole text. LLaMA-Factory encodes the pieces of `alpaca`, we encode the whole.
BROKEN_BY_PIECES = ("endoftext", "im_end", "im_end_pad", "spaces")

# What we make of odd examples where it is not the same. docs/migrating-from-llama-factory.md says
# it in words.
LEFT_OUT = {
    ("alpaca_odd", 4): "empty_answer",
    ("alpaca_odd", 5): "special_token",
    ("alpaca_odd", 6): "special_token",
    ("alpaca_odd", 7): "special_token",
    ("alpaca_odd", 8): "empty_answer",
    ("alpaca_odd", 9): "empty_prompt",
    ("alpaca_odd", 20): "empty_answer",
    ("alpaca_odd", 21): "empty_prompt",
    ("sharegpt_odd", 11): "empty_answer",
    ("sharegpt_odd", 12): "empty_answer",
    ("sharegpt_odd", 13): "empty_prompt",
    ("sharegpt_odd", 16): "special_token",
    ("sharegpt_odd", 17): "roles",
    ("tools", 0): "roles",
}
OTHER_TOKENS = {
    ("alpaca_odd", 0): "an answer that begins with a line break: they encode it by itself",
    ("alpaca_odd", 19): "their placeholder {{idx}} within a prompt",
    ("sharegpt_odd", 14): "an answer that begins with a line break: they encode it by itself",
}
KEPT = {
    ("no_input_column", 0): "a missing column of inputs stops their run",
    ("no_system_tag", 0): "tags without a system_tag: they leave out what has a system message",
}


@functools.cache
def recorded() -> dict[str, Any]:
    return json.loads((RECORDED / "recorded.json").read_text())


@functools.cache
def masker_for(template: str, tokenizer_name: str, train_on: str) -> Masker:
    tokenizer = load_tokenizer(str(RECORDED / "tokenizers" / tokenizer_name))
    name, system = TEMPLATES[template]
    found = load_template(name, tokenizer, default_system=system)
    return build_masker(found, tokenizer, train_on)


def build_masker(template: ChatTemplate, tokenizer: Any, train_on: Any = "all") -> Masker:
    stop = require_stop(template, tokenizer, "a template")
    encode = build_encoder(bare(tokenizer), add_bos=False, add_eos=False)
    return Masker(template, bare(tokenizer), encode, stop=stop, train_on=train_on)


def ours(case: dict[str, Any], form: Any, train_on: str) -> Tokens | str:
    """Our tokens of a recorded case, or the reason why it is left out."""
    masker = masker_for(case["template"], case["tokenizer"], train_on)
    row = recorded()["datasets"][case["dataset"]]["rows"][case["row"]]
    try:
        conversation = conversation_of(row, form)
    except LeftOut as problem:
        return problem.reason
    except InvalidRecord:
        return "unreadable"
    if any(masker.special.search(message.content) for message in conversation):
        return "special_token"
    (found,) = masker.tokens_of([conversation])
    return found.reason if isinstance(found, LeftOut) else found


def forms_of(folder: Path) -> dict[str, Any]:
    """The forms of the recorded datasets, read from a registry, of those that we offer."""
    infos = {name: each["info"] for name, each in recorded()["datasets"].items()}
    for info in infos.values():
        if "columns" in info:
            info["columns"].pop("tools", None)  # refused by name; see test_registry.py
    (folder / "dataset_info.json").write_text(json.dumps(infos))
    names = [name for name in infos if name != "openai"]
    return {each.name: each.form for each in read_registry(str(folder), names)}


def test_tokens_and_labels_are_those_of_llama_factory(tmp_path: Path) -> None:
    """519 recorded examples: equal, or different on purpose as the tables above say."""
    forms = forms_of(tmp_path)
    seen: Counter[str] = Counter()
    for case in recorded()["cases"]:
        if case["template"] not in TEMPLATES or case["dataset"] not in forms:
            continue
        if case["tokenizer"] == "spaces" and case["template"] != "alpaca":
            continue  # lacks the template's tokens: refused, see test_chat.py
        place = case["dataset"], case["row"]
        for theirs, train_on in TRAIN_ON.items():
            found = ours(case, forms[case["dataset"]], train_on)
            if place in LEFT_OUT and not isinstance(found, Tokens):
                assert found == LEFT_OUT[place], place
                seen["left out"] += 1
            elif "input_ids" not in case:
                assert not isinstance(found, Tokens) or place in KEPT, (place, case)
                seen["kept" if isinstance(found, Tokens) else "left out by both"] += 1
            else:
                assert isinstance(found, Tokens), (place, found)
                seen[compare(found, case, theirs, place)] += 1
    assert seen["equal"] > 700
    assert seen["the same text"] > 200
    assert seen.keys() == {
        *("equal", "the same text", "other tokens", "left out", "left out by both", "kept")
    }


def compare(found: Tokens, case: dict[str, Any], theirs: str, place: tuple[str, int]) -> str:
    ids, has_loss = case["input_ids"], [False] * len(case["input_ids"])
    for begin, end in case["trained"][theirs]:
        has_loss[begin:end] = [True] * (end - begin)
    has_loss[0] = False  # no position predicts the first token
    if found.ids.tolist() == ids:
        assert found.has_loss.tolist() == has_loss, place
        return "equal"
    if place in OTHER_TOKENS:
        return "other tokens"
    assert case["template"] == "alpaca", place
    assert case["tokenizer"] in BROKEN_BY_PIECES, place
    tokenizer = load_tokenizer(str(RECORDED / "tokenizers" / case["tokenizer"]))
    trained = [id for id, loss in zip(ids, has_loss, strict=True) if loss]
    for mine, other in ((found.ids, ids), (found.ids[found.has_loss], trained)):
        texts = [
            tokenizer.decode(each, clean_up_tokenization_spaces=False) for each in (mine, other)
        ]
        if case["tokenizer"] == "spaces":  # each piece gets a space put before it
            texts = [text.replace(" ", "") for text in texts]
        assert texts[0] == texts[1], place
    return "the same text"


MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{{ '\n' }}{% else %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
texts = st.text(
    st.characters(codec="utf-8", exclude_characters="\ue000\ue001"), min_size=1, max_size=40
).filter(lambda text: text.strip() and "<|" not in text and "</" not in text)


@pytest.mark.parametrize("name", ["endoftext", "im_end", "qwen2"])
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), system=st.none() | texts)
def test_masks_equal_those_of_hugging_face(
    name: str, turns: list[tuple[str, str]], system: str | None
) -> None:
    """Of a template with generation marks; byte tokens of a character that is cut are the last."""
    tokenizer = load_tokenizer(str(RECORDED / "tokenizers" / name))
    tokenizer.chat_template = MARKED
    messages = [Message("system", system)] if system else []
    for prompt, answer in turns:
        messages += [Message("user", prompt), Message("assistant", answer)]
    theirs = tokenizer.apply_chat_template(
        [{"role": each.role, "content": each.content} for each in messages],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    (found,) = build_masker(load_template("tokenizer", tokenizer), tokenizer).tokens_of([messages])
    assert isinstance(found, Tokens)
    assert found.ids.tolist() == theirs["input_ids"]
    assert found.has_loss.astype(int).tolist() == theirs["assistant_masks"]


UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "One?"),
    Message("assistant", "Two 数据."),
    Message("user", "Three?"),
    Message("assistant", "Four 🔥"),
)


@pytest.mark.parametrize("train_on", ["all", "last", "prompt_too"])
@pytest.mark.parametrize("losses", [(True, True), (True, False), (False, True)])
def test_answers_are_found_without_marks(train_on: str, losses: tuple[bool, bool]) -> None:
    """What follows a generation prompt, up to where the next turn begins, is an answer."""
    tokenizer = load_tokenizer(str(RECORDED / "tokenizers/qwen2"))
    conversation = list(CONVERSATION)
    for place, loss in zip((2, 4), losses, strict=True):
        conversation[place] = conversation[place]._replace(loss=loss)
    found = {}
    for kind, source in (("marked", MARKED), ("unmarked", UNMARKED)):
        tokenizer.chat_template = source
        masker = build_masker(load_template("tokenizer", tokenizer), tokenizer, train_on)
        (found[kind],) = masker.tokens_of([conversation])
    if train_on == "last" and not losses[1]:
        assert all(
            isinstance(each, LeftOut) and each.reason == "no_loss" for each in found.values()
        )
        return
    marked, unmarked = found["marked"], found["unmarked"]
    assert isinstance(marked, Tokens)
    assert isinstance(unmarked, Tokens)
    assert np.array_equal(marked.ids, unmarked.ids)
    # Without marks, the line break after <|im_end|> belongs to the answer.
    trained = [tokenizer.decode(each.ids[each.has_loss]) for each in (marked, unmarked)]
    answers = ["Two 数据.<|im_end|>", "Four 🔥<|im_end|>"]
    wanted = [
        answer
        for answer, loss, is_last in zip(answers, losses, (False, True), strict=True)
        if loss and (is_last or train_on != "last")
    ]
    if train_on != "prompt_too":
        assert trained == ["".join(wanted), "".join(f"{answer}\n" for answer in wanted)]
    else:
        rest = [answer for answer in answers if answer not in wanted]
        whole = tokenizer.decode(marked.ids[1:])
        for text, end in zip(trained, ("", "\n"), strict=True):
            expected = whole
            for answer in rest:
                expected = expected.replace(answer + end, "")
            assert text == expected


def test_a_prompt_whose_tokens_change_where_the_answer_follows_is_left_out() -> None:
    tokenizer = load_tokenizer(str(RECORDED / "tokenizers/qwen2"))
    tokenizer.chat_template = UNMARKED
    masker = build_masker(load_template("tokenizer", tokenizer), tokenizer)
    turns = [Message("user", "One?"), Message("assistant", "\n\nTwo.")]
    (found,) = masker.tokens_of([turns])
    assert isinstance(found, LeftOut)
    assert found.reason == "seam"


def test_a_template_that_forgets_the_end_of_earlier_answers_is_noticed() -> None:
    tokenizer = load_tokenizer(str(RECORDED / "tokenizers/qwen2"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    )
    template = load_template("tokenizer", tokenizer)
    (found,) = build_masker(template, tokenizer).tokens_of([CONVERSATION])
    assert isinstance(found, LeftOut)
    assert found.reason == "no_end"
    (found,) = build_masker(template, tokenizer, "last").tokens_of([CONVERSATION])
    assert isinstance(found, Tokens)


@pytest.mark.parametrize("name", ["endoftext", "im_end", "im_end_pad", "qwen2", "spaces"])
@pytest.mark.parametrize("template", ["alpaca", "chatml"])
def test_the_end_of_every_trained_answer_carries_loss(name: str, template: str) -> None:
    """Also where padding is eos: what carries loss is told by place, not by token."""
    if name == "spaces" and template == "chatml":
        return  # has no <|im_end|>
    tokenizer = load_tokenizer(str(RECORDED / "tokenizers" / name))
    masker = build_masker(load_template(template, tokenizer), tokenizer)
    (found,) = masker.tokens_of([CONVERSATION])
    assert isinstance(found, Tokens)
    ends = np.flatnonzero(found.ids == masker.stop)
    trained_ends = ends[found.has_loss[ends]]
    assert len(trained_ends) == 2
    for end, answer in zip(trained_ends, ("Two 数据.", "Four 🔥"), strict=True):
        assert tokenizer.decode(found.ids[:end]).endswith(answer)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_the_bytes_of_tokens_are_those_of_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    surfaces = surfaces_of(bare(tokenizer))
    assert surfaces is not None
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(surfaces[id] for id in ids) == text.encode()


@pytest.mark.parametrize("name", ["endoftext", "spaces"])
@settings(max_examples=50, deadline=None)
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_places_by_bytes_and_by_offsets_are_the_same(
    name: str, turns: list[tuple[str, str]]
) -> None:
    """The slow way, for tokenizers that change a text, finds the same answers."""
    tokenizer = load_tokenizer(str(RECORDED / "tokenizers" / name))
    masker = build_masker(load_template("alpaca", tokenizer), tokenizer)
    slow = build_masker(load_template("alpaca", tokenizer), tokenizer)
    slow.surfaces = None
    messages = [
        message
        for prompt, answer in turns
        for message in (Message("user", prompt), Message("assistant", answer))
    ]
    (one,), (other,) = masker.tokens_of([messages]), slow.tokens_of([messages])
    assert isinstance(one, Tokens)
    assert isinstance(other, Tokens)
    text = masker.template.render(messages).text
    assert list(masker._places([text], [one.ids])) != [None], "the fast way is tried"
    assert np.array_equal(one.has_loss, other.has_loss)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("m.content[:30] + eos_token", "template"),
        ("m.content|upper if loop.index > 2 else m.content + eos_token", "template"),
        ("eos_token + m.content if 'One.' in m.content else m.content + eos_token", "no_end"),
        ("m.content.split('</think>')[-1] + eos_token", None),
        ("m.content|trim + eos_token", None),
    ],
)
def test_answers_are_whole_up_to_their_end(written: str, reason: str | None) -> None:
    """A template that only writes the short answers whole is found out by the example."""
    tokenizer = byte_tokenizer()
    body = f"{{% generation %}}{{{{ {written} }}}}{{% endgeneration %}}"
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        f"{body}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
    )
    masker = build_masker(ChatTemplate(source, {"eos_token": "<|endoftext|>"}), tokenizer)
    answers = "<think>One.</think>It is one.", " A longer answer than some others are.\nTwo "
    turns = [
        Message(role, content)
        for answer in answers
        for role, content in (("user", "How many?"), ("assistant", answer))
    ]
    (found,) = masker.tokens_of([turns])
    assert (found.reason if isinstance(found, LeftOut) else None) == reason


@pytest.mark.parametrize(
    ("special", "normalized", "normalizer", "text"),
    [
        (False, False, None, "<|end|>"),
        (False, True, None, "<|end|>"),
        (True, True, normalizers.Lowercase(), "<|END|>"),
        (True, True, normalizers.NFKC(), "<|ｅｎｄ|>"),
        (True, True, normalizers.Replace("-", ""), "<|e-nd|>"),
    ],
)
def test_an_answer_cannot_end_in_its_middle(
    special: bool, normalized: bool, normalizer: Any, text: str
) -> None:
    """An end that is no special token, or that the tokenizer finds in other letters, is found."""
    backend = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    if normalizer is not None:
        backend.normalizer = normalizer
    token = AddedToken("<|end|>", special=special, normalized=normalized)
    (backend.add_special_tokens if special else backend.add_tokens)([token])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}: {% endif %}{% endfor %}"
    )
    masker = build_masker(ChatTemplate(source, {}), tokenizer)
    ids = tokenizer(f"a {text} b").input_ids
    assert masker.stop in ids
    assert masker.special.search(f"a {text} b") is not None
    assert masker.special.search("a <|e|> b") is None
