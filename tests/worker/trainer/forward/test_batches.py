"""Batches contain every trained token exactly once, packed or padded."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.estimation.defaults import PACK_LENGTH
from tests.worker.trainer.rows import examples_of, lengths
from worker.trainer.data.encoding import Encoded
from worker.trainer.forward.batches import IGNORED, batches, collate, trained_tokens


@given(sizes=lengths, packing=st.booleans(), micro_batch=st.integers(1, 9), lanes=st.integers(1, 3))
def test_every_trained_token_is_a_target_once(sizes: list[int], packing: bool, micro_batch: int, lanes: int) -> None:
    examples, lanes = examples_of(sizes), min(lanes, micro_batch)
    found = list(batches(examples, packing=packing, micro_batch=micro_batch, pad=0, lanes=lanes))
    assert sum(int((b.targets != IGNORED).sum()) for b in found) == trained_tokens(examples)
    rows = [len(b.input_ids) for b in found]
    if packing:
        assert max(b.input_ids.numel() for b in found) * lanes <= micro_batch * max(PACK_LENGTH, *sizes)
    else:
        assert max(rows) * lanes <= micro_batch
        assert max(rows) - min(rows) <= 1
    assert all((b.attention_mask is None) == packing for b in found)
    assert all(int(b.position_ids.max()) < max(sizes) for b in found)


def test_packed_row_restarts_positions_and_has_no_target_across_documents() -> None:
    one = Encoded(1, np.array([5, 6, 7], dtype=np.int32), np.array([True, True, True]))
    two = Encoded(2, np.array([8, 9], dtype=np.int32), np.array([False, True]))
    batch = collate([[one, two], [two]], packing=True, pad=3)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [8, 9, 3, 3, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch.targets.tolist() == [[6, 7, IGNORED, 9, IGNORED], [9, IGNORED, IGNORED, IGNORED, IGNORED]]


def test_padding_that_equals_eos_leaves_the_eos_trained() -> None:
    eos = 2
    short = Encoded(1, np.array([5, eos], dtype=np.int32), np.array([True, True]))
    long = Encoded(2, np.array([5, 6, 7, eos], dtype=np.int32), np.array([True] * 4))
    batch = collate([[long], [short]], packing=False, pad=eos)
    assert batch.targets.tolist() == [[6, 7, eos, IGNORED], [eos, IGNORED, IGNORED, IGNORED]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
