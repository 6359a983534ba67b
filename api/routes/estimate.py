"""`/v1/fine_tuning/estimate`: will it fit, how long, and what would make it fit. Nothing is tokenized."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import SessionDep, TenantDep
from shared import devices
from shared.errors import NotFound
from shared.estimation.estimate import Data, Estimate, EstimateCreate, estimate, guess
from shared.jobs import get_base, live_file
from shared.models import File, Job
from shared.schemas.results import FileReport, Plan

router = APIRouter(prefix="/v1/fine_tuning/estimate", tags=["fine-tuning"])


@router.post("")
def create_estimate(body: EstimateCreate, tenant: TenantDep, session: SessionDep) -> Estimate:
    """Memory and time of a job by arithmetic, from the base's config.json and what is known of the file."""
    base = get_base(session, body.model)
    data = _data(session, tenant.id, body.training_file, base.name) if body.training_file is not None else None
    weighings = devices.weighings(session, digest=base.digest, quantization=body.quantization, kind=body.device)
    return estimate(body, base.config, data, weighings)


def _data(session: Session, tenant_id: str, file_id: str, base: str) -> Data:
    """What an earlier job or dry run has counted in this file with this base's tokenizer, or else a guess."""
    owned = select(File).where(File.id == file_id, File.tenant_id == tenant_id, live_file())
    file = session.scalar(owned)
    if file is None:
        raise NotFound(
            f"no file {file_id!r}; list yours with GET /v1/files", param="training_file", code="file_not_found"
        )
    counted = (
        select(Job.plan)
        .where(Job.tenant_id == tenant_id, Job.training_file == file_id, Job.base_model == base, Job.plan.is_not(None))
        .order_by(Job.id.desc())
        .limit(1)
    )
    found = session.scalar(counted)
    if found is not None:
        plan = Plan.model_validate(found)
        return Data(rows=plan.rows, tokens=plan.tokens, longest_row=plan.longest_row, source="plan")
    rows = FileReport.model_validate(file.report).rows if file.report else 0
    return guess(rows=rows, size=file.bytes)
