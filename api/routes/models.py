"""`/v1/models`: the catalog of base models, shared by all, and the caller's fine-tuned ones."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial

from fastapi import APIRouter
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import SessionDep, TenantDep
from api.present import adapter_model_out, base_model_out
from shared import starts, storage
from shared.db import after_commit
from shared.errors import Conflict, NotFound, PermissionDenied
from shared.models import Adapter, BaseModel
from shared.schemas.responses import Deleted, Model, Page

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(tenant: TenantDep, session: SessionDep) -> Page[Model]:
    """All base models, then the tenant's fine-tuned ones, each oldest first."""
    bases = session.scalars(select(BaseModel).order_by(BaseModel.created_at)).all()
    owned = select(Adapter).where(Adapter.tenant_id == tenant.id, Adapter.deleted_at.is_(None))
    adapters = session.scalars(owned.order_by(Adapter.created_at)).all()
    models = [base_model_out(base) for base in bases] + [adapter_model_out(a, tenant.name) for a in adapters]
    return Page(data=models, has_more=False)


@router.get("/{model:path}")
def retrieve_model(model: str, tenant: TenantDep, session: SessionDep) -> Model:
    """One model; a base comes with presigned URLs of its files."""
    base = session.get(BaseModel, model)
    if base is not None:
        return base_model_out(base, with_files=True)
    return adapter_model_out(_adapter(session, tenant.id, model), tenant.name)


@router.delete("/{model:path}")
def delete_model(model: str, tenant: TenantDep, session: SessionDep) -> Deleted:
    """Delete a fine-tuned model that no unfinished job starts from, and its files; base models are the operator's."""
    if session.get(BaseModel, model) is not None:
        raise PermissionDenied(f"{model!r} is a base model, shared by all tenants; only ft:… models can be deleted")
    adapter = _adapter(session, tenant.id, model, for_update=True)
    user = starts.user(session, adapter.prefix)
    if user is not None:
        raise Conflict(f"job {user} still starts from {model!r}; cancel it or wait for its end", code="model_in_use")
    adapter.deleted_at = datetime.now(UTC)
    after_commit(session, partial(storage.delete_prefix, adapter.prefix))
    return Deleted(id=model, object="model")


def _adapter(session: Session, tenant_id: str, name: str, *, for_update: bool = False) -> Adapter:
    owned = select(Adapter).where(Adapter.name == name, Adapter.tenant_id == tenant_id, Adapter.deleted_at.is_(None))
    adapter = session.scalar(owned.with_for_update() if for_update else owned)
    if adapter is None:
        raise NotFound(f"no model {name!r}; list them with GET /v1/models", param="model", code="model_not_found")
    return adapter
