"""The most memory that this process, or this run, has taken from its device.

The kernel's account of the process on a CPU; torch's and the driver's on a GPU."""

from __future__ import annotations

from pathlib import Path

import torch


def begin() -> None:
    """Forget the peaks of whatever this process did before. Where the kernel does not allow it, they count."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc_pid_clear_refs(5)
    except OSError:
        return


def peak(on: torch.device) -> int:
    """Since `begin`. On a CPU the whole process at its largest; on a GPU all that was taken from it.

    There torch's cache is counted and not only what was in use, and the context, which is whatever else is gone.
    """
    if on.type == "cuda":
        free, total = torch.cuda.mem_get_info(on)
        beside = max(0, total - free - torch.cuda.memory_reserved(on))
        return torch.cuda.max_memory_reserved(on) + beside
    return process_peak()


def process_peak() -> int:
    """The most resident bytes that this process had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
