"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

The reference is the same model with the adapter off, so that it costs a forward pass and no memory. Must not know how
likelihoods are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch.nn import functional

from worker.trainer.batches import Batch
from worker.trainer.likelihood import Layout, likelihood
from worker.trainer.methods.loss import Loss


def loss(adapted: PeftModel, batch: Batch, layout: Layout, *, beta: float) -> Loss:
    """-log sigmoid(beta x (gain of the chosen answer - gain of the rejected one)), a gain being in nats over the base.

    Documents come in pairs, chosen before rejected; each pair weighs the same. Hits are those of the chosen answers.
    """
    with _reference(adapted):
        reference = likelihood(adapted.get_base_model(), batch, layout).nats
    tuned = likelihood(adapted.get_base_model(), batch, layout)
    gains = reference - tuned.nats
    margins = beta * (gains[0::2] - gains[1::2])
    return Loss(
        sums=-functional.logsigmoid(margins),
        counts=(1,) * len(margins),
        hits=tuned.hits[0::2],
        tokens=batch.lengths[0::2],
        margins=margins.detach(),
    )


@contextmanager
def _reference(adapted: PeftModel) -> Iterator[None]:
    """The base alone and without its own dropout. No random number is drawn in here."""
    training = adapted.training
    adapted.eval()
    try:
        with torch.no_grad(), adapted.disable_adapter():
            yield
    finally:
        adapted.train(training)
