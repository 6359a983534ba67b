"""Resource errors are recognized by the messages that the kernel, torch and Rust libraries really write."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors import SafetensorError

from worker.trainer.system.resource_errors import is_disk_full, is_kernel_error, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "memory", "disk"),
    [
        (MemoryError(), True, False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True, False),
        (RuntimeError("could not create a primitive"), False, False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True, False),
        (OSError(errno.ENOSPC, "No space left on device"), False, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), False, True),
        (OSError(errno.EFBIG, "File too large"), False, True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), False, True),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), False, True),
        (OSError(errno.EIO, "Input/output error"), False, False),
        (ValueError("line 28"), False, False),
    ],
)
def test_lack_of_memory_and_a_full_disk_are_distinguished(error: Exception, memory: bool, disk: bool) -> None:
    assert (is_out_of_memory(error), is_disk_full(error)) == (memory, disk)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (OSError("No such device (os error 19)"), True),
        (SafetensorError("Error while deserializing: I/O error: Stale file handle (os error 116)"), True),
        (OSError("Error no file named model.safetensors found in directory"), False),
        (ValueError("5"), False),
    ],
)
def test_errors_of_the_kernel_are_recognized_by_their_number(error: Exception, expected: bool) -> None:
    assert is_kernel_error(error) is expected
