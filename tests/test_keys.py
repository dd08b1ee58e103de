"""Every key of docs/configuration.md has a test that fails when the product forgets it:
tests/keys.json, `make test-keys`.
"""

from __future__ import annotations

import ast
import json

from tests.forget import ROOT, config_keys, extension_keys
from tests.prove_keys import NOT_HERE, TABLE


def test_every_key_has_a_test_and_every_such_test_exists():
    table: dict[str, str] = json.loads(TABLE.read_text(encoding="utf-8"))
    assert list(table) == sorted([*config_keys(), *extension_keys()]), (
        "add a key with the test that fails without it"
    )
    tests = {entry for entry in table.values() if not entry.startswith(NOT_HERE)}
    defined: set[str] = set()
    for file in {test.partition("::")[0] for test in tests}:
        nodes = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        defined |= {f"{file}::{node.name}" for node in nodes if isinstance(node, ast.FunctionDef)}
    assert {test.partition("[")[0] for test in tests} <= defined
