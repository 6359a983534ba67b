"""Fallback levels: what a run gives up, in which order, and that each level needs less memory than the one before."""

from __future__ import annotations

import pytest

from shared.estimation.defaults import PACK_LENGTH
from shared.estimation.fallback import Level, fallback_levels


def test_rows_are_halved_then_activations_recomputed_then_packing_dropped() -> None:
    found = fallback_levels(Level(5, checkpointing=False, packing=True), longest=PACK_LENGTH - 1)
    assert found == [
        Level(5, checkpointing=False, packing=True),
        Level(2, checkpointing=False, packing=True),
        Level(1, checkpointing=False, packing=True),
        Level(1, checkpointing=True, packing=True),
        Level(1, checkpointing=True, packing=False),
    ]


@pytest.mark.parametrize(
    ("widest", "longest", "can_checkpoint", "count"),
    [
        (Level(1, checkpointing=True, packing=False), 9, True, 1),
        (Level(1, checkpointing=False, packing=False), 9, True, 2),
        (Level(1, checkpointing=False, packing=False), 9, False, 1),
        (Level(1, checkpointing=True, packing=True), PACK_LENGTH, True, 1),
        (Level(1, checkpointing=True, packing=True), PACK_LENGTH - 1, True, 2),
        (Level(32, checkpointing=False, packing=True), 9, True, 8),
        (Level(32, checkpointing=False, packing=True), 9, False, 7),
    ],
)
def test_levels_are_counted(widest: Level, longest: int, can_checkpoint: bool, count: int) -> None:
    found = fallback_levels(widest, longest=longest, can_checkpoint=can_checkpoint)
    assert (len(found), found[0]) == (count, widest)
    assert len(set(found)) == count
