"""The tokens of conversations, and which of them carry loss.

The tokens are those of the whole text, as `apply_chat_template` gives them: a model then sees the
same tokens in training as when it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.text.chat import ChatTemplate, Message, TemplateRefuses
from flame_composer.text.examples import LeftOut
from flame_composer.text.tokenizer import BareTokenizer, Encoder, explained_failure, plain_copy

TrainOn = Literal["all", "last", "prompt_too"]


class Tokens(NamedTuple):
    """An example as tokens [T], with a flag for each: whether it carries loss, bool [T]."""

    ids: NDArray[np.unsignedinteger]
    has_loss: NDArray[np.bool_]


class Turn(NamedTuple):
    """An answer within a conversation's text.

    `begin` and `end` are its first character and the one after its last. `prompt` is the text
    before it as the template renders it by itself, or None if the template marks answers.
    """

    begin: int
    end: int
    is_trained: bool
    prompt: str | None


class Masker:
    """A maker of tokens and their loss flags from conversations."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: BareTokenizer,
        encode: Encoder,
        *,
        stop: int,
        train_on: TrainOn,
    ):
        """Use `encode` for texts; `stop` is the token that ends an answer in this template."""
        self.template, self.encode = template, encode
        self.stop, self.train_on = stop, train_on
        self.exact = plain_copy(tokenizer)
        self.surfaces = surfaces_of(tokenizer)
        self.special = special_pattern(tokenizer)
        self.sizes = np.array([len(each) for each in self.surfaces or ()], np.int64)

    def tokens_of(self, conversations: Sequence[Sequence[Message]]) -> list[Tokens | LeftOut]:
        """Return the tokens of each conversation, or why it is left out."""
        from flame_composer.upstream.jinja import template_limits

        texts: list[str] = []
        plans: list[tuple[int, list[Turn]] | LeftOut] = []
        with template_limits():
            for messages in conversations:
                try:
                    text, turns = self.turns_of(messages)
                except LeftOut as problem:
                    plans.append(problem)
                    continue
                plans.append((len(texts), turns))
                texts.append(text)
                texts += [turn.prompt or "" for turn in turns if self._is_compared(turn)]
        tokens, lengths = self.encode(texts)
        ends = np.cumsum(lengths)
        found: list[Tokens | LeftOut] = []
        for plan in plans:
            if isinstance(plan, LeftOut):
                found.append(plan)
                continue
            number, turns = plan
            of_texts = [
                tokens[ends[i] - lengths[i] : ends[i]]
                for i in range(number, number + 1 + sum(map(self._is_compared, turns)))
            ]
            try:
                found.append(self._masked(texts[number], turns, of_texts))
            except LeftOut as problem:
                found.append(problem)
        return found

    def _is_compared(self, turn: Turn) -> bool:
        return turn.is_trained and turn.prompt is not None and self.train_on != "prompt_too"

    def turns_of(self, messages: Sequence[Message]) -> tuple[str, list[Turn]]:
        """Return the text of a conversation and the answers in it.

        Raise LeftOut if the template does not render it, if its answers cannot be told from its
        prompts, or if none of them is trained on.
        """
        answers = [number for number, each in enumerate(messages) if each.role == "assistant"]
        is_trained = [
            messages[number].loss and (self.train_on != "last" or number == answers[-1])
            for number in answers
        ]
        if not any(is_trained):
            raise LeftOut("no_loss")
        try:
            text, spans = self.template.render(messages)
            if self.template.has_marks:
                prompts: list[str | None] = [None] * len(spans)
            else:
                spans, prompts = self._spans_by_prompts(messages, text, answers, is_trained)
        except TemplateRefuses as error:
            raise LeftOut("template", str(error)) from None
        if len(spans) != len(answers):
            detail = f"it marks {len(spans)} parts of {len(answers)} answers"
            raise LeftOut("template", detail)
        return text, [
            Turn(*span, trained, prompt)
            for span, trained, prompt in zip(spans, is_trained, prompts, strict=True)
        ]

    def _spans_by_prompts(
        self,
        messages: Sequence[Message],
        text: str,
        answers: Sequence[int],
        is_trained: Sequence[bool],
    ) -> tuple[list[tuple[int, int]], list[str | None]]:
        """Return where answers are in `text`, told by what the template renders before each.

        An answer begins where the conversation before it ends, rendered with the generation
        prompt. Answers that are not trained on are looked for only with `train_on=prompt_too`.
        """
        spans: list[tuple[int, int]] = []
        prompts: list[str | None] = []
        for number, trained in zip(answers, is_trained, strict=True):
            if not trained and self.train_on != "prompt_too":
                spans.append((0, 0))
                prompts.append(None)
                continue
            prompt = self.template.render(messages[:number], add_generation_prompt=True).text
            whole = (
                text
                if number + 1 == len(messages)
                else self.template.render(messages[: number + 1]).text
            )
            if not (text.startswith(prompt) and text.startswith(whole)):
                raise LeftOut("seam", "the text of the turns before an answer changes after it")
            spans.append((len(prompt), len(whole)))
            prompts.append(prompt)
        return spans, prompts

    def _masked(self, text: str, turns: Sequence[Turn], of_texts: list[NDArray[Any]]) -> Tokens:
        ids = of_texts[0]
        prompts = iter(of_texts[1:])
        starts, ends, at = self._places(text, ids)
        has_loss = np.full(len(ids), self.train_on == "prompt_too")
        for turn in turns:
            if not turn.is_trained and self.train_on != "prompt_too":
                continue
            begin, end = at(turn.begin), at(turn.end)
            first = int(np.searchsorted(ends, begin, side="right"))
            last = int(np.searchsorted(starts, end, side="left"))
            has_loss[first:last] = turn.is_trained
            if self._is_compared(turn):
                prompt = next(prompts)
                is_seamless = len(prompt) == first and np.array_equal(prompt, ids[:first])
                if not is_seamless or (last < len(ids) and starts[last] != end):
                    raise LeftOut("seam", f"at {text[max(turn.begin - 8, 0) : turn.begin + 8]!r}")
            if turn.is_trained and self.stop not in ids[first:last]:
                raise LeftOut("no_end")
        has_loss[0] = False  # nothing comes before it that it could be predicted from
        return Tokens(ids, has_loss)

    def _places(self, text: str, ids: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], Any]:
        """Return where tokens start and end in `text`, and a function from characters to places.

        Places are bytes if the tokens are the text's own bytes, and characters otherwise.
        """
        if self.surfaces is not None:
            data = text.encode()
            if b"".join(map(self.surfaces.__getitem__, ids.tolist())) == data:
                ends = np.cumsum(self.sizes[ids])
                is_same = len(data) == len(text)
                at = _itself if is_same else lambda character: len(text[:character].encode())
                return ends - self.sizes[ids], ends, at
        with explained_failure():
            encoding = self.exact.encode(text, add_special_tokens=False)
        if encoding.ids != ids.tolist():
            raise LeftOut("seam", "the text is too long to find answers in its tokens")
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        # Tokens without text of their own stand at the end of the one before.
        return np.maximum.accumulate(offsets[:, 0]), np.maximum.accumulate(offsets[:, 1]), _itself


def _itself(character: int) -> int:
    return character


def special_pattern(tokenizer: BareTokenizer) -> re.Pattern[str] | None:
    """Return a pattern that finds special tokens written out in a text, or None if there are none.

    The tokenizer would take them for the tokens themselves: an answer could end in its middle.
    """
    added = json.loads(tokenizer.serialized)["added_tokens"]
    texts = [token["content"] for token in added if token["special"] and token["content"]]
    if not texts or tokenizer.split_special_tokens:
        return None
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def surfaces_of(tokenizer: BareTokenizer) -> list[bytes] | None:
    """Return the bytes that each token of a byte-level tokenizer stands for, indexed by id.

    None for any other kind of tokenizer.
    """
    state = json.loads(tokenizer.serialized)
    decoder = state["decoder"] or {"type": None}
    if "ByteLevel" not in {step["type"] for step in decoder.get("decoders", [decoder])}:
        return None
    vocabulary = state["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        return None
    bytes_of = _bytes_by_character()
    found = [b""] * tokenizer.vocab_size
    for token, id in vocabulary.items():
        found[id] = bytes(bytes_of.get(character, 0) for character in token)
    for added in state["added_tokens"]:
        found[added["id"]] = added["content"].encode()
    return found


def _bytes_by_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Source: GPT-2's `bytes_to_unicode`: printable bytes stand for themselves, and the others are the
    characters from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
