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
    # The C library has one arena per thread, and backward runs in another thread: memory that is free in one arena is
    # not available to the other.
    ctypes.CDLL(None).malloc_trim(0)
