"""Which jobs the sweeper rings for and takes back, and when. The watch gets its clock as an argument."""

from __future__ import annotations

import redis
from sqlalchemy import func, select, text, update

from shared.broker.queues import Queue
from shared.database import claims, state_machine
from shared.database.session import session_scope
from shared.database.tables import Job
from shared.schemas.requests import State
from shared.settings import get_settings
from worker.background.sweeper import Watch, reclaim, sweep


def test_a_watch_grows_without_gaps() -> None:
    watch = Watch(longest_gap=5)
    assert [watch.seen(now) for now in (100, 104, 108)] == [0, 4, 8]


def test_a_gap_or_a_failure_restarts_the_watch() -> None:
    watch = Watch(longest_gap=5)
    assert [watch.seen(now) for now in (0, 5, 20, 24)] == [0, 5, 0, 4]
    watch.missed()
    assert [watch.seen(now) for now in (25, 29)] == [0, 4]


def test_it_rings_for_a_waiting_job_and_not_again_before_the_backoff(job: str) -> None:
    settings = get_settings()
    with redis.Redis.from_url(settings.redis_url.get_secret_value()) as broker:
        broker.flushdb()
        sweep(settings, watched=0)
        sweep(settings, watched=0)
        assert broker.llen(f"milliner:{Queue.TRAIN}") == 1
        broker.flushdb()
    assert row(job).ring_count == 1
    with session_scope() as session:
        session.execute(update(Job).values(rung_at=func.clock_timestamp() - text("interval '1h'")))
    sweep(settings, watched=0)
    assert row(job).ring_count == 2


def test_the_first_sweep_of_a_slot_rings_for_all_waiting_jobs(job: str) -> None:
    """The slot that received the last ring may have died."""
    settings = get_settings()
    assert sweep(settings, watched=0)
    assert sweep(settings, watched=0, first=True)
    assert row(job).ring_count == 2


def test_it_takes_jobs_back_only_after_a_whole_lease_time_without_a_gap(job: str) -> None:
    settings = get_settings()
    epoch = claim_and_expire(job)
    sweep(settings, watched=settings.lease_seconds - 0.1)
    assert row(job).state == State.RUNNING
    sweep(settings, watched=settings.lease_seconds)
    after = row(job)
    assert (after.state, after.reason, after.lease_epoch) == (State.QUEUED, state_machine.Reason.LEASE_EXPIRED, epoch)
    assert after.lease_owner is None


def test_a_valid_lease_is_not_taken_back(job: str) -> None:
    with session_scope() as session:
        assert claims.claim(session, Queue.TRAIN, owner="w", lease_seconds=60)
        assert reclaim(session, get_settings()) == 0
    assert row(job).state == State.RUNNING


def test_two_sweepers_take_a_job_back_only_once(job: str) -> None:
    """Without the advisory lock: both have read the same expired lease."""
    claim_and_expire(job)
    with session_scope() as one, session_scope() as other:
        assert one.scalar(select(claims.expired()).where(Job.id == job))
        assert other.scalar(select(claims.expired()).where(Job.id == job))
        assert reclaim(one, get_settings()) == 1
        one.commit()
        assert reclaim(other, get_settings()) == 0
    assert row(job).crash_count == 1


def claim_and_expire(job: str) -> int:
    """Claim the job and move the end of its lease into the past; return its epoch."""
    with session_scope() as session:
        claimed = claims.claim(session, Queue.TRAIN, owner="w", lease_seconds=60)
        assert claimed is not None
        assert claimed.id == job
        past = func.clock_timestamp() - text("interval '1s'")
        session.execute(update(Job).where(Job.id == job).values(lease_expires_at=past))
    return claimed.lease_epoch


def row(job: str) -> Job:
    with session_scope() as session:
        return session.get_one(Job, job)
