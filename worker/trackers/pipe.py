"""What a supervisor and the child that talks to a tracker say to each other: JSON lines.

Down the child's stdin go `start`, steps, and `end`; up its stdout goes whether the tracker takes them. A stdin that
ends without `end` says that the supervisor is dead, or has lost its lease: then nothing more is said to anybody.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from shared.schemas.requests import Integration

Ending = Literal["succeeded", "failed", "cancelled", "interrupted"]
Values = dict[str, float]


class StartRun(BaseModel):
    """The run to open. The secret travels here and nowhere else: not in the environment, not in the arguments."""

    op: Literal["start"] = "start"
    job: str
    integration: Integration
    base_model: str
    config: dict[str, Any]
    url: str = Field(repr=False)
    secret: str | None = Field(repr=False)


class Step(BaseModel):
    """What was measured at a step. One step may come in parts, and again after a resume."""

    op: Literal["step"] = "step"
    step: int
    values: Values


class End(BaseModel):
    """The attempt is over; `interrupted` where another attempt will go on with the job."""

    op: Literal["end"] = "end"
    ending: Ending


Message = Annotated[StartRun | Step | End, Field(discriminator="op")]
MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)


class Word(BaseModel):
    """The tracker has answered; or it has not, and why."""

    trouble: str | None = None
