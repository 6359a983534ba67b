"""Previews through the official client, with the worker of the test stack and without any worker."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from openai.types import FileObject
from sqlalchemy import Engine

from api.app import create_app
from deploy.local.folder import Record
from shared import settings
from shared.broker import doorbell
from shared.database.session import session_scope
from shared.database.tables import BaseModelRow, File, Preview
from shared.database.tenants import create_key, ensure_tenant
from shared.schemas.preview import PreviewOut

BASE = "SmolLM2-135M-Instruct"
ROWS = [
    {"messages": [{"role": "user", "content": "A hat?"}, {"role": "assistant", "content": "Felt.\nOr straw."}]},
    {"messages": [{"role": "robot", "content": "x"}]},
]


def ask(client: openai.OpenAI, **body: Any) -> PreviewOut:
    """Request a preview. If the machine is busy, the client's retries get the preview that the first try began."""
    answer = client.with_options(max_retries=9).post(
        "/fine_tuning/preview", cast_to=object, body={"model": BASE} | body
    )
    return PreviewOut.model_validate(answer)


@pytest.fixture(scope="module")
def chats(client: openai.OpenAI) -> FileObject:
    body = "\n".join(map(json.dumps, ROWS)).encode()
    return client.files.create(file=("chats.jsonl", body), purpose="fine-tune")


def test_a_chat_shows_its_trained_tokens(client: openai.OpenAI, chats: FileObject) -> None:
    """SmolLM2's template adds a system message. Trained are the answer and its end token, not the newline after it."""
    out = ask(client, training_file=chats.id)
    [row] = out.rows
    assert [segment.text for segment in row.segments if segment.trained] == ["Felt.\nOr straw.", "<|im_end|>"]
    assert "".join(segment.text for segment in row.segments) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nA hat?<|im_end|>\n<|im_start|>assistant\nFelt.\nOr straw.<|im_end|>\n"
    )
    assert row.segments[0].ids == [1]
    assert (row.line, row.truncated, row.tokens) == (1, False, sum(len(segment.ids) for segment in row.segments))
    assert [(problem.line, problem.field) for problem in out.problems] == [(2, "messages[0].role")]
    assert len(out.chat_template_sha256 or "") == 64


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"model": "gpt-4o"}, 404, "model", "base model 'gpt-4o' not found"),
        ({"training_file": "file-nope"}, 404, "training_file", "no file 'file-nope'"),
        ({"rows": 0}, 400, "rows", "greater than or equal to 1"),
        ({"rows": 21}, 400, "rows", "less than or equal to 20"),
        ({"lines": []}, 400, "lines", "at least 1 item"),
        ({"lines": [0]}, 400, "lines.0", "greater than or equal to 1"),
        ({"line": 3}, 400, "line", "unknown key 'line'"),
    ],
)
def test_an_invalid_request_says_what_is_allowed(
    client: openai.OpenAI, chats: FileObject, body: dict[str, Any], status: int, param: str, message: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, **{"training_file": chats.id} | body)
    assert (refused.value.status_code, refused.value.param) == (status, param)
    assert message in refused.value.message


def test_errors_of_the_trainer_are_those_of_a_job(client: openai.OpenAI) -> None:
    file = client.files.create(file=("empty.jsonl", b""), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="line 1: the file is empty") as refused:
        ask(client, training_file=file.id)
    assert (refused.value.code, refused.value.param) == ("invalid_training_file", "training_file")


@pytest.fixture
def without_worker(
    stack: Record, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TestClient, str]]:
    """An API on a database that no worker uses, and the id of a file in it."""
    monkeypatch.setenv("MILLINER_DATABASE_URL", database.url.set(drivername="postgresql").render_as_string(False))
    monkeypatch.setenv("MILLINER_REDIS_URL", stack.redis_url.replace("/0", "/9"))
    monkeypatch.setenv("MILLINER_PREVIEW_SECONDS", "0.3")
    caches = (settings.get_settings, doorbell.celery_app)
    for cached in caches:
        cached.cache_clear()
    with session_scope() as session:
        tenant = ensure_tenant(session, f"t-{secrets.token_hex(4)}")
        key = create_key(session, tenant, name="tests")
        file = File(
            id=f"file-{secrets.token_hex(15)}", tenant_id=tenant.id, filename="a", purpose="fine-tune",
            status="processed", bytes=1, sha256="0" * 64, key="k",
        )  # fmt: skip
        base = BaseModelRow(
            name=file.id, public_id="org/m", revision="1", digest=file.id, prefix="m/", files=[], config={},
            parameters=1, bytes=1,
        )  # fmt: skip
        session.add_all([file, base])
    with TestClient(create_app(), headers={"authorization": f"Bearer {key}"}) as http:
        yield http, file.id
    for cached in caches:
        cached.cache_clear()


def test_without_a_worker_a_preview_is_a_503_and_stays_queued(without_worker: tuple[TestClient, str]) -> None:
    """A retry gets the same preview, so work that was done in the meantime is not lost."""
    http, file_id = without_worker
    body = {"model": file_id, "training_file": file_id}
    answers = [http.post("/v1/fine_tuning/preview", json=body) for _ in range(2)]
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert (error["code"], error["type"]) == ("no_prepare_worker", "server_error")
        assert "check that one is running" in error["message"]
    with session_scope() as session:
        [preview] = session.query(Preview).filter_by(training_file=file_id)
    assert (preview.taken_at, preview.finished_at) == (None, None)
