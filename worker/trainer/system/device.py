"""The device that a trainer runs on; `python -m worker.trainer.machine [BYTES]` prints it for the supervisor.

Owns: names and sizes of devices. Must not import torch where there is no GPU: a worker asks when it starts.
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
    """Print the device as JSON; BYTES is what a run may take, 0 all that there is."""
    limit = int(argv[0]) if argv else 0
    print((_if_cuda(limit) or cpu(memory_bytes=limit)).model_dump_json())
    return 0


def describe(on: torch.device, *, memory_bytes: int) -> Device:
    """The device of a run. With `memory_bytes` it has that much, otherwise all that it was built with."""
    if on.type != "cuda":
        return cpu(memory_bytes=memory_bytes)
    import torch  # noqa: PLC0415 (import cost)

    properties = torch.cuda.get_device_properties(on)
    return Device(kind="cuda", name=properties.name, memory_bytes=memory_bytes or properties.total_memory)


def cpu(*, memory_bytes: int, proc: Path = linux.PROC, cgroups: Path = linux.CGROUPS) -> Device:
    """This machine's processor and memory, or what the container that we are in may take of it (cgroup v2)."""
    fields = (line.partition(":") for line in (proc / "cpuinfo").read_text(encoding="utf-8").splitlines())
    name = next((value.strip() for key, _, value in fields if key.strip() == "model name"), platform.machine())
    size, limit = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        linux.memory_limit(proc=proc, cgroups=cgroups),
    )
    return Device(kind="cpu", name=name, memory_bytes=memory_bytes or min(size, limit or size))


def _if_cuda(limit: int) -> Device | None:
    """The first visible GPU, if the driver's library is here and torch can use it."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    import torch  # noqa: PLC0415 (import cost)

    return describe(torch.device("cuda", 0), memory_bytes=limit) if torch.cuda.is_available() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
