"""A score on rows: forward only, with the adapter on or off.

Owns: switching to evaluation and back. Must leave the model as it was: in train mode, no gradient touched, no random
number drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from peft import PeftModel

from shared.schemas import Recipe, Score
from worker.trainer import methods
from worker.trainer.batches import batches
from worker.trainer.encoding import Row
from worker.trainer.likelihood import Layout
from worker.trainer.methods import Tally
from worker.trainer.model import Base


class Interrupted(Exception):
    """A stop was asked for while rows were being scored or trained on."""


def score(
    base: Base,
    adapted: PeftModel,
    rows: Sequence[Row],
    recipe: Recipe,
    *,
    adapter: bool,
    layout: Layout,
    stopping: Callable[[], bool] = lambda: False,
) -> Score:
    """The means over `rows`, as the recipe's method takes them. Raises Interrupted once `stopping` says so."""
    tally = Tally()
    adapted.eval()
    try:
        with torch.no_grad(), base.precision(), nullcontext() if adapter else adapted.disable_adapter():
            for batch in batches(rows, packing=layout.packing, micro_batch=layout.micro_batch, pad=layout.pad):
                if stopping():
                    raise Interrupted
                tally.add(methods.loss(adapted, batch.to(base.device), layout, recipe))
    finally:
        adapted.train()
    return tally.score()
