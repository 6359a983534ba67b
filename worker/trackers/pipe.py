"""The messages between a supervisor and the child that reports to a tracker: JSON lines.

The child's stdin gets `start`, the steps, and `end`; its stdout reports whether the tracker accepts them. If stdin
closes without `end`, the supervisor is dead or has lost its lease: the child then ends without another request.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from shared.schemas.requests import Integration

Ending = Literal["succeeded", "failed", "cancelled", "interrupted"]
Values = dict[str, float]


class StartRun(BaseModel):
    """The run to open. The secret is sent in this message only, not in the environment or the arguments."""

    op: Literal["start"] = "start"
    job: str
    integration: Integration
    base_model: str
    config: dict[str, Any]
    url: str = Field(repr=False)
    secret: str | None = Field(repr=False)


class Step(BaseModel):
    """The metrics of a step. One step may come in several messages, and again after a resume."""

    op: Literal["step"] = "step"
    step: int
    values: Values


class End(BaseModel):
    """The attempt is over; `interrupted` if another attempt will continue the job."""

    op: Literal["end"] = "end"
    ending: Ending


Message = Annotated[StartRun | Step | End, Field(discriminator="op")]
MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)


class Status(BaseModel):
    """The tracker answered (`error` is None), or why it did not."""

    error: str | None = None
