"""The one place where lines leave a process, without secrets or control sequences.

Everything that writes to stdout or stderr (prints, log lines, warnings, tracebacks, progress bars,
libraries) goes through a `Lines` object once `clean_streams` has been called.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from contextlib import suppress
from typing import Any, TextIO

from flame_composer.errors import DataError, hide, masked

# Names of environment variables that hold credentials.
_SECRET_NAME = re.compile(
    r"(.*_)?(SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CONNECTION_STRING"
    r"|(API|SECRET|ACCESS|ACCOUNT|PRIVATE)_?KEY)",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 8  # characters; a shorter one would be found in other words
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CURSOR_UP = re.compile(r"\n*(\x1b\[A)+")  # as tqdm writes between bars
_KEPT = "\n\t\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}"


class Lines:
    """A wrapper of a text stream that cleans lines as they are written.

    All other attributes are those of the stream. A closed terminal, or a full disk behind a
    redirection, does not end hours of work: from then on lines are dropped, and `lost` holds the
    error.
    """

    def __init__(self, stream: TextIO, name: str):
        """Wrap `stream`, which is called `name` in messages."""
        self.stream = stream
        self.name = name
        self.lost: OSError | None = None
        self._in_line = False  # in the middle of a line other than a progress bar
        self._after_bar = False

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # asked of a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            _write(self.stream, self._clean(text))
        except OSError as error:
            self._lose(error)
        return len(text)

    def clean_first(self) -> None:
        """Clean texts before they reach the `write` that a library has put in place of ours."""
        theirs = self.__dict__.pop("write", None)
        if theirs is not None:
            self.__dict__["write"] = lambda text: theirs(self._clean(text))

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _clean(self, text: str) -> str:
        """Return `text` in the form in which it may be shown.

        Only progress bars may move the cursor back to the start of their line, or up to another.
        """
        if self._after_bar and _CURSOR_UP.fullmatch(text):
            return text
        is_bar = text.startswith("\r") and not self._in_line
        body = text[1:] if is_bar else text
        back = is_bar and body.endswith("\r")
        body = _COLOUR.sub("", masked(body[:-1] if back else body).replace("\r\n", "\n"))
        if text:
            self._after_bar = is_bar
            self._in_line = not is_bar and not text.endswith("\n")
        return ("\r" if is_bar else "") + visible(body, _KEPT) + ("\r" if back else "")

    def _lose(self, error: OSError) -> None:
        """Drop everything that is written from now on, because of `error`; warn about it once."""
        if self.lost is not None:
            return
        self.lost = error
        # Redirect the stream, or writing the rest of its buffer would fail again at exit.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        # No warning if it was the reader that went away, as in `| head`.
        if not isinstance(error, BrokenPipeError) and self.name == "stdout":
            print(
                f"warning: stdout: cannot be written to: {error.strerror}; the work"
                " continues without it",
                file=sys.stderr,
            )


def _write(stream: TextIO, text: str) -> None:
    """Write a text, with escapes for characters that the stream cannot encode."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def clean_streams() -> None:
    """Clean everything that this process writes to stdout and stderr from now on.

    Lines for a closed stream are dropped. The values of environment variables such as
    AWS_SECRET_ACCESS_KEY or HF_TOKEN are replaced by the variables' names.
    """
    for name, value in os.environ.items():
        if _SECRET_NAME.fullmatch(name) and len(value) >= _SHORTEST_SECRET:
            hide(value, name)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would get this number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if isinstance(stream, Lines):
            continue
        if stream is None:
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        cleaned: Any = Lines(stream, name)
        setattr(sys, name, cleaned)
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in getattr(logger, "handlers", ()):
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    handler.setStream(cleaned)


def flush_streams() -> OSError | None:
    """Flush both streams, and return the error that made stdout drop lines.

    Return None if there was none, or if the reader of stdout just went away.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    lost = sys.stdout.lost if isinstance(sys.stdout, Lines) else None
    return None if isinstance(lost, BrokenPipeError) else lost


def write_content(text: str) -> None:
    """Write the text that a script was asked to produce to stdout, at once and unchanged.

    Control characters are replaced only if stdout is a terminal, which they would control. Raise
    DataError if the text cannot be written.
    """
    stream: TextIO = sys.stdout.stream if isinstance(sys.stdout, Lines) else sys.stdout
    try:
        _write(stream, visible(text, _KEPT) if stream.isatty() else text)
        stream.flush()
    except OSError as error:
        if isinstance(sys.stdout, Lines):
            sys.stdout._lose(error)
        raise DataError(
            f"stdout: cannot be written to: {error.strerror}; send it to where there is space"
        ) from None


def visible(text: str, kept: str = "") -> str:
    """Return `text` with control characters and the like made visible.

    Control characters become Unicode's pictures of them. Other characters that are not printable
    become their code, such as <U+200B>. Characters in `kept` stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in kept else _picture(ord(each)) for each in text
    )


def _picture(code: int) -> str:
    """Return the visible form of the character with this code."""
    return chr(0x2400 + code) if code < 32 else "␡" if code == 127 else f"<U+{code:04X}>"
