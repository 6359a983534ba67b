"""Previews from the bucket to their row, made by this process with a real child, and what is left when either dies."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import func, text, update

from shared import storage
from shared.database import previews
from shared.database.session import session_scope
from shared.database.tables import BaseModelRow, File, Preview
from shared.database.tenants import ensure_tenant
from shared.errors import NotFound, TooMany
from shared.schemas.preview import PreviewCreate, PreviewError, PreviewOut
from shared.settings import get_settings
from worker.background.sweeper import sweep
from worker.preview_requests import answer_next

ROWS = b'{"prompt": "1 + 1 =", "completion": " 2"}\n{"prompt": "x"}\n'


class Requested(NamedTuple):
    tenant: str
    body: PreviewCreate
    id: str


@pytest.fixture
def requested(as_worker: None, llama: str) -> Requested:
    """The only preview in the unit database, with its file and its base in the bucket."""
    name = f"m-{secrets.token_hex(4)}"
    files = storage.put_folder(f"models/{name}/", Path(llama))
    with session_scope() as session:
        session.execute(text("TRUNCATE previews"))
        tenant = ensure_tenant(session, f"t-{secrets.token_hex(4)}")
        file = File(
            id=f"file-{secrets.token_hex(15)}", tenant_id=tenant.id, filename="a", purpose="fine-tune", status="error",
            bytes=len(ROWS), sha256=storage.sha256_of_bytes(ROWS), key=f"files/{tenant.id}/{name}",
        )  # fmt: skip
        base = BaseModelRow(
            name=name, public_id="org/m", revision="1", digest=name, prefix=f"models/{name}/", files=files,
            config={}, parameters=1, bytes=1,
        )  # fmt: skip
        session.add_all([file, base])
    storage.put_bytes(file.key, ROWS)
    body = PreviewCreate(model=name, training_file=file.id)
    return Requested(tenant.id, body, ask(tenant.id, body))


def test_the_preview_of_a_dead_worker_is_answered_by_another(requested: Requested) -> None:
    assert take() == requested.id
    assert take() is None  # another worker has it
    age("taken_at", previews.SILENT_SECONDS)
    answer_next(draining=lambda: False)
    preview = read(requested.id)
    assert (preview.error, preview.finished_at is None) == (None, False)
    out = PreviewOut.model_validate(preview.result)
    assert [(segment.text, segment.trained) for segment in out.rows[0].segments] == [
        ("1 + 1 =", False),
        (" 2", True),
        ("<|im_end|>", True),
    ]
    assert [(problem.line, problem.field) for problem in out.problems] == [(2, "completion")]
    assert take() is None


def test_a_trainer_that_dies_fails_the_preview_which_can_be_requested_again(
    requested: Requested, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLINER_TRAINER_COMMAND", "false")
    get_settings.cache_clear()
    answer_next(draining=lambda: False)
    error = PreviewError.model_validate(read(requested.id).error)
    assert (error.code, error.message, error.retryable) == (
        "trainer_crashed",
        "the trainer ended with exit code 1",
        True,
    )
    assert ask(requested.tenant, requested.body) != requested.id  # a new request is a new try


def test_a_preview_that_kills_its_workers_is_refused(requested: Requested) -> None:
    for _ in range(previews.MAX_TAKES):
        assert take() == requested.id
        age("taken_at", previews.SILENT_SECONDS)
    assert take() is None
    error = PreviewError.model_validate(read(requested.id).error)
    assert (error.code, error.retryable) == ("trainer_crashed", False)


def test_a_tenant_can_have_only_a_few_waiting_previews(requested: Requested) -> None:
    for rows in range(1, previews.MAX_WAITING):
        ask(requested.tenant, requested.body.model_copy(update={"rows": rows}))
    with pytest.raises(TooMany, match="previews of yours are waiting"):
        ask(requested.tenant, requested.body.model_copy(update={"rows": 20}))
    assert ask(requested.tenant, requested.body) == requested.id


def test_a_file_missing_from_the_bucket_is_reported(requested: Requested) -> None:
    with session_scope() as session:
        session.execute(update(File).where(File.id == requested.body.training_file).values(key="files/nowhere"))
    answer_next(draining=lambda: False)
    error = PreviewError.model_validate(read(requested.id).error)
    assert (error.code, error.retryable) == ("object_lost", False)


def test_a_draining_worker_leaves_the_preview_to_another(requested: Requested) -> None:
    answer_next(draining=after(1))
    assert (read(requested.id).taken_at, read(requested.id).finished_at) == (None, None)
    assert take() == requested.id


def test_the_same_request_is_the_same_preview_and_the_first_answer_counts(requested: Requested) -> None:
    assert ask(requested.tenant, requested.body) == requested.id
    assert ask(requested.tenant, requested.body.model_copy(update={"rows": 2})) != requested.id
    first, second = (
        PreviewOut(format=form, max_length=8, chat_template_sha256=None, rows=[], problems=[])
        for form in ("text", "chat")
    )
    with session_scope() as session:
        assert previews.keep(session, requested.id)
        previews.answer(session, requested.id, first)
        previews.answer(session, requested.id, second)
        previews.refuse(session, requested.id, PreviewError(code="c", message="m", retryable=True))
        previews.give_back(session, requested.id)
        assert not previews.keep(session, requested.id)
    preview = read(requested.id)
    assert (PreviewOut.model_validate(preview.result), preview.error) == (first, None)
    assert ask(requested.tenant, requested.body) == requested.id  # answered at once


def test_another_tenants_file_cannot_be_previewed(requested: Requested) -> None:
    with session_scope() as session:
        other = ensure_tenant(session, f"t-{secrets.token_hex(4)}").id
    with pytest.raises(NotFound, match="no file"):
        ask(other, requested.body)


def test_abandoned_previews_are_not_answered_and_the_sweeper_deletes_them(requested: Requested) -> None:
    age("created_at", previews.WANTED_SECONDS)
    assert take() is None
    assert ask(requested.tenant, requested.body) != requested.id
    age("created_at", previews.KEPT_SECONDS)
    assert sweep(get_settings(), watched=0)
    with session_scope() as session:
        assert session.query(Preview).count() == 0


def ask(tenant: str, body: PreviewCreate) -> str:
    with session_scope() as session:
        return previews.create(session, tenant, body)


def take() -> str | None:
    with session_scope() as session:
        preview = previews.take(session)
    return preview.id if preview else None


def age(column: str, seconds: float) -> None:
    """Move a time of all previews into the past, by more than `seconds`."""
    past = func.clock_timestamp() - text(f"interval '{seconds + 1:f}s'")
    with session_scope() as session:
        session.execute(update(Preview).values({column: past}))


def read(preview_id: str) -> Preview:
    with session_scope() as session:
        return session.get_one(Preview, preview_id)


def after(calls: int) -> Callable[[], bool]:
    """Return False for so many calls, then True."""
    left = iter([False] * calls)
    return lambda: next(left, True)
