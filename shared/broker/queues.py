"""The work queues. Pure, so that SQL can name them without importing Celery."""

from __future__ import annotations

from enum import StrEnum


class Queue(StrEnum):
    """`prepare` reads datasets on a CPU; `train` holds an accelerator."""

    PREPARE = "prepare"
    TRAIN = "train"
