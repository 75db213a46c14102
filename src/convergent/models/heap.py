"""Memory that tensors free is kept by the process for the next ones.

glibc hands large blocks back to the system and asks for them anew, and every 4 KiB page of a new block costs a fault: where these are slow, as in a virtual
machine, a seventh of a pass over texts.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import sys
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT = 1 << 30
_MOST_MMAP = 32 << 20
"""What an older glibc accepts."""


@functools.cache
def keep_freed() -> bool:
    """Let glibc keep up to 1 GiB that is free at the end of its heaps, once per process; False where there is another library, or the user has set it."""
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = mallopt(_MMAP_THRESHOLD, _KEPT) or mallopt(_MMAP_THRESHOLD, _MOST_MMAP)
    return bool(kept and mallopt(_TRIM_THRESHOLD, _KEPT))


def give_back() -> None:
    """Collect what nothing refers to, and let the C library return what was freed; elsewhere than with glibc only the first."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
