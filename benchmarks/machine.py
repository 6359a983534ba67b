"""Describe the machine of a benchmark: processor, package versions, and the speed of bf16 matrix products.

Owns: the description of the machine. Must not know what is measured.
"""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
#: CPU features that speed up 16-bit matrix products, by their names in /proc/cpuinfo.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "sve", "bf16")
CPU = torch.device("cpu")
SIZE, GPU_SIZE, SECONDS = 2048, 8192, 3.0


def describe() -> dict[str, object]:
    """Processor, memory, load and Python version. `cores` counts those that this process may use."""
    fields = _cpuinfo()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Version of each package in PACKAGES."""
    return {name: version(name) for name in PACKAGES}


def bf16_flops(device: torch.device = CPU) -> float:
    """FLOP/s of a large square bf16 matrix product, on all cores of a CPU: the best within a few seconds."""
    size = SIZE if device.type == "cpu" else GPU_SIZE
    left, right = torch.randn(2, size, size, device=device).bfloat16()
    best, until = 0.0, time.monotonic() + SECONDS
    while time.monotonic() < until:
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
