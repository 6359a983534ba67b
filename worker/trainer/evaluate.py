"""A score on rows: forward only, with the adapter on or off.

Owns: switching to evaluation and back. Must leave the model as it was: in train mode, no gradient touched, no random
number drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from peft import PeftModel

from shared.schemas import Score
from worker.trainer.batches import batches
from worker.trainer.encoding import Encoded
from worker.trainer.likelihood import Layout
from worker.trainer.methods import sft
from worker.trainer.model import Base


class Interrupted(Exception):
    """A stop was asked for while rows were being scored or trained on."""


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
    total, correct, tokens = 0.0, 0, 0
    adapted.eval()
    try:
        with torch.no_grad(), base.precision(), nullcontext() if adapter else adapted.disable_adapter():
            for batch in batches(rows, packing=layout.packing, micro_batch=layout.micro_batch, pad=layout.pad):
                if stopping():
                    raise Interrupted
                loss = sft.loss(base.model, batch.to(base.device), layout)
                total += loss.sum.item()
                correct += int(loss.correct.item())
                tokens += loss.tokens
    finally:
        adapted.train()
    return Score(loss=total / tokens, token_accuracy=correct / tokens, tokens=tokens)
