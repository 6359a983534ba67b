"""Try the heaviest micro-batch before step 1, so that a run short of memory finds out at once and not after hours.

Owns: whether a trial is worth its time, and leaving no trace of it. The trial also allocates the gradients and AdamW
moments that exist in later steps but not in the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel

from shared.schemas.results import Recipe
from worker.trainer.data import dataset, packing
from worker.trainer.data.encoding import Row
from worker.trainer.data.packing import Heaviest
from worker.trainer.forward.layout import Layout
from worker.trainer.model.base import trainable
from worker.trainer.system import peak_memory
from worker.trainer.training import random_state
from worker.trainer.training.memory_account import MemoryAccount
from worker.trainer.training.run import Run, with_fallback
from worker.trainer.training.step import accumulate

#: With fewer steps left, a trial would take more than a twentieth of the time, and the heaviest rows come soon anyway.
FEWEST_STEPS = 20
#: fp32 tensors that AdamW keeps for each parameter.
MOMENTS = 2


def try_heaviest_rows(run: Run) -> None:
    """Run the heaviest micro-batch of the run forward and backward, if that is worth its time.

    If memory runs out, the run goes down its fallback levels. Raises Interrupted if a stop is requested, and the error
    of the lowest level.
    """
    rows, recipe = run.rows.train, run.recipe
    if heaviest(rows, recipe, run.layout, step=run.state.step) is None:
        return
    random_before = random_state.torch_random()

    def act() -> Heaviest | None:
        found = heaviest(rows, recipe, run.layout, step=run.state.step)
        if found is not None:
            examples = dataset.step_examples(rows, found.step, batch_size=recipe.batch_size, seed=recipe.seed)
            with as_after_steps(run.adapted, run.optimizer):
                accumulate(run, examples, turn=found.turn)
        return found

    tried = with_fallback(run, act, when="in the trial of the longest rows")
    run.optimizer.zero_grad()
    random_state.set_torch_random(random_before)
    run.account.rehearsed_bytes = peak_memory.peak(run.base.device)
    run.log(described(tried, run.account))


def heaviest(rows: Sequence[Row], recipe: Recipe, layout: Layout, *, step: int) -> Heaviest | None:
    """The heaviest micro-batch from `step` on. None if few steps are left, or if `step` itself contains it."""
    if recipe.total_steps - step < FEWEST_STEPS:
        return None
    found = packing.heaviest(
        rows, recipe, packing=layout.packing, micro_batch=layout.micro_batch, lanes=layout.lanes, from_step=step
    )
    return None if found.step == step else found


@contextmanager
def as_after_steps(adapted: PeftModel, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give every parameter a gradient, and hold as much memory as the optimizer's moments will take."""
    held = []
    for parameter in trainable(adapted).values():
        parameter.grad = torch.ones_like(parameter)  # ones, not empty: Linux assigns pages only once they are written
        if not optimizer.state.get(parameter):
            held += [torch.ones_like(parameter) for _ in range(MOMENTS)]
    yield
    del held


def described(tried: Heaviest | None, account: MemoryAccount) -> str:
    """The outcome of the trial, as an event's message."""
    assert account.rehearsed_bytes is not None
    peak = f"peak memory so far {account.rehearsed_bytes / 1e9:.2f} GB"
    if tried is None:
        return f"the longest rows are in the first step anyway; {peak}"
    shape = f"{tried.rows} x {tried.length:,} tokens of step {tried.step + 1}"
    return f"tried the longest rows: {shape}; {peak}"
