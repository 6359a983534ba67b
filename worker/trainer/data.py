"""A dataset file → encoded rows: read, held out, truncated, and put in the order of each epoch.

Owns: which rows are trained on, which are held out, and in what order. Everything is a pure function of the files, the
base and the seed, so that a resumed run sees the same rows. Must not import torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from shared import formats
from shared.errors import TrainingFailed
from shared.formats import RowError
from shared.protocol import Task
from shared.schemas import FileReport
from worker.trainer.encoding import CannotEncode, Encoder, Row, longest_document

HELDOUT_SHARE = 0.05
HELDOUT_MOST = 200
#: Below this many rows, five percent would be no row at all, or one that says nothing.
CARVE_FROM_ROWS = 20

HeldoutSource = Literal["validation_file", "training_file_carved", "training_file"]


@dataclass(frozen=True, slots=True)
class Dataset:
    """All rows of the files, neither cut to a length nor parted yet."""

    train: list[Row]
    validation: list[Row] | None


@dataclass(frozen=True, slots=True)
class Fitted:
    """Rows cut to a length; `dropped` lost every trained token by it."""

    kept: list[Row]
    truncated: int
    dropped: int


def load(task: Task, encoder: Encoder, *, tick: Callable[[], None] = lambda: None) -> Dataset:
    """Read and encode the job's files, calling `tick` with each row.

    Raises TrainingFailed that names every bad line (the first ones in full).
    """
    rows = _read(task.training_file, task, encoder, tick, param="training_file")
    if task.validation_file is None:
        return Dataset(rows, None)
    return Dataset(rows, _read(task.validation_file, task, encoder, tick, param="validation_file"))


def carve(rows: list[Row], *, seed: int) -> tuple[list[Row], list[Row], HeldoutSource]:
    """Rows to train on, and rows to score in place of a validation file: some of their own, or all if they are few."""
    if len(rows) < CARVE_FROM_ROWS:
        return rows, rows, "training_file"
    count = min(HELDOUT_MOST, max(1, int(len(rows) * HELDOUT_SHARE)))
    chosen = frozenset(random.Random(f"heldout {seed}").sample(range(len(rows)), count))
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen], "training_file_carved"


def fit(rows: Sequence[Row], max_length: int) -> Fitted:
    """Cut each document to `max_length` tokens; a row left with nothing to learn is dropped, and counted."""
    cut = [row.cut(max_length) for row in rows]
    kept = [row for row in cut if row.learnable]
    truncated = sum(longest_document([row]) > max_length for row in rows)
    return Fitted(kept, truncated, len(cut) - len(kept))


@lru_cache(maxsize=1)
def epoch_order(rows: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation that depends on nothing but its arguments. Every step of an epoch asks for the same one."""
    return tuple(np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows).tolist())


def step_examples(rows: Sequence[Row], step: int, *, batch_size: int, seed: int) -> list[Row]:
    """The examples of optimizer step `step` (0-based). The last step of an epoch may be short; none crosses epochs."""
    per_epoch = -(-len(rows) // batch_size)
    epoch, within = divmod(step, per_epoch)
    order = epoch_order(len(rows), seed=seed, epoch=epoch)
    return [rows[i] for i in order[within * batch_size : (within + 1) * batch_size]]


def _read(path: str, task: Task, encoder: Encoder, tick: Callable[[], None], *, param: str) -> list[Row]:
    rows: list[Row] = []
    errors: list[RowError] = []
    bad = 0
    with open(path, "rb") as stream:
        for line, example in formats.read_rows(stream, max_row_bytes=task.max_row_bytes):
            tick()
            if isinstance(example, RowError):
                error = example
            else:
                if misfit := formats.misfit(task.method.type, formats.name(example)):
                    raise TrainingFailed(misfit, code=f"invalid_{param}", param=param)
                try:
                    rows.append(encoder.encode(line, example))
                    continue
                except CannotEncode as cause:
                    error = RowError(line, cause.field, cause.message, cause.hint)
            bad += 1
            if len(errors) < formats.MAX_PROBLEMS:
                errors.append(error)
    if bad:
        report = FileReport(rows=len(rows), bad_rows=bad, format=None, problems=[error.problem() for error in errors])
        raise TrainingFailed(
            formats.describe(report),
            code=f"invalid_{param}",
            param=param,
            hint="mend these lines, upload the file again, and create the job anew",
        )
    return rows
