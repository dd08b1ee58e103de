"""The requests of OpenAI's API: what they may hold, checked before anything is done with it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flame_composer.config.fields import nearest
from flame_composer.config.rules import is_text
from flame_composer.serve.sampling import Settings
from flame_composer.text.chat import Message

# What other servers offer and this one does not, with the values that ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "web_search_options": (None,),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_STOPS, LONGEST_STOP = 16, 1000
MOST_TOP, MOST_BIASES = 20, 1000
_SEED = 2**63


class BadRequest(Exception):
    """The refusal of a request: one line, the field it is about, and the HTTP status.

    `logged` is the line for the server's log, if the message may hold texts of the request.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str = "",
        logged: str | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code or None
        self.logged = logged or message


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most."""

    max_rows: int
    max_waiting: int
    max_new_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class Request:
    """A request that was checked; either `prompts` or `messages` is empty."""

    prompts: list[str | list[int]]
    messages: list[Message]
    settings: Settings
    seed: int | None
    n: int
    max_tokens: int
    stop: list[str]
    echo: bool
    num_top: int | None
    """Likeliest tokens to report beside each; None for no log probabilities."""
    stream: bool
    include_usage: bool
    cache_key: str = ""
    """Whose states of earlier prompts may be used, and who may use this one's."""

    @property
    def is_chat(self) -> bool:
        """Whether the request is for the next turn of a conversation."""
        return bool(self.messages)


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in the body of a request; raise BadRequest if there is none."""
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        deep = "too deep" if isinstance(error, RecursionError) else "no valid JSON"
        raise BadRequest(f"the body is {deep}; send one JSON object") from None
    if not isinstance(content, dict):
        raise BadRequest("the body must be a JSON object")
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def parse_completion(content: Mapping[str, Any], model: str, limits: Limits) -> Request:
    """Return a request for /v1/completions; raise BadRequest if it holds what it must not."""
    fields = Fields(content)
    prompts = _prompts(fields.take("prompt"), limits)
    fields.require_model(model)
    num_top = fields.whole("logprobs", None, 0, MOST_TOP)
    max_tokens = fields.whole(
        "max_tokens", min(16, limits.max_new_tokens), 0, limits.max_new_tokens
    )
    echo = fields.flag("echo")
    n = fields.whole("n", 1, 1, limits.max_rows)
    best_of = fields.whole("best_of", n, 1, limits.max_rows)
    assert max_tokens is not None
    assert n is not None
    if best_of != n:
        raise BadRequest("best_of: must be n: there is no choice among answers", "best_of")
    most = max(limits.max_waiting, limits.max_rows)
    if len(prompts) * n > most:
        raise BadRequest(f"n: must make {most} answers at most of all prompts together", "n")
    if max_tokens == 0 and not echo:
        raise BadRequest("max_tokens: must be 1 or more without echo", "max_tokens")
    if echo and fields.flag("stream"):
        raise BadRequest("echo: does not go with stream", "echo")
    return _request(
        fields, limits, prompts=prompts, n=n, max_tokens=max_tokens, echo=echo, num_top=num_top
    )


def parse_chat(content: Mapping[str, Any], model: str, limits: Limits) -> Request:
    """Return a request for /v1/chat/completions; raise BadRequest as `parse_completion` does."""
    fields = Fields(content)
    messages = _messages(fields.take("messages"))
    fields.require_model(model)
    names = [name for name in ("max_completion_tokens", "max_tokens") if fields.has(name)]
    if len(names) == 2:
        raise BadRequest("max_tokens: must not be set beside max_completion_tokens", "max_tokens")
    name = names[0] if names else "max_tokens"
    max_tokens = fields.whole(name, limits.max_new_tokens, 1, limits.max_new_tokens)
    n = fields.whole("n", 1, 1, limits.max_rows)
    num_top = fields.whole("top_logprobs", None, 0, MOST_TOP)
    if fields.flag("logprobs"):
        num_top = num_top or 0
    elif num_top is not None:
        raise BadRequest("top_logprobs: needs logprobs to be true", "top_logprobs")
    assert max_tokens is not None
    assert n is not None
    return _request(
        fields, limits, messages=messages, n=n, max_tokens=max_tokens, echo=False, num_top=num_top
    )


def _request(
    fields: Fields,
    limits: Limits,
    *,
    n: int,
    max_tokens: int,
    echo: bool,
    num_top: int | None,
    prompts: list[str | list[int]] | None = None,
    messages: list[Message] | None = None,
) -> Request:
    """Return the request, after reading the fields that both kinds have."""
    settings = Settings(
        temperature=fields.number("temperature", 1.0, 0, 100),
        top_p=fields.number("top_p", 1.0, 0, 1),
        top_k=fields.whole("top_k", 0, 0, 2**31) or 0,
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100),
        presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
        logit_bias=_biases(fields.take("logit_bias"), limits.vocab_size),
    )
    if 0 < settings.temperature < 0.01:
        raise BadRequest("temperature: must be 0, or in [0.01, 100]", "temperature")
    if settings.top_p == 0:
        raise BadRequest("top_p: must be more than 0", "top_p")
    stream, options = fields.flag("stream"), fields.take("stream_options")
    if options is not None and (not stream or not _are_options(options)):
        rule = 'must be {"include_usage": true or false}, and goes with stream only'
        raise BadRequest(f"stream_options: {rule}", "stream_options")
    made = Request(
        prompts=prompts or [],
        messages=messages or [],
        settings=settings,
        seed=fields.whole("seed", None, -_SEED, _SEED - 1),
        n=n,
        max_tokens=max_tokens,
        stop=_stops(fields.take("stop")),
        echo=echo,
        num_top=num_top,
        stream=stream,
        include_usage=bool(options and options.get("include_usage")),
        cache_key=_own_name(fields, "prompt_cache_key"),
    )
    _own_name(fields, "user")
    _own_name(fields, "safety_identifier")
    fields.require_no_more()
    return made


def _own_name(fields: Fields, name: str) -> str:
    """Return a field that holds a name of the client's own, which changes no answer."""
    value = fields.take(name)
    if value is not None and not (isinstance(value, str) and is_text(value)):
        raise BadRequest(f"{name}: must be a string", name)
    return value or ""


class Fields:
    """The fields of a request, which are taken one after another until none is left."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self.left = dict.fromkeys(content)
        self.known: list[str] = []

    def has(self, name: str) -> bool:
        """Return whether a field is set."""
        return self.content.get(name) is not None

    def take(self, name: str) -> Any:
        """Return the value of a field, None if it is not set."""
        self.left.pop(name, None)
        self.known.append(name)
        return self.content.get(name)

    def flag(self, name: str) -> bool:
        """Return a field that is true or false; false if it is not set."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise BadRequest(f"{name}: must be true or false", name)
        return bool(value)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return a field that is a number in [low, high]."""
        value = self.take(name)
        if value is None:
            return default
        is_number = type(value) is float or type(value) is int
        if not is_number or not low <= value <= high:  # NaN is not, either
            raise BadRequest(f"{name}: must be a number in [{low:g}, {high:g}]", name)
        return float(value)

    def whole(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Return a field that is a whole number in [low, high]."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise BadRequest(f"{name}: must be a whole number in [{low}, {high}]", name)
        return value

    def require_model(self, model: str) -> None:
        """Raise BadRequest if the request is for another model than the one named `model`."""
        name = self.take("model")
        if name is not None and name != model:
            shown = ascii(name)[1:-1] if isinstance(name, str) else "this"
            raise BadRequest(
                f"model: {shown[:80]} is not served here; {model} is",
                "model",
                404,
                "model_not_found",
                logged="model: another is served here",
            )

    def require_no_more(self) -> None:
        """Raise BadRequest for a field that asks for what this server does not do."""
        for name in self.left:
            shown = ascii(name)[1:-1][:80]
            if name not in _NOTHING:
                line = f"{shown}: this server knows no such field{nearest(shown, self.known)}"
                raise BadRequest(line, shown, logged="an unknown field")
            if self.content[name] not in _NOTHING[name]:
                raise BadRequest(f"{shown}: this server does not do that; leave it out", shown)


def _prompts(value: Any, limits: Limits) -> list[str | list[int]]:
    """Return the prompts in `prompt`: a text, tokens, or a list of either."""
    several = value if isinstance(value, list) and not _are_tokens(value) else [value]
    if not several or not all(isinstance(each, str) or _are_tokens(each) for each in several):
        raise BadRequest(
            "prompt: must be a text, a list of token ids, or a list of these", "prompt"
        )
    if len(several) > limits.max_waiting:
        raise BadRequest(
            f"prompt: must hold {limits.max_waiting} prompts at most in one request", "prompt"
        )
    for prompt in several:
        if isinstance(prompt, str):
            _require_text(prompt, "prompt")
        elif not all(0 <= id < limits.vocab_size for id in prompt):
            raise BadRequest(f"prompt: token ids must be in [0, {limits.vocab_size})", "prompt")
    return several


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def _are_options(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and not set(value) - {"include_usage"}
        and all(isinstance(each, bool) for each in value.values())
    )


def _messages(value: Any) -> list[Message]:
    """Return the messages of a conversation, whose contents are texts or lists of texts."""
    if not isinstance(value, list) or not value:
        raise BadRequest("messages: must be a list of one message or more", "messages")
    found = []
    for number, message in enumerate(value):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{place}: must be an object with role and content", "messages")
        more = [
            name
            for name, each in message.items()
            if name not in ("role", "content") and each not in (None, [], {})
        ]
        if more:
            raise BadRequest(
                f"{place}: {ascii(more[0])[1:-1][:80]}: must be left out: messages have a role and"
                " content only",
                "messages",
                logged=f"{place}: messages have a role and content only",
            )
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRequest(f"{place}: role: must be {_either(_ROLES)}", "messages")
        found.append(Message(_ROLES[role], _content(message.get("content"), place)))
    return found


def _content(value: Any, place: str) -> str:
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    texts = []
    for part in parts:
        is_text_part = isinstance(part, dict) and part.get("type") == "text" and len(part) == 2
        if not is_text_part or not isinstance(part.get("text"), str):
            raise BadRequest(
                f'{place}: content: must be a text, or a list of {{"type": "text", "text": ...}}',
                "messages",
            )
        texts.append(part["text"])
        _require_text(texts[-1], f"{place}: content", "messages")
    return "".join(texts)


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    is_list = isinstance(stops, list) and all(isinstance(each, str) for each in stops)
    if not is_list or len(stops) > MOST_STOPS:
        raise BadRequest(f"stop: must be a text, or a list of {MOST_STOPS} at most", "stop")
    for text in stops:
        _require_text(text, "stop")
        if not 0 < len(text) <= LONGEST_STOP:
            raise BadRequest(f"stop: must have 1 to {LONGEST_STOP} characters each", "stop")
    return list(dict.fromkeys(stops))


def _biases(value: Any, vocab_size: int) -> dict[int, float]:
    rule = (
        f"logit_bias: must have token ids below {vocab_size} as its names, {MOST_BIASES} at most,"
        " and numbers in [-100, 100] as its values"
    )
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise BadRequest(rule, "logit_bias")
    found = {}
    for name, bias in value.items():
        is_id = name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size
        if not is_id or type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise BadRequest(rule, "logit_bias")
        found[int(name)] = float(bias)
    return found


def _require_text(text: str, place: str, param: str | None = None) -> None:
    if not is_text(text):
        raise BadRequest(
            f"{place}: holds half a surrogate pair, which is not valid text", param or place
        )


def _either(names: Collection[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
