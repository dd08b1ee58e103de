"""Sees every key's test of tests/keys.json fail while the key is forgotten: `make test-keys`.

    python -m tests.prove_keys [KEY]       # all keys that begin as the pattern says
    python -m tests.prove_keys KEY TEST    # a key with another test than the table's

Each test is run as it is, then once for each of its keys, and as it is again: it has to pass, fail
every time, and pass.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from tests.forget import forgotten, note_places

TABLE = Path(__file__).with_name("keys.json")
NOT_HERE = ("GPU: ", "the run's")  # entries of the table that name no test
# What a test that was made to fail leaves open is closed in the middle of another.
QUIET = (
    "ignore::pytest.PytestAssertRewriteWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
OPTIONS = (
    "-q",
    "-p",
    "no:cacheprovider",
    "--timeout=1800",
    *(option for quiet in QUIET for option in ("-W", quiet)),
)


class Prover:
    """A pytest plugin; `keys` by the test that is to fail without them."""

    def __init__(self, keys: dict[str, list[str]]):
        self.keys, self.caught = keys, set[str]()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        keys = [*self.keys.get(item.nodeid, ()), *self.keys.get(item.nodeid.partition("[")[0], ())]
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        failed = set()
        if self.passes(item, log=True):
            for key in sorted(set(keys) - self.caught):
                with tempfile.TemporaryDirectory() as folder, forgotten(key, Path(folder)):
                    failed |= set() if self.passes(item) else {key}
            # What failed left nothing behind that makes others fail
            if failed and self.passes(item, log=True):
                self.caught |= failed
                item.config.get_terminal_writer().line(
                    f" {item.nodeid} catches {', '.join(sorted(failed))}"
                )
        item.session._setupstate.teardown_exact(nextitem)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @staticmethod
    def passes(item: pytest.Item, *, log: bool = False) -> bool:
        # As if another test of its module were next: the fixtures of the test alone are done with.
        after: Any = item.parent
        return all(report.passed for report in runtestprotocol(item, log=log, nextitem=after))


def main(key: str = "", *tests: str) -> None:
    table: dict[str, str] = json.loads(TABLE.read_text(encoding="utf-8"))
    named = {
        each: test
        for each, test in table.items()
        if re.match(key, each) and not test.startswith(NOT_HERE)
    }
    to_try = dict.fromkeys([key], tests[0]) if tests else named
    by_test: dict[str, list[str]] = defaultdict(list)
    for each, test in to_try.items():
        by_test[test].append(each)
    prover, started = Prover(by_test), time.monotonic()
    os.environ["FLAME_COMPOSER_FAULTS"] = "1"
    note_places()
    status: Any = pytest.main([*OPTIONS, *by_test], plugins=[prover])
    missed = sorted(set(to_try) - prover.caught)
    print(*(f"NOT CAUGHT: {each}: {to_try[each]}" for each in missed), sep="\n")
    print(
        f"{len(prover.caught)} of {len(to_try)} keys are caught, in"
        f" {(time.monotonic() - started) / 60:.1f} minutes"
    )
    sys.exit(bool(missed or status))


if __name__ == "__main__":
    main(*sys.argv[1:])
