"""What a job's adapter starts as: another job's, as it was published or as a checkpoint has it.

Owns: the names that an adapter goes by (`ft:…`, its checkpoints' `ft:…:ckpt-step-N`, their ids `ftckpt_…`), and which
folders of the bucket must stay because a job that has not ended starts from them. Must not touch S3.

A submit holds a lock on the row of its source from the moment it saw that it is live, so whoever ends that row and then
asks `needed` sees the job. The job bears all that it needs of the source; the row may go.
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
#: What a job of full fine-tuning publishes instead.
MODEL = "model.safetensors"
#: What an adapter's tensors are made by; the rest of a recipe may differ from its source's.
SHAPE = ("r", "alpha", "target_modules", "use_rslora", "use_dora")
_CHECKPOINT_NAME = re.compile(r"(?P<model>ft:.+:(?P<job>[0-9a-f]{30})):ckpt-step-(?P<step>[0-9]{1,18})")


class AdapterSource(NamedTuple):
    """An adapter, by the name that its owner knows: what it is for, where its weights lie, and how it was made."""

    name: str
    base: str
    prefix: str
    sha256: str
    recipe: Recipe


def get_adapter(
    session: Session, tenant_id: str, name: str, *, param: str = "model", lock: Lock | None = None
) -> Adapter:
    """The tenant's fine-tuned model of that name. Raises NotFound, which says so if it was deleted."""
    query = select(Adapter).where(Adapter.name == name, Adapter.tenant_id == tenant_id)
    if lock is not None:
        query = query.with_for_update(read=lock == "share").execution_options(populate_existing=True)
    adapter = session.scalar(query)
    if adapter is None or adapter.deleted_at is not None:
        found = f"no model {name!r}" if adapter is None else f"model {name!r} was deleted"
        raise NotFound(f"{found}; list yours with GET /v1/models", param=param, code="model_not_found")
    return adapter


def list_adapters(session: Session, tenant_id: str) -> Sequence[Adapter]:
    """The tenant's fine-tuned models, oldest first."""
    owned = select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.deleted_at.is_(None))
    return session.scalars(owned.order_by(Adapter.created_at)).all()


def delete_adapter(session: Session, tenant_id: str, name: str) -> Adapter:
    """Mark an adapter deleted. Raises Conflict while an unfinished job starts from it; its objects are the caller's."""
    adapter = get_adapter(session, tenant_id, name, lock="update")
    user = job_using(session, adapter.prefix)
    if user is not None:
        raise Conflict(f"job {user} still starts from {name!r}; cancel it or wait for its end", code="model_in_use")
    adapter.deleted_at = func.clock_timestamp()
    session.flush()
    return adapter


def names_adapter(model: str) -> bool:
    """Is this the name of an adapter or of a checkpoint, rather than of a base?"""
    return model.startswith(("ft:", "ftckpt_"))


def checkpoint_name(model: str, step: int) -> str:
    """What clients call a checkpoint of the job whose adapter is called `model`, as OpenAI names its own."""
    return f"{model}:ckpt-step-{step}"


def adapter_source(session: Session, tenant_id: str, request: JobCreate) -> AdapterSource | None:
    """What the request starts from, by `from_checkpoint` or `model`, locked against deletion till the job is there.

    Raises NotFound, for another tenant's too, and InvalidRequest: the two do not agree.
    """
    told = {"from_checkpoint": request.from_checkpoint}
    if names_adapter(request.model):
        told["model"] = request.model
    found = [_find(session, tenant_id, name, param) for param, name in told.items() if name is not None]
    if not found:
        return None
    start = found[0]
    if request.trainer.full_finetuning or start.recipe.full_finetuning:
        raise InvalidRequest(
            f"{start.name!r} and this job cannot follow each other: where all weights are trained there is no adapter "
            "to go on from; start from the base",
            param="trainer.full_finetuning",
            code="unsupported_start",
        )
    if "classification" in (request.method.type, start.recipe.method):
        raise InvalidRequest(
            f"{start.name!r} is of method {start.recipe.method!r}, this job of {request.method.type!r}: a "
            "classification has a head of its own, and neither goes on from an adapter nor is gone on from; "
            "start from the base",
            param="from_checkpoint" if request.from_checkpoint else "model",
            code="unsupported_start",
        )
    if any(other.prefix != start.prefix for other in found):
        raise InvalidRequest(
            f"model is {request.model!r} and from_checkpoint {request.from_checkpoint!r}, which is another adapter; "
            "name it once",
            param="from_checkpoint",
        )
    if "model" not in told and request.model != start.base:
        raise InvalidRequest(
            f"{request.from_checkpoint!r} is an adapter of {start.base!r}, model is {request.model!r}; "
            f"allowed: {start.base!r}, or the adapter's own name",
            param="from_checkpoint",
            code="base_mismatch",
        )
    return start


def keep_shape(asked: Lora, start: AdapterSource) -> Lora:
    """`asked` with the shape of the adapter that it starts as. Raises InvalidRequest where another was asked for."""
    has = {name: getattr(start.recipe, name) for name in SHAPE}
    for name in SHAPE:
        said = getattr(asked, name)
        if name in asked.model_fields_set and said != "auto" and _sorted(said) != _sorted(has[name]):
            raise InvalidRequest(
                f"lora.{name} is {said!r}, and {start.name!r} has {has[name]!r}: an adapter keeps its shape; "
                "leave it out, or start anew",
                param=f"lora.{name}",
                code="lora_mismatch",
            )
    return asked.model_copy(update=has)


def prefixes_in_use(session: Session, prefixes: Collection[str]) -> set[str]:
    """Those of the folders that jobs which have not ended start from."""
    starting = _starting(prefixes).with_only_columns(Job.start_prefix)
    return {prefix for prefix in session.scalars(starting) if prefix is not None}


def job_using(session: Session, prefix: str) -> str | None:
    """The id of a job that has not ended and starts from this folder."""
    return session.scalar(_starting([prefix]).with_only_columns(Job.id).limit(1))


def _starting(prefixes: Collection[str]) -> Select[Job]:
    return select(Job).where(Job.start_prefix.in_(prefixes), Job.state.not_in(TERMINAL))


def _find(session: Session, tenant_id: str, name: str, param: str) -> AdapterSource:
    if match := _CHECKPOINT_NAME.fullmatch(name):
        here = (Checkpoint.job_id == f"ftjob-{match['job']}") & (Checkpoint.step == int(match["step"]))
        return _checkpoint(session, tenant_id, here, name, param)
    if name.startswith("ftckpt_"):
        return _checkpoint(session, tenant_id, Checkpoint.id == name, name, param)
    if name.startswith("ft:"):
        return _adapter(session, tenant_id, name, param)
    raise InvalidRequest(
        f"{name!r} names no adapter; allowed: the id of a checkpoint (ftckpt_…), its name (ft:…:ckpt-step-N), or a "
        "fine-tuned model (ft:…)",
        param=param,
    )


def _adapter(session: Session, tenant_id: str, name: str, param: str) -> AdapterSource:
    adapter = get_adapter(session, tenant_id, name, param=param, lock="share")
    return _start(session.get_one(Job, adapter.job_id), name, adapter.prefix, adapter.files)


def _checkpoint(session: Session, tenant_id: str, here: ColumnElement[bool], name: str, param: str) -> AdapterSource:
    mine = select(Checkpoint).join(Job).where(here, Job.tenant_id == tenant_id)
    locked = mine.with_for_update(read=True, of=Checkpoint).execution_options(populate_existing=True)
    checkpoint, found = session.scalar(locked), f"no checkpoint {name!r}"
    if checkpoint is not None:
        job = session.scalars(select(Job).options(joinedload(Job.tenant)).where(Job.id == checkpoint.job_id)).one()
        model = fine_tuned_name(job.base_model, job.tenant.name, job.request.get("suffix"), job.id)
        called = checkpoint_name(model, checkpoint.step)
        if name in (checkpoint.id, called):
            if checkpoint.deleted_at is None:
                return _start(job, called, checkpoint.prefix, checkpoint.files)
            found = f"checkpoint {name!r} was dropped when newer ones came"
    hint = "list those of a job with GET /v1/fine_tuning/jobs/{id}/checkpoints"
    raise NotFound(f"{found}; {hint}", param=param, code="checkpoint_not_found")


def _start(job: Job, name: str, prefix: str, files: list[Any]) -> AdapterSource:
    [sha256] = [file["sha256"] for file in files if file["path"] in (WEIGHTS, MODEL)]
    return AdapterSource(name, job.base_model, prefix, sha256, Plan.model_validate(job.plan).recipe)


def _sorted(value: object) -> object:
    """A list of modules means the same in any order."""
    return sorted(value) if isinstance(value, list) else value
