"""Memory that tensors free is kept for the next ones."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from flame_composer.cpu import allocator

CODE = """
import ctypes, resource, runpy, sys, threading, time

how, what, file = sys.argv[1:]
if what == "tensors":
    import torch
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
if how == "refused":  # a process of one thread has one arena only
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    assert library.malloc(1 << 60) is None
is_kept = None if how == "as it is" else runpy.run_path(file)["keep_freed_memory"]()

def take():  # 64 MB
    torch.ones(1 << 24) if what == "tensors" else bytearray(1 << 26)

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):
    take()
print(is_kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, what: str = "buffers") -> tuple[str, int]:
    """Return what keep_freed_memory() said, and the page faults of 32 blocks after it."""
    command = [sys.executable, "-c", CODE, how, what, allocator.__file__]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    is_kept, number = found.stdout.split()
    return is_kept, int(number)


def is_glibc_with_mallinfo2() -> bool:
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 33)


@pytest.mark.skipif(not is_glibc_with_mallinfo2(), reason="glibc 2.33 and later keep memory")
@pytest.mark.parametrize(
    ("what", "fresh"),
    [
        ("buffers", 2),
        # Until glibc 2.38 a tensor needs up to 96 bytes more than the one of its size that was
        # freed, and may get new memory as long as small blocks lie between the large ones.
        ("tensors", 16),
    ],
)
def test_no_page_is_asked_for_twice(what: str, fresh: int) -> None:
    is_kept, number = faults("kept", what)
    assert is_kept == "True"
    # With huge pages a fault brings 2 MB, on either side
    assert number <= fresh / 32 * faults("as it is", what)[1] + 100


@pytest.mark.skipif(not is_glibc_with_mallinfo2(), reason="glibc 2.33 and later keep memory")
def test_a_thread_that_was_refused_memory_keeps_none() -> None:
    is_kept, number = faults("refused")
    assert is_kept == "False"
    assert number >= 32 * 32
