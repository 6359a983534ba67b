"""Name and memory size of the device that a trainer runs on.

`python -m worker.trainer.system.device [BYTES]` prints it as JSON. The supervisor runs that in a child process.
Owns: device names and sizes. Must not import torch on a machine without a GPU: every worker asks when it starts.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shared import linux
from shared.schemas.memory import Device

if TYPE_CHECKING:
    import torch


def main(argv: list[str]) -> int:
    """Print the device as JSON. BYTES is the memory that a run may use; 0 means all of it."""
    limit = int(argv[0]) if argv else 0
    print((_cuda_device(limit) or cpu(memory_bytes=limit)).model_dump_json())
    return 0


def describe(on: torch.device, *, memory_bytes: int) -> Device:
    """Describe the device of a run. `memory_bytes` overrides its memory size; 0 means the physical size."""
    if on.type != "cuda":
        return cpu(memory_bytes=memory_bytes)
    import torch  # noqa: PLC0415 (import cost)

    properties = torch.cuda.get_device_properties(on)
    return Device(kind="cuda", name=properties.name, memory_bytes=memory_bytes or properties.total_memory)


def cpu(*, memory_bytes: int, proc: Path = linux.PROC, cgroups: Path = linux.CGROUPS) -> Device:
    """Describe this machine's CPU and memory. Inside a container, memory is at most its cgroup v2 limit.

    `memory_bytes` overrides the memory size; 0 means the detected one.
    """
    fields = (line.partition(":") for line in (proc / "cpuinfo").read_text(encoding="utf-8").splitlines())
    name = next((value.strip() for key, _, value in fields if key.strip() == "model name"), platform.machine())
    size, limit = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        linux.memory_limit(proc=proc, cgroups=cgroups),
    )
    return Device(kind="cpu", name=name, memory_bytes=memory_bytes or min(size, limit or size))


def _cuda_device(limit: int) -> Device | None:
    """The first visible GPU; None without the driver's library, or if torch cannot use the GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    import torch  # noqa: PLC0415 (import cost)

    return describe(torch.device("cuda", 0), memory_bytes=limit) if torch.cuda.is_available() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
