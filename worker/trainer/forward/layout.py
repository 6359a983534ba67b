"""How a base model is fed: rows a micro-batch, packing, threads, checkpointing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from shared.estimation.defaults import PACK_LENGTH
from worker.trainer.data.encoding import Row
from worker.trainer.forward.batches import Batch, batches


@dataclass(frozen=True, slots=True)
class Layout:
    """How a base is fed; `selftest.py` finds what it can bear. `chunked`: run the head apart from the backbone.

    `micro_batch` rows are in memory at a time, packed ones of about `row` tokens, shared out among `lanes` (see
    `lanes.py`). With `checkpointing` backward computes each layer anew rather than keep its activations.
    """

    packing: bool
    chunked: bool
    micro_batch: int
    pad: int
    row: int = PACK_LENGTH
    lanes: int = 1
    checkpointing: bool = False

    def split(self, examples: Sequence[Row], turn: int | None = None) -> Iterator[Batch]:
        """Examples as micro-batches of this layout; only those of a `turn` (from 0), which are in memory together."""
        cut = batches(
            examples,
            packing=self.packing,
            micro_batch=self.micro_batch,
            pad=self.pad,
            row=self.row,
            lanes=self.lanes,
        )
        return cut if turn is None else islice(cut, turn * self.lanes, (turn + 1) * self.lanes)
