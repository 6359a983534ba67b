"""Memory that training takes: what there is, what was predicted, what was measured, and what the one says of the other.

Owns: the wire objects of `fit` on a job, and the rule that corrects a prediction. The arithmetic is in shared/fit.py.
Pure. Bytes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from shared.schemas import Wire

Kind = Literal["cuda", "cpu"]

#: A measurement further off than this has another cause than the arithmetic, such as a guest on the same GPU.
LARGEST_CORRECTION = 2.0


class Device(Wire):
    """What a trainer runs on: `name` as its maker calls it, `memory_bytes` as far as a trainer may have them."""

    kind: Kind
    name: str
    memory_bytes: int


class Weighing(Wire):
    """Of one run, the peak by arithmetic alone and the peak that was measured."""

    computed_bytes: int
    measured_bytes: int


class KnownDevice(Device):
    """A device that has reported itself, and how runs of one base at one quantization came out on it, newest first."""

    weighings: list[Weighing] = Field(default_factory=list)


class PredictedPeak(Wire):
    """The peak on a device; where none has reported itself, on a kind of device, and then nobody knows if it `fits`.

    `computed_bytes` are by arithmetic alone, `predicted_bytes` corrected by what earlier runs took.
    """

    kind: Kind
    name: str | None = None
    memory_bytes: int | None = None
    computed_bytes: int
    predicted_bytes: int
    fits: bool | None = None


class PlannedFit(Wire):
    """The heaviest micro-batch that the run will meet, `rows` of `length` tokens, and the peak it leads to."""

    rows: int
    length: int
    peaks: list[PredictedPeak]


class MeasuredFit(Wire):
    """The same, on the device that the run was on and with the micro-batch that it ended with.

    `measured_bytes` are of the whole attempt: the process at its largest on a CPU, what was taken from the GPU there.
    `rehearsed_bytes` were the peak when the heaviest micro-batch had been tried; None where that was left out.
    """

    device: Device
    rows: int
    length: int
    computed_bytes: int
    predicted_bytes: int
    rehearsed_bytes: int | None
    measured_bytes: int


class Fit(Wire):
    """On a job: the peak as it was predicted and as it was measured; `measured_bytes` is null until the job is done."""

    predicted_bytes: int
    measured_bytes: int | None
    device: str | None


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
