"""The log of requests with their texts, which is kept only if it is asked for."""

from __future__ import annotations

import json
import logging
import os
import queue
import stat
import threading
import time
from typing import TYPE_CHECKING, Any

from flame_composer.errors import InvalidField, one_line

if TYPE_CHECKING:
    from flame_composer.serve.app import Exchange

log = logging.getLogger(__name__)

MOST_WAITING = 100  # requests that wait to be written, if the disk is slow
CLOSE_SECONDS = 5  # for those to be written when the server ends


class TextLog:
    """A file with a line of JSON for each request that was answered, or begun to be.

    It is written by a thread of its own. What cannot be written is left out, which is said once:
    no answer waits for a disk.
    """

    def __init__(self, path: str):
        """Open the file, or begin it, readable to its owner only.

        Raise InvalidField if it cannot be opened, is no file, is another user's, or others
        may read it.
        """
        self.path = path
        self._file = _opened(path)
        self._entries: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._is_torn = _ends_torn(self._file)
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="texts", daemon=True)
        self._thread.start()

    def note(self, exchange: Exchange, path: str, status: int) -> None:
        """Have a request written down, with what it was answered."""
        entry = entry_of(exchange, path, status)
        try:
            self._entries.put_nowait(entry)
        except queue.Full:
            self._warn("the disk is too slow")

    def close(self) -> None:
        """Write what is left, if it takes no longer than a few seconds."""
        until = time.monotonic() + CLOSE_SECONDS
        try:
            self._entries.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            return
        self._thread.join(until - time.monotonic() if until > time.monotonic() else 0)

    def _run(self) -> None:
        while (entry := self._entries.get()) is not None:
            text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
            line = text.encode(errors="backslashreplace") + b"\n"
            if self._is_torn:  # the line before is not whole
                line = b"\n" + line
            try:
                self._write(line)
            except OSError as error:
                self._warn(error.strerror or one_line(error))
        os.close(self._file)

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            written = os.write(self._file, left)
            left = left[written:]
            self._is_torn = bool(left)

    def _warn(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            log.warning("warning: log_texts: requests are left out of %s: %s", self.path, reason)


def _opened(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o600)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InvalidField("log_texts", f"cannot be opened: {reason}") from None
    found = os.fstat(file)
    rule = ""
    if not stat.S_ISREG(found.st_mode):
        rule = "must be a file"
    elif found.st_uid != os.geteuid():
        rule = "is there, and belongs to another user; name another file"
    elif found.st_mode & 0o077:
        rule = "is there, and others may read or write it; chmod 600 it, or name another file"
    if rule:
        os.close(file)
        raise InvalidField("log_texts", rule)
    return file


def _ends_torn(file: int) -> bool:
    """Return whether a file ends in half a line, as of a server that was killed."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def describe(path: str | None) -> str:
    """Return a line for the user that says whether texts are written down."""
    if path is None:
        return "requests are logged without their texts"
    return f"the texts of all requests and answers are written to {path} (log_texts)"


def entry_of(exchange: Exchange, path: str, status: int) -> dict[str, Any]:
    """Return what is written down of a request: what it asked, and what it was answered."""
    asked, (read, written, cached) = exchange.asked, exchange.count()
    entry: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": exchange.form.head["id"],
        "path": path,
        "status": status,
        **vars(asked.settings),
        "seed": asked.seed,
        "max_tokens": asked.max_tokens,
        "stop": asked.stop,
    }
    if asked.is_chat:
        entry["messages"] = [
            {"role": each.role, "content": each.content} for each in asked.messages
        ]
    else:
        entry["prompt"] = asked.prompts
    entry["answers"] = [
        {"text": choice.text, "finish_reason": choice.finish} for choice in exchange.choices
    ]
    entry["tokens"] = {"prompt": read, "written": written, "cached": cached}
    return entry
