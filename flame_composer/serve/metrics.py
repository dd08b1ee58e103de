"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Mapping

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """A histogram of durations in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    def note(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        """Return the histogram in Prometheus's text format."""
        found, below = [], 0
        for border, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            below += count
            found.append(f'{name}_bucket{{le="{border}"}} {below}')
        return [*found, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


class Metrics:
    """The counts of a server; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: Counter[int] = Counter()  # answered, by HTTP status
        self.prompt_tokens = self.written_tokens = 0
        self.prefix_hits = self.cached_tokens = 0
        self.to_first, self.between = Histogram(), Histogram()

    def note_request(self, status: int) -> None:
        """Count a request that was answered with this HTTP status."""
        with self._lock:
            self.requests[status] += 1

    def note_read(self, tokens: int) -> None:
        """Count tokens of prompts that were read."""
        with self._lock:
            self.prompt_tokens += tokens

    def note_cached(self, tokens: int) -> None:
        """Count a prompt of which so many tokens need not be read, as they were before."""
        with self._lock:
            self.prefix_hits += 1
            self.cached_tokens += tokens

    def note_token(self, seconds: float, *, is_first: bool) -> None:
        """Count a token, written so many seconds after the one before, or after the request."""
        with self._lock:
            self.written_tokens += 1
            (self.to_first if is_first else self.between).note(seconds)

    def text(self, gauges: Mapping[str, int]) -> str:
        """Return all counts, and the `gauges`, in Prometheus's text format."""
        with self._lock:
            lines = ["# TYPE flame_requests_total counter"]
            lines += [
                f'flame_requests_total{{status="{status}"}} {count}'
                for status, count in sorted(self.requests.items())
            ]
            for name, count in (
                ("flame_prompt_tokens_total", self.prompt_tokens),
                ("flame_written_tokens_total", self.written_tokens),
                ("flame_prefix_hits_total", self.prefix_hits),
                ("flame_cached_tokens_total", self.cached_tokens),
            ):
                lines += [f"# TYPE {name} counter", f"{name} {count}"]
            for name, count in gauges.items():
                lines += [f"# TYPE flame_{name} gauge", f"flame_{name} {count}"]
            for name, histogram in (
                ("flame_time_to_first_token_seconds", self.to_first),
                ("flame_time_between_tokens_seconds", self.between),
            ):
                lines += [f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"
