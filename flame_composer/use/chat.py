"""A conversation with a model, in the form of its chat template."""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

from flame_composer.config.use import ChatConfig
from flame_composer.errors import ConfigError
from flame_composer.text.chat import Message, Refusal, load_template, render_for_answer
from flame_composer.text.tokenizer import explained_failure
from flame_composer.use.generate import (
    Pieces,
    Streamer,
    asked,
    build_answer_sampling,
    continue_ids,
    ends_of_answers,
    row_length,
)

COMMANDS = (
    "/reset forgets the conversation; /system TEXT sets the system prompt, /system alone takes it"
    " away; /exit or Ctrl-D ends the session; Ctrl-C ends an answer; a line that ends in \\ goes on"
    " in the next"
)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's token for a byte

log = logging.getLogger(__name__)


class Conversation:
    """A conversation with a model: the messages so far, and a way to get the next answer."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: ChatConfig
    ):
        """Begin an empty conversation.

        Raise ConfigError if the tokenizer has no chat template, or if the template or the tokenizer
        does not take the system prompt in `config`.
        """
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"model={config.model}: its tokenizer has no chat template, so that it is not known"
                " how a conversation is put to it; tune the model on examples (docs/tuning.md),"
                " which records their template, or use recipes/generate.py"
            )
        self.model, self.tokenizer = model, tokenizer
        self.template = load_template("tokenizer", tokenizer)
        self.stop = ends_of_answers(model, tokenizer)
        self.special = special_ids(tokenizer, self.template.source, self.stop)
        self.sampling = build_answer_sampling(config, tokenizer, self.stop)
        self.repetition_penalty = config.repetition_penalty
        self.system: str | None = None
        self.turns: list[Message] = []
        self.is_said_to_be_long = False
        if config.system is not None:
            try:
                self.set_system(config.system)
            except Refusal as error:
                raise ConfigError(f"system: {error}") from None

    def reset(self) -> None:
        """Forget all messages but the system prompt."""
        self.turns.clear()
        self.is_said_to_be_long = False

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt, None for none; the other messages stay.

        Raise Refusal if the tokenizer or the template does not take it.
        """
        if text is not None:
            require_plain(self.tokenizer, self.special, text)
            render_for_answer(self.template, [Message("system", text), Message("user", "?")])
        self.system = text

    def answer(self, text: str, show: Callable[[str], Any], interruption: Interruption) -> str:
        """Return the model's answer to a message, and keep both in the conversation.

        `show` is called with each piece of the answer as it is written. The answer ends before the
        token that ends it, and after the token being written when `interruption` has come, or the
        next. Raise Refusal, and keep nothing, if the tokenizer or the template does not take the
        message.
        """
        require_plain(self.tokenizer, self.special, text)
        system = [] if self.system is None else [Message("system", self.system)]
        turns = [*self.turns, Message("user", text)]
        rendered = render_for_answer(self.template, [*system, *turns])
        with explained_failure():
            ids: list[int] = self.tokenizer(
                rendered, add_special_tokens=False, verbose=False
            ).input_ids
        if not ids:
            raise Refusal("the chat template makes no text of the conversation")
        self._warn_if_long(len(ids))
        streamer = Streamer(Pieces(self.tokenizer, ids), show, hidden=self.stop)
        continue_ids(
            self.model,
            [ids],
            self.sampling,
            repetition_penalty=self.repetition_penalty,
            criteria=[interruption],
            streamer=streamer,
        )
        written = "".join(streamer.shown)
        # A model may spell a special token in letters; read again, it would be the token itself.
        found = find_special(self.tokenizer, self.special, written)
        kept = written if found is None else written[: found[0]]
        self.turns = [*turns, Message("assistant", kept)]
        return written

    def _warn_if_long(self, length: int) -> None:
        limit = row_length(self.model)
        if limit is None or length <= limit or self.is_said_to_be_long:
            return
        self.is_said_to_be_long = True
        log.warning(
            "warning: the conversation has %s tokens, but the model was trained on rows of %s; its"
            " answers may become worse; /reset begins a new one",
            f"{length:,}",
            f"{limit:,}",
        )


def find_special(
    tokenizer: PreTrainedTokenizerFast, special: Collection[int], text: str
) -> tuple[int, int] | None:
    """Return the first and the last place of the first token in `special` in a text, if any."""
    with explained_failure():
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if not any(id in special for id in ids):  # places take as long again to find
            return None
        encoding = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    for id, place in zip(encoding.input_ids, encoding.offset_mapping, strict=True):
        if id in special:
            return place
    return None


def require_plain(tokenizer: PreTrainedTokenizerFast, special: Collection[int], text: str) -> None:
    """Raise Refusal for a message in which the tokenizer would find a token in `special`.

    Such a message could end its own turn, and go on as the system prompt or as an answer.
    """
    found = find_special(tokenizer, special, text)
    if found is not None:
        start, end = found
        raise Refusal(
            f"{text[start:end]} is a special token of the tokenizer, not text; write the"
            " message without it"
        )


def special_ids(
    tokenizer: PreTrainedTokenizerFast, template: str, stop: list[int]
) -> frozenset[int]:
    """Return the ids of the tokens that must not come from a message's text.

    They are those that end an answer, special tokens, and added tokens that the template writes,
    whether they are marked as special or not. Tokens for spaces, for bytes and for unknown text,
    which stand for what is written otherwise, are none of them.
    """
    found = {
        id
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip()
        and not _BYTE.fullmatch(token.content)
        and (token.special or token.content in template)
    }
    return frozenset({*found, *stop} - {tokenizer.unk_token_id})


class Interruption(StoppingCriteria):
    """A criterion that ends an answer at Ctrl-C; a second Ctrl-C raises KeyboardInterrupt.

    It is a context manager that listens to Ctrl-C within its body.
    """

    def __init__(self) -> None:
        self.has_come = False

    def __enter__(self) -> Interruption:
        self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.has_come:
            raise KeyboardInterrupt
        self.has_come = True

    def __call__(self, input_ids: torch.LongTensor, *_: Any, **__: Any) -> torch.BoolTensor:
        is_done: Any = torch.full((len(input_ids),), self.has_come, device=input_ids.device)
        return is_done


def read_messages() -> Iterator[str]:
    """Yield each message on standard input: a line, or several of which all but the last end in \\.

    Messages of white space alone are left out. Raise ConfigError if standard input is closed or is
    not UTF-8.
    """
    if sys.stdin is None:
        raise ConfigError("there is no standard input to read messages from")
    lines: list[str] = []
    for line in asked(lambda: "... " if lines else "> "):
        lines.append(line.removesuffix("\\"))
        if line.endswith("\\"):
            continue
        message = "\n".join(lines)
        lines.clear()
        if message.strip():
            yield message
    if "".join(lines).strip():
        yield "\n".join(lines)


def hold(conversation: Conversation, messages: Iterator[str], show: Callable[[str], Any]) -> None:
    """Hold a conversation until `messages` end or one of them is /exit.

    `show` is called with each piece of the answers. A message that is refused is answered by one
    line on stderr, and the conversation goes on.
    """
    for message in messages:
        command, _, rest = message.strip().partition(" ")
        try:
            if message.strip() == "/exit":
                return
            if message.strip() == "/reset":
                conversation.reset()
            elif command == "/system":
                conversation.set_system(rest.strip() or None)
            elif re.fullmatch(r"/\w+", message.strip()):
                raise Refusal(f"{command}: no such command; {COMMANDS}")
            else:
                with Interruption() as interruption:
                    conversation.answer(message, show, interruption)
                show("\n")
        except Refusal as error:
            print(f"not taken: {error}", file=sys.stderr, flush=True)
