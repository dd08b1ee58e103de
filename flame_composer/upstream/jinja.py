"""jinja2 3: what templates of others take of the machine has limits."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.filters import do_round
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

# What a template may take to render a text: CPU seconds, as nested loops may never end, and bytes
# of memory.
TEMPLATE_SECONDS = 30
TEMPLATE_BYTES = 2 << 30
LONGEST_NUMBER = 1024  # bits
MOST_DIGITS = 300  # that a number is rounded to

_is_limited = False


@contextlib.contextmanager
def template_limits() -> Iterator[None]:
    """Raise TemplateError if the body, which renders a text, takes too much time or memory.

    Within another such body, which may be a loop over many texts, this costs a microsecond, and
    each text has the whole time. There are no limits outside the main thread, where Python handles
    no signals.

    Upstream: jinja2 3, `sandbox.SandboxedEnvironment`.
    Mends: the sandbox limits the length of a single range(), and nothing else.
    """
    global _is_limited
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.ExitStack() as stack:
        if not _is_limited:
            stack.enter_context(_limited_process())
        signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS)
        try:
            yield
        except MemoryError:
            raise TemplateError(
                f"a text takes more than {TEMPLATE_BYTES >> 20:,} MiB of memory; have it write less"
            ) from None


@contextlib.contextmanager
def _limited_process() -> Iterator[None]:
    """Have the process give up where the timer ends, and take so much more memory only."""
    global _is_limited
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + TEMPLATE_BYTES
    before = signal.signal(signal.SIGVTALRM, _give_up)
    _is_limited = True
    try:
        if soft == resource.RLIM_INFINITY or limit < soft:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        yield
    finally:
        _is_limited = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def _give_up(*_: Any) -> None:
    raise TemplateError(
        f"a text takes more than {TEMPLATE_SECONDS} seconds; have it loop over less"
    )


def _round(value: Any, precision: Any = 0, method: Any = "common") -> Any:
    if not isinstance(precision, int) or abs(precision) > MOST_DIGITS:
        raise SecurityError(f"round takes a precision of {MOST_DIGITS} digits at most")
    return do_round(value, precision, method)


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which no number is so large that a single operation never ends.

    Upstream: jinja2 3, `sandbox.SandboxedEnvironment.intercepted_binops` and `filters.do_round`.
    Mends: `10 ** 10 ** 10` is computed, and so is that in `1|round(10 ** 10, "ceil")`; no signal
        stops it.
    """

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.filters["round"] = _round

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return the product or the power, or raise SecurityError if it is too large a number."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            size = bits + right.bit_length() if operator == "*" else bits * max(right, 1)
            if size > LONGEST_NUMBER:
                raise SecurityError(f"{operator} makes too large a number")
        return super().call_binop(context, operator, left, right)
