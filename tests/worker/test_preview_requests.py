"""A preview from the bucket to its row, made by this process with the real child; and what is left when either dies."""

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


class Asked(NamedTuple):
    tenant: str
    body: PreviewCreate
    id: str


@pytest.fixture
def asked(as_worker: None, llama: str) -> Asked:
    """The only preview of the unit database, its file and its base in the bucket."""
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
    return Asked(tenant.id, body, ask(tenant.id, body))


def test_a_preview_of_a_dead_worker_is_taken_over(asked: Asked) -> None:
    assert take() == asked.id
    assert take() is None  # somebody is at it
    pass_by("taken_at", previews.SILENT_SECONDS)
    answer_next(draining=lambda: False)
    preview = read(asked.id)
    assert (preview.error, preview.finished_at is None) == (None, False)
    out = PreviewOut.model_validate(preview.result)
    assert [(segment.text, segment.trained) for segment in out.rows[0].segments] == [
        ("1 + 1 =", False),
        (" 2", True),
        ("<|im_end|>", True),
    ]
    assert [(problem.line, problem.field) for problem in out.problems] == [(2, "completion")]
    assert take() is None


def test_a_trainer_that_dies_costs_the_answer_and_no_more(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLINER_TRAINER_COMMAND", "false")
    get_settings.cache_clear()
    answer_next(draining=lambda: False)
    error = PreviewError.model_validate(read(asked.id).error)
    assert (error.code, error.message, error.retryable) == (
        "trainer_crashed",
        "the trainer ended with exit code 1",
        True,
    )
    assert ask(asked.tenant, asked.body) != asked.id  # asked again, it is tried again


def test_a_preview_that_workers_die_of_is_refused(asked: Asked) -> None:
    for _ in range(previews.MAX_TAKES):
        assert take() == asked.id
        pass_by("taken_at", previews.SILENT_SECONDS)
    assert take() is None
    error = PreviewError.model_validate(read(asked.id).error)
    assert (error.code, error.retryable) == ("trainer_crashed", False)


def test_a_tenant_has_a_few_at_a_time(asked: Asked) -> None:
    for rows in range(1, previews.MAX_WAITING):
        ask(asked.tenant, asked.body.model_copy(update={"rows": rows}))
    with pytest.raises(TooMany, match="previews of yours are waiting"):
        ask(asked.tenant, asked.body.model_copy(update={"rows": 20}))
    assert ask(asked.tenant, asked.body) == asked.id


def test_a_file_that_the_bucket_has_lost_is_told(asked: Asked) -> None:
    with session_scope() as session:
        session.execute(update(File).where(File.id == asked.body.training_file).values(key="files/nowhere"))
    answer_next(draining=lambda: False)
    error = PreviewError.model_validate(read(asked.id).error)
    assert (error.code, error.retryable) == ("object_lost", False)


def test_a_worker_that_drains_leaves_it_to_another(asked: Asked) -> None:
    answer_next(draining=after(1))
    assert (read(asked.id).taken_at, read(asked.id).finished_at) == (None, None)
    assert take() == asked.id


def test_the_same_question_is_the_same_preview_and_the_first_answer_counts(asked: Asked) -> None:
    assert ask(asked.tenant, asked.body) == asked.id
    assert ask(asked.tenant, asked.body.model_copy(update={"rows": 2})) != asked.id
    first, second = (
        PreviewOut(format=form, max_length=8, chat_template_sha256=None, rows=[], problems=[])
        for form in ("text", "chat")
    )
    with session_scope() as session:
        assert previews.keep(session, asked.id)
        previews.answer(session, asked.id, first)
        previews.answer(session, asked.id, second)
        previews.refuse(session, asked.id, PreviewError(code="c", message="m", retryable=True))
        previews.give_back(session, asked.id)
        assert not previews.keep(session, asked.id)
    preview = read(asked.id)
    assert (PreviewOut.model_validate(preview.result), preview.error) == (first, None)
    assert ask(asked.tenant, asked.body) == asked.id  # answered at once


def test_anothers_file_and_anothers_answer_are_out_of_reach(asked: Asked) -> None:
    with session_scope() as session:
        other = ensure_tenant(session, f"t-{secrets.token_hex(4)}").id
    with pytest.raises(NotFound, match="no file"):
        ask(other, asked.body)


def test_nobody_works_for_those_who_left_and_the_sweeper_tidies_up(asked: Asked) -> None:
    pass_by("created_at", previews.WANTED_SECONDS)
    assert take() is None
    assert ask(asked.tenant, asked.body) != asked.id
    pass_by("created_at", previews.KEPT_SECONDS)
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


def pass_by(column: str, seconds: float) -> None:
    """Turn Postgres's clock."""
    past = func.clock_timestamp() - text(f"interval '{seconds + 1:f}s'")
    with session_scope() as session:
        session.execute(update(Preview).values({column: past}))


def read(preview_id: str) -> Preview:
    with session_scope() as session:
        return session.get_one(Preview, preview_id)


def after(calls: int) -> Callable[[], bool]:
    """False so many times, then True."""
    left = iter([False] * calls)
    return lambda: next(left, True)
