"""Whether an error is nobody's fault but the machine's: memory or disk ran out, or the kernel refused a file.

Owns: the many names of those errors. Must not import torch: the child answers its pipe before that is loaded.
"""

from __future__ import annotations

import errno

#: What torch's CPU allocator says in a plain RuntimeError, the kernel through safetensors, CUDA and cuBLAS outside of
#: torch's caching allocator, and C++ through anybody.
NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory"),
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc"),
)

#: No space, no quota, or more than a file may be.
NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, CUDA's, the kernel's, and those that can only be told by their words.

    Not oneDNN's "could not create a primitive", although that is often about memory: a thread that has met it once
    creates none ever after (seen with torch 2.13, in bf16 on a CPU), so only a fresh process helps.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(words in str(error) for words in NO_MEMORY)
    )


def is_disk_full(error: BaseException) -> bool:
    """The kernel's, and Rust's of safetensors and tokenizers, which only quote its number."""
    return (
        (isinstance(error, OSError) and error.errno in NO_DISK)
        or "No space left on device" in str(error)
        or any(f"(os error {number})" in str(error) for number in NO_DISK)
    )


def is_the_kernels(error: BaseException) -> bool:
    """Did the kernel say it (EIO, ESTALE, EACCES), to Python or to Rust? The OSErrors of libraries have no number."""
    return (isinstance(error, OSError) and error.errno is not None) or "(os error " in str(error)
