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
    """All rows of the files, neither cut to a length nor parted yet, and what reading each file found."""

    train: list[Row]
    validation: list[Row] | None
    report: FileReport
    validation_report: FileReport | None


@dataclass(frozen=True, slots=True)
class Fitted:
    """Split cut to a length; `dropped` lost every trained token by it."""

    kept: list[Row]
    truncated: int
    dropped: int


def load(task: Task, encoder: Encoder, *, tick: Callable[[], None] = lambda: None) -> Dataset:
    """Read and encode the job's files, calling `tick` with each row.

    A file with more than `skip_bad_rows` bad rows raises TrainingFailed that names them (the first ones in full).
    """
    train, report = _read(task, task.training_file, encoder, tick, param="training_file")
    if task.validation_file is None:
        return Dataset(train, None, report, None)
    validation, its_report = _read(task, task.validation_file, encoder, tick, param="validation_file")
    return Dataset(train, validation, report, its_report)


def encode(encoder: Encoder, line: int, example: Example | RowError) -> Row | RowError:
    """What `formats.read_rows` gives for a line, as tokens; or why it cannot be trained on."""
    if isinstance(example, RowError):
        return example
    try:
        if isinstance(example, LabelledExample):
            return classification.encode(encoder, line, example)
        return encoder.encode(line, example)
    except CannotEncode as cause:
        return RowError(line, cause.field, cause.message, cause.hint)


def carve(rows: list[Row], *, seed: int) -> tuple[list[Row], list[Row], HeldoutSource]:
    """Split to train on, and rows to score in place of a validation file: some of their own, or all if they are few."""
    count = heldout_rows(len(rows))
    if not count:
        return rows, rows, "training_file"
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


def _read(
    task: Task, path: str, encoder: Encoder, tick: Callable[[], None], *, param: str
) -> tuple[list[Row], FileReport]:
    rows: list[Row] = []
    report = FileReport(rows=0, bad_rows=0, format=None, problems=[])
    ended = True
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
            ended = not row.ends_file
            if len(report.problems) < formats.MAX_PROBLEMS:
                report.problems.append(row.problem())
    report.rows = len(rows)
    skippable = bool(rows) and ended
    if report.bad_rows <= task.trainer.skip_bad_rows and skippable:
        return rows, report
    hint = "mend these lines, upload the file again, and create the job anew"
    if skippable:
        hint += f"; or leave them out: trainer.skip_bad_rows = {report.bad_rows} (it is {task.trainer.skip_bad_rows})"
    raise TrainingFailed(formats.describe(report), code=f"invalid_{param}", param=param, hint=hint)


@dataclass(frozen=True, slots=True)
class Split:
    """What is trained on and what is scored, cut to the recipe's length; and what the cut cost."""

    train: list[Row]
    heldout: list[Row]
    heldout_source: HeldoutSource
    truncated: int
    dropped: int
    dropped_heldout: int


def split(dataset: Dataset, max_length: int, *, seed: int) -> Split:
    """The rows that survive the cut, and of those the held-out ones. Raises TrainingFailed where none does."""
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
