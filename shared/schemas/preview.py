"""Rows of a dataset as the base's tokenizer sees them, and which of their tokens carry the loss.

Owns: the wire objects of `POST /fine_tuning/preview`. The rows of the table are shared/database/previews.py's, the
tokens come from the trainer. Must not know about HTTP or tables.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared.schemas.requests import Request, Text, TrainerParams, Wire
from shared.schemas.results import JobError, RowProblem

MOST_ROWS = 20
Line = Annotated[int, Field(ge=1, lt=2**53)]


class PreviewCreate(Request):
    """A job's own fields, and which rows: those of `lines`, or the first `rows`. Of `trainer`, `max_length` counts."""

    model: Text
    training_file: Text
    rows: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 5
    lines: Annotated[list[Line], Field(min_length=1, max_length=MOST_ROWS)] | None = None
    trainer: TrainerParams = TrainerParams()


class Segment(Wire):
    """Tokens that follow one another and are all trained or all not, all special or all not."""

    text: str
    trained: bool
    special: bool
    ids: list[int]


Answer = Literal["chosen", "rejected"]


class PreviewRow(Wire):
    """One row after the cut, as it would be trained on. `tokens` are those of the whole row, `trained_tokens` after it.

    The first token of a row is never trained: nothing comes before it that could predict it. A preference makes two of
    these, one for each `answer`. Of a row to be classified no token is trained, but what gives it its `label`.
    """

    line: int
    answer: Answer | None
    label: str | None = None
    tokens: int
    trained_tokens: int
    truncated: bool
    segments: list[Segment]


class PreviewOut(Wire):
    """`problems` are the rows among those looked at that cannot be trained on."""

    object: Literal["fine_tuning.preview"] = "fine_tuning.preview"
    format: str | None
    max_length: int
    chat_template_sha256: str | None
    rows: list[PreviewRow]
    problems: list[RowProblem]


class PreviewError(JobError):
    """Why there is no preview. `retryable` is false for what the user must mend, as in the trainer's `failed`."""

    retryable: bool
