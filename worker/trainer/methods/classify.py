"""Classification: cross entropy of a row's label, from a head over the last token or the first.

Rows weigh the same, however long. Where a row is read off is transformers' own, so that whoever loads the classifier
finds it there: `[CLS]` on encoders, on decoders the last token that is no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from worker.trainer.forward.batches import Batch
from worker.trainer.methods.loss import Loss


def loss(model: PreTrainedModel, batch: Batch, labels: Sequence[str]) -> Loss:
    """An example is one row; the label that the model finds most likely is the one that it gives."""
    found = logits(model, batch)
    place = {label: i for i, label in enumerate(labels)}
    targets = torch.tensor([place[label] for label in batch.labels], device=found.device)
    predicted = found.detach().argmax(dim=-1)
    ones = (1,) * len(targets)
    return Loss(
        lines=batch.lines,
        sums=functional.cross_entropy(found, targets, reduction="none"),
        counts=ones,
        hits=(predicted == targets).long(),
        tokens=ones,
        answers=tuple(zip(targets.tolist(), predicted.tolist(), strict=True)),
    )


def logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """fp32 (rows, labels). Positions are the model's own affair: RoBERTa's begin elsewhere."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.type_ids
    scores: torch.Tensor = model(**inputs).logits.float()
    return scores
