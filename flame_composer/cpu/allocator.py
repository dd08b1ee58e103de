"""The memory allocator of a process that trains on a CPU."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_BLOCK = 1 << 26  # bytes; above 32 MB, as of which glibc would always give memory back


class _Mallinfo2(ctypes.Structure):
    """What glibc's allocator holds, in bytes or blocks (malloc.h)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def keep_freed_memory() -> bool:
    """Make this process keep memory that tensors free for the next ones; return whether it does.

    glibc gives blocks above 32 MB back to Linux whenever they are freed, and the next tensor's
    pages are then cleared and mapped one by one, in every step anew. Steps all need the same sizes.

    Other allocators, C libraries than glibc's and glibc before 2.33 are left as they are. A thread
    to which malloc once had to refuse memory cannot keep large blocks: glibc has given it an arena
    of its own, whose large blocks always are mappings.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, mallinfo2 = library.mallopt, library.mallinfo2
    except (OSError, AttributeError):
        return False
    # The largest threshold: never give back; and no block gets a mapping of its own.
    if not (mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_MMAP_MAX, 0)):
        return False
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    mallinfo2.restype = _Mallinfo2
    before = mallinfo2().uordblks  # in use, but for what has a mapping of its own
    block = library.malloc(_BLOCK)  # no page of it is touched
    is_kept = bool(mallinfo2().uordblks - before >= _BLOCK)
    library.free(block)
    return is_kept
