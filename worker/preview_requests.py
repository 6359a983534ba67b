"""A preview, top to bottom: take it, bring its file and its tokenizer here, ask a trainer, write down what it says.

Owns: that no preview costs a worker more than the time it takes. Nothing that happens to one is raised; it is told on
the preview's row. A request waits for it, so there are no second tries: who still wants it asks again.
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

#: How often others hear that somebody is at it.
KEEP_EVERY = 2.0


class Unwanted(Exception):
    """Nobody waits for this preview any more, or another worker should do it: let go."""


class Refused(Exception):
    """There is no preview, for this reason."""

    def __init__(self, error: PreviewError) -> None:
        super().__init__(error.message)
        self.error = error


def answer_next(draining: Callable[[], bool]) -> bool:
    """Answer the preview that is next, if one waits; returns whether one did."""
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
        result = _made(preview, _Watch(preview.id, draining))
    except Unwanted:
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
            log.exception("preview.unstorable")
            with session_scope() as session:
                previews.refuse(session, preview.id, _error("internal_error", f"{error.orig}", retryable=False))


def _made(preview: PreviewRow, watch: _Watch) -> PreviewOut:
    """Raises Unwanted or Refused, and nothing else."""
    try:
        return _asked(preview, watch)
    except (Unwanted, Refused):
        raise
    except storage.Corrupt as lost:
        raise Refused(_error("object_lost", f"{lost}; upload the file again", retryable=False)) from lost
    except Unavailable as error:
        raise Refused(_error(error.code, error.message)) from error
    except Ended as end:
        raise Refused(_error("trainer_crashed", str(end))) from end
    except Exception as error:
        log.exception("preview.broke")
        raise Refused(_error("internal_error", f"{type(error).__name__}: {error}")) from error


def _asked(preview: PreviewRow, watch: _Watch) -> PreviewOut:
    request = PreviewCreate.model_validate(preview.request)
    job = JobCreate(model=request.model, training_file=request.training_file, trainer=request.trainer)
    with session_scope() as session:
        base = session.get_one(BaseModelRow, preview.base_model)
        file = session.get_one(File, preview.training_file)
    with ExitStack() as held:
        # Named apart: another slot of this machine may be at the same preview, stopped or slow.
        work_dir = held.enter_context(cache.work_dir(f"{preview.id}-{secrets.token_hex(4)}"))
        base_dir = held.enter_context(cache.base_model(base, with_weights=False, tick=watch.tick))
        path = work_dir / file.id
        storage.fetch(file.key, path, file.sha256, tick=watch.tick)
        trainer = trainer_pool.take(trainer_pool.Purpose.WORK, visible_device="")
        ended = held.enter_context(ExitStack())
        ended.callback(trainer_pool.close, trainer)
        task = task_of(job, base, base_dir=base_dir, training_file=path, validation_file=None, seed=0)
        trainer.send(Preview(job=preview.id, task=task, rows=request.rows, lines=request.lines))
        while True:
            watch.tick()
            match trainer.receive(timeout=TICK):
                case Previewed(preview=result):
                    ended.pop_all()
                    trainer_pool.keep(trainer_pool.Purpose.WORK, trainer)
                    return result
                case Failed() as failed:
                    said = failed.model_dump(include={"code", "message", "param", "hint", "retryable"})
                    raise Refused(PreviewError.model_validate(said))


class _Watch:
    """Says that somebody is at it, and hears when that is for nothing."""

    def __init__(self, preview_id: str, draining: Callable[[], bool]) -> None:
        self._id = preview_id
        self._draining = draining
        self._kept_at = time.monotonic()

    def tick(self) -> None:
        """Called all the time; raises Unwanted."""
        if self._draining():
            raise Unwanted
        if time.monotonic() - self._kept_at < KEEP_EVERY:
            return
        with session_scope() as session:
            if not previews.keep(session, self._id):
                raise Unwanted
        self._kept_at = time.monotonic()


def _error(code: str, message: str, *, retryable: bool = True) -> PreviewError:
    return PreviewError(code=code, message=message, retryable=retryable)
