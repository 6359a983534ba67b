"""`/v1/fine_tuning/estimate`: will it fit, how long, and what would make it fit. Nothing is tokenized."""

from __future__ import annotations

from fastapi import APIRouter

from api.deps import SessionDep, TenantDep
from shared.database import devices, jobs
from shared.database.base_models import get_base_model
from shared.database.files import get_file
from shared.database.session import Session
from shared.estimation.estimate import Data, Estimate, EstimateCreate, estimate, from_plan, guess
from shared.schemas.results import FileReport

router = APIRouter(prefix="/v1/fine_tuning/estimate", tags=["fine-tuning"])


@router.post("")
def create_estimate(body: EstimateCreate, tenant: TenantDep, session: SessionDep) -> Estimate:
    """Memory and time of a job by arithmetic, from the base's config.json and what is known of the file."""
    base = get_base_model(session, body.model)
    data = _data(session, tenant.id, body.training_file, base.name) if body.training_file is not None else None
    weighings = devices.weighings(session, digest=base.digest, quantization=body.quantization, kind=body.device)
    return estimate(body, base.config, data, weighings)


def _data(session: Session, tenant_id: str, file_id: str, base: str) -> Data:
    """What an earlier job or dry run has counted in this file with this base's tokenizer, or else a guess."""
    file = get_file(session, tenant_id, file_id, param="training_file")
    plan = jobs.latest_plan(session, tenant_id, training_file=file_id, base=base)
    if plan is not None:
        return from_plan(plan)
    rows = FileReport.model_validate(file.report).rows if file.report else 0
    return guess(rows=rows, size=file.bytes)
