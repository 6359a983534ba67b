"""How a slot goes on after a setback."""

from __future__ import annotations

from worker.app import setback_seconds


def test_the_first_setback_costs_nothing_and_then_the_wait_doubles() -> None:
    assert [setback_seconds(n) for n in (0, 1, 2, 3, 4, 9, 50)] == [0, 0, 1, 2, 4, 120, 120]
