"""Peak memory of a run, predicted and measured, for the report.

Owns: bringing both together. The prediction comes from `shared/estimation/memory_model.py`, the measurement from the
kernel on a CPU, and from torch and the driver on a GPU. Must not decide anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.errors import InvalidRequest
from shared.estimation import memory_model
from shared.estimation.architecture import Architecture
from shared.estimation.correction import corrected
from shared.schemas.memory import Device, MeasuredFit, Weighing
from shared.schemas.results import Recipe
from worker.trainer.data.encoding import Row
from worker.trainer.data.packing import heaviest
from worker.trainer.forward.layout import Layout
from worker.trainer.model.base import Base
from worker.trainer.planning.sizing import known_architecture, setup
from worker.trainer.protocol import Task
from worker.trainer.system.device import describe
from worker.trainer.system.peak_memory import peak


@dataclass(slots=True)
class MemoryAccount:
    """The memory of one attempt.

    `base` is None if the memory model does not know the architecture; then nothing is predicted. `weighings` are
    earlier measurements on devices of this kind and name. `from_step` is the step at which the attempt began,
    `rehearsed_bytes` the peak after the trial of the heaviest micro-batch.
    """

    device: Device
    base: Architecture | None
    weighings: list[Weighing]
    from_step: int
    rehearsed_bytes: int | None = None


def open_account(base: Base, task: Task, recipe: Recipe, *, from_step: int) -> MemoryAccount:
    """Start the account of an attempt that begins at `from_step`."""
    device = describe(base.device, memory_bytes=task.device_memory_bytes)
    weighings = (known.weighings for known in task.devices if (known.kind, known.name) == (device.kind, device.name))
    return MemoryAccount(device, known_architecture(task.base_dir, recipe), next(weighings, []), from_step)


def measured(
    account: MemoryAccount, on: torch.device, examples: Sequence[Row], recipe: Recipe, layout: Layout
) -> MeasuredFit | None:
    """Predicted and measured peak memory for the layout at the end of the run. None if nothing can be predicted."""
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
