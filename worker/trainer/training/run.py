"""The state of one run, and what every part of it needs: reporting, and falling back when memory runs out.

Owns: everything that lives as long as the training loop. Must not know about pipes or processes: it gets `emit` and
`stopping` from the caller.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from shared.schemas.results import Metrics, Recipe
from worker.trainer.data.dataset import Split
from worker.trainer.evaluation.evaluate import RowScores
from worker.trainer.forward import fallback
from worker.trainer.forward.interrupted import Interrupted
from worker.trainer.forward.layout import Layout
from worker.trainer.model import fused_lora
from worker.trainer.model.adapter_weights import Tensors
from worker.trainer.model.base import Base, keep_activations
from worker.trainer.model.full_weights import Adapted
from worker.trainer.model.initial_adapter import InitialAdapter
from worker.trainer.protocol import Measured, Notice, Train, TrainerEvent
from worker.trainer.system import free_memory
from worker.trainer.system.resource_errors import is_out_of_memory
from worker.trainer.training.checkpoint import RunState
from worker.trainer.training.memory_account import MemoryAccount

Emit = Callable[[TrainerEvent], None]
T = TypeVar("T")


@dataclass(slots=True)
class Run:
    """One run of the training loop.

    `levels` are the layouts from the widest down; `state.fallback_level` is the index of the one in use. `start` is the
    adapter from which training started, if any. `best` is the adapter with the lowest held-out loss, kept only for
    early stopping. `saved_step` is the step of the latest checkpoint, and `save_tried_at` the time of the latest
    attempt to write one, in seconds on the monotonic clock. `latest` is the last held-out score with its step;
    checkpoints do not contain it, so a resumed run scores again.
    """

    command: Train
    emit: Emit
    stopping: Callable[[], bool]
    rows: Split
    base: Base
    adapted: Adapted
    optimizer: torch.optim.Optimizer
    levels: list[Layout]
    state: RunState
    start: InitialAdapter | None
    account: MemoryAccount
    best: Tensors | None
    saved_step: int
    save_tried_at: float
    latest: tuple[int, RowScores] | None = None
    disk_is_full: bool = False

    @property
    def recipe(self) -> Recipe:
        return self.command.recipe

    @property
    def layout(self) -> Layout:
        return self.levels[self.state.fallback_level]

    def log(self, message: str, level: str = "info") -> None:
        """Add a line to the job's events."""
        log(self.emit, self.command.job, message, level)

    def record(self, metrics: Metrics) -> None:
        """Report metrics, and keep them for the checkpoint."""
        self.state.metrics.append(metrics)
        self.emit(Measured(job=self.command.job, metrics=metrics))

    def check_stop(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self.stopping():
            raise Interrupted


def log(emit: Emit, job: str, message: str, level: str = "info") -> None:
    """Add a line to the job's events."""
    emit(Notice.model_validate({"job": job, "level": level, "message": message}))


def with_fallback(run: Run, act: Callable[[], T], *, when: str) -> T:
    """Call `act`; each time it runs out of memory, go one fallback level down and call it again.

    An error of another kind, or on the lowest level, is raised. `when` completes the sentence "out of memory …" in the
    job's events.
    """
    while True:
        try:
            return act()
        except Exception as error:
            if not is_out_of_memory(error) or run.layout is run.levels[-1]:
                raise
            traceback.print_exc()
        free_memory.free()  # after `except`: until then the traceback keeps activations alive
        wider = run.layout
        run.state.fallback_level += 1
        fused_lora.drop_resident_weights(run.adapted)
        keep_activations(run.adapted, kept=not run.layout.checkpointing)
        change = fallback.difference(wider, run.layout)
        run.log(f"out of memory {when}: {change}; the result is the same up to rounding", "warn")
