"""Schemas of a dataset preview: rows as tokens of a base model, with the tokens that carry the loss marked.

Owns: request and response of `POST /fine_tuning/preview`. The database table is in `shared/database/previews.py`; the
trainer produces the tokens. Must not depend on HTTP or tables.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared.schemas.requests import Request, Text, TrainerParams, Wire
from shared.schemas.results import JobError, RowProblem

MAX_ROWS = 20
Line = Annotated[int, Field(ge=1, lt=2**53)]


class PreviewCreate(Request):
    """Which rows of a file to show: those that begin at the 1-based `lines`, or otherwise the first `rows`.

    `model`, `training_file` and `trainer` are as in a job. Of `trainer`, only `max_length` has an effect.
    """

    model: Text
    training_file: Text
    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 5
    lines: Annotated[list[Line], Field(min_length=1, max_length=MAX_ROWS)] | None = None
    trainer: TrainerParams = TrainerParams()


class Segment(Wire):
    """Consecutive tokens with the same `trained` and the same `special` flag, as `text` and as token `ids`."""

    text: str
    trained: bool
    special: bool
    ids: list[int]


Answer = Literal["chosen", "rejected"]


class PreviewRow(Wire):
    """One row as it is trained on, cut at `max_length`.

    `tokens` counts the whole row, before the cut; `trained_tokens` counts after the cut. The first token of a row is
    never trained, because no token precedes it. A preference row gives two of these, one per `answer`. A classification
    row has a `label` and no trained tokens: only the label is learned.
    """

    line: int
    answer: Answer | None
    label: str | None = None
    tokens: int
    trained_tokens: int
    truncated: bool
    segments: list[Segment]


class PreviewOut(Wire):
    """The requested rows as tokens. `problems` lists the requested rows that cannot be trained on."""

    object: Literal["fine_tuning.preview"] = "fine_tuning.preview"
    format: str | None
    max_length: int
    chat_template_sha256: str | None
    rows: list[PreviewRow]
    problems: list[RowProblem]


class PreviewError(JobError):
    """Why a preview failed. `retryable` is false if the user must fix something, as in the trainer's `failed`."""

    retryable: bool
