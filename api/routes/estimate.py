"""`/v1/fine_tuning/estimate`: predict memory and time of a job and, if it does not fit, which change would make it fit.

Must not tokenize, nor wait for a worker.
"""

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
    """Predict memory and time of a job from the base model's config.json and the number of tokens in the file.

    Tokens come from the plan of an earlier job or dry run with the same file and base. Without one they are guessed
    from the file's size. Nothing is tokenized.
    """
    base = get_base_model(session, body.model)
    data = _data(session, tenant.id, body.training_file, base.name) if body.training_file is not None else None
    weighings = devices.weighings(session, digest=base.digest, quantization=body.quantization, kind=body.device)
    return estimate(body, base.config, data, weighings)


def _data(session: Session, tenant_id: str, file_id: str, base: str) -> Data:
    """Return the token counts of an earlier plan with this file and base model, or a guess from the file's size."""
    file = get_file(session, tenant_id, file_id, param="training_file")
    plan = jobs.latest_plan(session, tenant_id, training_file=file_id, base=base)
    if plan is not None:
        return from_plan(plan)
    rows = FileReport.model_validate(file.report).rows if file.report else 0
    return guess(rows=rows, size=file.bytes)
