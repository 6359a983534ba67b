"""Response objects of the API.

Owns: their fields. Names and types follow `openai.types.fine_tuning` and `openai.types.file_object` (openai 3.52);
fields beyond those are ours. Must not depend on HTTP, tables or torch.
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
    """An uploaded dataset or a result file. Times are Unix seconds.

    `status` is `error` if the file has rows that cannot be trained on; `status_details` describes the first ones in
    words, `report` lists them.
    """

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
    """Progress of a running job in optimizer steps. `eta_seconds` is null unless the job is running."""

    step: int
    total_steps: int
    percent: float
    tokens_per_second: float | None
    eta_seconds: int | None


class Artifact(Wire):
    """A file in the bucket: path, size in bytes, SHA-256 in hex. `url` is presigned and expires soon."""

    path: str
    bytes: int
    sha256: str
    url: str


class AdapterOut(Wire):
    """A published adapter: its `uri` in the bucket, total size in bytes, files, verification result and exports.

    `signed_by` is the public key (Ed25519, base64) of the manifest's signature; null if the manifest is not signed.
    """

    uri: str
    bytes: int
    files: list[Artifact]
    proof: Proof | None = None
    exports: list[Export] = Field(default_factory=list)
    signed_by: str | None = None


class Job(Wire):
    """A fine-tuning job. Times are Unix seconds.

    `hyperparameters` and `method` show the request, with numbers in place of "auto" once there is a `plan`. `phase` is
    what the worker is doing, `reason` why the job has its `status`. `queue_position` counts from 1 and is null unless
    the job is queued; `attempt` counts how often a worker has started on the job.
    """

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
    """An event of a job. For type `metrics`, `data` holds the numbers of the step."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class Checkpoint(Wire):
    """A checkpoint of a job, saved after optimizer step `step_number`."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: Metrics
    step_number: int


class Model(Wire):
    """A base model, or a fine-tuned model of the caller. Only the latter has `base` and `job`.

    `bytes` is the total size of its files. `files` is set only where a single base model is retrieved.
    """

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
    """Confirmation that an object was deleted."""

    id: str
    object: str
    deleted: Literal[True] = True


Item = TypeVar("Item", bound=Wire)


class Page(Wire, Generic[Item]):
    """A page of a list. Pass `last_id` as `after` to get the next page.

    `has_more` is exact: the query fetches one row more than the page holds.
    """

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None
