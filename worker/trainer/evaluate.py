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
from peft import PeftModel

from shared.schemas import Score
from worker.trainer.batches import batches
from worker.trainer.encoding import Encoded
from worker.trainer.likelihood import Layout
from worker.trainer.methods import sft
from worker.trainer.model import Base


class Interrupted(Exception):
    """A stop was asked for while rows were being scored, continued or trained on."""


@dataclass(frozen=True, slots=True)
class RowScores:
    """A score, and what it is the mean of: each row's summed loss in `nats` (rows,) and its `weights` (rows,), the
    trained tokens, in the order that the rows were given in.
    """

    mean: Score
    nats: npt.NDArray[np.float32]
    weights: npt.NDArray[np.int64]


def score(
    base: Base,
    adapted: PeftModel,
    rows: Sequence[Encoded],
    *,
    adapter: bool,
    layout: Layout,
    stopping: Callable[[], bool] = lambda: False,
) -> Score:
    """Mean loss and token accuracy over the trained tokens of `rows`. Raises Interrupted once `stopping` says so."""
    return score_rows(base, adapted, rows, adapter=adapter, layout=layout, stopping=stopping).mean


def score_rows(
    base: Base,
    adapted: PeftModel,
    rows: Sequence[Encoded],
    *,
    adapter: bool,
    layout: Layout,
    stopping: Callable[[], bool] = lambda: False,
) -> RowScores:
    """The same, row by row."""
    total, correct, tokens = 0.0, 0, 0
    place = {row.line: i for i, row in enumerate(rows)}
    nats, weights = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int64)
    with forward_only(base, adapted, adapter=adapter):
        for batch in batches(rows, packing=layout.packing, micro_batch=layout.micro_batch, pad=layout.pad):
            if stopping():
                raise Interrupted
            loss = sft.loss(base.model, batch.to(base.device), layout)
            total += loss.sum.item()
            correct += int(loss.correct.item())
            tokens += loss.tokens
            # A batch has its rows in an order of its own.
            places = [place[line] for line in batch.lines]
            nats[places], weights[places] = loss.nats.cpu().numpy(), batch.lengths
    return RowScores(Score(loss=total / tokens, token_accuracy=correct / tokens, tokens=tokens), nats, weights)


@contextmanager
def forward_only(base: Base, adapted: PeftModel, *, adapter: bool) -> Iterator[None]:
    """The model as it answers rather than learns, with its adapter or as the base alone; in train mode afterwards."""
    adapted.eval()
    try:
        with torch.no_grad(), base.precision(), nullcontext() if adapter else adapted.disable_adapter():
            yield
    finally:
        adapted.train()
