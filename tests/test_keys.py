"""Every key of docs/configuration.md has a test that fails when the product forgets it:
tests/keys.json, `make test-keys`.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import psutil

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


SERVER = """
import os, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(900)
"""
TESTS = """
import time
from pathlib import Path
import pytest
from tests import runs
runs._FORKS.set_forkserver_preload([])
FOLDER = Path(__file__).parent

def start(name):
    script = runs.Script(FOLDER / "server.py", FOLDER / name)
    while not (FOLDER / name).exists() or not (FOLDER / name).read_text():
        time.sleep(0.01)
    return script

@pytest.fixture(scope="module")
def of_module():
    yield start("module")  # and is never ended

@pytest.fixture(scope="module")
def halfway():
    start("halfway")
    assert False

def test_one(of_module):
    start("test")
    assert False

def test_two(of_module):
    assert of_module.process.is_alive()
    assert not runs.psutil.pid_exists(int((FOLDER / "test").read_text().split()[0]))

def test_three(halfway):
    pass
"""


def test_a_test_that_fails_ends_its_servers(tmp_path: Path) -> None:
    """pytest would wait for them in the end; those of a module's fixture live on until then."""
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "test_inner.py").write_text(TESTS)
    options = ("-q", "-p", "tests.runs", "-p", "no:cacheprovider", f"--rootdir={tmp_path}")
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_inner.py")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "1 failed, 1 passed, 1 error" in result.stdout, result.stdout
    for name in ("test", "module", "halfway"):
        for process in map(int, (tmp_path / name).read_text().split()):
            assert not psutil.pid_exists(process) or psutil.Process(process).status() == "zombie"
