"""Configuration of serve.py: keys, defaults, rules."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from flame_composer.config.rules import ScriptConfig, require, require_text

SHORTEST_KEY = 16  # characters


@dataclass
class ServeConfig(ScriptConfig):
    """Serve a model over HTTP, to clients of OpenAI's API."""

    paths = ("model", "base", "log_texts")

    model: str = MISSING
    """Hugging Face folder or id, a folder of an adapter in peft's layout, or a checkpoint file or a
    folder of checkpoints, of which the newest is taken; local or in an object store.
    """
    base: str | None = None
    """Hugging Face folder or id of the model that an adapter was trained on, if it is not where it
    was in training.
    """
    quantize: Literal["int8", "bf16"] | None = None
    """Type that the weights are turned into, on a CPU: int8 (with a scale for each output channel)
    or bf16; none if not set.
    """
    served_name: str | None = None
    """Name of the model to clients; the last part of model if not set."""
    host: str = "127.0.0.1"
    """Address to listen at; with 127.0.0.1 only this machine can connect. Any other needs
    api_key_env.
    """
    port: int = 8000
    """Port to listen at; 0 for any that is free."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key, 16 characters or more, which
    requests must then bring.
    """
    add_bos: bool | None = None
    """Begin each prompt with the tokenizer's bos token; if not set, prompts begin as documents did
    in training.
    """
    max_rows: int = 16
    """Largest number of answers that are written at a time."""
    max_waiting: int = 64
    """Largest number of prompts that wait for their turn; a request beyond is answered 429."""
    max_prompt_tokens: int = 8192
    """Largest number of tokens of a prompt."""
    max_new_tokens: int = 2048
    """Largest number of tokens of an answer."""
    prefill_tokens: int = 512
    """Largest number of tokens of prompts that are read between two tokens of the answers."""
    prefix_cache_bytes: int = 500_000_000
    """Largest size of the states that are kept of prompts, so that a prompt that begins alike is
    not read anew, bytes of the model's device; 0 keeps none.
    """
    max_body_bytes: int = 2_000_000
    """Largest size of a request, bytes."""
    request_seconds: float = 600
    """Longest time that a request may take, seconds."""
    drain_seconds: float = 30
    """Longest time that the answers under way get to end at SIGTERM, seconds."""
    blocked: list[str] = field(default_factory=list)
    """Texts that prompts must not hold and that end an answer before they are shown, in upper or
    lower case; one `*` in a text stands for any letters and digits, as in secret*.
    """

    log_texts: str | None = None
    """File to add the texts of requests and answers to, a line of JSON for each; it is made
    readable to its owner only. If not set, requests are logged without their texts.
    """

    def validate(self) -> None:
        require_text(self, "model", "base", "log_texts")
        require(
            importlib.util.find_spec("uvicorn") is not None
            and importlib.util.find_spec("starlette") is not None,
            "model",
            "starlette or uvicorn, which serve it, is not installed; pip install"
            " 'flame-composer[serve]'",
        )
        require(self.served_name != "", "served_name", "must not be empty")
        require(bool(self.host), "host", "must not be empty; 0.0.0.0 is for all addresses")
        require(0 <= self.port < 2**16, "port", "must be in [0, 65535]")
        for name in (
            "max_rows",
            "max_waiting",
            "max_prompt_tokens",
            "max_new_tokens",
            "prefill_tokens",
        ):
            require(getattr(self, name) > 0, name, "must be 1 or more")
        require(self.prefix_cache_bytes >= 0, "prefix_cache_bytes", "must be 0 or more")
        require(self.max_body_bytes >= 1000, "max_body_bytes", "must be 1000 bytes or more")
        require(
            0 < self.request_seconds < math.inf,
            "request_seconds",
            "must be more than 0, and finite",
        )
        require(
            0 <= self.drain_seconds < math.inf, "drain_seconds", "must be 0 or more, and finite"
        )
        require("" not in self.blocked, "blocked", "must not hold an empty text")
        require(
            all(text != "*" and text.count("*") <= 1 for text in self.blocked),
            "blocked",
            "must have one * at most in each text, which must not be all of it",
        )
        self._check_key()

    def _check_key(self) -> None:
        if self.api_key_env is None:
            is_here = self.host in ("127.0.0.1", "localhost", "::1")
            rule = (
                "must be set to serve at another address than 127.0.0.1: anyone who can reach it"
                " could use the model"
            )
            require(is_here, "api_key_env", rule)
            return
        key = os.environ.get(self.api_key_env, "")
        require(key != "", "api_key_env", "names an environment variable that is not set")
        is_key = len(key) >= SHORTEST_KEY and key.isascii() and key.isprintable()
        rule = (
            f"names a variable whose value is no key: it must have {SHORTEST_KEY} characters or"
            " more, ASCII without spaces, e.g. from `openssl rand -hex 32`"
        )
        require(is_key and " " not in key, "api_key_env", rule)
