"""The names of the work queues. Must not import Celery: the SQL code uses these names too."""

from __future__ import annotations

from enum import StrEnum


class Queue(StrEnum):
    """The work queues: `prepare` validates datasets on a CPU, `train` trains on an accelerator."""

    PREPARE = "prepare"
    TRAIN = "train"
