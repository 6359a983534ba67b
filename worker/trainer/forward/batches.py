"""Turn encoded rows into tensors, packed or padded.

Owns: position ids and targets; `data/packing.py` decides which examples share a row. Must not know about models or
epochs.

In a packed row, documents are kept apart by `position_ids` that restart at 0 and by the *absence* of an attention mask:
only then does transformers build a block-diagonal mask. With a mask, or with a cache, it does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from shared.estimation.defaults import PACK_LENGTH
from worker.trainer.data.classification import LabelledRow
from worker.trainer.data.encoding import Encoded, Row
from worker.trainer.data.packing import micro_batches

#: Target of a position without a loss; the default `ignore_index` of torch's cross entropy.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """The tensors of a micro-batch, all (rows, length) int64.

    `targets[r, t]` is the token that position t must predict, or IGNORED. `attention_mask` is None for packed rows and
    required for padded ones. `lines` (the dataset's line numbers) and `lengths` (trained tokens) have an entry for each
    document, row by row. For classification, `labels` has each document's label and `type_ids` the token types.
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
    """The number of trained tokens in all documents of these examples."""
    return sum(example.trained_tokens for example in examples)


def batches(
    examples: Sequence[Row], *, packing: bool, micro_batch: int, pad: int, row: int = PACK_LENGTH, lanes: int = 1
) -> Iterator[Batch]:
    """Split examples into micro-batches with `packing.micro_batches`, and make tensors of each.

    Every trained token is a target exactly once. The documents of an example are neighbours in the same micro-batch.
    """
    for rows in micro_batches(examples, packing=packing, micro_batch=micro_batch, row=row, lanes=lanes):
        yield collate(rows, packing=packing, pad=pad)


def collate(rows: Sequence[Sequence[Encoded]], *, packing: bool, pad: int) -> Batch:
    """Make tensors of rows with one or more documents each, as long as the longest row.

    Padding is never a target. In packed rows it counts as a document of its own, so that no mask is needed.
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
            # The last position of a document has no target: the next token belongs to another document.
            targets[r, start : end - 1] = torch.where(trained[1:], ids[1:], IGNORED)
            position_ids[r, start:end] = torch.arange(len(example))
            if isinstance(example, LabelledRow):
                type_ids[r, start:end] = torch.from_numpy(example.types)
            if attention_mask is not None:
                attention_mask[r, start:end] = 1
            start = end
        # Padding may be longer than the base's context; its position ids must stay within those of real documents.
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
