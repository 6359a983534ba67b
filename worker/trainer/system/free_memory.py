"""Return unused memory to the device and the operating system.

Owns: the three places that keep it: Python reference cycles, torch's GPU cache, and the C library's heap.
"""

from __future__ import annotations

import ctypes
import gc

import torch


def free() -> None:
    """Collect reference cycles, empty torch's GPU cache, and trim the C heap.

    Call it outside of an `except` block: a traceback keeps activations alive. A base in 4 bits is a reference cycle
    (bitsandbytes' weights refer to their layer), so only the garbage collector frees it.
    """
    gc.collect()
    torch.cuda.empty_cache()
    _trim_heap()


def _trim_heap() -> None:
    """Return the allocator's unused pages, of all its arenas: backward runs in another thread, which has its own."""
    process = ctypes.CDLL(None)
    if hasattr(process, "mallctl"):  # jemalloc; 4096 is MALLCTL_ARENAS_ALL (jemalloc(3))
        process.mallctl(b"arena.4096.purge", None, None, None, ctypes.c_size_t(0))
    else:
        process.malloc_trim(0)
