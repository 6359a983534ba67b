"""`/v1/models`: the base models, which all tenants share, and the caller's fine-tuned models."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter

from api.deps import SessionDep, TenantDep
from api.present import adapter_model_out, base_model_out
from shared import storage
from shared.database import adapters, base_models
from shared.database.session import after_commit
from shared.errors import PermissionDenied
from shared.schemas.responses import Deleted, Model, Page

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(tenant: TenantDep, session: SessionDep) -> Page[Model]:
    """List all base models, then your fine-tuned models, each group oldest first."""
    bases = [base_model_out(base) for base in base_models.list_base_models(session)]
    owned = [adapter_model_out(adapter, tenant.name) for adapter in adapters.list_adapters(session, tenant.id)]
    return Page(data=bases + owned, has_more=False)


@router.get("/{model:path}")
def retrieve_model(model: str, tenant: TenantDep, session: SessionDep) -> Model:
    """Return one model; for a base model, with presigned URLs of its files."""
    base = base_models.find_base_model(session, model)
    if base is not None:
        return base_model_out(base, with_files=True)
    return adapter_model_out(adapters.get_adapter(session, tenant.id, model), tenant.name)


@router.delete("/{model:path}")
def delete_model(model: str, tenant: TenantDep, session: SessionDep) -> Deleted:
    """Delete a fine-tuned model and its files. A 409 if an unfinished job starts from it; a 403 for a base model."""
    if base_models.find_base_model(session, model) is not None:
        raise PermissionDenied(f"{model!r} is a base model, shared by all tenants; only ft:… models can be deleted")
    adapter = adapters.delete_adapter(session, tenant.id, model)
    after_commit(session, partial(storage.delete_prefix, adapter.prefix))
    return Deleted(id=model, object="model")
