"""What the API answers, in the words of `openai.types.fine_tuning` and `openai.types.file_object` (openai 3.52).

Must not know about HTTP, tables or torch.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import Field

from shared.schemas.memory import Fit
from shared.schemas.requests import (
    Hyperparameters,
    Integration,
    Lora,
    Metadata,
    Method,
    Phase,
    Quantization,
    State,
    TrainerParams,
    Wire,
)
from shared.schemas.results import Export, FileReport, JobError, Metrics, Plan, Proof, Report


class File(Wire):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None = None
    expires_at: int | None = None
    sha256: str
    report: FileReport | None = None


class Progress(Wire):
    step: int
    total_steps: int
    percent: float
    tokens_per_second: float | None
    eta_seconds: int | None


class Artifact(Wire):
    """One file in the bucket; `url` is presigned and short-lived."""

    path: str
    bytes: int
    sha256: str
    url: str


class AdapterOut(Wire):
    """`signed_by` is the public key (Ed25519, base64) that the manifest's signature is by, if it has one."""

    uri: str
    bytes: int
    files: list[Artifact]
    proof: Proof | None = None
    exports: list[Export] = Field(default_factory=list)
    signed_by: str | None = None


class Job(Wire):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: Hyperparameters
    method: Method
    model: str
    organization_id: str
    result_files: list[str]
    status: State
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    seed: int
    suffix: str | None
    estimated_finish: int | None
    integrations: list[Integration]
    metadata: Metadata | None
    phase: Phase | None
    reason: str | None
    queue_position: int | None
    attempt: int
    priority: int
    lora: Lora
    quantization: Quantization
    trainer: TrainerParams
    from_checkpoint: str | None = None
    dry_run: bool
    plan: Plan | None
    progress: Progress | None
    fit: Fit | None = None
    report: Report | None
    adapter: AdapterOut | None


class Event(Wire):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class Checkpoint(Wire):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: Metrics
    step_number: int


class Model(Wire):
    """A base model of the catalog, or a tenant's fine-tuned one (`base` and `job` set)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    public_id: str | None = None
    revision: str | None = None
    license: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    base: str | None = None
    job: str | None = None
    files: list[Artifact] | None = None


class Deleted(Wire):
    id: str
    object: str
    deleted: Literal[True] = True


Item = TypeVar("Item", bound=Wire)


class Page(Wire, Generic[Item]):
    """A keyset page. `has_more` is honest: one row more than asked for was looked for."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None
