"""The longest rows first, as a trial: what is tried before step 1, when that is worth it, and what is said of it.

Owns: the choice, the memory that later steps have and the first lacks, and leaving no trace. Must not run the model:
it is given what does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
from worker.trainer.training.memory_account import Account

if TYPE_CHECKING:
    from worker.trainer.training.loop import Run

#: In fewer steps than these a trial would cost a twentieth of the run, and the heaviest rows come soon anyway.
FEWEST_STEPS = 20
#: fp32 tensors that AdamW keeps of each parameter.
MOMENTS = 2


def try_heaviest_rows(run: Run, accumulate: Callable[..., object], narrowing: Callable[..., Heaviest | None]) -> None:
    """The heaviest micro-batch before all others: memory that is short is short now, not in hours.

    Left out where it is not worth its time. Raises Interrupted when a stop is asked for, and what the lowest rung of
    the ladder raised.
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

    tried = narrowing(run, act, when="in the trial of the longest rows")
    run.optimizer.zero_grad()
    random_state.set_torch_random(random_before)
    run.account.rehearsed_bytes = peak_memory.peak(run.base.device)
    run.say(told(tried, run.account))


def heaviest(rows: Sequence[Row], recipe: Recipe, layout: Layout, *, step: int) -> Heaviest | None:
    """The heaviest micro-batch from `step` on; None in a short run, or where that very step has it."""
    if recipe.total_steps - step < FEWEST_STEPS:
        return None
    found = packing.heaviest(
        rows, recipe, packing=layout.packing, micro_batch=layout.micro_batch, lanes=layout.lanes, from_step=step
    )
    return None if found.step == step else found


@contextmanager
def as_after_steps(adapted: PeftModel, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Every parameter has a gradient, and the optimizer its moments, or as much memory as those will take."""
    held = []
    for parameter in trainable(adapted).values():
        parameter.grad = torch.ones_like(parameter)  # written to, or a CPU would not give the pages
        if not optimizer.state.get(parameter):
            held += [torch.ones_like(parameter) for _ in range(MOMENTS)]
    yield
    del held


def told(tried: Heaviest | None, account: Account) -> str:
    """In the words of an event."""
    assert account.rehearsed_bytes is not None
    peak = f"peak memory so far {account.rehearsed_bytes / 1e9:.2f} GB"
    if tried is None:
        return f"the longest rows come first anyway; {peak}"
    shape = f"{tried.rows} x {tried.length:,} tokens of step {tried.step + 1}"
    return f"the longest rows went through as a trial: {shape}; {peak}"
