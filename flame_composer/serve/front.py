"""What stands before the endpoints: who may ask, from where, and a line of log for each request."""

from __future__ import annotations

import hmac
import sys
import time
from typing import Any

from starlette.datastructures import Headers

from flame_composer.errors import masked
from flame_composer.lines import visible
from flame_composer.serve.answers import error
from flame_composer.serve.app import CLIENT_LEFT
from flame_composer.serve.metrics import Metrics
from flame_composer.serve.texts import TextLog

OPEN = ("/", "/health")  # to all who can reach the server; the page asks for the key
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
OTHER_SITES = ("cross-site", "same-site")  # the latter: another port of this machine


class Front:
    """An ASGI application that lets requests through to another, and logs them without texts.

    Endpoints leave in the request's state what the line of log tells: `tokens`, a function that
    returns how many the prompts have, were written and were cached, and `error`, a line. What they
    leave as `exchange` goes to the log of texts, if there is one.

    With an API key, requests must bring it. Without one, they must be addressed to this machine by
    a name of its own: a page in a browser could otherwise reach the server under a name that its
    author made point here. What a browser says to be for a page of another site is refused, too.
    """

    def __init__(self, app: Any, key: str | None, metrics: Metrics, texts: TextLog | None = None):
        self.app, self.metrics, self.texts = app, metrics, texts
        self.expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        started, status = time.monotonic(), CLIENT_LEFT

        async def note(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        state: dict[str, Any] = {}
        scope["state"] = state
        app = self._refusal(scope) or self.app
        try:
            await app(scope, receive, note)
        finally:
            self.metrics.note_request(status)
            tokens = ""
            if "tokens" in state:
                read, written, cached = state["tokens"]()
                tokens = f" {read}+{written} tokens" + (f" ({cached} cached)" if cached else "")
            # Mask before cutting: half of a secret would not be recognized.
            path = masked(visible(scope["path"]))[:60]
            if self.texts is not None and "exchange" in state:
                self.texts.note(state["exchange"], path, status)
            seconds = time.monotonic() - started
            reason = f": {visible(state['error'])}" if "error" in state else ""
            print(
                f"{time.strftime('%H:%M:%S')} {scope['method']} {path} {status}{tokens}"
                f" {seconds:.2f} s{reason}",
                file=sys.stderr,
                flush=True,
            )

    def _refusal(self, scope: Any) -> Any:
        """Return the response to a request that is not let through, or None."""
        asked = Headers(scope=scope)
        if self.expected is None:
            host = asked.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in LOOPBACK:
                return error(403, "without an API key, only this machine's own names are served")
            if scope["path"] not in OPEN and asked.get("sec-fetch-site") in OTHER_SITES:
                return error(403, "without an API key, pages of other sites are not served")
            return None
        given = asked.get("authorization", "").encode("latin-1")
        if scope["path"] in OPEN or hmac.compare_digest(given, self.expected):
            return None
        headers = {"WWW-Authenticate": "Bearer"}
        return error(
            401, "the API key is missing or wrong", headers=headers, code="invalid_api_key"
        )
