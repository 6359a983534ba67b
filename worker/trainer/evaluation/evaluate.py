"""Score a model on rows, with its adapter or without.

Owns: switching to eval mode and back, and the loss of each row, so that two scores can be compared row by row. Must
leave the model as it was: in train mode, with its gradients, and with no random number drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from shared.schemas.results import Recipe, Score
from worker.trainer import methods
from worker.trainer.data.encoding import Row
from worker.trainer.forward import threads
from worker.trainer.forward.batches import Batch
from worker.trainer.forward.interrupted import Interrupted
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import Loss, Tally
from worker.trainer.model.base import Base
from worker.trainer.model.full_weights import Adapted
from worker.trainer.model.initial_adapter import InitialAdapter


@dataclass(frozen=True, slots=True)
class RowScores:
    """A score with the losses behind it, in the order of the rows that were passed in.

    `nats` (rows,) is each row's summed loss, and `weights` (rows,) its weight in the mean.
    """

    mean: Score
    nats: npt.NDArray[np.float32]
    weights: npt.NDArray[np.int64]


def score(
    base: Base,
    adapted: Adapted,
    rows: Sequence[Row],
    recipe: Recipe,
    *,
    adapter: bool,
    layout: Layout,
    start: InitialAdapter | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> RowScores:
    """Score `rows` with the loss of the recipe's method, with the adapter or by the base alone.

    `start` is the adapter from which training started, if any. Raises Interrupted once `stopping` returns True.
    """
    tally, index = Tally(), {row.line: i for i, row in enumerate(rows)}
    nats, weights = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int64)

    def check_stop() -> None:
        if stopping():
            raise Interrupted

    def loss_of(batch: Batch) -> Loss:
        with torch.no_grad(), base.precision():  # both apply to the current thread only
            return methods.loss(adapted, batch.to(base.device), layout, recipe, start=start)

    with forward_only(base, adapted, adapter=adapter):
        for loss in threads.run_in_order(loss_of, layout.split(rows), layout.lanes, before=check_stop):
            tally.add(loss)
            indices = [index[line] for line in loss.lines]  # batches are sorted by length
            nats[indices], weights[indices] = loss.sums.cpu().numpy(), loss.counts
    return RowScores(tally.score(), nats, weights)


@contextmanager
def forward_only(base: Base, adapted: Adapted, *, adapter: bool) -> Iterator[None]:
    """Put the model in eval mode without gradients, with its adapter or as the base alone; train mode afterwards."""
    adapted.eval()
    try:
        with torch.no_grad(), base.precision(), nullcontext() if adapter else adapted.disable_adapter():
            yield
    finally:
        adapted.train()
