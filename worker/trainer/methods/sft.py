"""Supervised fine-tuning: the mean loss of all trained tokens of an optimizer step.

Owns: what a batch's likelihood means for the gradient. Must not know how that likelihood is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from worker.trainer.batches import Batch
from worker.trainer.likelihood import Layout, likelihood


@dataclass(frozen=True, slots=True)
class Loss:
    """`sum` over the trained tokens of the batch, in nats, differentiable; `nats` (documents,) are its parts, which are
    not; `correct` of `tokens` were argmax.
    """

    sum: torch.Tensor
    nats: torch.Tensor
    correct: torch.Tensor
    tokens: int


def loss(model: PreTrainedModel, batch: Batch, layout: Layout) -> Loss:
    """The summed loss. Callers divide by the trained tokens of the whole optimizer step."""
    found = likelihood(model, batch, layout)
    return Loss(found.nats.sum(), found.nats.detach(), found.hits.sum(), sum(batch.lengths))
