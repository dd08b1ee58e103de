"""Memory that tensors free is kept for the next ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import platform, resource, sys
import torch
from flame_composer.cpu.allocator import keep_freed_memory

is_kept = keep_freed_memory() if sys.argv[1] == "kept" else None
for _ in range(3):
    torch.ones(1 << 24)  # 64 MB: the first ones need pages in any case
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(1 << 24)
print(is_kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> tuple[str, int]:
    command = [sys.executable, "-c", CODE, how]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    is_kept, number = found.stdout.split()
    return is_kept, int(number)


def test_no_page_is_asked_for_twice() -> None:
    is_kept, number = faults("kept")
    if is_kept == "False":
        pytest.skip("this C library has no mallopt")
    assert number < 100
    # With huge pages a fault brings 2 MB: three times 32 at the least
    assert faults("as it is")[1] >= max(96, 10 * number)
