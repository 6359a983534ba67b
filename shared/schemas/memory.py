"""Schemas for the memory of a training run: available, predicted and measured.

Owns: the objects behind `fit` on a job. The prediction is in `shared/estimation/memory_model.py`, its correction by
earlier runs in `shared/estimation/correction.py`. Pure. All sizes are in bytes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.schemas.requests import Wire

Kind = Literal["cuda", "cpu"]


class Device(Wire):
    """A device that a trainer runs on: the manufacturer's `name`, and the memory that a trainer may use."""

    kind: Kind
    name: str
    memory_bytes: int


class Weighing(Wire):
    """The peak memory of one run: computed by the memory model without correction, and measured."""

    computed_bytes: int
    measured_bytes: int


class KnownDevice(Device):
    """A device that a worker has reported, with the measured runs of one base model and quantization, newest first."""

    weighings: list[Weighing] = Field(default_factory=list)


class PredictedPeak(Wire):
    """The predicted peak memory on one device.

    `computed_bytes` is the result of the memory model, `predicted_bytes` the same after correction by earlier runs. If
    no worker has reported a device, the prediction is for a device kind: `name`, `memory_bytes` and `fits` are null.
    """

    kind: Kind
    name: str | None = None
    memory_bytes: int | None = None
    computed_bytes: int
    predicted_bytes: int
    fits: bool | None = None


class PlannedFit(Wire):
    """The largest micro-batch of the planned run, `rows` of `length` tokens, and its peak memory per device."""

    rows: int
    length: int
    peaks: list[PredictedPeak]


class MeasuredFit(Wire):
    """Predicted and measured peak memory on the device of the run, for the micro-batch that the run ended with.

    `rows` and `length` (tokens) describe its largest micro-batch. `measured_bytes` is the peak of the whole attempt: of
    the process on a CPU, of GPU memory on a GPU. `rehearsed_bytes` is the peak after the memory trial, which runs the
    largest micro-batch before the first step; null if there was no trial.
    """

    device: Device
    rows: int
    length: int
    computed_bytes: int
    predicted_bytes: int
    rehearsed_bytes: int | None
    measured_bytes: int


class Fit(Wire):
    """Peak memory of a job on `device`: predicted, and measured. `measured_bytes` is null until the job is done.

    Until then the prediction is for the device with the largest predicted peak.
    """

    predicted_bytes: int
    measured_bytes: int | None
    device: str | None
