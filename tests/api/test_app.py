"""The envelope around every answer: the shape of errors, request ids, limits, health."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2 as httpx
import openai
import pytest

from deploy.local.folder import Record

ERROR = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def http(stack: Record) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {stack.api_key}"}
    with httpx.Client(base_url=stack.base_url.removesuffix("/v1"), headers=headers) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nowhere", 404),
        ("PUT", "/v1/files", 405),
        ("GET", "/v1/files?limit=0", 400),
        ("GET", "/v1/fine_tuning/jobs?limit=101", 400),
        ("GET", "/v1/fine_tuning/jobs?limit=x", 400),
        ("GET", "/v1/models/acme%2Fnone", 404),
    ],
)
def test_every_error_has_the_envelope(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == ERROR
    assert answer.json()["error"]["message"]
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_body_over_the_limit_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/fine_tuning/jobs", content=b" " * 2_000_000, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert set(answer.json()["error"]) == ERROR


def test_health(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"ready": True, "postgres": "ok", "s3": "ok", "redis": "ok"}


def test_models(client: openai.OpenAI, stranger: openai.OpenAI) -> None:
    (base,) = (model for model in client.models.list() if model.id == "SmolLM2-135M-Instruct")
    assert base.owned_by == "milliner"
    shown = stranger.models.retrieve(base.id)
    assert shown.model_extra is not None
    assert shown.model_extra["public_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert shown.model_extra["license"] == "apache-2.0"
    assert {file["path"] for file in shown.model_extra["files"]} >= {"config.json", "model.safetensors"}
    with pytest.raises(openai.PermissionDeniedError, match="base model, shared by all"):
        client.models.delete(base.id)
