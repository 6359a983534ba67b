"""`/healthz` (is the process alive?) and `/readyz` (can it serve requests?). Neither requires an API key."""

from __future__ import annotations

from typing import Any

import redis
from fastapi import APIRouter, Response

from shared import storage
from shared.database import jobs
from shared.database.session import session_scope
from shared.errors import Unavailable
from shared.settings import get_settings

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Return ok whenever the process is able to respond."""
    # async, so that it does not wait for a thread of a busy pool.
    return {"status": "ok"}


@router.get("/readyz")
def readyz(response: Response) -> dict[str, Any]:
    """Return 503 unless Postgres and S3 respond. Redis is reported but not required; it makes jobs start sooner."""
    postgres = "ok"
    try:
        with session_scope() as session:
            jobs.check_schema(session)
    except Unavailable as error:
        postgres = error.message
    bucket = "ok"
    try:
        storage.check()
    except Unavailable as error:
        bucket = error.message
    ready = postgres == bucket == "ok"
    response.status_code = 200 if ready else 503
    return {"ready": ready, "postgres": postgres, "s3": bucket, "redis": _redis()}


def _redis() -> str:
    url = get_settings().redis_url.get_secret_value()
    try:
        with redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1) as client:
            client.ping()
    except redis.RedisError as error:
        return f"{type(error).__name__}: {error}"
    return "ok"
