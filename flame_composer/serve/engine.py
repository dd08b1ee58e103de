"""Continuous batching: texts join and leave the batch between any two tokens."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from flame_composer.errors import DataError, one_line
from flame_composer.serve.metrics import Metrics
from flame_composer.serve.prefixes import Prefixes, ends_of_pieces
from flame_composer.serve.sampling import Sampler, are_numbers, score
from flame_composer.serve.states import Abilities, States, copies, read
from flame_composer.serve.writing import Answer, TokenScore, Written

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Row:
    """One of the answers to a prompt."""

    job: Job
    number: int  # of the answer in its request
    sampler: Sampler
    answer: Answer
    tokens: list[int] = field(default_factory=list)
    time: float = 0.0  # of its last token
    is_done: bool = False


class Piece(NamedTuple):
    """A part of an answer, and how many tokens the answer has so far."""

    number: int  # of the answer in its request
    written: Written
    num_tokens: int


class PromptScores(NamedTuple):
    """The log probabilities of a prompt's tokens, each given those before it."""

    numbers: list[int]  # of the answers to this prompt
    scores: list[TokenScore]


class Failure(NamedTuple):
    """The end of a request that cannot be answered."""

    status: int  # of HTTP
    message: str


Event = Piece | PromptScores | Failure


@dataclass(eq=False)
class Job:
    """A prompt, and what is to be written after it."""

    ids: list[int]
    max_tokens: int
    stop_ids: frozenset[int]
    num_top: int | None  # likeliest tokens to report beside each; None for no log probabilities
    score_prompt: bool
    deliver: Callable[[Event], None]  # called in the engine's thread
    echo: str = ""  # text of the prompt, if it is to be shown before each answer
    turns: Sequence[int] = ()  # places in the prompt after tokens that end a turn
    owner: str = ""  # whose other prompts may have left a state after the same beginning
    rows: list[Row] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    is_gone: bool = False  # nobody waits for it any more
    # The engine's own: where the pieces of the prompt end, where its state is to be kept, how
    # much of it was known and how much is read, the state after that, the scores in it.
    ends: list[int] = field(default_factory=list)
    wanted: dict[int, bytes] = field(default_factory=dict)
    num_cached: int = 0
    position: int = 0
    cache: Any = None
    scores: list[TokenScore] = field(default_factory=list)


class Full(Exception):
    """The refusal of a request because too many are waiting."""


class Closed(Exception):
    """The refusal of a request because the server is about to end."""


class Engine:
    """A thread that writes all answers, one token of each at a time.

    Between two tokens it reads at most `prefill_tokens` tokens of new prompts in at most four
    passes, by turns, so that a long prompt holds up neither the answers under way nor other ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        abilities: Abilities,
        metrics: Metrics,
        *,
        max_rows: int,
        max_waiting: int,
        prefill_tokens: int,
        prefix_cache_bytes: int = 0,
    ):
        """Prepare to write `max_rows` answers at a time while `max_waiting` prompts wait."""
        self.model, self.abilities, self.metrics = model, abilities, metrics
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.prefill_tokens = prefill_tokens
        self.prefixes = Prefixes(prefix_cache_bytes if abilities.in_pieces else 0, metrics)
        self.waiting: deque[Job] = deque()
        self.reading: deque[Job] = deque()
        self.rows: list[Row] = []
        self.states = States(model, joined=abilities.joined)
        self._changed = threading.Condition()
        self._preparing = 0  # jobs
        self._closing: str | None = None
        self.is_draining = False  # takes nothing new, and finishes the rest
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @contextmanager
    def room_for(self, jobs: int) -> Iterator[None]:
        """Have no more requests prepared, in the body, than may be written or wait.

        Raise Full if there is no room for so many jobs, and Closed as `submit` does.
        """
        with self._changed:
            self._require_room(jobs)
            if self._preparing + jobs > self.max_waiting + self.max_rows:
                raise Full
            self._preparing += jobs
        try:
            yield
        finally:
            with self._changed:
                self._preparing -= jobs

    def _require_room(self, jobs: int) -> None:
        if self.is_draining or self._closing is not None:
            raise Closed
        if len(self.waiting) + jobs > self.max_waiting:
            raise Full

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have the jobs done, all of them or none.

        Raise Full if too many are waiting, and Closed once the engine ends or has failed.
        """
        with self._changed:
            self._require_room(len(jobs))
            self.waiting += jobs
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give up the jobs; their rows are free before the next token."""
        for job in jobs:
            job.is_gone = True
        with self._changed:
            self.waiting = deque(job for job in self.waiting if not job.is_gone)
            self._changed.notify()

    def gauges(self) -> dict[str, int]:
        """Return how much of the engine is in use now, by the names that Prometheus gets."""
        reading = sum(len(job.rows) for job in list(self.reading))
        return {"rows": len(self.rows), "rows_reading": reading, "waiting": len(self.waiting)}

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self, reason: str) -> None:
        """End the thread; what is not finished fails with the message `reason`."""
        with self._changed:
            self._closing = reason
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    try:
                        self._join(self._read_prompts())
                        if self.rows:
                            self._write_tokens()
                        self._drop_rows()
                    except Exception as error:  # the model's code is another package's
                        self._fail_all(error)
        finally:  # however the thread ends, nobody waits for it
            with self._changed:
                if self._closing is None:
                    self._closing = "the server failed; see its log"
            for job in {*self.waiting, *self.reading, *(row.job for row in self.rows)}:
                self._fail(job, 503, self._closing)
            self.waiting.clear()
            self.reading.clear()
            self.prefixes.clear()
            self.rows, self.states = [], States(self.model, joined=self.abilities.joined)

    def _wait(self) -> bool:
        """Wait until there is something to do; return whether to go on."""
        with self._changed:
            while not (self.waiting or self.reading or self.rows or self._closing is not None):
                self._changed.wait()
            taken = len(self.rows) + sum(len(job.rows) for job in self.reading)
            while self.waiting and taken + len(self.waiting[0].rows) <= self.max_rows:
                job = self.waiting.popleft()
                taken += len(job.rows)
                self.reading.append(job)
            return self._closing is None

    def _drop_rows(self) -> None:
        """Drop the rows that are done, and those that nobody waits for any more."""
        self.reading = deque(job for job in self.reading if not job.is_gone)
        kept = [
            number for number, row in enumerate(self.rows) if not (row.is_done or row.job.is_gone)
        ]
        if len(kept) < len(self.rows):
            self.states.keep(kept)
            self.rows = [self.rows[number] for number in kept]

    def _read_prompts(self) -> list[tuple[Job, torch.Tensor]]:
        """Read some tokens of prompts; return those now read, with the scores [1, V] after them.

        Prompts take turns, piece by piece. A piece that does not fit any more is read after
        another token of each row, not in part: how a prompt is cut does not depend on the others.
        """
        budget, found = self.prefill_tokens, []
        while budget > 0 and self.reading:
            job = self.reading.popleft()
            try:
                if not job.ends:
                    self._start(job)
                size = job.ends[0] - job.position
                cost = max(size, (self.prefill_tokens + 3) // 4)  # a short piece costs a pass, too
                if budget < min(cost, self.prefill_tokens):
                    self.reading.appendleft(job)
                    break
                budget -= cost
                scores = self._read(job, size)
            except Exception as error:  # the model's code is another package's
                self._fail_with(job, error)
                continue
            if job.ends:
                self.reading.append(job)
            else:
                found.append((job, scores))
        return found

    def _start(self, job: Job) -> None:
        """Find out in which pieces a prompt is read, and where to start."""
        job.ends = [len(job.ids)]
        if self.abilities.in_pieces:
            job.ends = ends_of_pieces(len(job.ids), job.turns, self.prefill_tokens)
        if job.score_prompt:  # which a state does not tell
            return
        start = self.prefixes.start(job.ids, job.ends, job.owner)
        job.position, job.cache, job.wanted = start
        job.num_cached = start.position
        job.ends = [end for end in job.ends if end > start.position]

    def _read(self, job: Job, size: int) -> torch.Tensor:
        """Read the next `size` tokens of a prompt; return the scores [1, V] after them."""
        piece = job.ids[job.position : job.position + size]
        ids = torch.tensor([piece], device=self.model.device)
        scores, job.cache = read(self.model, ids, job.cache, all_scores=job.score_prompt)
        if job.score_prompt:
            if job.position == 0:
                job.scores.append(TokenScore(piece[0], 0, None, []))
            following = job.ids[job.position + 1 : job.position + size + 1]
            job.scores += score(scores[0, : len(following)], following, job.num_top or 0)
        job.position = job.ends.pop(0)
        if job.position in job.wanted:
            name = job.wanted[job.position]
            self.prefixes.keep(name, job.ids[: job.position], job.owner, job.cache)
        self.metrics.note_read(size)
        return scores[:, -1]

    def _join(self, read: list[tuple[Job, torch.Tensor]]) -> None:
        """Choose the first token of each answer to the prompts that were read; rows join.

        What fails for one prompt fails its request alone.
        """
        joined: list[Any] = []
        for job, scores in read:
            try:
                rows = self._begin(job, scores)
                caches = copies(job.cache, len(rows)) if rows else []
            except Exception as error:  # such as no memory for the copies
                self._fail_with(job, error)
                continue
            job.cache = None
            self.rows += rows
            joined += caches
        self.states.join(joined)

    def _begin(self, job: Job, scores: torch.Tensor) -> list[Row]:
        """Choose the first token of each answer to a prompt; return the rows that go on."""
        if job.score_prompt:
            job.deliver(PromptScores([row.number for row in job.rows], job.scores))
        likeliest, [is_fine] = int(scores.argmax(-1)), are_numbers(scores)
        for row in job.rows:
            if job.max_tokens == 0:
                self._end(row, row.answer.end("length"))
            elif not job.is_gone:
                self._take(row, scores, likeliest, is_fine)
        return [row for row in job.rows if not (row.is_done or job.is_gone)]

    def _write_tokens(self) -> None:
        """Write a token of every row."""
        scores = self.states.step([row.tokens[-1] for row in self.rows])
        likeliest, fine = scores.argmax(-1).tolist(), are_numbers(scores)
        for number, row in enumerate(self.rows):
            if not row.job.is_gone:
                self._take(row, scores[number : number + 1], likeliest[number], fine[number])

    def _take(self, row: Row, scores: torch.Tensor, likeliest: int, is_fine: bool) -> None:
        """Choose the next token of a row, given its scores [1, V], and deliver its text.

        `likeliest` is the token with the highest score; `is_fine` if all scores are numbers.
        """
        job = row.job
        try:
            if not is_fine:
                raise DataError("the model's scores for the next token are not numbers")
            token = likeliest if row.sampler.is_plain else row.sampler.choose(scores)
            row.sampler.note(token)
            now = time.monotonic()
            first = not row.tokens
            self.metrics.note_token(now - (job.arrived if first else row.time), is_first=first)
            row.time = now
            row.tokens.append(token)
            if token in job.stop_ids:
                return self._end(row, row.answer.end("stop"))
            found = None
            if job.num_top is not None:
                found = score(scores, [token], job.num_top)[0]
            written = row.answer.add(token, found)
            if written.finish is None and len(row.tokens) >= job.max_tokens:
                last = row.answer.end("length")
                written = Written(written.text + last.text, written.scores + last.scores, "length")
                if last.finish != "length":
                    written = written._replace(finish=last.finish)
            if written.finish is not None:
                return self._end(row, written)
            if written.text or written.scores:
                job.deliver(Piece(row.number, written, len(row.tokens)))
        except Exception as error:
            self._fail_with(job, error)

    def _end(self, row: Row, written: Written) -> None:
        row.is_done = True
        row.job.deliver(Piece(row.number, written, len(row.tokens)))

    def _fail(self, job: Job, status: int, message: str) -> None:
        job.is_gone, job.cache = True, None
        try:
            job.deliver(Failure(status, message))
        except Exception as error:  # it must not cost the other requests their answers
            log.warning("warning: a failure was not delivered: %s", one_line(error))

    def _fail_with(self, job: Job, error: Exception) -> None:
        _log_failure(error)
        self.prefixes.make_room(error)
        is_ours = isinstance(error, DataError)
        self._fail(
            job, 500, one_line(error) if is_ours else "the model failed; see the server's log"
        )

    def _fail_all(self, error: Exception) -> None:
        """Fail all rows, whose states may be half changed, and begin anew without any."""
        rows, self.rows = self.rows, []
        self.prefixes.make_room(error)
        self.states = States(self.model, joined=self.abilities.joined)
        failed = {row.job for row in rows if not row.job.is_gone}
        if not failed:
            _log_failure(error)
        for job in failed:
            self._fail_with(job, error)


def _log_failure(error: Exception) -> None:
    log.warning("warning: a request failed: %s: %s", type(error).__name__, one_line(error))
