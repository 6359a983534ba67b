"""Whether an error says that memory ran out: nobody's fault but the machine's.

Owns: the many names of that error. Must not import torch: the child answers its pipe before that is loaded.
"""

from __future__ import annotations

import errno

#: What torch's CPU allocator says in a plain RuntimeError, and what the kernel says through safetensors.
WORDS = ("can't allocate memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, CUDA's, the kernel's, and those that can only be told by their words."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(words in str(error) for words in WORDS)
    )
