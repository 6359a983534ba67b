"""A score on rows: forward only, with the adapter on or off.

Owns: switching to evaluation and back, and what each row came to, so that two scores can be compared row by row. Must
leave the model as it was: in train mode, no gradient touched, no random number drawn.
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
    """A score, and what it is the mean of: each row's summed loss in `nats` (rows,) and its `weights` (rows,) in
    that mean, in the order that the rows were given in.
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
    """`rows` as the recipe's method takes them; `start` is the adapter that training began with, if it did with one.

    Raises Interrupted once `stopping` says so.
    """
    tally, place = Tally(), {row.line: i for i, row in enumerate(rows)}
    nats, weights = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int64)

    def go_on() -> None:
        if stopping():
            raise Interrupted

    def loss_of(batch: Batch) -> Loss:
        with torch.no_grad(), base.precision():  # which are of each thread
            return methods.loss(adapted, batch.to(base.device), layout, recipe, start=start)

    with forward_only(base, adapted, adapter=adapter):
        for loss in threads.run_in_order(loss_of, layout.split(rows), layout.lanes, before=go_on):
            tally.add(loss)
            # A batch has its rows in an order of its own.
            places = [place[line] for line in loss.lines]
            nats[places], weights[places] = loss.sums.cpu().numpy(), loss.counts
    return RowScores(tally.score(), nats, weights)


@contextmanager
def forward_only(base: Base, adapted: Adapted, *, adapter: bool) -> Iterator[None]:
    """The model as it answers rather than learns, with its adapter or as the base alone; in train mode afterwards."""
    adapted.eval()
    try:
        with torch.no_grad(), base.precision(), nullcontext() if adapter else adapted.disable_adapter():
            yield
    finally:
        adapted.train()
