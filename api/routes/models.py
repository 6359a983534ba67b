"""`/v1/models`: the catalog of base models, shared by all, and the caller's fine-tuned ones."""

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
    """All base models, then the tenant's fine-tuned ones, each oldest first."""
    bases = [base_model_out(base) for base in base_models.list_base_models(session)]
    owned = [adapter_model_out(adapter, tenant.name) for adapter in adapters.list_adapters(session, tenant.id)]
    return Page(data=bases + owned, has_more=False)


@router.get("/{model:path}")
def retrieve_model(model: str, tenant: TenantDep, session: SessionDep) -> Model:
    """One model; a base comes with presigned URLs of its files."""
    base = base_models.find_base_model(session, model)
    if base is not None:
        return base_model_out(base, with_files=True)
    return adapter_model_out(adapters.get_adapter(session, tenant.id, model), tenant.name)


@router.delete("/{model:path}")
def delete_model(model: str, tenant: TenantDep, session: SessionDep) -> Deleted:
    """Delete a fine-tuned model that no unfinished job starts from, and its files; base models are the operator's."""
    if base_models.find_base_model(session, model) is not None:
        raise PermissionDenied(f"{model!r} is a base model, shared by all tenants; only ft:… models can be deleted")
    adapter = adapters.delete_adapter(session, tenant.id, model)
    after_commit(session, partial(storage.delete_prefix, adapter.prefix))
    return Deleted(id=model, object="model")
