"""Many small reads: as many at a time as pays where the files are."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

# Calls at a time: an object store is slow to answer, but answers many at once
THREADS = 16
# Local files that are read one after another before it is looked at how long they took
BATCH = 64
# A disk of a cluster, which has to be waited for: seconds a call, in this many batches in a row
SLOW, SLOW_BATCHES = 1e-3, 4
T = TypeVar("T")
R = TypeVar("R")


def each(do: Callable[[T], R], items: Iterable[T], batch: int = 1) -> Iterator[R]:
    """Yield `do(item)` for every item in order, with many calls at a time; an error stops all.

    A thread calls it for `batch` items one after another, which pays where a call takes less than
    a thread's turn. Items are taken as results are: no more than a few hundred are in memory.
    """
    source = iter(items)
    waiting: deque[Future[list[R]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            while True:
                while len(waiting) < 2 * THREADS and (some := list(islice(source, batch))):
                    waiting.append(pool.submit(lambda some: [do(item) for item in some], some))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def each_local(do: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield what `each` does, where `do` reads a small local file or two.

    A disk that answers at once is read in one thread: others would wait for Python's lock, and take
    twice the processor's time. Only where files have to be waited for are there many at a time.
    """
    source = iter(items)
    num_slow = 0
    while num_slow < SLOW_BATCHES:
        began, used = time.monotonic(), time.thread_time()
        results = [do(item) for item in islice(source, BATCH)]
        if not results:
            return
        waited = time.monotonic() - began - (time.thread_time() - used)
        num_slow = num_slow + 1 if waited > SLOW * len(results) else 0
        yield from results
    yield from each(do, source, BATCH)
