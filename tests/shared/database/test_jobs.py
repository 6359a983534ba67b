"""The state machine, on a real Postgres: who may move a job, and what a worker without a lease can do (nothing)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, extract, func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from shared.broker.queues import Queue
from shared.database import attempts, checkpoints, claims, jobs
from shared.database.session import session_scope
from shared.database.state_machine import MOVES, Reason
from shared.database.tables import File, Job, JobEvent, JobMetric, Tenant
from shared.database.tenants import ensure_tenant
from shared.errors import Conflict, NotFound
from shared.schemas.requests import TERMINAL, Desired, JobCreate, Phase, State
from shared.schemas.results import JobError, Metrics
from tests.results import PLAN, REPORT
from tests.shared.job_rows import adapter, claim, make, queued, result_file

OOPS = JobError(code="trainer_crashed", message="the trainer was killed by SIGKILL")
CRASH: dict[str, Any] = {"backoff": 0.0, "max_crashes": 3}


@pytest.fixture(autouse=True)
def empty(database: Engine) -> None:
    with session_scope(database) as session:
        session.execute(text("TRUNCATE jobs, job_events, job_metrics, checkpoints, adapters CASCADE"))


def test_every_reason_is_a_move_and_every_end_is_reached() -> None:
    assert set(MOVES) == set(Reason)
    assert {move.target for move in MOVES.values()} >= TERMINAL
    assert not any(move.source & TERMINAL for move in MOVES.values())


def test_a_job_goes_all_the_way(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = make(database, tenant, dataset)
    assert job.state == State.VALIDATING
    prepared = claim(database, Queue.PREPARE)
    assert (prepared.id, prepared.state, prepared.attempt, prepared.lease_epoch) == (job.id, State.VALIDATING, 0, 1)
    with session_scope(database) as session:
        assert attempts.finish_planning(session, job.id, 1, PLAN) is State.QUEUED
    running = claim(database, Queue.TRAIN)
    assert (running.state, running.attempt, running.lease_epoch) == (State.RUNNING, 1, 2)
    with session_scope(database) as session:
        assert attempts.record_metrics(
            session, job.id, 2, [Metrics(step=1, total_steps=2, train_loss=1.5)], {"step": 1}
        )
    with session_scope(database) as session:
        done = attempts.succeed(session, job.id, 2, report=REPORT, adapter=adapter(job), result_file=result_file(job))
        assert done is State.SUCCEEDED
    ended = read(database, job.id)
    assert (ended.state, ended.reason, ended.lease_owner) == (State.SUCCEEDED, Reason.COMPLETED, None)
    assert ended.finished_at is not None
    assert messages(database, job.id) == [
        f"Created fine-tuning job: {job.id}",
        "Files validated, job queued",
        "Fine-tuning job started",
        "Step 1/2: training loss=1.50",
        "The job has successfully completed",
    ]


def test_a_worker_without_the_lease_can_write_nothing(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    zombie = claim(database, Queue.TRAIN).lease_epoch
    with session_scope(database) as session:
        assert attempts.release(session, job.id, zombie)
    owner = claim(database, Queue.TRAIN).lease_epoch
    assert owner > zombie
    step = Metrics(step=9, total_steps=9, train_loss=0.0)
    with session_scope(database) as session:
        assert attempts.add_checkpoint(session, job.id, owner, step=8, prefix="p/", files=[], metrics=step)
    before = read(database, job.id)
    with session_scope(database) as session:
        assert attempts.renew(session, job.id, zombie, lease_seconds=60) is None
        assert not attempts.set_phase(session, job.id, zombie, Phase.TRAINING)
        assert not attempts.add_event(session, job.id, zombie, level="info", message="boo")
        assert not attempts.record_metrics(session, job.id, zombie, [step], {})
        assert not attempts.add_checkpoint(session, job.id, zombie, step=9, prefix="p/", files=[], metrics=step)
        assert checkpoints.drop_checkpoints(session, job.id, zombie, keep=0) == []
        assert attempts.finish_planning(session, job.id, zombie, PLAN) is None
        assert not attempts.fail(session, job.id, zombie, OOPS)
        assert not attempts.crash(session, job.id, zombie, OOPS, **CRASH)
        assert not attempts.release(session, job.id, zombie)
        files: dict[str, Any] = {"adapter": adapter(job), "result_file": result_file(job)}
        assert attempts.succeed(session, job.id, zombie, report=REPORT, **files) is None
    after = read(database, job.id)
    assert (after.state, after.lease_epoch, after.event_seq) == (State.RUNNING, owner, before.event_seq)
    with session_scope(database) as session:
        assert [checkpoint.step for checkpoint in checkpoints.latest_checkpoints(session, job.id)] == [8]


def test_terminal_states_absorb_even_hand_written_sql(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = make(database, tenant, dataset)
    with session_scope(database) as session:
        jobs.set_desired_state(session, tenant.id, job.id, Desired.CANCEL)
    with pytest.raises(IntegrityError, match="terminal states do not change"), session_scope(database) as session:
        session.execute(text("UPDATE jobs SET state = 'queued' WHERE id = :id"), {"id": job.id})
    assert read(database, job.id).state == State.CANCELLED


def test_events_and_epochs_cannot_be_rewritten(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    epoch = claim(database, Queue.TRAIN).lease_epoch
    for statement in (
        "UPDATE job_events SET message = 'another' WHERE job_id = :id",
        "DELETE FROM job_events WHERE job_id = :id",
        "UPDATE jobs SET lease_epoch = 0 WHERE id = :id",
    ):
        with pytest.raises(IntegrityError), session_scope(database) as session:
            session.execute(text(statement), {"id": job.id})
    assert read(database, job.id).lease_epoch == epoch
    with session_scope(database) as session:
        epochs = session.scalars(select(JobEvent.lease_epoch).where(JobEvent.job_id == job.id).order_by(JobEvent.seq))
        assert list(epochs) == [0, 1, 2]


def test_the_back_off_doubles_up_to_five_minutes(database: Engine, tenant: Tenant, dataset: str) -> None:
    job, waits = queued(database, tenant, dataset), []
    for crashes in (0, 1, 5, 6, 1000):
        with session_scope(database) as session:
            session.execute(update(Job).where(Job.id == job.id).values(crash_count=crashes, not_before=func.now()))
        epoch = claim(database, Queue.TRAIN).lease_epoch
        with session_scope(database) as session:
            assert attempts.crash(session, job.id, epoch, OOPS, backoff=5.0, max_crashes=10_000)
            wait = extract("epoch", Job.not_before - func.clock_timestamp())
            waits.append(session.scalars(select(wait).where(Job.id == job.id)).one())
    assert [round(wait) for wait in waits] == [5, 10, 160, 300, 300]


def test_a_running_job_must_be_leased(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    with pytest.raises(IntegrityError, match="running_is_leased"), session_scope(database) as session:
        session.execute(update(Job).where(Job.id == job.id).values(state=State.RUNNING))


def test_two_workers_never_get_the_same_job(database: Engine, tenant: Tenant, dataset: str) -> None:
    for _ in range(40):
        queued(database, tenant, dataset)

    def take(_: int) -> str | None:
        with session_scope(database) as session:
            job = claims.claim(session, Queue.TRAIN, owner="w", lease_seconds=60)
            return job.id if job else None

    with ThreadPoolExecutor(8) as pool:
        taken = [job_id for job_id in pool.map(take, range(60)) if job_id]
    assert len(taken) == len(set(taken)) == 40


def test_claims_go_by_priority_then_fair_share_then_age(database: Engine, dataset: str, tenant: Tenant) -> None:
    first = queued(database, tenant, dataset)
    second = queued(database, tenant, dataset)
    urgent = queued(database, tenant, dataset, priority=5)
    stranger = other_tenant(database)
    other = queued(database, stranger, copied(database, dataset, stranger))
    order = [claim(database, Queue.TRAIN).id for _ in range(4)]
    # After the urgent one, the first tenant has one running, so the other tenant comes before its older jobs.
    assert order == [urgent.id, other.id, first.id, second.id]


def test_cancel_is_at_once_without_a_lease_and_a_wish_with_one(database: Engine, tenant: Tenant, dataset: str) -> None:
    idle = queued(database, tenant, dataset)
    with session_scope(database) as session:
        assert jobs.set_desired_state(session, tenant.id, idle.id, Desired.CANCEL).state == State.CANCELLED
    busy = queued(database, tenant, dataset)
    epoch = claim(database, Queue.TRAIN).lease_epoch
    with session_scope(database) as session:
        assert jobs.set_desired_state(session, tenant.id, busy.id, Desired.CANCEL).state == State.RUNNING
        assert attempts.renew(session, busy.id, epoch, lease_seconds=60) is Desired.CANCEL
    with session_scope(database) as session:
        files: dict[str, Any] = {"adapter": adapter(busy), "result_file": result_file(busy)}
        assert attempts.succeed(session, busy.id, epoch, report=REPORT, **files) is State.CANCELLED
    with session_scope(database) as session, pytest.raises(Conflict, match="is cancelled"):
        jobs.set_desired_state(session, tenant.id, busy.id, Desired.CANCEL)
    assert read(database, busy.id).reason == Reason.CANCELLED


def test_a_cancel_that_was_accepted_cannot_be_taken_back(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    claim(database, Queue.TRAIN)
    with session_scope(database) as session:
        jobs.set_desired_state(session, tenant.id, job.id, Desired.CANCEL)
        jobs.set_desired_state(session, tenant.id, job.id, Desired.CANCEL)
        for other in (Desired.PAUSE, Desired.RUN):
            with pytest.raises(Conflict, match="already being cancelled"):
                jobs.set_desired_state(session, tenant.id, job.id, other)


@pytest.mark.parametrize("letting_go", ["released", "crashed", "reclaimed"])
@pytest.mark.parametrize(("wish", "state"), [(Desired.CANCEL, State.CANCELLED), (Desired.PAUSE, State.PAUSED)])
def test_a_wish_survives_whatever_happens_to_the_worker(
    database: Engine, tenant: Tenant, dataset: str, letting_go: str, wish: Desired, state: State
) -> None:
    job = queued(database, tenant, dataset)
    epoch = claim(database, Queue.TRAIN).lease_epoch
    with session_scope(database) as session:
        jobs.set_desired_state(session, tenant.id, job.id, wish)
    with session_scope(database) as session:
        if letting_go == "released":
            assert attempts.release(session, job.id, epoch)
        elif letting_go == "crashed":
            assert attempts.crash(session, job.id, epoch, OOPS, **CRASH)
        else:
            expire(session, job.id)
            assert attempts.crash(session, job.id, epoch, OOPS, silent=True, **CRASH)
    assert read(database, job.id).state == state


def test_pause_and_resume(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    with session_scope(database) as session:
        assert jobs.set_desired_state(session, tenant.id, job.id, Desired.PAUSE).state == State.PAUSED
        assert claims.claim(session, Queue.TRAIN, owner="w", lease_seconds=60) is None
    with session_scope(database) as session:
        assert jobs.set_desired_state(session, tenant.id, job.id, Desired.RUN).state == State.QUEUED
    assert claim(database, Queue.TRAIN).id == job.id


def test_three_crashes_are_poison_and_preemptions_are_not(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    for _ in range(5):
        with session_scope(database) as session:
            assert attempts.release(session, job.id, claim(database, Queue.TRAIN).lease_epoch)
    for _ in range(3):
        with session_scope(database) as session:
            assert attempts.crash(session, job.id, claim(database, Queue.TRAIN).lease_epoch, OOPS, **CRASH)
    ended = read(database, job.id)
    assert (ended.state, ended.reason, ended.crash_count, ended.preempt_count) == (State.FAILED, Reason.POISON, 3, 5)
    assert ended.error is not None
    assert ended.error["code"] == "trainer_crashed"
    assert ended.attempt == 8


def test_a_crash_waits_before_the_next_attempt(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    epoch = claim(database, Queue.TRAIN).lease_epoch
    with session_scope(database) as session:
        assert attempts.crash(session, job.id, epoch, OOPS, backoff=3600, max_crashes=3)
    with session_scope(database) as session:
        assert claims.claim(session, Queue.TRAIN, owner="w", lease_seconds=60) is None
        assert claims.to_ring_for(session, Queue.TRAIN, backoff=0, limit=9) == []


def test_a_slot_gives_back_what_it_does_not_know_of(database: Engine, tenant: Tenant, dataset: str) -> None:
    """Its claim was committed, and the answer lost."""
    mine, other = queued(database, tenant, dataset), queued(database, tenant, dataset)
    with session_scope(database) as session:
        for owner in ("me", "you"):
            claims.claim(session, Queue.TRAIN, owner=owner, lease_seconds=60)
        claims.disown(session, "me")
    assert (read(database, mine.id).state, read(database, mine.id).crash_count) == (State.QUEUED, 0)
    assert read(database, other.id).state == State.RUNNING


def test_a_cancel_wins_over_a_failure(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    epoch = claim(database, Queue.TRAIN).lease_epoch
    with session_scope(database) as session:
        jobs.set_desired_state(session, tenant.id, job.id, Desired.CANCEL)
        assert attempts.fail(session, job.id, epoch, OOPS)
    assert read(database, job.id).state == State.CANCELLED


def test_a_paused_dataset_is_still_read_and_then_waits(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = make(database, tenant, dataset)
    with session_scope(database) as session:
        jobs.set_desired_state(session, tenant.id, job.id, Desired.PAUSE)
    epoch = claim(database, Queue.PREPARE).lease_epoch
    with session_scope(database) as session:
        assert attempts.finish_planning(session, job.id, epoch, PLAN) is State.PAUSED
    with session_scope(database) as session:
        assert jobs.set_desired_state(session, tenant.id, job.id, Desired.RUN).state == State.QUEUED


def test_a_lease_that_was_renewed_is_not_taken_back(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    epoch = claim(database, Queue.TRAIN).lease_epoch
    with session_scope(database) as session:
        assert not attempts.crash(session, job.id, epoch, OOPS, silent=True, **CRASH)
    assert read(database, job.id).state == State.RUNNING


def test_rings_back_off(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    with session_scope(database) as session:
        assert claims.to_ring_for(session, Queue.TRAIN, backoff=30, limit=9) == [job.id]
    with session_scope(database) as session:
        assert claims.to_ring_for(session, Queue.TRAIN, backoff=30, limit=9) == []
        claims.not_rung(session, [job.id])
    with session_scope(database) as session:
        assert claims.to_ring_for(session, Queue.TRAIN, backoff=30, limit=9) == [job.id]
    for rings, seconds, due in [(1, 31, True), (2, 31, False), (2, 61, True), (9, 999, True), (5000, 900, False)]:
        with session_scope(database) as session:
            ago = func.clock_timestamp() - text(f"interval '{seconds}s'")
            session.execute(update(Job).where(Job.id == job.id).values(ring_count=rings, rung_at=ago))
            assert bool(claims.to_ring_for(session, Queue.TRAIN, backoff=30, limit=9)) is due, (rings, seconds)


def test_the_same_idempotency_key_is_the_same_job(database: Engine, tenant: Tenant, dataset: str) -> None:
    body = JobCreate(model="tiny", training_file=dataset, seed=1)

    def send(_: int) -> tuple[str, bool]:
        with session_scope(database) as session:
            job, new = jobs.submit(session, tenant.id, body, idempotency_key="k")
            return job.id, new

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(send, range(12)))
    assert len({job_id for job_id, _ in answers}) == 1
    assert sum(new for _, new in answers) == 1
    with session_scope(database) as session, pytest.raises(Conflict, match="another body"):
        jobs.submit(session, tenant.id, body.model_copy(update={"seed": 2}), idempotency_key="k")


def test_one_key_with_two_bodies_at_once_is_one_job_and_one_conflict(
    database: Engine, tenant: Tenant, dataset: str
) -> None:
    def send(seed: int) -> bool:
        body = JobCreate(model="tiny", training_file=dataset, seed=seed)
        try:
            with session_scope(database) as session:
                return jobs.submit(session, tenant.id, body, idempotency_key="race")[1]
        except Conflict:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(send, range(8))) == 1


@pytest.mark.parametrize("column", ["deleted_at", "expires_at"])
def test_a_file_that_is_gone_cannot_be_trained_on(database: Engine, tenant: Tenant, dataset: str, column: str) -> None:
    with session_scope(database) as session:
        past = func.clock_timestamp() - text("interval '1s'")
        session.execute(update(File).where(File.id == dataset).values({column: past}))
    with session_scope(database) as session, pytest.raises(NotFound, match="no file"):
        jobs.submit(session, tenant.id, JobCreate(model="tiny", training_file=dataset))


def test_a_retry_of_the_same_body_is_the_same_job_but_a_second_request_is_not(
    database: Engine, tenant: Tenant, dataset: str
) -> None:
    body = JobCreate(model="tiny", training_file=dataset)
    with session_scope(database) as session:
        first, _ = jobs.submit(session, tenant.id, body)
        second, new = jobs.submit(session, tenant.id, body)
        assert new
        assert second.id != first.id
        retried, new = jobs.submit(session, tenant.id, body, retry_window=300)
        assert (retried.id, new) == (second.id, False)
        stranger = other_tenant(database)
        with pytest.raises(NotFound, match="no file"):
            jobs.submit(session, stranger.id, body, retry_window=300)


def test_a_dry_run_ends_with_its_plan(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = make(database, tenant, dataset, dry_run=True)
    epoch = claim(database, Queue.PREPARE).lease_epoch
    with session_scope(database) as session:
        assert attempts.finish_planning(session, job.id, epoch, PLAN) is State.CANCELLED
    ended = read(database, job.id)
    assert (ended.reason, ended.plan is not None) == (Reason.DRY_RUN, True)


def test_a_step_and_its_evaluation_are_one_row_and_one_event(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    epoch = claim(database, Queue.TRAIN).lease_epoch
    with session_scope(database) as session:
        batch = [step(1, 2.0), Metrics(step=1, total_steps=3, valid_loss=1.5)]
        assert attempts.record_metrics(session, job.id, epoch, batch, {})
        session.flush()
        row = session.get_one(JobMetric, (job.id, 1))
        assert (row.values["train_loss"], row.values["valid_loss"]) == (2.0, 1.5)
    assert messages(database, job.id)[-1] == "Step 1/3: training loss=2.00, validation loss=1.50"


def test_a_step_trained_again_overwrites_its_metrics(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = queued(database, tenant, dataset)
    epoch = claim(database, Queue.TRAIN).lease_epoch
    for batch in ([step(1, 3.0), step(2, 2.0)], [step(2, 2.5), step(3, 1.0)]):
        with session_scope(database) as session:
            assert attempts.record_metrics(session, job.id, epoch, batch, {})
    with session_scope(database) as session:
        rows = session.scalars(select(JobMetric).where(JobMetric.job_id == job.id).order_by(JobMetric.step)).all()
        assert [(row.step, row.values["train_loss"]) for row in rows] == [(1, 3.0), (2, 2.5), (3, 1.0)]


# ---------------------------------------------------------------- the cast


def expire(session: Session, job_id: str) -> None:
    past = func.clock_timestamp() - text("interval '1s'")
    session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=past))


def read(database: Engine, job_id: str) -> Job:
    with session_scope(database) as session:
        return session.get_one(Job, job_id)


def messages(database: Engine, job_id: str) -> list[str]:
    with session_scope(database) as session:
        events = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)).all()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.message for event in events]


def step(number: int, loss: float) -> Metrics:
    return Metrics(step=number, total_steps=3, train_loss=loss)


def other_tenant(database: Engine) -> Tenant:
    with session_scope(database) as session:
        return ensure_tenant(session, "other")


def copied(database: Engine, dataset: str, owner: Tenant) -> str:
    """A file of another tenant."""
    with session_scope(database) as session:
        file = File(
            id=f"{dataset[:-4]}feed", tenant_id=owner.id, filename="b", purpose="fine-tune", status="processed",
            bytes=1, sha256="0" * 64, key="k",
        )  # fmt: skip
        session.add(file)
    return file.id
