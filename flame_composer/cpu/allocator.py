"""The memory allocator of a process that trains on a CPU."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Make this process keep memory that tensors free for the next ones; return whether it does.

    glibc gives blocks above 32 MB back to Linux whenever they are freed, and the next tensor's
    pages are then cleared and mapped one by one, in every step anew. Steps all need the same sizes.
    Other allocators and C libraries than glibc's are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # The largest threshold: never give back; and no block gets a mapping of its own.
    return bool(mallopt(_M_TRIM_THRESHOLD, -1)) and bool(mallopt(_M_MMAP_MAX, 0))
