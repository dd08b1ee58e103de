"""Chat templates: what they make of conversations, and that they are held in."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from flame_composer.errors import ConfigError
from flame_composer.text.chat import (
    ALPACA_SYSTEM,
    BUILT_IN,
    CHATML,
    ChatTemplate,
    Message,
    Refusal,
    TemplateRefuses,
    load_template,
    render_for_answer,
    require_stop,
    stop_ids,
    with_template,
)
from flame_composer.text.tokenizer import load_tokenizer
from flame_composer.upstream import jinja
from tests.data_fixtures import byte_tokenizer

RECORDED = Path(__file__).parent.parent / "fixtures/llama_factory/tokenizers"
QUESTION = (Message("user", "One?"),)
ANSWERED = (*QUESTION, Message("assistant", "Two."))
LOOPS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.fixture(scope="module")
def qwen() -> PreTrainedTokenizerFast:
    """A tokenizer with the tokens of every template here."""
    return load_tokenizer(str(RECORDED / "qwen2"))


def copied(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


def of_hugging_face(
    tokenizer: PreTrainedTokenizerFast, source: str, messages: list[Message], prompt: bool
) -> Any:
    return copied(tokenizer, source).apply_chat_template(
        [{"role": each.role, "content": each.content} for each in messages],
        tokenize=False,
        add_generation_prompt=prompt,
    )


texts = st.text(st.characters(codec="utf-8", exclude_characters="\ue000\ue001"), max_size=40)


@pytest.mark.parametrize("default_system", [None, "", 'Say "it\'s {{ 7 * 7 }}"\n数据 \\n'])
@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
    system=st.none() | texts,
    asks=st.booleans(),
)
def test_templates_are_rendered_as_transformers_does(
    qwen: PreTrainedTokenizerFast,
    name: str,
    default_system: str | None,
    turns: list[tuple[str, str]],
    system: str | None,
    asks: bool,
) -> None:
    template = load_template(name, qwen, default_system=default_system)
    messages = [] if system is None else [Message("system", system)]
    for prompt, answer in turns:
        messages += [Message("user", prompt), Message("assistant", answer)]
    if asks:
        del messages[-1]
    found = template.render(messages, add_generation_prompt=asks)
    assert found.text == of_hugging_face(qwen, template.source, messages, asks)
    answers = [each.content for each in messages if each.role == "assistant"]
    end = "<|im_end|>\n" if name == "chatml" else f"{qwen.eos_token}\n\n"
    assert [found.text[begin:last] for begin, last in found.spans] == [
        answer + end for answer in answers
    ]
    if system is None and default_system:
        assert default_system in found.text


def test_the_texts_of_the_templates(qwen: PreTrainedTokenizerFast) -> None:
    """Letter by letter."""
    system = (Message("system", "S"), *ANSWERED)
    for name, messages, more, text in (
        (
            "chatml",
            system,
            {},
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
            "<|im_start|>assistant\nTwo.<|im_end|>\n",
        ),
        (
            "chatml",
            ANSWERED,
            {},
            "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n",
        ),
        (
            "alpaca",
            ANSWERED,
            {},
            f"{ALPACA_SYSTEM}### Instruction:\nOne?\n\n### Response:\nTwo.<|endoftext|>\n\n",
        ),
        (
            "alpaca",
            system,
            {"default_system": "never"},
            "S### Instruction:\nOne?\n\n### Response:\nTwo.<|endoftext|>\n\n",
        ),
        (
            "alpaca",
            QUESTION,
            {"default_system": "", "add_bos": True},
            "<|im_start|>### Instruction:\nOne?\n\n### Response:\n",
        ),
    ):
        tokenizer = copied(qwen, None)
        tokenizer.bos_token = "<|im_start|>"
        tokenizer.eos_token = "<|endoftext|>"
        template = load_template(name, tokenizer, **more)  # type: ignore[arg-type]
        assert template.render(messages).text == text


def test_a_conversation_cannot_hold_the_marks_of_answers(qwen: PreTrainedTokenizerFast) -> None:
    """They are random: a text with others like them is no answer."""
    template = load_template("chatml", qwen)
    content = "\ue0000123456789abcdef evil \ue0010123456789abcdef"
    found = template.render([Message("user", content), Message("assistant", content)])
    assert found.text.count(content) == 2
    ((begin, end),) = found.spans
    assert found.text[begin:end] == f"{content}<|im_end|>\n"


def test_a_template_can_be_sent_to_another_process(qwen: PreTrainedTokenizerFast) -> None:
    template = load_template("alpaca", qwen)
    received = pickle.loads(pickle.dumps(template))  # noqa: S301
    assert received.render(ANSWERED) == template.render(ANSWERED)


HOSTILE = {
    "loops": (LOOPS, "a text takes more than 0.3 seconds; have it loop over less"),
    "a long range": (
        "{% for a in range(10 ** 12) %}{% endfor %}",
        "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)",
    ),
    "a long text": ("{{ 'x' * 10 ** 12 }}", "a text takes more than 256 MiB of memory"),
    "a wide text": ("{{ 'x' | center(10 ** 11) }}", "a text takes more than 256 MiB of memory"),
    "a wide number": ("{{ '%100000000000d' % 1 }}", "a text takes more than 256 MiB of memory"),
    "a text that doubles": (DOUBLED, "a text takes more than 256 MiB of memory"),
    "a text for the tokenizer": ("{{ 'x' * 10 ** 8 }}", "a text of 100,000,000 characters"),
    "a power": ("{{ 10 ** (10 ** 10) }}", "** makes too large a number"),
    "powers": ("{{ (10 ** 300) ** 300 }}", "** makes too large a number"),
    "squares": (
        "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "* makes too large a number",
    ),
    "a class": ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of 'str' object is unsafe"),
    "globals": (
        "{{ raise_exception.__globals__['os'] }}",
        "attribute '__globals__' of 'function' object is unsafe",
    ),
    "a constructor": (
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "attribute '__init__' of 'type' object is unsafe",
    ),
    "a format": (
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "attribute '__class__' of 'int' object is unsafe",
    ),
    "a change of its input": (
        "{{ messages.append(1) }}",
        "attribute 'append' of 'list' object is unsafe",
    ),
    "a file": ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
    "itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "maximum recursion depth exceeded",
    ),
    "what a filter does not take": ("{{ 1 | dictsort }}", "object has no attribute 'items'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line(
    qwen: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Wherever it is used: in a conversion, in a conversation and in an export."""
    monkeypatch.setattr(jinja, "TEMPLATE_SECONDS", 0.3 if name == "loops" else 20)
    monkeypatch.setattr(jinja, "TEMPLATE_BYTES", 256 << 20)
    source, problem = HOSTILE[name]
    template = ChatTemplate(source, {})
    began = time.process_time()
    with pytest.raises(TemplateRefuses) as refused:
        template.render(ANSWERED)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) <= 300
    assert time.process_time() - began < 15
    tokenizer = copied(qwen, source)
    with pytest.raises(ConfigError, match=r"^template: its name: cannot render a question"):
        require_stop(load_template("tokenizer", tokenizer), tokenizer, "its name")
    with pytest.raises(Refusal, match=r"^the chat template refuses the conversation: "):
        render_for_answer(template, QUESTION)
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]


def test_many_texts_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the whole time, and when all are done there are no limits any more."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    monkeypatch.setattr(jinja, "TEMPLATE_SECONDS", 0.5)
    slow = "{% for a in range(90000) %}{% for b in range(10) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(slow, {})
    template.render(QUESTION)
    began = time.process_time()
    with jinja.template_limits():
        assert resource.getrlimit(resource.RLIMIT_AS) != before[0]
        while time.process_time() - began < 1.2:
            assert template.render(QUESTION).text == ""
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    with pytest.raises(TemplateRefuses):
        ChatTemplate(LOOPS, {}).render(QUESTION)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for m in messages %}\n{{ m.content }\n", "line 2: is no Jinja template"),
        (
            "{% if " + "(" * 3000 + "1" + ")" * 3000 + " %}",
            "is no Jinja template: maximum recursion",
        ),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
        ("{% generation %}", "line 1: is no Jinja template: Unexpected end of template"),
    ],
)
def test_what_is_no_template(qwen: PreTrainedTokenizerFast, source: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_template("tokenizer", copied(qwen, source))
    assert str(refused.value).startswith("template: tokenizer: ")
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_tokens_that_the_tokenizer_lacks(qwen: PreTrainedTokenizerFast) -> None:
    other = byte_tokenizer()
    with pytest.raises(ConfigError, match=r"its token <\|im_start\|> is not in the tokenizer"):
        require_stop(load_template("chatml", other), other, "chatml")
    none = copied(other, None)
    none.eos_token = none.bos_token = None
    with pytest.raises(ConfigError, match=r"^template: alpaca: ends answers with the eos token"):
        load_template("alpaca", none)
    with pytest.raises(ConfigError, match=r"^add_bos: the tokenizer has no bos token"):
        load_template("chatml", copied(qwen, None), add_bos=True)


def test_the_tokens_that_end_an_answer(qwen: PreTrainedTokenizerFast) -> None:
    """The template's own comes first; eos ends an answer, too."""
    end, eos = (qwen.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>"))
    plain = copied(qwen, None)
    plain.eos_token = "<|endoftext|>"
    assert stop_ids(plain) == [eos]
    assert stop_ids(copied(plain, CHATML)) == [end, eos]
    assert stop_ids(copied(plain, load_template("alpaca", plain).source)) == [eos]
    # One without an end of its own, and one that is no template
    assert stop_ids(copied(plain, "{{ messages[0].content }}")) == [eos]
    assert stop_ids(copied(plain, "{{")) == [eos]
    unmarked = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert stop_ids(copied(plain, unmarked)) == [end, eos]
    ended = copied(plain, CHATML)
    ended.eos_token = "<|im_end|>"
    assert stop_ids(ended) == [end]


def test_the_template_of_the_first_dataset_goes_with_the_tokenizer(
    qwen: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    plain = copied(qwen, None)
    alpaca = load_template("alpaca", qwen).source
    made = with_template(plain, {"one": CHATML, "two": CHATML})
    assert (made.chat_template, plain.chat_template) == (CHATML, None)
    assert not caplog.records
    made = with_template(plain, {"one": alpaca, "two": CHATML, "three": alpaca})
    assert [record.getMessage() for record in caplog.records] == [
        "warning: two: its examples have another chat template than those of one; the tokenizer is"
        " saved with that of one"
    ]
    made.save_pretrained(tmp_path)
    assert load_template("tokenizer", load_tokenizer(str(tmp_path))).source == alpaca


def test_a_template_among_several(qwen: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A tokenizer may have more than one, of which one is called default; files may have a BOM."""
    tokenizer = copied(qwen, None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    assert load_template("tokenizer", tokenizer).source == CHATML
    tokenizer.chat_template = {"tool_use": "{{ tools }}"}
    with pytest.raises(ConfigError, match="has no chat template; set template=chatml, alpaca or"):
        load_template("tokenizer", tokenizer)
    (tmp_path / "own.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    assert load_template(str(tmp_path / "own.jinja"), qwen).source == CHATML
