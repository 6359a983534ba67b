"""Packing loses no example, keeps to its budget and balances rows and lanes; the largest micro-batch is found."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.estimation.defaults import PACK_LENGTH
from shared.schemas.results import Recipe
from tests.results import RECIPE
from tests.worker.trainer.rows import examples_of, lengths
from worker.trainer.data import dataset, packing
from worker.trainer.data.encoding import Pair, Row
from worker.trainer.data.packing import Rows, heaviest, micro_batches, pack, packed_row_tokens
from worker.trainer.forward.batches import batches


def recipe_of(**changes: Any) -> Recipe:
    return RECIPE.model_copy(update=changes)


def padded(rows: Rows) -> int:
    return len(rows) * max(sum(map(len, row)) for row in rows)


@given(sizes=lengths, micro_batch=st.integers(1, 9), lanes=st.integers(1, 3), row=st.integers(1, 3 * PACK_LENGTH))
def test_packed_micro_batches_have_each_example_once_and_keep_to_the_budget(
    sizes: list[int], micro_batch: int, lanes: int, row: int
) -> None:
    lanes = min(lanes, micro_batch)
    cut = list(micro_batches(examples_of(sizes), packing=True, micro_batch=micro_batch, row=row, lanes=lanes))
    assert sorted(e.line for rows in cut for row in rows for e in row) == list(range(len(sizes)))
    assert all(row for rows in cut for row in rows)
    budget = micro_batch // lanes * max(row, PACK_LENGTH, *sizes)
    assert max(map(padded, cut)) <= budget
    assert max(sum(map(len, one)) for rows in cut for one in rows) <= max(row, PACK_LENGTH, *sizes)


def test_short_examples_are_packed_with_little_padding_and_in_equal_lanes() -> None:
    drawn = random.Random(7)
    for _ in range(20):
        # Most examples are short, and some steps have a long one, as in a dataset of quotations.
        sizes = [drawn.randint(20, 60) for _ in range(31)] + [drawn.choice((40, 238))]
        cut = list(micro_batches(examples_of(sizes), packing=True, micro_batch=8, row=238, lanes=2))
        assert len(cut) == 2
        # With equal lanes and no padding, each lane would have sum(sizes) / 2 tokens.
        assert max(map(padded, cut)) <= 1.4 * sum(sizes) / 2


@pytest.mark.parametrize("micro_batch", [1, 4_000])
def test_packing_does_not_take_quadratic_time(micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []

    def counted(ordered: Sequence[Row], **limits: int) -> list[list[Row]]:
        packed.append(len(ordered))
        return pack(ordered, **limits)

    monkeypatch.setattr(packing, "pack", counted)
    examples = examples_of([20 + i % (PACK_LENGTH - 20) for i in range(4_000)])
    list(micro_batches(examples, packing=True, micro_batch=micro_batch, row=PACK_LENGTH))
    assert sum(packed) <= 20 * len(examples)


def test_no_examples_give_no_micro_batches() -> None:
    assert not list(micro_batches([], packing=True, micro_batch=2, row=PACK_LENGTH))


@given(
    sizes=lengths,
    packing=st.booleans(),
    pairs=st.booleans(),
    micro_batch=st.integers(1, 9),
    lanes=st.integers(1, 3),
    batch_size=st.integers(1, 16),
    from_step=st.integers(0, 9),
)
def test_heaviest_is_the_largest_turn_of_the_run(
    sizes: list[int], packing: bool, pairs: bool, micro_batch: int, lanes: int, batch_size: int, from_step: int
) -> None:
    lanes = min(lanes, micro_batch)
    rows: list[Row] = list(examples_of(sizes))
    if pairs:
        rows = [Pair(one, one.cut(len(one) // 2 + 1)) for one in examples_of(sizes)]
    steps = -(-len(rows) // batch_size) * 2
    recipe = recipe_of(batch_size=batch_size, total_steps=steps, seed=3)
    met = []
    for step in range(min(from_step, steps - 1), steps):
        chosen = dataset.step_examples(rows, step, batch_size=batch_size, seed=3)
        options: dict[str, Any] = {
            "packing": packing,
            "micro_batch": micro_batch,
            "row": packed_row_tokens(rows),
            "lanes": lanes,
        }
        shapes = [batch.input_ids.shape for batch in batches(chosen, pad=0, **options)]
        for turn, start in enumerate(range(0, len(shapes), lanes)):
            side_by_side = shapes[start : start + lanes]
            met.append((sum(map(torch.Size.numel, side_by_side)), sum(one[0] for one in side_by_side), step, turn))
    found = heaviest(rows, recipe, packing=packing, micro_batch=micro_batch, lanes=lanes, from_step=from_step)
    most = max(tokens for tokens, *_ in met)
    assert (found.tokens, found.rows, found.step, found.turn) == next(one for one in met if one[0] == most)
    assert 0 <= found.rows * found.length - found.tokens < found.rows
