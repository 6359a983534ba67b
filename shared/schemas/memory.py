"""Memory that training takes: what there is, what was predicted, what was measured, and what the one says of the other.

Owns: the wire objects of `fit` on a job, and the rule that corrects a prediction. The arithmetic is in
shared/estimation/memory_model.py. Pure. Bytes are bytes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.schemas.requests import Wire

Kind = Literal["cuda", "cpu"]


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
