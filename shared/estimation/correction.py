"""Correct a computed peak by measurements of earlier runs of the same base. Pure. Memory is in bytes."""

from __future__ import annotations

from collections.abc import Sequence

from shared.schemas.memory import Weighing

#: A measurement that is off by more than this factor has another cause than the arithmetic, such as another process
#: on the same GPU. It is ignored.
LARGEST_CORRECTION = 2.0


def correction(weighings: Sequence[Weighing], computed_bytes: int) -> float:
    """The factor for a computed peak: measured over computed bytes of the run whose computed peak is the nearest.

    `weighings` are the newest first; if several are equally near, the newest counts. 1 if there is none. The error is
    partly constant and partly proportional to the peak; the nearest run has about the same mixture, and a repeated run
    has exactly the same.
    """
    credible = [weighing for weighing in weighings if 1 / LARGEST_CORRECTION <= _ratio(weighing) <= LARGEST_CORRECTION]
    if not credible:
        return 1.0
    return _ratio(min(credible, key=lambda weighing: abs(weighing.computed_bytes - computed_bytes)))


def corrected(weighings: Sequence[Weighing], computed_bytes: int) -> int:
    """The peak that will probably be measured, in bytes."""
    return round(computed_bytes * correction(weighings, computed_bytes))


def _ratio(weighing: Weighing) -> float:
    return weighing.measured_bytes / weighing.computed_bytes
