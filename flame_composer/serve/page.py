"""The page at `/`, on which a person in a browser talks to the model: one file, page.html."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response


def page_endpoint() -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint that sends the page.

    The browser is told to run the page's own script and no other, and to connect to nothing but
    this server. So a mistake in how the page shows a model's text would still run nothing.
    """
    content = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": policy_of(content),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }

    async def send(_: Request) -> Response:
        return Response(content, headers=headers, media_type="text/html")

    return send


def policy_of(page: str) -> str:
    """Return the Content-Security-Policy for a page with one script and one style sheet in it."""
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    [style] = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of(script)}",
            f"style-src {_hash_of(style)}",
            "img-src data:",  # the page's icon
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
