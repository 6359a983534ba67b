"""The layout of a forward pass: size of a micro-batch, packing, threads, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from shared.estimation.defaults import PACK_LENGTH
from worker.trainer.data.encoding import Row
from worker.trainer.forward.batches import Batch, batches


@dataclass(frozen=True, slots=True)
class Layout:
    """How examples go through a base. `layout_probe.py` checks which layouts give exact results on it.

    `micro_batch` rows are in memory at a time, divided among `lanes` CPU threads (see `threads.py`; 1 on a GPU). A
    packed row has about `row` tokens. `pad` is the pad id. `chunked` runs the output head separately from the backbone,
    a chunk of tokens at a time. `checkpointing` recomputes activations in the backward pass instead of keeping them.
    """

    packing: bool
    chunked: bool
    micro_batch: int
    pad: int
    row: int = PACK_LENGTH
    lanes: int = 1
    checkpointing: bool = False

    def split(self, examples: Sequence[Row], turn: int | None = None) -> Iterator[Batch]:
        """Split examples into micro-batches. With `turn` (from 0), only those that run in parallel in that turn."""
        found = batches(
            examples,
            packing=self.packing,
            micro_batch=self.micro_batch,
            pad=self.pad,
            row=self.row,
            lanes=self.lanes,
        )
        return found if turn is None else islice(found, turn * self.lanes, (turn + 1) * self.lanes)
