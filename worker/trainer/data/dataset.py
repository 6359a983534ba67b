"""Read and encode dataset files, hold rows out, truncate rows, and order them for each epoch.

Owns: which rows are trained on, which are held out, and in what order. All of it is a pure function of the files, the
base and the seed, so that a resumed run sees the same rows. Must not import torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from shared.datasets import formats
from shared.datasets.formats import Example, LabelledExample, RowError
from shared.errors import TrainingFailed
from shared.estimation.defaults import heldout_rows
from shared.schemas.results import FileReport
from worker.trainer.data import classification
from worker.trainer.data.encoding import CannotEncode, Encoder, Row, longest_document
from worker.trainer.protocol import Task

HeldoutSource = Literal["validation_file", "training_file_carved", "training_file"]


@dataclass(frozen=True, slots=True)
class Dataset:
    """All valid rows of the files, before truncation and splitting, and a report on each file."""

    train: list[Row]
    validation: list[Row] | None
    report: FileReport
    validation_report: FileReport | None


@dataclass(frozen=True, slots=True)
class Fitted:
    """Rows after truncation. `truncated` counts those that were cut, `dropped` those with nothing left to learn."""

    kept: list[Row]
    truncated: int
    dropped: int


def load(task: Task, encoder: Encoder, *, tick: Callable[[], None] = lambda: None) -> Dataset:
    """Read and encode the job's files. `tick` is called for each row.

    Raises TrainingFailed, with the first bad rows, if a file has more than `trainer.skip_bad_rows` bad rows, no good
    row, a part that cannot be read, or rows of a format that the method cannot use.
    """
    train, report = _read(task, task.training_file, encoder, tick, param="training_file")
    if task.validation_file is None:
        return Dataset(train, None, report, None)
    validation, validation_report = _read(task, task.validation_file, encoder, tick, param="validation_file")
    return Dataset(train, validation, report, validation_report)


def encode(encoder: Encoder, line: int, example: Example | RowError) -> Row | RowError:
    """Encode what `formats.read_rows` yields for a line, or return the reason why it cannot be trained on."""
    if isinstance(example, RowError):
        return example
    try:
        if isinstance(example, LabelledExample):
            return classification.encode(encoder, line, example)
        return encoder.encode(line, example)
    except CannotEncode as cause:
        return RowError(line, cause.field, cause.message, cause.hint)


def carve(rows: list[Row], *, seed: int) -> tuple[list[Row], list[Row], HeldoutSource]:
    """Hold rows out where there is no validation file. Returns the training rows, the held-out rows and their source.

    5 % are held out, at most 200. With fewer than CARVE_FROM_ROWS rows, all are both trained on and scored.
    """
    count = heldout_rows(len(rows))
    if not count:
        return rows, rows, "training_file"
    chosen = frozenset(random.Random(f"heldout {seed}").sample(range(len(rows)), count))
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen], "training_file_carved"


def fit(rows: Sequence[Row], max_length: int) -> Fitted:
    """Cut each document to `max_length` tokens, and drop the rows with nothing left to learn."""
    cut = [row.cut(max_length) for row in rows]
    kept = [row for row in cut if row.learnable]
    truncated = sum(longest_document([row]) > max_length for row in rows)
    return Fitted(kept, truncated, len(cut) - len(kept))


@lru_cache(maxsize=1)
def epoch_order(rows: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """Permutation of range(rows) for an epoch (0-based). It depends on the arguments only.

    Cached, because every step of an epoch needs the same one.
    """
    return tuple(np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows).tolist())


def step_examples(rows: Sequence[Row], step: int, *, batch_size: int, seed: int) -> list[Row]:
    """Examples of optimizer step `step` (0-based). No step crosses epochs, so the last of an epoch may be smaller."""
    per_epoch = -(-len(rows) // batch_size)
    epoch, within = divmod(step, per_epoch)
    order = epoch_order(len(rows), seed=seed, epoch=epoch)
    return [rows[i] for i in order[within * batch_size : (within + 1) * batch_size]]


def _read(
    task: Task, path: str, encoder: Encoder, tick: Callable[[], None], *, param: str
) -> tuple[list[Row], FileReport]:
    rows: list[Row] = []
    report = FileReport(rows=0, bad_rows=0, format=None, problems=[])
    readable = True  # to the end of the file
    with open(path, "rb") as stream:
        for line, example in formats.read_rows(stream, max_row_bytes=task.max_row_bytes):
            tick()
            if not isinstance(example, RowError):
                report.format = report.format or formats.kind(example)
                if misfit := formats.misfit(task.method.type, formats.kind(example)):
                    raise TrainingFailed(misfit, code=f"invalid_{param}", param=param)
            row = encode(encoder, line, example)
            if not isinstance(row, RowError):
                rows.append(row)
                continue
            report.bad_rows += 1
            readable = not row.ends_file
            if len(report.problems) < formats.MAX_PROBLEMS:
                report.problems.append(row.problem())
    report.rows = len(rows)
    skippable = bool(rows) and readable
    if report.bad_rows <= task.trainer.skip_bad_rows and skippable:
        return rows, report
    hint = "fix these lines, upload the file again and create a new job"
    if skippable:
        hint += f"; or skip them: trainer.skip_bad_rows = {report.bad_rows} (it is {task.trainer.skip_bad_rows})"
    raise TrainingFailed(formats.describe(report), code=f"invalid_{param}", param=param, hint=hint)


@dataclass(frozen=True, slots=True)
class Split:
    """Training and held-out rows, cut to the recipe's length, and how many rows the cut affected."""

    train: list[Row]
    heldout: list[Row]
    heldout_source: HeldoutSource
    truncated: int
    dropped: int
    dropped_heldout: int


def split(dataset: Dataset, max_length: int, *, seed: int) -> Split:
    """Truncate rows, then hold some out. Raises TrainingFailed if a file has no row left after truncation."""
    fitted = _fit(dataset.train, max_length, param="training_file")
    if dataset.validation is None:
        train, heldout, source = carve(fitted.kept, seed=seed)
        return Split(train, heldout, source, fitted.truncated, fitted.dropped, 0)
    validation = _fit(dataset.validation, max_length, param="validation_file")
    return Split(fitted.kept, validation.kept, "validation_file", fitted.truncated, fitted.dropped, validation.dropped)


def _fit(rows: list[Row], max_length: int, *, param: str) -> Fitted:
    fitted = fit(rows, max_length)
    if not fitted.kept:
        raise TrainingFailed(
            f"no row has a trained token within its first {max_length:,} tokens",
            code=f"invalid_{param}",
            param=param,
            hint="raise trainer.max_length, or shorten what comes before the answers",
        )
    return fitted
