"""Recognize errors that the machine causes: out of memory, disk full, or a file that the kernel cannot read or write.

Owns: the different exceptions and messages that report them. Must not import torch: the child must answer its pipe
before torch is loaded.
"""

from __future__ import annotations

import errno

#: Messages for lack of memory: of torch's CPU allocator (a plain RuntimeError), of the kernel through safetensors, of
#: CUDA and cuBLAS outside of torch's caching allocator, and of C++.
NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory"),
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc"),
)

#: No space left, quota exceeded, or file too large.
NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, CUDA's or the kernel's error, or one known only by its message.

    oneDNN's "could not create a primitive" does not count, although lack of memory often causes it: after it, the
    same thread can create no primitive at all (seen with torch 2.13, in bf16 on a CPU), so only a new process helps.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(words in str(error) for words in NO_MEMORY)
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk is full: an OSError, or an error of safetensors or tokenizers (Rust) that quotes its number."""
    return (
        (isinstance(error, OSError) and error.errno in NO_DISK)
        or "No space left on device" in str(error)
        or any(f"(os error {number})" in str(error) for number in NO_DISK)
    )


def is_kernel_error(error: BaseException) -> bool:
    """Whether the kernel reported it (EIO, ESTALE, EACCES), to Python or to Rust.

    The OSErrors that libraries raise themselves have no errno.
    """
    return (isinstance(error, OSError) and error.errno is not None) or "(os error " in str(error)
