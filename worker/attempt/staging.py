"""Bring to this machine what an attempt needs: dataset, base model, adapter to start from, last checkpoint.

Owns: the command and the task that a trainer gets. Everything downloaded is checked against the hash on its row. Must
not start a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from shared import storage
from shared.broker.queues import Queue
from shared.database import checkpoints, devices, jobs
from shared.database.adapters import WEIGHTS
from shared.database.session import session_scope
from shared.database.tables import BaseModelRow, Checkpoint, File, Job
from shared.schemas.memory import KnownDevice
from shared.schemas.requests import JobCreate
from shared.schemas.results import Plan, Recipe
from shared.settings import get_settings
from worker import cache
from worker.attempt.waiting import Retry
from worker.trainer.protocol import Prepare, Task, Train

#: (level, message) for the job's events.
AddEvent = Callable[[str, str], None]


def stage(
    job: Job, request: JobCreate, queue: Queue, *, work_dir: Path, held: ExitStack, retry: Retry, add_event: AddEvent
) -> Prepare | Train:
    """Download what the job needs and return the command for a trainer. `held` protects the base from eviction.

    Raises `storage.Corrupt` for a lost or changed object, and OSError if the disk is full.
    """
    base, training, validation = retry.call(lambda: _inputs(job))
    base_dir, in_use = retry.call(lambda: _base(base, with_weights=queue is Queue.TRAIN, tick=retry.tick))
    held.push(in_use)
    settings = get_settings()
    task = task_of(
        request,
        base,
        base_dir=base_dir,
        training_file=_fetch(training, work_dir, retry),
        validation_file=_fetch(validation, work_dir, retry) if validation else None,
        start_from=_start_adapter(job, work_dir, retry) if queue is Queue.TRAIN else None,
        start_name=job.start_name,
        seed=job.seed,
        known_devices=retry.call(lambda: _devices(base, request)),
        silence_seconds=(settings.lease_seconds - settings.fence_seconds) / 2,
    )
    if queue is Queue.PREPARE:
        return Prepare(job=job.id, task=task)
    recipe: Recipe = Plan.model_validate(job.plan).recipe
    resume = _last_checkpoint(job, work_dir, retry, add_event)
    return Train(
        job=job.id,
        task=task,
        recipe=recipe,
        work_dir=str(work_dir),
        resume_from=str(resume) if resume else None,
        fallback_level=job.fallback_level,
    )


def task_of(
    request: JobCreate,
    base: BaseModelRow,
    *,
    base_dir: Path,
    training_file: Path,
    validation_file: Path | None,
    seed: int,
    known_devices: Sequence[KnownDevice] = (),
    start_from: Path | None = None,
    start_name: str | None = None,
    silence_seconds: float | None = None,
) -> Task:
    """Return everything that a trainer needs to know about a job."""
    settings = get_settings()
    return Task(
        base_dir=str(base_dir),
        base_name=base.public_id,
        base_revision=base.revision,
        base_license=base.license,
        base_parameters=base.parameters,
        training_file=str(training_file),
        validation_file=str(validation_file) if validation_file else None,
        start_from=str(start_from) if start_from else None,
        start_name=start_name,
        method=request.method,
        lora=request.lora,
        quantization=request.quantization,
        trainer=request.trainer,
        seed=seed,
        torch_threads=settings.torch_threads,
        full_finetuning_bytes=settings.full_finetuning_bytes,
        devices=list(known_devices),
        device_memory_bytes=settings.device_memory_bytes,
        max_row_bytes=settings.max_row_bytes,
        silence_seconds=silence_seconds,
    )


def _inputs(job: Job) -> jobs.Inputs:
    with session_scope() as session:
        return jobs.inputs_of(session, job)


def _base(base: BaseModelRow, *, with_weights: bool, tick: Callable[[], None]) -> tuple[Path, ExitStack]:
    """Return the base's folder, and the stack whose lock protects it from eviction."""
    with ExitStack() as stack:
        folder = stack.enter_context(cache.base_model(base, with_weights=with_weights, tick=tick))
        return folder, stack.pop_all()


def _fetch(file: File, work_dir: Path, retry: Retry) -> Path:
    path = work_dir / file.id
    retry.call(lambda: storage.fetch(file.key, path, file.sha256, tick=retry.tick))
    return path


def _start_adapter(job: Job, work_dir: Path, retry: Retry) -> Path | None:
    """Download the weights of the adapter that the job starts from; None if it starts from the base."""
    if job.start_prefix is None or job.start_sha256 is None:
        return None
    folder, key = work_dir / "start", job.start_prefix + WEIGHTS
    retry.call(partial(storage.fetch, key, folder / WEIGHTS, job.start_sha256, tick=retry.tick))
    return folder


def _last_checkpoint(job: Job, work_dir: Path, retry: Retry, add_event: AddEvent) -> Path | None:
    """Download the newest checkpoint whose hashes are right. A damaged one is reported and the one before it tried."""
    for checkpoint in retry.call(lambda: _checkpoints(job)):
        folder = work_dir / f"resume-{checkpoint.step}"
        fetch = partial(storage.fetch_folder, checkpoint.prefix, checkpoint.files, folder, tick=retry.tick)
        try:
            retry.call(fetch)
        except storage.Corrupt as damaged:
            add_event("warn", f"Checkpoint of step {checkpoint.step} is damaged; trying the one before it: {damaged}")
            continue
        add_event("info", f"Resuming from the checkpoint of step {checkpoint.step}")
        return folder
    return None


def _devices(base: BaseModelRow, request: JobCreate) -> list[KnownDevice]:
    with session_scope() as session:
        return devices.known(session, digest=base.digest, quantization=request.quantization)


def _checkpoints(job: Job) -> Sequence[Checkpoint]:
    with session_scope() as session:
        return checkpoints.latest_checkpoints(session, job.id)
