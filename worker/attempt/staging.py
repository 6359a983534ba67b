"""Bringing to this machine what an attempt needs: dataset, base model, the adapter it starts as, its last checkpoint.

Owns: what a trainer is told of a job. Everything that comes from the bucket is checked against the hash on its row.
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
from worker.attempt.waiting import Patience
from worker.trainer.protocol import Prepare, Task, Train

Tell = Callable[[str, str], None]


def stage(
    job: Job, request: JobCreate, queue: Queue, *, work_dir: Path, held: ExitStack, patience: Patience, tell: Tell
) -> Prepare | Train:
    """The command for a trainer, with all that it names in place. `held` keeps the base safe from eviction."""
    base, training, validation = patience.do(lambda: _inputs(job))
    base_dir, in_use = patience.do(lambda: _base(base, with_weights=queue is Queue.TRAIN, tick=patience.tick))
    held.push(in_use)
    settings = get_settings()
    task = task_of(
        request,
        base,
        base_dir=base_dir,
        training_file=_fetched(training, work_dir, patience),
        validation_file=_fetched(validation, work_dir, patience) if validation else None,
        start_from=_start(job, work_dir, patience) if queue is Queue.TRAIN else None,
        start_name=job.start_name,
        seed=job.seed,
        known_devices=patience.do(lambda: _devices(base, request)),
        silence_seconds=(settings.lease_seconds - settings.fence_seconds) / 2,
    )
    if queue is Queue.PREPARE:
        return Prepare(job=job.id, task=task)
    recipe: Recipe = Plan.model_validate(job.plan).recipe
    resume = _last_checkpoint(job, work_dir, patience, tell)
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
    """All that a trainer is told of a job."""
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
    """Its folder, and what keeps it safe from eviction."""
    with ExitStack() as stack:
        folder = stack.enter_context(cache.base_model(base, with_weights=with_weights, tick=tick))
        return folder, stack.pop_all()


def _fetched(file: File, work_dir: Path, patience: Patience) -> Path:
    path = work_dir / file.id
    patience.do(lambda: storage.fetch(file.key, path, file.sha256, tick=patience.tick))
    return path


def _start(job: Job, work_dir: Path, patience: Patience) -> Path | None:
    """The folder of the adapter that the job begins with: of another's files, the weights alone are needed."""
    if job.start_prefix is None or job.start_sha256 is None:
        return None
    folder, key = work_dir / "start", job.start_prefix + WEIGHTS
    patience.do(partial(storage.fetch, key, folder / WEIGHTS, job.start_sha256, tick=patience.tick))
    return folder


def _last_checkpoint(job: Job, work_dir: Path, patience: Patience, tell: Tell) -> Path | None:
    """The newest checkpoint whose every hash is right; a broken one is told of and the one before it taken."""
    for checkpoint in patience.do(lambda: _checkpoints(job)):
        folder = work_dir / f"resume-{checkpoint.step}"
        fetch = partial(storage.fetch_folder, checkpoint.prefix, checkpoint.files, folder, tick=patience.tick)
        try:
            patience.do(fetch)
        except storage.Corrupt as broken:
            tell("warn", f"Checkpoint of step {checkpoint.step} is broken, going one back: {broken}")
            continue
        tell("info", f"Resuming from the checkpoint of step {checkpoint.step}")
        return folder
    return None


def _devices(base: BaseModelRow, request: JobCreate) -> list[KnownDevice]:
    with session_scope() as session:
        return devices.known(session, digest=base.digest, quantization=request.quantization)


def _checkpoints(job: Job) -> Sequence[Checkpoint]:
    with session_scope() as session:
        return checkpoints.latest_checkpoints(session, job.id)
