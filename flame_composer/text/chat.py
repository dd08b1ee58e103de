"""Chat templates: conversations as text, and which parts of the text are answers.

A template is a Jinja text, as tokenizers of Hugging Face hold it. It is not trusted: it runs in
Jinja's sandbox, with limits to what it takes (`upstream.jinja`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.storage import files
from flame_composer.text.ends import warn
from flame_composer.text.marks import Marks, Rendered, TemplateRefuses
from flame_composer.text.tokenizer import require_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BUILT_IN = ("chatml", "alpaca")
TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
# Of the templates `qwen` and `alpaca` of LLaMA-Factory, which say the same in slots. The end of an
# answer is inside the generation mark, so that a model learns to end it.
CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token + '\\n\\n' }}{% endgeneration %}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
    "{% endif %}{% endfor %}"
)
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
# The longest text that a template may make, in characters: of a conversation without any, and for
# each of its characters.
TEXT_CHARACTERS, TIMES_LONGER = 1_000_000, 8


class Message(NamedTuple):
    """A turn of a conversation; `loss` says whether an answer may be trained on."""

    role: str
    content: str
    loss: bool = True


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    `source` is its Jinja text, and `tokens` the texts of special tokens, by the names that
    templates have for them (`bos_token`, `eos_token` and so on).
    """

    source: str
    tokens: Mapping[str, str]

    @functools.cached_property
    def _compiled(self) -> tuple[Any, Marks]:
        """The compiled template, and the marks that it puts around generated parts."""
        marks = Marks()
        template = _environment(marks).from_string(self.source)
        # jinja2 copies them for every text, and from a plain dict that takes a tenth of the time
        template.globals = dict(template.globals)
        return template, marks

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "tokens": self.tokens}  # what is compiled is not sent

    @functools.cached_property
    def has_marks(self) -> bool:
        """Whether the template marks what an assistant generates."""
        return re.search(r"\{%-?\+?\s*generation\b", self.source) is not None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Return the conversation as text.

        With `add_generation_prompt`, the text goes on to where an answer begins. Raise
        TemplateRefuses if the template fails, takes too much time or memory, or raises an exception
        of its own. Of many conversations, render all within one `upstream.jinja.template_limits`.
        """
        from flame_composer.upstream.jinja import template_limits

        turns = [{"role": each.role, "content": each.content} for each in messages]
        try:
            with template_limits():
                template, marks = self._compiled
                if self.has_marks:
                    marks.renew("".join(each.content for each in messages))
                text: str = template.render(
                    messages=turns,
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self.tokens,
                )
        except Exception as error:  # the template is code of somebody else's, in a sandbox
            raise TemplateRefuses(one_line(error)) from None
        longest = TEXT_CHARACTERS + TIMES_LONGER * sum(len(each.content) for each in messages)
        if len(text) > longest:
            raise TemplateRefuses(f"it makes a text of {len(text):,} characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise TemplateRefuses("it makes half of a surrogate pair") from None
        return marks.taken_out(text)


def _environment(marks: Marks) -> Any:
    """Return the sandbox that templates are run in, set up as that of transformers.

    It knows no date, and nothing random: a conversion would otherwise depend on when it is made.
    Templates that ask for a date have a fixed one to fall back on.
    """
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock

    from flame_composer.upstream.jinja import Sandbox

    class Generation(Extension):
        """The tag `{% generation %}`, which puts marks around its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return marks.put(caller())

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    del environment.filters["random"], environment.globals["lipsum"]
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment


def load_template(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    add_bos: bool = False,
    default_system: str | None = None,
) -> ChatTemplate:
    """Return the template called `name`: one of BUILT_IN, `tokenizer` for its own, or a file.

    `add_bos` and `default_system`, the system prompt of conversations without one, are for the
    templates that come with this package. Raise ConfigError if there is no such template, or if it
    is no Jinja text.
    """
    from flame_composer.upstream.jinja import template_limits

    tokens = _texts_of(tokenizer)
    if name in BUILT_IN:
        require_ends(tokenizer, add_bos=add_bos, add_eos=False)
        if name == "alpaca" and "eos_token" not in tokens:
            raise ConfigError(
                f"template: {name}: ends answers with the eos token, which the tokenizer"
                f" {tokenizer.name_or_path} lacks; take another template, or a tokenizer that has"
                " one"
            )
        source = _built_in(name, add_bos=add_bos, default_system=default_system)
    elif default_system is not None:
        raise ConfigError(
            f"default_system: only goes with template={' or '.join(BUILT_IN)}; put it into the"
            " template itself"
        )
    else:
        source = _of_tokenizer(tokenizer) if name == "tokenizer" else _in_file(name)
    template = ChatTemplate(source, tokens)
    try:
        with template_limits():
            template._compiled  # noqa: B018
    except Exception as error:  # jinja makes Python of it, which may fail in any way
        line = getattr(error, "lineno", None)
        place = name if line is None else f"{name}: line {line}"
        raise ConfigError(f"template: {place}: is no Jinja template: {one_line(error)}") from None
    return template


def _built_in(name: str, *, add_bos: bool, default_system: str | None) -> str:
    body, own_system = (CHATML, None) if name == "chatml" else (ALPACA, ALPACA_SYSTEM)
    system = own_system if default_system is None else default_system
    start = "{{ bos_token }}" if add_bos else ""
    if system:
        turn = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
        start += (
            "{% if messages and messages[0]['role'] != 'system' %}"
            f"{{% set messages = {turn} + messages %}}{{% endif %}}"
        )
    return start + body


def _of_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    found: Any = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str):
        place = tokenizer.name_or_path or "the tokenizer"
        raise ConfigError(
            f"template: {place} has no chat template; set template={', '.join(BUILT_IN)} or a"
            " .jinja file"
        )
    return found


def _in_file(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"template: {name}: no such file; give {', '.join(BUILT_IN)}, tokenizer or a .jinja"
            " file"
        )
    try:
        return files.read_small(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"template: {name}: cannot be read: {one_line(error)}") from None


def _texts_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return the texts of the tokenizer's special tokens by the names that templates know."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
    found = {name: getattr(tokenizer, name, None) for name in names}
    return {name: str(text) for name, text in found.items() if text is not None}


def require_stop(template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """Return the id of the token that ends an answer in this template.

    It is the first special token (or the eos token) after an answer's text in what a model is
    trained on. Raise ConfigError if there is none: the model would never learn to end an answer.
    """
    answer = "An answer of some words"
    turns = (Message("user", "A question"), Message("assistant", answer))
    try:
        text, spans = template.render(turns)
        prompt = template.render(turns[:1], add_generation_prompt=True).text
    except TemplateRefuses as error:
        raise ConfigError(
            f"template: {name}: cannot render a question and its answer: {error}"
        ) from None
    _require_known(text, tokenizer, name)
    if answer not in text:
        raise ConfigError(f"template: {name}: leaves out the answer of a conversation")
    if template.has_marks and not spans:
        raise ConfigError(f"template: {name}: its generation marks are around no answer")
    if not template.has_marks and not text.startswith(prompt):
        raise ConfigError(
            f"template: {name}: with add_generation_prompt, a question does not begin as the same"
            " question with its answer, so that answers cannot be told from prompts; mark them"
            " with {% generation %}"
        )
    begin, end = spans[-1] if template.has_marks else (len(prompt), len(text))
    after = text.index(answer) + len(answer)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    special.discard(None)
    ids = tokenizer(text[min(after, end) : end], add_special_tokens=False).input_ids
    stops = [id for id in ids if id in special]
    if begin > text.index(answer) or not stops:
        raise ConfigError(
            f"template: {name}: no special token ends the part of an answer that is trained on"
            f" ({text[max(begin, 0) : end]!r}), so that a model would never learn to stop; put the"
            " token that ends an answer inside {% generation %}, or take a tokenizer with eos"
        )
    return stops[0]


def _require_known(text: str, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Raise ConfigError if a token of the template, like <|im_start|>, is not in the tokenizer."""
    vocabulary = tokenizer.get_vocab()
    for token in re.findall(r"<\|[^|<>\s]{1,40}\|>", text):
        if token not in vocabulary:
            raise ConfigError(
                f"template: {name}: its token {token} is not in the tokenizer"
                f" {tokenizer.name_or_path}; take another template, or a tokenizer that has it"
            )


def with_template(
    tokenizer: PreTrainedTokenizerFast, templates: Mapping[str, str]
) -> PreTrainedTokenizerFast:
    """Return a copy of the tokenizer with the first of these templates as its chat template.

    `templates` are by the name of the dataset that was made with them. A warning is logged if they
    differ.
    """
    first, *others = templates
    for name in others:
        if templates[name] != templates[first]:
            warn(
                f"{name}: its examples have another chat template than those of {first}; the"
                f" tokenizer is saved with that of {first}"
            )
    made = copy.deepcopy(tokenizer)
    made.chat_template = templates[first]
    return made


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of the tokens that end an answer.

    They are the end of an answer in the tokenizer's chat template, if it has one, and eos.
    """
    found: list[int] = []
    if tokenizer.chat_template is not None:
        # A template without such a token leaves eos alone.
        with contextlib.suppress(ConfigError):
            template = load_template("tokenizer", tokenizer)
            found.append(require_stop(template, tokenizer, "tokenizer"))
    eos = tokenizer.eos_token_id
    return found + ([eos] if eos is not None and eos not in found else [])


class Refusal(DataError):
    """The error for a message of a person that cannot be put to a model."""


def render_for_answer(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """Return the conversation as text up to where the assistant's next answer begins.

    Raise Refusal if the template does not render it.
    """
    try:
        return template.render(messages, add_generation_prompt=True).text
    except TemplateRefuses as error:
        raise Refusal(f"the chat template refuses the conversation: {error}") from None
