"""Answer one preview, top to bottom: take it, download its file and tokenizer, ask a trainer, store the result.

Owns: that a failing preview does not harm the worker. Errors are not raised but stored on the preview's row. There are
no retries, because an API request waits for the answer; the user can ask again. Must not know jobs' rows.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack

from shared import storage
from shared.database import previews
from shared.database.session import DataError, session_scope
from shared.database.tables import BaseModelRow, File
from shared.database.tables import Preview as PreviewRow
from shared.errors import Unavailable
from shared.schemas.preview import PreviewCreate, PreviewError, PreviewOut
from shared.schemas.requests import JobCreate
from shared.telemetry import bind, log, unbind
from worker import cache
from worker.attempt.staging import task_of
from worker.attempt.waiting import TICK
from worker.child import trainer_pool
from worker.child.trainer_process import Ended
from worker.trainer.protocol import Failed, Preview, Previewed

#: Seconds between two writes that show other workers that this one still works on the preview.
KEEP_EVERY = 2.0


class Abandoned(Exception):
    """Stop work on this preview: nobody waits for it any more, or another worker should answer it."""


class Refused(Exception):
    """The preview cannot be made. `error` says why."""

    def __init__(self, error: PreviewError) -> None:
        super().__init__(error.message)
        self.error = error


def answer_next(draining: Callable[[], bool]) -> bool:
    """Answer the next preview if one waits. Returns whether there was one."""
    try:
        if draining() or not cache.has_room() or (preview := _take()) is None:
            return False
        bind(preview=preview.id)
        _answer(preview, draining)
        log.info("preview.done")
    except Unavailable as error:
        log.warning("preview.failed", error=error.message)
        return False
    finally:
        unbind("preview")
    return True


def _take() -> PreviewRow | None:
    with session_scope() as session:
        return previews.take(session)


def _answer(preview: PreviewRow, draining: Callable[[], bool]) -> None:
    try:
        result = _make_preview(preview, _Heartbeat(preview.id, draining))
    except Abandoned:
        with session_scope() as session:
            previews.give_back(session, preview.id)
    except Refused as refused:
        log.warning("preview.refused", code=refused.error.code, message=refused.error.message)
        with session_scope() as session:
            previews.refuse(session, preview.id, refused.error)
    else:
        try:
            with session_scope() as session:
                previews.answer(session, preview.id, result)
        except DataError as error:
            log.exception("preview.result_rejected")
            with session_scope() as session:
                previews.refuse(session, preview.id, _error("internal_error", f"{error.orig}", retryable=False))


def _make_preview(preview: PreviewRow, heartbeat: _Heartbeat) -> PreviewOut:
    """Return the preview; raise Abandoned or Refused, and nothing else."""
    try:
        return _ask_trainer(preview, heartbeat)
    except (Abandoned, Refused):
        raise
    except storage.Corrupt as corrupt:
        raise Refused(_error("object_lost", f"{corrupt}; upload the file again", retryable=False)) from corrupt
    except Unavailable as error:
        raise Refused(_error(error.code, error.message)) from error
    except Ended as end:
        raise Refused(_error("trainer_crashed", str(end))) from end
    except Exception as error:
        log.exception("preview.crashed")
        raise Refused(_error("internal_error", f"{type(error).__name__}: {error}")) from error


def _ask_trainer(preview: PreviewRow, heartbeat: _Heartbeat) -> PreviewOut:
    request = PreviewCreate.model_validate(preview.request)
    job = JobCreate(model=request.model, training_file=request.training_file, trainer=request.trainer)
    with session_scope() as session:
        base = session.get_one(BaseModelRow, preview.base_model)
        file = session.get_one(File, preview.training_file)
    with ExitStack() as held:
        # A unique name: another slot of this machine, stopped or slow, may work on the same preview.
        work_dir = held.enter_context(cache.work_dir(f"{preview.id}-{secrets.token_hex(4)}"))
        base_dir = held.enter_context(cache.base_model(base, with_weights=False, tick=heartbeat.tick))
        path = work_dir / file.id
        storage.fetch(file.key, path, file.sha256, tick=heartbeat.tick)
        trainer = trainer_pool.take(trainer_pool.Purpose.WORK, visible_device="")
        closing = held.enter_context(ExitStack())
        closing.callback(trainer_pool.close, trainer)
        task = task_of(job, base, base_dir=base_dir, training_file=path, validation_file=None, seed=0)
        trainer.send(Preview(job=preview.id, task=task, rows=request.rows, lines=request.lines))
        while True:
            heartbeat.tick()
            match trainer.receive(timeout=TICK):
                case Previewed(preview=result):
                    closing.pop_all()
                    trainer_pool.keep(trainer_pool.Purpose.WORK, trainer)
                    return result
                case Failed() as failed:
                    fields = failed.model_dump(include={"code", "message", "param", "hint", "retryable"})
                    raise Refused(PreviewError.model_validate(fields))


class _Heartbeat:
    """Keeps the preview reserved for this worker, and notices when the work is no longer wanted."""

    def __init__(self, preview_id: str, draining: Callable[[], bool]) -> None:
        self._id = preview_id
        self._draining = draining
        self._kept_at = time.monotonic()

    def tick(self) -> None:
        """Renew the reservation every `KEEP_EVERY` seconds. Raises Abandoned."""
        if self._draining():
            raise Abandoned
        if time.monotonic() - self._kept_at < KEEP_EVERY:
            return
        with session_scope() as session:
            if not previews.keep(session, self._id):
                raise Abandoned
        self._kept_at = time.monotonic()


def _error(code: str, message: str, *, retryable: bool = True) -> PreviewError:
    return PreviewError(code=code, message=message, retryable=retryable)
