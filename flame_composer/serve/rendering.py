"""A process that renders conversations, so that what a template takes is not taken of the server.

To limit a template's memory and time is to limit its whole process (`upstream.jinja`). The engine
shares the server's. This module imports nothing that takes time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from flame_composer.processes import when_parent_ends
from flame_composer.text.chat import ChatTemplate, Message, Refusal, render_for_answer

CPU_SECONDS = 2  # for a conversation; a template gives up by itself
SECONDS = 20  # for a conversation, after which the process is killed, whatever it is doing
_COMMAND = "from flame_composer.serve.rendering import answer; answer()"


class Renderer:
    """The process that renders conversations; one that has ended is started again when needed.

    Any thread may use it.
    """

    def __init__(self, template: ChatTemplate):
        """Start the process."""
        self.template = template
        self._lock = threading.Lock()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which then finishes its requests
        )

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation as text, up to where the next answer begins.

        Raise Refusal if the template does not render it, or takes too much.
        """
        question = {
            "source": self.template.source,
            "tokens": dict(self.template.tokens),
            "messages": [[each.role, each.content] for each in messages],
        }
        sent = json.dumps(question).encode() + b"\n"
        with self._lock:
            began = time.monotonic()
            line = self._ask(sent)
            if not line and time.monotonic() - began < SECONDS:  # somebody else ended it
                self._process.wait()
                line = self._ask(sent)
        if not line.endswith(b"\n"):
            raise Refusal("the chat template takes too much time or memory for the conversation")
        found = json.loads(line)
        if "refusal" in found:
            raise Refusal(found["refusal"])
        text: str = found["text"]
        return text

    def _ask(self, question: bytes) -> bytes:
        """Return the line that the process answers, or less if it ends before."""
        if self._process.poll() is not None:
            self._close()
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(question)
                process.stdin.flush()
            return process.stdout.readline()
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # closing writes what was not taken
                pipe.close()


def answer() -> None:
    """Answer questions on stdin, until it closes, on stdout."""
    from flame_composer.upstream import jinja

    when_parent_ends(signal.SIGKILL)
    jinja.TEMPLATE_SECONDS = CPU_SECONDS  # of this process alone
    template = None
    with os.fdopen(os.dup(1), "wb") as answers:
        for line in sys.stdin.buffer:
            question = json.loads(line)
            if template is None:
                template = ChatTemplate(question["source"], question["tokens"])
            messages = [Message(role, content) for role, content in question["messages"]]
            try:
                found = {"text": render_for_answer(template, messages)}
            except Refusal as refusal:
                found = {"refusal": str(refusal)}
            answers.write(json.dumps(found).encode() + b"\n")
            answers.flush()
