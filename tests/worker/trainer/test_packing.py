"""Rows are filled as full as they can be, and the heaviest micro-batch is the heaviest."""

from __future__ import annotations

import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shared.training import Recipe
from tests.shared.test_jobs import RECIPE
from worker.trainer import data
from worker.trainer.batches import batches
from worker.trainer.encoding import Pair, Row
from worker.trainer.packing import heaviest, pack
from worker.trainer.recipe import PACK_LENGTH

from .test_batches import examples_of, lengths


def recipe_of(**changes: Any) -> Recipe:
    return RECIPE.model_copy(update=changes)


@given(sizes=lengths)
def test_packed_rows_hold_each_example_and_no_more_than_fits(sizes: list[int]) -> None:
    examples = examples_of(sizes)
    rows = pack(examples)
    assert sorted(e.line for row in rows for e in row) == list(range(len(examples)))
    capacity = max(PACK_LENGTH, *sizes)
    filled = [sum(map(len, row)) for row in rows]
    assert max(filled) <= capacity
    # Best fit leaves no two rows that would have gone into one.
    assert sum(sorted(filled)[:2]) > capacity or len(rows) == 1


def test_packing_many_rows_takes_no_square_of_them() -> None:
    examples = examples_of([2 + i % PACK_LENGTH for i in range(20_000)])
    started = time.perf_counter()
    pack(examples)
    assert time.perf_counter() - started < 2


@given(
    sizes=lengths,
    packing=st.booleans(),
    pairs=st.booleans(),
    micro_batch=st.integers(1, 9),
    batch_size=st.integers(1, 16),
    from_step=st.integers(0, 9),
)
def test_heaviest_is_what_the_run_will_meet(
    sizes: list[int], packing: bool, pairs: bool, micro_batch: int, batch_size: int, from_step: int
) -> None:
    rows: list[Row] = list(examples_of(sizes))
    if pairs:
        rows = [Pair(one, one.cut(len(one) // 2 + 1)) for one in examples_of(sizes)]
    steps = -(-len(rows) // batch_size) * 2
    recipe = recipe_of(batch_size=batch_size, total_steps=steps, seed=3)
    met = [
        (tuple(batch.input_ids.shape), step, turn)
        for step in range(min(from_step, steps - 1), steps)
        for turn, batch in enumerate(
            batches(
                data.step_examples(rows, step, batch_size=batch_size, seed=3),
                packing=packing,
                micro_batch=micro_batch,
                pad=0,
            )
        )
    ]
    found = heaviest(rows, recipe, packing=packing, micro_batch=micro_batch, from_step=from_step)
    assert found.tokens == max(count * length for (count, length), *_ in met)
    assert ((found.rows, found.length), found.step, found.turn) == next(
        one for one in met if one[0][0] * one[0][1] == found.tokens
    )
