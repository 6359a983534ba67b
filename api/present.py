"""Convert database rows to response objects.

Must not query the database: everything comes from the row that is passed in.
"""

from __future__ import annotations

import time
from datetime import datetime

from shared import storage
from shared.database.adapters import checkpoint_name
from shared.database.tables import Adapter, BaseModelRow, Checkpoint, File, Job, JobEvent
from shared.schemas.memory import Fit
from shared.schemas.requests import JobCreate, Method, Phase, State
from shared.schemas.responses import AdapterOut, Artifact, Event, Progress
from shared.schemas.responses import Checkpoint as CheckpointOut
from shared.schemas.responses import File as FileOut
from shared.schemas.responses import Job as JobOut
from shared.schemas.responses import Model as ModelOut
from shared.schemas.results import Export, FileReport, JobError, Metrics, Plan, Proof, Recipe, Report
from shared.storage import Entry


def file_out(file: File) -> FileOut:
    return FileOut(
        id=file.id,
        bytes=file.bytes,
        created_at=_unix(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
        status="error" if file.status == "error" else "processed",
        status_details=file.status_details,
        expires_at=_unix(file.expires_at) if file.expires_at else None,
        sha256=file.sha256,
        report=FileReport.model_validate(file.report) if file.report else None,
    )


def job_out(job: Job, *, queue_position: int | None = None) -> JobOut:
    """Convert a job. Once it has a plan, each "auto" in `method` is replaced by the resolved number."""
    request = JobCreate.model_validate(job.request)
    plan = Plan.model_validate(job.plan) if job.plan else None
    report = Report.model_validate(job.report) if job.report else None
    method = _resolved(plan.recipe) if plan else request.method
    progress = _progress(job)
    eta = progress.eta_seconds if progress else None
    adapter = job.adapter if job.adapter is not None and job.adapter.deleted_at is None else None
    return JobOut(
        id=job.id,
        created_at=_unix(job.created_at),
        error=JobError.model_validate(job.error) if job.error else None,
        fine_tuned_model=adapter.name if adapter else None,
        finished_at=_unix(job.finished_at) if job.finished_at else None,
        hyperparameters=method.hyperparameters,
        method=method,
        model=job.base_model,
        organization_id=job.tenant_id,
        result_files=[job.result_file] if job.result_file else [],
        status=State(job.state),
        trained_tokens=report.trained_tokens if report else None,
        training_file=job.training_file,
        validation_file=job.validation_file,
        seed=job.seed,
        suffix=request.suffix,
        estimated_finish=int(time.time()) + eta if eta is not None else None,
        integrations=request.integrations or [],
        metadata=request.metadata,
        phase=Phase(job.phase) if job.phase else None,
        reason=job.reason,
        queue_position=queue_position,
        attempt=job.attempt,
        priority=job.priority,
        lora=request.lora,
        quantization=request.quantization,
        trainer=request.trainer,
        from_checkpoint=job.start_name,
        dry_run=job.dry_run,
        plan=plan,
        progress=progress,
        fit=_fit(plan, report),
        report=report,
        adapter=_adapter_out(adapter) if adapter else None,
    )


def event_out(event: JobEvent) -> Event:
    return Event.model_validate(
        {
            "id": f"ftevent-{event.job_id.removeprefix('ftjob-')}-{event.seq:08d}",
            "created_at": _unix(event.created_at),
            "level": event.level,
            "message": event.message,
            "type": event.type,
            "data": event.data,
        }
    )


def checkpoint_out(checkpoint: Checkpoint, model: str) -> CheckpointOut:
    return CheckpointOut(
        id=checkpoint.id,
        created_at=_unix(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint_name(model, checkpoint.step),
        fine_tuning_job_id=checkpoint.job_id,
        metrics=Metrics.model_validate(checkpoint.metrics),
        step_number=checkpoint.step,
    )


def base_model_out(base: BaseModelRow, *, with_files: bool = False) -> ModelOut:
    return ModelOut(
        id=base.name,
        created=_unix(base.created_at),
        owned_by="milliner",
        public_id=base.public_id,
        revision=base.revision,
        license=base.license,
        parameters=base.parameters,
        bytes=base.bytes,
        files=_artifacts(base.prefix, base.files) if with_files else None,
    )


def adapter_model_out(adapter: Adapter, owner: str) -> ModelOut:
    return ModelOut(
        id=adapter.name,
        created=_unix(adapter.created_at),
        owned_by=owner,
        bytes=adapter.bytes,
        base=adapter.base_model,
        job=adapter.job_id,
    )


def _resolved(recipe: Recipe) -> Method:
    """Return the requested method with a number in place of each "auto"."""
    names = ["n_epochs", "batch_size", "learning_rate_multiplier", *(["beta"] if recipe.method == "dpo" else [])]
    return Method.of(recipe.method, **{name: getattr(recipe, name) for name in names})


def _fit(plan: Plan | None, report: Report | None) -> Fit | None:
    """Return the peak memory of the finished run, or the largest peak predicted for any known device until then."""
    if report is not None and report.fit is not None:
        run = report.fit
        return Fit(predicted_bytes=run.predicted_bytes, measured_bytes=run.measured_bytes, device=run.device.name)
    if plan is None or plan.fit is None:
        return None
    largest = max(plan.fit.peaks, key=lambda peak: peak.predicted_bytes)
    return Fit(predicted_bytes=largest.predicted_bytes, measured_bytes=None, device=largest.name)


def _adapter_out(adapter: Adapter) -> AdapterOut:
    return AdapterOut(
        uri=storage.uri(adapter.prefix),
        bytes=adapter.bytes,
        files=_artifacts(adapter.prefix, adapter.files),
        proof=Proof.model_validate(adapter.proof) if adapter.proof else None,
        exports=[Export.model_validate(export) for export in adapter.exports],
        signed_by=adapter.signed_by,
    )


def _artifacts(prefix: str, entries: list[Entry]) -> list[Artifact]:
    return [Artifact(**entry, url=storage.presign(prefix + entry["path"])) for entry in entries]


def _progress(job: Job) -> Progress | None:
    """Return the last progress that the worker wrote, with the time since then subtracted from the ETA."""
    if not job.progress:
        return None
    step, total = int(job.progress["step"]), int(job.progress["total_steps"])
    seconds_per_step: float | None = job.progress["seconds_per_step"]
    eta = None
    if job.state == State.RUNNING and seconds_per_step is not None:
        eta = max(0, round((total - step) * seconds_per_step - (time.time() - job.progress["at"])))
    return Progress(
        step=step,
        total_steps=total,
        percent=round(100 * step / max(total, 1), 1),
        tokens_per_second=job.progress["tokens_per_second"],
        eta_seconds=eta,
    )


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())
