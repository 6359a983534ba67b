"""Which examples share a row, and which rows a micro-batch.

Owns: packing, and the heaviest micro-batch that a run will meet. A pure function of lengths, seed and recipe.
Must not import torch: a dataset is planned without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import count, islice
from math import inf

from shared.estimation.defaults import PACK_LENGTH
from shared.schemas.results import Recipe
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoded, Row

#: A row of this length costs twice what its tokens would cost in short ones: what attention takes grows with it.
ATTENTION = 1500
#: Rows of a tensor: each the documents that lie in it.
Rows = list[list[Encoded]]


@dataclass(frozen=True, slots=True)
class Heaviest:
    """What a run has in memory at the time it has the most tokens, padding included: `rows` of `length`.

    That is one micro-batch in each lane, taken together: the `turn`-th of `step` (both from 0), the first if several
    are as heavy. `length` is the mean, rounded up, where lanes differ in it.
    """

    step: int
    turn: int
    rows: int
    length: int
    tokens: int


def heaviest(
    examples: Sequence[Row], recipe: Recipe, *, packing: bool, micro_batch: int, lanes: int = 1, from_step: int = 0
) -> Heaviest:
    """Of all turns from that step on. Activations grow with the tokens, and memory with them."""
    row, most = row_of(examples), Heaviest(0, 0, 0, 0, 0)
    for step in range(min(from_step, recipe.total_steps - 1), recipe.total_steps):
        chosen = dataset.step_examples(examples, step, batch_size=recipe.batch_size, seed=recipe.seed)
        # A pair is as long as both of its documents, which padded are two rows.
        if micro_batch * (row if packing else 2 * max(map(len, chosen))) <= most.tokens:
            continue
        parts = micro_batches(chosen, packing=packing, micro_batch=micro_batch, row=row, lanes=lanes)
        for turn in count():
            sizes = [(len(rows), max(sum(map(len, row)) for row in rows)) for rows in islice(parts, lanes)]
            if not sizes:
                break
            rows, tokens = sum(rows for rows, _ in sizes), sum(rows * length for rows, length in sizes)
            most = max(most, Heaviest(step, turn, rows, -(-tokens // rows), tokens), key=lambda one: one.tokens)
    return most


def row_of(examples: Sequence[Row]) -> int:
    """Tokens that a packed row is reckoned to have, where these are all the examples of a run."""
    return max(PACK_LENGTH, max(map(len, examples), default=0))


def micro_batches(
    examples: Sequence[Row], *, packing: bool, micro_batch: int, row: int, lanes: int = 1
) -> Iterator[Rows]:
    """`lanes` of them hold at most `micro_batch` examples; packed, as many tokens as so many rows of `row` have.

    They are as even as can be: a last one with a row or two would cost nearly as much time, and the others more memory,
    and of lanes side by side the lightest waits for the heaviest. The documents of an example stay together.
    """
    ordered, most = sorted(examples, key=lambda e: (-len(e), e.line)), micro_batch // lanes
    row = max(row, len(ordered[0])) if ordered else row
    for rows in _packed(ordered, most, row, lanes) if packing else _unpacked(ordered, most, lanes):
        documents = [[d for e in row for d in e.documents] for row in rows]
        yield documents if packing else [[d] for row in documents for d in row]


def _unpacked(ordered: Sequence[Row], most: int, lanes: int) -> Iterator[list[list[Row]]]:
    parts = min(len(ordered), -(-len(ordered) // (most * lanes)) * lanes)
    for part in range(parts):
        yield [[e] for e in ordered[part * len(ordered) // parts : (part + 1) * len(ordered) // parts]]


def _packed(ordered: Sequence[Row], most: int, row: int, lanes: int) -> list[list[list[Row]]]:
    """Examples of like lengths share a micro-batch: they can be parted into even rows."""
    rounds = -(-sum(map(len, ordered)) // (most * row * lanes))
    while True:  # at the latest where each example has a micro-batch of its own, all fit
        shares = _shares(ordered, min(len(ordered), rounds * lanes))
        packed = [rows for share in shares if (rows := pack(share, tokens=most * row, row=row))]
        if len(packed) == len(shares):
            return packed
        rounds += max(1, rounds // 16)


def pack(ordered: Sequence[Row], *, tokens: int, row: int) -> list[list[Row]]:
    """Rows for one micro-batch, each of `row` tokens at most, and padding included of `tokens`; none if that fails.

    Each example, the longest first, goes to the emptiest row. Of the numbers of rows that will do, near the one that
    makes them as long as the longest example, that is taken which costs least.
    """
    about = round(sum(map(len, ordered)) / max(PACK_LENGTH, len(ordered[0])))
    best, least = list[list[Row]](), inf
    for number in _numbers(about, len(ordered)):
        rows: list[list[Row]] = [[] for _ in range(number)]
        filled = [(0, one) for one in range(number)]
        for example in ordered:
            length, emptiest = filled[0]
            rows[emptiest].append(example)
            heapreplace(filled, (length + len(example), emptiest))
        longest = max(length for length, _ in filled)
        if longest <= row:
            cost = number * longest * (longest + ATTENTION)
            if number * longest <= tokens and cost < least:
                best, least = rows, cost
            if number > about:
                break  # more of them would have more padding
    return best


def _numbers(about: int, most: int) -> Iterator[int]:
    """From just under `about` upwards, ever faster, and `most` at last."""
    number = max(1, about - 1)
    while number < most:
        yield number
        number += 1 if number <= about else max(1, number // 8)
    yield most


def _shares(ordered: Sequence[Row], parts: int) -> list[Sequence[Row]]:
    """Consecutive examples, none of the shares empty, with as even sums of tokens as that allows."""
    shares, start, left = list[Sequence[Row]](), 0, sum(map(len, ordered))
    for rest in range(parts, 0, -1):
        end, taken, most = start + 1, len(ordered[start]), len(ordered) - rest + 1
        while end < most and (rest == 1 or taken + len(ordered[end]) / 2 <= left / rest):
            taken += len(ordered[end])
            end += 1
        shares.append(ordered[start:end])
        start, left = end, left - taken
    return shares
