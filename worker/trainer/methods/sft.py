"""Supervised fine-tuning: the mean cross entropy of all trained tokens of an optimizer step.

Must not know how likelihoods are computed.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from worker.trainer.forward.batches import Batch
from worker.trainer.forward.layout import Layout
from worker.trainer.forward.log_likelihood import log_likelihood
from worker.trainer.methods.loss import Loss


def loss(model: PreTrainedModel, batch: Batch, layout: Layout) -> Loss:
    """The loss of each document, weighted by its number of trained tokens."""
    found = log_likelihood(model, batch, layout)
    return Loss(lines=batch.lines, sums=found.nats, counts=batch.lengths, hits=found.hits, tokens=batch.lengths)
