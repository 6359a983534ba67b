"""Which examples share a row, and which rows a micro-batch.

Owns: best-fit packing, and the heaviest micro-batch that a run will meet. A pure function of lengths, seed and recipe.
Must not import torch: a dataset is planned without it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from shared.training import Recipe
from worker.trainer import data
from worker.trainer.encoding import Encoded, Row
from worker.trainer.recipe import PACK_LENGTH

#: Rows of a tensor: each the documents that lie in it.
Rows = list[list[Encoded]]


@dataclass(frozen=True, slots=True)
class Heaviest:
    """What a run has in memory at the time it has the most tokens, padding included: `rows` of `length`.

    That is one micro-batch in each lane: the `turn`-th of `step` (both from 0), the first if several are as heavy.
    """

    step: int
    turn: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def heaviest(
    examples: Sequence[Row], recipe: Recipe, *, packing: bool, micro_batch: int, lanes: int = 1, from_step: int = 0
) -> Heaviest:
    """Of all turns from that step on. Activations grow with the tokens, and memory with them."""
    most = Heaviest(0, 0, 0, 0)
    for step in range(min(from_step, recipe.total_steps - 1), recipe.total_steps):
        chosen = data.step_examples(examples, step, batch_size=recipe.batch_size, seed=recipe.seed)
        longest = max(map(len, chosen))
        # A pair is as long as both of its documents, which padded are two rows.
        if micro_batch * (max(PACK_LENGTH, longest) if packing else 2 * longest) <= most.tokens:
            continue
        parts = micro_batches(chosen, packing=packing, micro_batch=micro_batch, lanes=lanes)
        for turn in count():
            rows = [row for part in islice(parts, lanes) for row in part]
            if not rows:
                break
            found = Heaviest(step, turn, len(rows), max(sum(map(len, row)) for row in rows))
            most = max(most, found, key=lambda one: one.tokens)
    return most


def micro_batches(examples: Sequence[Row], *, packing: bool, micro_batch: int, lanes: int = 1) -> Iterator[Rows]:
    """`lanes` of them hold at most `micro_batch` packed rows, or else examples.

    They are as even as can be: a last one with a row or two would cost nearly as much time, and the others more memory.
    The documents of an example follow each other in one micro-batch.
    """
    rows = pack(examples) if packing else [[e] for e in sorted(examples, key=lambda e: (-len(e), e.line))]
    rounds = -(-len(rows) // (micro_batch // lanes * lanes))
    parts = min(len(rows), rounds * lanes)
    for part in range(parts):
        mine = rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]
        documents = [[d for e in row for d in e.documents] for row in mine]
        yield documents if packing else [[d] for row in documents for d in row]


def pack(examples: Sequence[Row]) -> list[list[Row]]:
    """Best-fit decreasing: each example goes to the fullest row that still has room, the longest first.

    Rows hold at most max(PACK_LENGTH, the longest example) tokens.
    """
    capacity = max(PACK_LENGTH, max(map(len, examples), default=0))
    rows: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for example in sorted(examples, key=lambda e: (-len(e), e.line)):
        fullest = bisect_left(room, (len(example), 0))
        if fullest < len(room):
            left, row = room.pop(fullest)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        insort(room, (left - len(example), row))
    return rows
