"""Encoded rows → tensors: packed rows or padded ones.

Owns: the arithmetic of positions and targets; which examples share a row is `packing.py`'s. Must not know about models
or epochs.

In a packed row the documents are kept apart by `position_ids` that start again at 0 and by the *absence* of an
attention mask: transformers then builds a block-diagonal mask by itself. With a mask, or with a cache, it would not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from shared.estimation.defaults import PACK_LENGTH
from worker.trainer.data.classification import LabelledRow
from worker.trainer.data.encoding import Encoded, Row
from worker.trainer.data.packing import micro_batches

#: The target of a position that predicts nothing trained, as in torch's cross entropy.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """All (rows, length) int64. `targets[r, t]` is the token that position t predicts, or IGNORED.

    `attention_mask` is None for packed rows and required for padded ones. The documents of the batch, row by row, come
    from the dataset's `lines` and have `lengths` trained tokens each. Rows to be classified have `labels` and, in
    `type_ids`, the types of their tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor | None
    lines: tuple[int, ...]
    lengths: tuple[int, ...]
    type_ids: torch.Tensor | None = None
    labels: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        mask, types = self.attention_mask, self.type_ids
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            targets=self.targets.to(device),
            attention_mask=None if mask is None else mask.to(device),
            type_ids=None if types is None else types.to(device),
        )


def trained_tokens(examples: Sequence[Row]) -> int:
    """Of all their documents."""
    return sum(example.trained_tokens for example in examples)


def batches(
    examples: Sequence[Row], *, packing: bool, micro_batch: int, pad: int, row: int = PACK_LENGTH, lanes: int = 1
) -> Iterator[Batch]:
    """Split examples into micro-batches, as `packing.micro_batches` does.

    Every trained token appears exactly once; the documents of an example follow each other in one micro-batch.
    """
    for rows in micro_batches(examples, packing=packing, micro_batch=micro_batch, row=row, lanes=lanes):
        yield collate(rows, packing=packing, pad=pad)


def collate(rows: Sequence[Sequence[Encoded]], *, packing: bool, pad: int) -> Batch:
    """Rows of one or more documents → tensors as long as the fullest row.

    Padding is never a target. In packed rows it is a document of its own, so no mask is needed.
    """
    length = max(sum(map(len, row)) for row in rows)
    longest = max(len(example) for row in rows for example in row)
    input_ids = torch.full((len(rows), length), pad, dtype=torch.long)
    targets = torch.full((len(rows), length), IGNORED, dtype=torch.long)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    type_ids = torch.zeros((len(rows), length), dtype=torch.long)
    attention_mask = None if packing else torch.zeros((len(rows), length), dtype=torch.long)
    for r, row in enumerate(rows):
        start = 0
        for example in row:
            ids, end = torch.from_numpy(example.ids).long(), start + len(example)
            input_ids[r, start:end] = ids
            trained = torch.from_numpy(example.trained)
            # The last position of a document predicts nothing: what follows it is another document.
            targets[r, start : end - 1] = torch.where(trained[1:], ids[1:], IGNORED)
            position_ids[r, start:end] = torch.arange(len(example))
            if isinstance(example, LabelledRow):
                type_ids[r, start:end] = torch.from_numpy(example.types)
            if attention_mask is not None:
                attention_mask[r, start:end] = 1
            start = end
        # Padding may be longer than any document, and than the base's context: its positions must not be.
        position_ids[r, start:] = torch.arange(length - start) % longest
    documents = [example for row in rows for example in row]
    return Batch(
        input_ids,
        position_ids,
        targets,
        attention_mask,
        lines=tuple(example.line for example in documents),
        lengths=tuple(example.trained_tokens for example in documents),
        type_ids=type_ids,
        labels=tuple(example.label for example in documents if isinstance(example, LabelledRow)),
    )
