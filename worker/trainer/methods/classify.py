"""Classification: cross entropy of a row's label, from a head on one token of the row.

All rows have the same weight, whatever their length. Transformers' own model decides which token the head reads, so
that whoever loads the classifier gets the same result: `[CLS]` in encoders, the last non-padding token in decoders.
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
    """The loss of each row. The model's answer is its most likely label."""
    found = logits(model, batch)
    index = {label: i for i, label in enumerate(labels)}
    targets = torch.tensor([index[label] for label in batch.labels], device=found.device)
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
    """fp32 logits (rows, labels). No position ids are passed, because RoBERTa numbers positions differently."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.type_ids
    scores: torch.Tensor = model(**inputs).logits.float()
    return scores
