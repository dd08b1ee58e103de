"""The answers of OpenAI's API: whole, in parts as they are written, and errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from transformers import PreTrainedTokenizerFast

from flame_composer.serve.protocol import Request
from flame_composer.serve.writing import TokenScore
from flame_composer.use.generate import Pieces

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> Any:
    """Return an error in OpenAI's form."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def to_json(content: Any) -> bytes:
    """Return `content` as JSON."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def to_event(content: Any) -> bytes:
    """Return `content` as a server-sent event."""
    return b"data: " + to_json(content) + b"\n\n"


class ErrorResponse(Response):
    """An error, which the log tells, too (`serve.front`)."""

    logged = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["error"] = self.logged
        await super().__call__(scope, receive, send)


def error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
    logged: str | None = None,
) -> Response:
    """Return an error as a response in OpenAI's form; `logged` is told the log instead, if set."""
    body = to_json(error_body(status, message, param, code))
    response = ErrorResponse(body, status, headers, "application/json")
    response.logged = logged or message
    return response


@dataclass
class Choice:
    """What has been written of one answer; `offset` is the number of characters sent before it.

    `of_prompt` holds the scores in the prompt, if they are shown: one list for all its answers.
    """

    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    finish: str | None = None
    offset: int = 0
    of_prompt: list[TokenScore] = field(default_factory=list)


class Form:
    """The form of the answers to one request."""

    def __init__(
        self,
        request: Request,
        model: str,
        tokenizer: PreTrainedTokenizerFast,
        surfaces: Sequence[bytes] | None,
    ):
        """Begin an answer by the model of the name `model`.

        `surfaces` are the bytes of the tokenizer's tokens, None if they are not known.
        """
        self.request, self.tokenizer, self.surfaces = request, tokenizer, surfaces or ()
        kind = "chat.completion" if request.is_chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self.chunk_head = {**self.head}
        if request.is_chat:
            self.chunk_head["object"] = "chat.completion.chunk"
        self._texts: dict[int, str] = {}  # of tokens, most of which come often
        self._parts: dict[int, bytes | None] = {}  # tokens that hold a part of a character
        self._last_prompt: list[TokenScore] = []
        self._of_last_prompt: dict[str, list[Any]] = {}

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> bytes:
        """Return the whole answer as JSON, which may take seconds: call it in a thread.

        It is made choice by choice: no other thread runs while a part becomes JSON.
        """
        made = []
        for index, choice in enumerate(choices):
            content: dict[str, Any] = {"text": choice.text}
            if self.request.is_chat:
                message = {"role": "assistant", "content": choice.text, "refusal": None}
                content = {"message": message}
            made.append(to_json(self._choice(index, content, choice)))
        head = to_json({**self.head, "usage": usage})
        return b'%b,"choices":[%b]}' % (head.removesuffix(b"}"), b",".join(made))

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Return the part that begins an answer in a conversation."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, Choice())

    def chunk(self, index: int, part: Choice) -> dict[str, Any]:
        """Return a part of an answer."""
        content: dict[str, Any] = {"text": part.text}
        if self.request.is_chat:
            content = {"delta": {"content": part.text} if part.text else {}}
        return self._chunk(index, content, part)

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the part that ends an answer with its counts of tokens."""
        return {**self.chunk_head, "choices": [], "usage": usage}

    def _chunk(self, index: int, content: dict[str, Any], part: Choice) -> dict[str, Any]:
        made = {**self.chunk_head, "choices": [self._choice(index, content, part)]}
        return {**made, "usage": None} if self.request.include_usage else made

    def _choice(self, index: int, content: dict[str, Any], part: Choice) -> dict[str, Any]:
        logprobs = None
        if self.request.num_top is not None:
            logprobs = self._of_chat(part) if self.request.is_chat else self._of_text(part)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": part.finish}

    def _of_text(self, part: Choice) -> dict[str, Any]:
        """Return log probabilities in the form of /v1/completions."""
        written = self._columns(part.scores, part.offset)
        if not part.of_prompt:
            return written
        if part.of_prompt is not self._last_prompt:  # one prompt's answers follow one another
            pieces, start, placed = Pieces(self.tokenizer, []), 0, []
            for score in part.of_prompt:
                placed.append(score._replace(start=start))
                start += len(pieces.add(score.id))
            self._last_prompt, self._of_last_prompt = part.of_prompt, self._columns(placed, 0)
        return {name: self._of_last_prompt[name] + written[name] for name in written}

    def _columns(self, scores: Sequence[TokenScore], offset: int) -> dict[str, list[Any]]:
        return {
            "tokens": [self._text(score.id) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [
                None if score.logprob is None else self._top(score) for score in scores
            ],
            "text_offset": [offset + score.start for score in scores],
        }

    def _top(self, score: TokenScore) -> dict[str, float]:
        """Return the likeliest tokens by their texts; of two with the same text, the likelier."""
        found: dict[str, float] = {}
        for id, logprob in score.top:
            found.setdefault(self._text(id), logprob)
        return found

    def _of_chat(self, part: Choice) -> dict[str, Any]:
        """Return log probabilities in the form of /v1/chat/completions."""
        found = []
        for score in part.scores:
            top = [self._entry(id, logprob) for id, logprob in score.top]
            found.append({**self._entry(score.id, score.logprob), "top_logprobs": top})
        return {"content": found, "refusal": None}

    def _entry(self, id: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(id)
        found = self._parts.get(id, text.encode())
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if found is None else list(found),
        }

    def _text(self, id: int) -> str:
        """Return a token's text, or its bytes as OpenAI writes them if a character is not whole."""
        if id not in self._texts:
            self._texts[id] = self._text_or_bytes(id)
        return self._texts[id]

    def _text_or_bytes(self, id: int) -> str:
        text = self.tokenizer.decode([id], clean_up_tokenization_spaces=False)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        found = self.surfaces[id] if id < len(self.surfaces) else b""
        if not found:
            self._parts[id] = None
            return text
        try:
            return found.decode()  # the replacement character itself
        except UnicodeDecodeError:
            self._parts[id] = found
            escaped = "".join(f"\\x{byte:02x}" for byte in found)
            return escaped if self.request.is_chat else f"bytes:{escaped}"


def usage_of(prompt_tokens: int, written_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Return counts of tokens in OpenAI's form."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written_tokens,
        "total_tokens": prompt_tokens + written_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
