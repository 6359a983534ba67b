"""Memory that nobody holds any more, given back.

Owns: the three that keep it: Python's cycles, torch's cache on a GPU, and the C library's heap.
"""

from __future__ import annotations

import ctypes
import gc

import torch


def free() -> None:
    """Call it outside of an `except` block: a traceback holds activations.

    A base in 4 bits is a cycle (bitsandbytes' weights know their layer), and goes with a collection alone.
    """
    gc.collect()
    torch.cuda.empty_cache()
    # Each thread has an arena of its own, and backward is another thread: what one hoards, the other cannot have.
    ctypes.CDLL(None).malloc_trim(0)
