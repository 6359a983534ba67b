"""What a run takes of its device's memory: the device itself, the peak so far, and what fit.py computes for it.

Owns: measuring. The kernel's account of this process on a CPU, torch's and the driver's on a GPU. Must not decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.errors import InvalidRequest
from shared.estimation import memory_model
from shared.estimation.architecture import Architecture
from shared.estimation.correction import corrected
from shared.protocol import Task
from shared.schemas.memory import Device, MeasuredFit, Weighing
from shared.schemas.results import Recipe
from worker.trainer import machine
from worker.trainer.encoding import Row
from worker.trainer.likelihood import Layout
from worker.trainer.model import Base
from worker.trainer.packing import heaviest
from worker.trainer.sizing import known_architecture, setup


@dataclass(slots=True)
class Account:
    """Of one attempt. `base` is None where fit.py does not know the architecture: then nothing is predicted.

    `from_step` is where the attempt began; `rehearsed_bytes` the peak after the heaviest micro-batch was tried.
    """

    device: Device
    base: Architecture | None
    weighings: list[Weighing]
    from_step: int
    rehearsed_bytes: int | None = None


def begin() -> None:
    """Forget the peaks of whatever this process did before. Where the kernel does not allow it, they count."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc_pid_clear_refs(5)
    except OSError:
        return


def open_account(base: Base, task: Task, recipe: Recipe, *, from_step: int) -> Account:
    device = machine.describe(base.device, memory_bytes=task.device_memory_bytes)
    same = (known.weighings for known in task.devices if (known.kind, known.name) == (device.kind, device.name))
    return Account(device, known_architecture(task.base_dir, recipe), next(same, []), from_step)


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


def measured(
    account: Account, on: torch.device, examples: Sequence[Row], recipe: Recipe, layout: Layout
) -> MeasuredFit | None:
    """Predicted and measured, for the layout that the run ended with. None where nothing can be predicted."""
    if account.base is None:
        return None
    found = heaviest(
        examples,
        recipe,
        packing=layout.packing,
        micro_batch=layout.micro_batch,
        lanes=layout.lanes,
        from_step=account.from_step,
    )
    try:
        computed = memory_model.peak_memory(
            account.base, setup(recipe, found, kind=account.device.kind, checkpointing=layout.checkpointing)
        )
    except InvalidRequest:
        return None
    return MeasuredFit(
        device=account.device,
        rows=found.rows,
        length=found.length,
        computed_bytes=computed.total,
        predicted_bytes=corrected(account.weighings, computed.total),
        rehearsed_bytes=account.rehearsed_bytes,
        measured_bytes=peak(on),
    )
