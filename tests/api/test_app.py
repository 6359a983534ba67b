"""What every response has: the shape of errors, request ids, size limits. Also health checks and models."""

from __future__ import annotations

import socket
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
def test_every_error_has_the_same_shape(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == ERROR
    assert answer.json()["error"]["message"]
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_body_over_the_limit_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/fine_tuning/jobs", content=b" " * 2_000_000, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert set(answer.json()["error"]) == ERROR


def test_a_request_without_a_key_is_rejected_before_its_body_is_read(http: httpx.Client) -> None:
    """The response comes at once, although the declared body is large and never sent."""
    with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as raw:
        raw.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 8000000000\r\n"
            b"content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        raw.settimeout(10)
        assert raw.recv(100).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("body", [{}, {"purpose": "fine-tune"}, {"purpose": "fine-tune", "colour": "red"}])
def test_an_upload_with_a_missing_or_unknown_field_is_a_400(http: httpx.Client, body: dict[str, str]) -> None:
    answer = http.post("/v1/files", data=body, files={"other": b"x"} if not body else None)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == ERROR


@pytest.mark.parametrize("path", ["/v1/files/%00", "/v1/models/a%00b", "/v1/fine_tuning/jobs?after=%00"])
def test_text_that_postgres_cannot_store_is_a_400(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == ERROR


def test_health_checks_report_every_service(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"ready": True, "postgres": "ok", "s3": "ok", "redis": "ok"}


def test_base_models_are_listed_with_files_and_cannot_be_deleted(
    client: openai.OpenAI, stranger: openai.OpenAI
) -> None:
    (base,) = (model for model in client.models.list() if model.id == "SmolLM2-135M-Instruct")
    assert base.owned_by == "milliner"
    shown = stranger.models.retrieve(base.id)
    assert shown.model_extra is not None
    assert shown.model_extra["public_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert shown.model_extra["license"] == "apache-2.0"
    assert {file["path"] for file in shown.model_extra["files"]} >= {"config.json", "model.safetensors"}
    with pytest.raises(openai.PermissionDeniedError, match="base model, shared by all"):
        client.models.delete(base.id)
