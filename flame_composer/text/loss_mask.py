"""The tokens of conversations, and which of them carry loss.

The tokens are those of the whole text, as `apply_chat_template` gives them: a model then sees the
same tokens in training as when it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_composer.text.chat import ChatTemplate, Message, TemplateRefuses
from flame_composer.text.examples import LeftOut
from flame_composer.text.marks import Rendered
from flame_composer.text.special_texts import SpecialTexts
from flame_composer.text.surfaces import BYTE, is_lossless, surfaces_of
from flame_composer.text.tokenizer import BareTokenizer, Encoder, explained_failure, plain_copy

LAST_CHARACTERS = 40  # of an answer, that a template must write
TrainOn = Literal["all", "last", "prompt_too"]


class Tokens(NamedTuple):
    """An example as tokens [T], with a flag for each: whether it carries loss, bool [T]."""

    ids: NDArray[np.unsignedinteger]
    has_loss: NDArray[np.bool_]


class Turn(NamedTuple):
    """An answer within a conversation's text.

    `begin` and `end` are its first character and the one after its last; the template ends it
    behind `written`. `prompt` is the text before it as the template renders it by itself, or None
    if the template marks answers.
    """

    begin: int
    written: int
    end: int
    is_trained: bool
    prompt: str | None


class Places(NamedTuple):
    """The places in a text where its tokens start and end.

    They are counted in bytes, or in characters where those are the same or bytes are not known.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    is_bytes: bool

    def at(self, text: str, character: int) -> int:
        """Return the place of a character of the text."""
        return len(text[:character].encode()) if self.is_bytes else character

    def tokens_within(self, begin: int, end: int) -> tuple[int, int]:
        """Return the first token with a part between two places, and the one after the last."""
        first = self.ends.searchsorted(begin, side="right")
        return int(first), int(self.starts.searchsorted(end, side="left"))


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
        longest: int | None = None,
    ):
        """Use `encode` for texts; `stop` is the token that ends an answer in this template.

        Of an example with more than `longest` tokens no answer is looked for, and no flag is set:
        it does not fit into a row.
        """
        self.longest = longest
        self.template, self.encode = template, encode
        self.stop, self.train_on = stop, train_on
        self.exact = plain_copy(tokenizer)
        self.surfaces = surfaces_of(tokenizer)
        self.special = SpecialTexts(tokenizer, self.exact.normalizer, stop)
        self.sizes = np.array([len(each) for each in self.surfaces or ()], np.int64)
        self.has_space = np.array([each[:1] == b" " for each in self.surfaces or ()], np.bool_)
        state = json.loads(tokenizer.serialized)
        self.is_lossless = is_lossless(state)
        self.is_added = np.zeros(tokenizer.vocab_size, np.bool_)
        for each in state["added_tokens"]:
            self.is_added[each["id"]] = not BYTE.fullmatch(each["content"])

    def tokens_of(self, conversations: Sequence[Sequence[Message]]) -> list[Tokens | LeftOut]:
        """Return the tokens of each conversation, or why it is left out."""
        from flame_composer.upstream.jinja import template_limits

        rendered: list[Rendered | LeftOut] = []
        with template_limits():
            for messages in conversations:
                try:
                    rendered.append(self._render(messages))
                except LeftOut as problem:
                    rendered.append(problem)
        texts = [each.text for each in rendered if isinstance(each, Rendered)]
        of_texts = self._encode_each(texts)
        places = self._places(texts, of_texts)
        ids = iter(of_texts)
        found: list[Tokens | LeftOut] = []
        with template_limits():
            for messages, each in zip(conversations, rendered, strict=True):
                if isinstance(each, LeftOut):
                    found.append(each)
                    continue
                try:
                    found.append(self._example(messages, each, next(ids), next(places)))
                except LeftOut as problem:
                    found.append(problem)
        return found

    def _encode_each(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        tokens, lengths = self.encode(texts)
        ends = np.cumsum(lengths)
        return [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def _example(
        self,
        messages: Sequence[Message],
        rendered: Rendered,
        ids: NDArray[np.unsignedinteger],
        place: Places | None,
    ) -> Tokens:
        """Return a rendered conversation as tokens; raise LeftOut if it cannot be trained on."""
        if self.longest is not None and len(ids) > self.longest:
            return Tokens(ids, np.zeros(len(ids), np.bool_))
        turns = self._turns(messages, rendered)
        prompts = [turn.prompt or "" for turn in turns if self._is_compared(turn)]
        of_prompts = self._encode_each(prompts) if prompts else []
        return self._masked(rendered.text, turns, ids, of_prompts, place)

    def _is_compared(self, turn: Turn) -> bool:
        return turn.is_trained and turn.prompt is not None and self.train_on != "prompt_too"

    def _is_trained(self, messages: Sequence[Message]) -> dict[int, bool]:
        """Return whether each answer is trained on, by its place in the conversation."""
        answers = [number for number, each in enumerate(messages) if each.role == "assistant"]
        return {
            number: messages[number].loss and (self.train_on != "last" or number == answers[-1])
            for number in answers
        }

    def _render(self, messages: Sequence[Message]) -> Rendered:
        """Return a conversation as text.

        Raise LeftOut if the template does not render it, or if no answer of it is trained on.
        """
        if not any(self._is_trained(messages).values()):
            raise LeftOut("no_loss")
        try:
            return self.template.render(messages)
        except TemplateRefuses as error:
            raise LeftOut("template", str(error)) from None

    def _turns(self, messages: Sequence[Message], rendered: Rendered) -> list[Turn]:
        """Return the answers in a conversation's text.

        Raise LeftOut if they cannot be told from the prompts.
        """
        text, spans = rendered
        is_trained = self._is_trained(messages)
        prompts: list[str | None] = [None] * len(spans)
        if not self.template.has_marks:
            try:
                spans, prompts = self._spans_by_prompts(messages, text, is_trained)
            except TemplateRefuses as error:
                raise LeftOut("template", str(error)) from None
        if len(spans) != len(is_trained):
            detail = f"it marks {len(spans)} parts of {len(is_trained)} answers"
            raise LeftOut("template", detail)
        return [
            Turn(
                begin,
                written_to(messages[number].content, text, begin, end) if trained else begin,
                end,
                trained,
                prompt,
            )
            for (number, trained), (begin, end), prompt in zip(
                is_trained.items(), spans, prompts, strict=True
            )
        ]

    def _spans_by_prompts(
        self,
        messages: Sequence[Message],
        text: str,
        is_trained: Mapping[int, bool],
    ) -> tuple[list[tuple[int, int]], list[str | None]]:
        """Return where answers are in `text`, told by what the template renders before each.

        An answer begins where the conversation before it ends, rendered with the generation
        prompt. Answers that are not trained on are looked for only with `train_on=prompt_too`.
        """
        spans: list[tuple[int, int]] = []
        prompts: list[str | None] = []
        for number, trained in is_trained.items():
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

    def _masked(
        self,
        text: str,
        turns: Sequence[Turn],
        ids: NDArray[np.unsignedinteger],
        of_prompts: Sequence[NDArray[Any]],
        place: Places | None,
    ) -> Tokens:
        """Return the tokens of a conversation with their loss flags.

        `of_prompts` are the tokens of the prompts that are compared with them. Raise LeftOut if its
        answers cannot be told by its tokens.
        """
        if place is None:
            place = self._places_by_offsets(text, ids)
        prompts = iter(of_prompts)
        has_loss = np.full(len(ids), self.train_on == "prompt_too")
        for turn in turns:
            if not turn.is_trained and self.train_on != "prompt_too":
                continue
            begin, end = place.at(text, turn.begin), place.at(text, turn.end)
            first, last = place.tokens_within(begin, end)
            has_loss[first:last] = turn.is_trained
            if self._is_compared(turn):
                prompt = next(prompts)
                is_seamless = len(prompt) == first and np.array_equal(prompt, ids[:first])
                if not is_seamless or place.ends[last - 1] > end:
                    raise LeftOut("seam", f"at {text[max(turn.begin - 8, 0) : turn.begin + 8]!r}")
            if turn.is_trained:
                behind, _ = place.tokens_within(place.at(text, turn.written), end)
                if self.stop not in ids[behind:last].tolist():
                    raise LeftOut("no_end")
        has_loss[0] = False  # nothing comes before it that it could be predicted from
        return Tokens(ids, has_loss)

    def _places(
        self, texts: Sequence[str], of_texts: Sequence[NDArray[Any]]
    ) -> Iterator[Places | None]:
        """Yield where each text's tokens are in its bytes, or None if they are not its bytes.

        Texts are looked at together, which is several times as fast as one by one.
        """
        if self.surfaces is None or not texts:
            yield from [None] * len(texts)
            return
        ids = np.concatenate(of_texts)
        lengths = np.fromiter(map(len, of_texts), np.int64, len(of_texts))
        borders = np.concatenate([[0], np.cumsum(lengths)])
        sizes = self.sizes[ids]
        # Some tokenizers put a space before a text, and again behind each special token.
        after = np.flatnonzero(self.is_added[ids]) + 1
        begins = np.union1d(borders[:-1], after[after < len(ids)])
        spaced = begins[self.has_space[ids[begins]]]
        ends = np.concatenate([[0], np.cumsum(sizes)])
        for number, text in enumerate(texts):
            begin, end = borders[number : number + 2].tolist()
            num_bytes = len(text) if text.isascii() else len(text.encode())
            in_bytes = ends[begin : end + 1] - ends[begin]
            if in_bytes[-1] != num_bytes:
                first, last = np.searchsorted(spaced, (begin, end)).tolist()
                of_text = sizes[begin:end].copy()
                of_text[spaced[first:last] - begin] -= 1
                in_bytes = np.concatenate([[0], np.cumsum(of_text)])
            is_bytes = num_bytes != len(text)
            place = Places(in_bytes[:-1], in_bytes[1:], is_bytes=is_bytes)
            is_right = in_bytes[-1] == num_bytes and (
                self.is_lossless or self._has_bytes(text, ids[begin:end], place)
            )
            yield place if is_right else None

    def _has_bytes(self, text: str, ids: NDArray[Any], place: Places) -> bool:
        """Return whether the tokens' bytes are those of the text at the places found for them."""
        assert self.surfaces is not None
        found = [self.surfaces[id] for id in ids.tolist()]
        sizes = (place.ends - place.starts).tolist()
        # Where a token has a byte less than its surface, the space before it was left out.
        parts = [each[len(each) - size :] for each, size in zip(found, sizes, strict=True)]
        return b"".join(parts) == text.encode()

    def _places_by_offsets(self, text: str, ids: NDArray[Any]) -> Places:
        """Return where tokens are in the characters of a text that they are not the bytes of."""
        with explained_failure():
            encoding = self.exact.encode(text, add_special_tokens=False)
        if encoding.ids != ids.tolist():
            raise LeftOut("seam", "the text is too long to find answers in its tokens")
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        # Tokens without text of their own stand at the end of the one before.
        starts, ends = np.maximum.accumulate(offsets, axis=0).T
        return Places(starts, ends, is_bytes=False)


def written_to(answer: str, text: str, begin: int, end: int) -> int:
    """Return the character of a text behind an answer, which the template writes from `begin` on.

    Templates may write it otherwise than it is, without the thoughts it begins with, for example.
    Raise LeftOut if the end of its last line is not between `begin` and `end`: it is cut then.
    """
    last = answer.strip().splitlines()[-1]
    last = (last.rpartition("</think>")[2].strip() or last)[-LAST_CHARACTERS:]
    found = text.find(last, begin, end)
    if found < 0:
        raise LeftOut("template", f"it changes or leaves out the end of an answer: {last!a}")
    return found + len(last)
