"""Measure the peak memory of this process or run.

On a CPU the kernel counts it; on a GPU torch and the driver do.
"""

from __future__ import annotations

from pathlib import Path

import torch


def begin() -> None:
    """Reset the peaks. Where the kernel does not allow it, memory used earlier by this process still counts."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc_pid_clear_refs(5)
    except OSError:
        return


def peak(on: torch.device) -> int:
    """Peak bytes since `begin`: on a CPU of the whole process, on a GPU everything allocated on it.

    The GPU figure is torch's peak reserved memory, cache included, plus whatever else is allocated there now, such as
    the CUDA context.
    """
    if on.type == "cuda":
        free, total = torch.cuda.mem_get_info(on)
        outside_torch = max(0, total - free - torch.cuda.memory_reserved(on))
        return torch.cuda.max_memory_reserved(on) + outside_torch
    return process_peak()


def process_peak() -> int:
    """Peak resident bytes of this process (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
