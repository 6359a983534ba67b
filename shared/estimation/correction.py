"""Correct a predicted peak by what earlier runs of the same base took. Pure; bytes are bytes."""

from __future__ import annotations

from collections.abc import Sequence

from shared.schemas.memory import Weighing

#: A measurement further off than this has another cause than the arithmetic, such as a guest on the same GPU.
LARGEST_CORRECTION = 2.0


def correction(weighings: Sequence[Weighing], computed_bytes: int) -> float:
    """What to multiply a computed peak by: measured over computed of the run whose computed peak was the nearest.

    Of equally near ones the first counts, which is the newest. 1 where nothing was weighed. What is off is partly the
    same in every run and partly a share of it; the nearest run has about the right mixture, and a run that is done
    again has exactly it.
    """
    credible = [one for one in weighings if 1 / LARGEST_CORRECTION <= _ratio(one) <= LARGEST_CORRECTION]
    if not credible:
        return 1.0
    return _ratio(min(credible, key=lambda one: abs(one.computed_bytes - computed_bytes)))


def corrected(weighings: Sequence[Weighing], computed_bytes: int) -> int:
    """A computed peak as it will probably be measured."""
    return round(computed_bytes * correction(weighings, computed_bytes))


def _ratio(weighing: Weighing) -> float:
    return weighing.measured_bytes / weighing.computed_bytes
