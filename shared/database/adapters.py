"""Published adapters, and the adapter that a new job starts from: a published one, or a checkpoint.

Owns: the names of adapters (`ft:…`), of their checkpoints (`ft:…:ckpt-step-N`) and checkpoint ids (`ftckpt_…`), and
which folders of the bucket must stay because an unfinished job starts from them. Must not touch S3.

`jobs.submit` locks the row of the source from the moment it finds it live until the job is committed. So whoever
deletes that row and then calls `prefixes_in_use` sees the job. The job stores all that it needs of the source; the row
may be deleted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session, joinedload

from shared.database.files import Lock
from shared.database.tables import Adapter, Checkpoint, Job
from shared.errors import Conflict, InvalidRequest, NotFound
from shared.ids import fine_tuned_name
from shared.schemas.requests import TERMINAL, JobCreate, Lora
from shared.schemas.results import Plan, Recipe

WEIGHTS = "adapter_model.safetensors"
#: The weights file that full fine-tuning publishes instead.
MODEL = "model.safetensors"
#: The recipe fields that decide an adapter's tensors. A job keeps its source's values; other fields may differ.
SHAPE = ("r", "alpha", "target_modules", "use_rslora", "use_dora")
_CHECKPOINT_NAME = re.compile(r"(?P<model>ft:.+:(?P<job>[0-9a-f]{30})):ckpt-step-(?P<step>[0-9]{1,18})")


class AdapterSource(NamedTuple):
    """An adapter that a job can start from.

    `name` is the name that its owner knows, `base` its base model, `prefix` its folder in the bucket, `sha256` the hash
    of its weights file, and `recipe` how it was trained.
    """

    name: str
    base: str
    prefix: str
    sha256: str
    recipe: Recipe


def get_adapter(
    session: Session, tenant_id: str, name: str, *, param: str = "model", lock: Lock | None = None
) -> Adapter:
    """Return the tenant's fine-tuned model of that name. Raises NotFound, which says if the model was deleted."""
    query = select(Adapter).where(Adapter.name == name, Adapter.tenant_id == tenant_id)
    if lock is not None:
        query = query.with_for_update(read=lock == "share").execution_options(populate_existing=True)
    adapter = session.scalar(query)
    if adapter is None or adapter.deleted_at is not None:
        found = f"no model {name!r}" if adapter is None else f"model {name!r} was deleted"
        raise NotFound(f"{found}; list yours with GET /v1/models", param=param, code="model_not_found")
    return adapter


def list_adapters(session: Session, tenant_id: str) -> Sequence[Adapter]:
    """List the tenant's fine-tuned models, oldest first."""
    owned = select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.deleted_at.is_(None))
    return session.scalars(owned.order_by(Adapter.created_at)).all()


def delete_adapter(session: Session, tenant_id: str, name: str) -> Adapter:
    """Mark an adapter as deleted; the caller deletes its objects. Raises Conflict if an unfinished job needs it."""
    adapter = get_adapter(session, tenant_id, name, lock="update")
    user = job_using(session, adapter.prefix)
    if user is not None:
        raise Conflict(f"job {user} still starts from {name!r}; cancel it or wait until it ends", code="model_in_use")
    adapter.deleted_at = func.clock_timestamp()
    session.flush()
    return adapter


def names_adapter(model: str) -> bool:
    """Whether `model` is the name of an adapter or checkpoint, rather than of a base model."""
    return model.startswith(("ft:", "ftckpt_"))


def checkpoint_name(model: str, step: int) -> str:
    """The name of a checkpoint of the job whose adapter is `model`, in the form that OpenAI uses."""
    return f"{model}:ckpt-step-{step}"


def adapter_source(session: Session, tenant_id: str, request: JobCreate) -> AdapterSource | None:
    """Return the adapter that the request starts from (`from_checkpoint` or `model`); None if it starts from a base.

    Its row is locked against deletion until the transaction ends. Raises NotFound, also for another tenant's adapter,
    and InvalidRequest if the request cannot start from it or names two different ones.
    """
    named = {"from_checkpoint": request.from_checkpoint}
    if names_adapter(request.model):
        named["model"] = request.model
    found = [_find(session, tenant_id, name, param) for param, name in named.items() if name is not None]
    if not found:
        return None
    start = found[0]
    if request.trainer.full_finetuning or start.recipe.full_finetuning:
        raise InvalidRequest(
            f"this job cannot start from {start.name!r}: full fine-tuning trains all weights, so there is no adapter "
            "to continue; start from a base model",
            param="trainer.full_finetuning",
            code="unsupported_start",
        )
    if "classification" in (request.method.type, start.recipe.method):
        raise InvalidRequest(
            f"{start.name!r} was trained with method {start.recipe.method!r}, and this job's method is "
            f"{request.method.type!r}: classification trains a head of its own, and cannot start from, or be continued "
            "as, an adapter; start from a base model",
            param="from_checkpoint" if request.from_checkpoint else "model",
            code="unsupported_start",
        )
    if any(other.prefix != start.prefix for other in found):
        raise InvalidRequest(
            f"model is {request.model!r} and from_checkpoint is {request.from_checkpoint!r}, a different adapter; "
            "give only one of them",
            param="from_checkpoint",
        )
    if "model" not in named and request.model != start.base:
        raise InvalidRequest(
            f"{request.from_checkpoint!r} is an adapter of {start.base!r}, but model is {request.model!r}; "
            f"allowed: {start.base!r}, or the adapter's own name",
            param="from_checkpoint",
            code="base_mismatch",
        )
    return start


def keep_shape(requested: Lora, start: AdapterSource) -> Lora:
    """Return `requested` with the shape (SHAPE) of `start`. Raises InvalidRequest if it asks for another shape."""
    shape = {name: getattr(start.recipe, name) for name in SHAPE}
    for name in SHAPE:
        value = getattr(requested, name)
        if name in requested.model_fields_set and value != "auto" and _sorted(value) != _sorted(shape[name]):
            raise InvalidRequest(
                f"lora.{name} is {value!r}, but {start.name!r} has {shape[name]!r}: an adapter keeps its shape; "
                f"leave lora.{name} out, or start from a base model",
                param=f"lora.{name}",
                code="lora_mismatch",
            )
    return requested.model_copy(update=shape)


def prefixes_in_use(session: Session, prefixes: Collection[str]) -> set[str]:
    """Return those of the folders that an unfinished job starts from."""
    starting = _starting(prefixes).with_only_columns(Job.start_prefix)
    return {prefix for prefix in session.scalars(starting) if prefix is not None}


def job_using(session: Session, prefix: str) -> str | None:
    """Return the id of an unfinished job that starts from this folder, if there is one."""
    return session.scalar(_starting([prefix]).with_only_columns(Job.id).limit(1))


def _starting(prefixes: Collection[str]) -> Select[Job]:
    return select(Job).where(Job.start_prefix.in_(prefixes), Job.state.not_in(TERMINAL))


def _find(session: Session, tenant_id: str, name: str, param: str) -> AdapterSource:
    if match := _CHECKPOINT_NAME.fullmatch(name):
        wanted = (Checkpoint.job_id == f"ftjob-{match['job']}") & (Checkpoint.step == int(match["step"]))
        return _checkpoint(session, tenant_id, wanted, name, param)
    if name.startswith("ftckpt_"):
        return _checkpoint(session, tenant_id, Checkpoint.id == name, name, param)
    if name.startswith("ft:"):
        return _adapter(session, tenant_id, name, param)
    raise InvalidRequest(
        f"{name!r} is not the name of an adapter; allowed: the id of a checkpoint (ftckpt_…), its name "
        "(ft:…:ckpt-step-N), or a fine-tuned model (ft:…)",
        param=param,
    )


def _adapter(session: Session, tenant_id: str, name: str, param: str) -> AdapterSource:
    adapter = get_adapter(session, tenant_id, name, param=param, lock="share")
    return _start(session.get_one(Job, adapter.job_id), name, adapter.prefix, adapter.files)


def _checkpoint(session: Session, tenant_id: str, wanted: ColumnElement[bool], name: str, param: str) -> AdapterSource:
    owned = select(Checkpoint).join(Job).where(wanted, Job.tenant_id == tenant_id)
    locked = owned.with_for_update(read=True, of=Checkpoint).execution_options(populate_existing=True)
    checkpoint, found = session.scalar(locked), f"no checkpoint {name!r}"
    if checkpoint is not None:
        job = session.scalars(select(Job).options(joinedload(Job.tenant)).where(Job.id == checkpoint.job_id)).one()
        model = fine_tuned_name(job.base_model, job.tenant.name, job.request.get("suffix"), job.id)
        full_name = checkpoint_name(model, checkpoint.step)
        if name in (checkpoint.id, full_name):
            if checkpoint.deleted_at is None:
                return _start(job, full_name, checkpoint.prefix, checkpoint.files)
            found = f"checkpoint {name!r} was deleted when newer ones replaced it"
    hint = "list the checkpoints of a job with GET /v1/fine_tuning/jobs/{id}/checkpoints"
    raise NotFound(f"{found}; {hint}", param=param, code="checkpoint_not_found")


def _start(job: Job, name: str, prefix: str, files: list[Any]) -> AdapterSource:
    [sha256] = [file["sha256"] for file in files if file["path"] in (WEIGHTS, MODEL)]
    return AdapterSource(name, job.base_model, prefix, sha256, Plan.model_validate(job.plan).recipe)


def _sorted(value: object) -> object:
    """Sort a list, because the order of `target_modules` has no meaning; return other values unchanged."""
    return sorted(value) if isinstance(value, list) else value
