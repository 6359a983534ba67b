"""Pack examples into rows, and rows into micro-batches.

Owns: packing, and finding the largest micro-batch of a run. All of it is a pure function of lengths, seed and recipe.
Must not import torch: planning uses it without.
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

#: Row length at which attention doubles the cost of a token: a row costs length * (length + ATTENTION).
ATTENTION = 1500
#: The rows of a tensor, each a list of the documents in it.
Rows = list[list[Encoded]]


@dataclass(frozen=True, slots=True)
class Heaviest:
    """The turn of a run that has the most tokens in memory. A turn is one micro-batch in each lane at the same time.

    `tokens` includes padding. `rows` is the number of rows in all lanes; `length` is the mean row length, rounded up.
    `turn` counts within `step`; both start at 0. Of several equal turns it is the first.
    """

    step: int
    turn: int
    rows: int
    length: int
    tokens: int


def heaviest(
    examples: Sequence[Row], recipe: Recipe, *, packing: bool, micro_batch: int, lanes: int = 1, from_step: int = 0
) -> Heaviest:
    """Find the turn with the most tokens from `from_step` on. Activation memory grows with the tokens."""
    row, most = packed_row_tokens(examples), Heaviest(0, 0, 0, 0, 0)
    for step in range(min(from_step, recipe.total_steps - 1), recipe.total_steps):
        chosen = dataset.step_examples(examples, step, batch_size=recipe.batch_size, seed=recipe.seed)
        # Upper bound. The length of a pair is the sum of its two documents; without packing they are two rows.
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


def packed_row_tokens(examples: Sequence[Row]) -> int:
    """Capacity of a packed row in tokens. `examples` are all examples of the run."""
    return max(PACK_LENGTH, max(map(len, examples), default=0))


def micro_batches(
    examples: Sequence[Row], *, packing: bool, micro_batch: int, row: int, lanes: int = 1
) -> Iterator[Rows]:
    """Split the examples of an optimizer step into micro-batches, of which `lanes` run at the same time.

    Together, the micro-batches of one turn have at most `micro_batch` examples, or with packing as many tokens as
    `micro_batch` rows of `row` tokens. All are as equal as possible: a last one with a row or two would take nearly as
    much time, and the others would need more memory; and a lane waits for the slowest one of its turn. The documents of
    an example stay in one micro-batch.
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
    """Put examples of similar lengths into the same micro-batch, so that its rows can be of equal length."""
    rounds = -(-sum(map(len, ordered)) // (most * row * lanes))
    while True:  # ends: with one example per micro-batch, all fit
        shares = _shares(ordered, min(len(ordered), rounds * lanes))
        packed = [rows for share in shares if (rows := pack(share, tokens=most * row, row=row))]
        if len(packed) == len(shares):
            return packed
        rounds += max(1, rounds // 16)


def pack(ordered: Sequence[Row], *, tokens: int, row: int) -> list[list[Row]]:
    """Pack examples into the rows of one micro-batch. Returns [] if they do not fit.

    `ordered` must have the longest example first. A row has at most `row` tokens; all rows together, padding included,
    at most `tokens`. Each example goes to the row with the fewest tokens. Several numbers of rows are tried, near the
    one at which rows are as long as the longest example; the cheapest that fits is used.
    """
    about = round(sum(map(len, ordered)) / max(PACK_LENGTH, len(ordered[0])))
    best, least = list[list[Row]](), inf
    for number in _numbers(about, len(ordered)):
        rows: list[list[Row]] = [[] for _ in range(number)]
        filled = [(0, index) for index in range(number)]
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
                break  # more rows would only add padding
    return best


def _numbers(about: int, most: int) -> Iterator[int]:
    """Numbers of rows to try: from just below `about` up to `most`, in growing steps."""
    number = max(1, about - 1)
    while number < most:
        yield number
        number += 1 if number <= about else max(1, number // 8)
    yield most


def _shares(ordered: Sequence[Row], parts: int) -> list[Sequence[Row]]:
    """Split into `parts` non-empty runs of consecutive examples, with sums of tokens as equal as possible."""
    shares, start, left = list[Sequence[Row]](), 0, sum(map(len, ordered))
    for rest in range(parts, 0, -1):
        end, taken, most = start + 1, len(ordered[start]), len(ordered) - rest + 1
        while end < most and (rest == 1 or taken + len(ordered[end]) / 2 <= left / rest):
            taken += len(ordered[end])
            end += 1
        shares.append(ordered[start:end])
        start, left = end, left - taken
    return shares
