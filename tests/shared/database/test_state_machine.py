"""Compare the state machine with a simple model, on a real Postgres: users, workers, zombies and sweepers in any order.

Hypothesis chooses who does what. The model knows only what the product promises for each job. A zombie is a worker that
has lost its lease; whatever it does must change nothing. Time passes by moving `lease_expires_at`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine, func, select, text, update

from shared.broker.queues import Queue
from shared.database import attempts, claims, jobs, state_machine
from shared.database.session import session_scope
from shared.database.tables import Job, JobEvent, Tenant
from shared.errors import Conflict
from shared.schemas.requests import TERMINAL, Desired, JobCreate, State
from shared.schemas.results import JobError, Metrics
from tests.results import PLAN, REPORT
from tests.shared.job_rows import adapter, result_file

EXAMPLES, STEPS = 260, 50
MAX_CRASHES = 3
WANTED = {Queue.PREPARE: {Desired.RUN, Desired.PAUSE}, Queue.TRAIN: {Desired.RUN}}
ERROR = JobError(code="x", message="x")


@dataclass
class Model:
    """The expected values of one job."""

    row: Job
    state: State = State.VALIDATING
    desired: Desired = Desired.RUN
    epoch: int = 0
    leased: bool = False
    crashes: int = 0
    memory_failures: int = 0
    attempts: int = 0
    ends: int = 0
    seen: list[int] = field(default_factory=list)

    def has_lease(self, epoch: int) -> bool:
        return self.leased and epoch == self.epoch

    def release(self, state: State) -> None:
        self.state, self.leased = state, False
        self.ends += state in TERMINAL

    def requested(self) -> State | None:
        """The state that the user has requested and that the job gets when its worker releases it."""
        if self.desired is Desired.CANCEL:
            return State.CANCELLED
        return State.PAUSED if self.desired is Desired.PAUSE and self.state is State.RUNNING else None

    def waiting(self) -> State:
        return State.QUEUED if self.state is State.RUNNING else self.state


class Machine(RuleBasedStateMachine):
    """One tenant's jobs. A lease is (job id, epoch); leases that have ended stay in the bundle, as zombies."""

    leases = Bundle("leases")
    database: Engine
    tenant: Tenant
    dataset: str
    transitions = 0

    @initialize()
    def clean(self) -> None:
        self.models: dict[str, Model] = {}
        with session_scope(self.database) as session:
            session.execute(text("TRUNCATE jobs, job_events, job_metrics, checkpoints, adapters CASCADE"))

    @rule(dry_run=st.booleans())
    def submit(self, dry_run: bool) -> None:
        body = JobCreate(model="tiny", training_file=self.dataset, dry_run=dry_run)
        with session_scope(self.database) as session:
            job, _ = jobs.submit(session, self.tenant.id, body)
        self.models[job.id] = Model(job)

    @rule(target=leases, queue=st.sampled_from(Queue))
    def claim(self, queue: Queue) -> tuple[str, int]:
        with session_scope(self.database) as session:
            job = claims.claim(session, queue, owner="w", lease_seconds=60)
        free = [
            m for m in self.models.values()
            if m.state is state_machine.WAITING[queue] and not m.leased and m.desired in WANTED[queue]
        ]  # fmt: skip
        assert (job is not None) == bool(free)
        if job is None:
            return ("none", 0)
        model = self.models[job.id]
        assert model in free
        assert job.lease_epoch == model.epoch + 1
        model.epoch, model.leased = job.lease_epoch, True
        model.seen.append(job.lease_epoch)
        if queue is Queue.TRAIN:
            model.state, model.attempts = State.RUNNING, model.attempts + 1
        return job.id, job.lease_epoch

    @rule(lease=leases, kind=st.sampled_from(["renew", "note", "record", "checkpoint"]))
    def write(self, lease: tuple[str, int], kind: str) -> None:
        """Writes that do not move the job: accepted from the worker with the lease, refused from all others."""
        job_id, epoch = lease
        metrics = Metrics(step=1, total_steps=2, train_loss=1.0)
        writes: dict[str, Callable[[Any], Any]] = {
            "renew": lambda s: attempts.renew(s, job_id, epoch, lease_seconds=60),
            "note": lambda s: attempts.add_event(s, job_id, epoch, level="info", message="x"),
            "record": lambda s: attempts.record_metrics(s, job_id, epoch, [metrics], {}),
            "checkpoint": lambda s: attempts.add_checkpoint(
                s, job_id, epoch, step=1, prefix="p/", files=[], metrics=metrics
            ),
        }
        with session_scope(self.database) as session:
            accepted = writes[kind](session)
        model = self.models.get(job_id)
        assert bool(accepted) == (model is not None and model.has_lease(epoch))
        if kind == "renew" and accepted:
            assert model is not None
            assert accepted is model.desired

    @rule(lease=leases)
    def plan(self, lease: tuple[str, int]) -> None:
        job_id, epoch = lease
        model = self.models.get(job_id)
        if model is not None and model.has_lease(epoch) and model.state is not State.VALIDATING:
            return  # only a job in validation gets a plan
        with session_scope(self.database) as session:
            state = attempts.finish_planning(session, job_id, epoch, PLAN)
        if model is None or not model.has_lease(epoch):
            assert state is None
            return
        requested = {Desired.CANCEL: State.CANCELLED, Desired.PAUSE: State.PAUSED}
        expected = requested.get(model.desired, State.CANCELLED if model.row.dry_run else State.QUEUED)
        assert state is expected
        model.release(expected)

    @rule(lease=leases)
    def succeed(self, lease: tuple[str, int]) -> None:
        job_id, epoch = lease
        model = self.models.get(job_id)
        if model is not None and model.has_lease(epoch) and model.state is not State.RUNNING:
            return  # only a running job gets an adapter
        row = model.row if model else Job(id="none", tenant_id=self.tenant.id)
        with session_scope(self.database) as session:
            files: dict[str, Any] = {"adapter": adapter(row), "result_file": result_file(row)}
            state = attempts.succeed(session, job_id, epoch, report=REPORT, **files)
        if model is None or not model.has_lease(epoch):
            assert state is None
            return
        assert state is (State.CANCELLED if model.desired is Desired.CANCEL else State.SUCCEEDED)
        model.release(state)

    @rule(lease=leases)
    def fail(self, lease: tuple[str, int]) -> None:
        with session_scope(self.database) as session:
            accepted = attempts.fail(session, *lease, ERROR)
        self.check_end(lease, accepted, lambda m: State.CANCELLED if m.desired is Desired.CANCEL else State.FAILED)

    @rule(lease=leases)
    def release(self, lease: tuple[str, int]) -> None:
        with session_scope(self.database) as session:
            accepted = attempts.release(session, *lease)
        self.check_end(lease, accepted, lambda model: model.requested() or model.waiting())

    @rule(lease=leases)
    def crash(self, lease: tuple[str, int]) -> None:
        with session_scope(self.database) as session:
            accepted = attempts.crash(session, *lease, ERROR, backoff=0, max_crashes=MAX_CRASHES)
        self.check_end(lease, accepted, self.after_crash)

    @rule(lease=leases)
    def run_out_of_memory(self, lease: tuple[str, int]) -> None:
        model = self.models.get(lease[0])
        with session_scope(self.database) as session:
            accepted = attempts.step_down(session, *lease)
        if accepted and model is not None:
            model.memory_failures += 1
        self.check_end(lease, accepted, lambda model: model.requested() or model.waiting())

    @rule(lease=leases, expires=st.booleans())
    def sweep(self, lease: tuple[str, int], expires: bool) -> None:
        """A sweeper takes a job back. It must succeed only if the lease has expired."""
        job_id, epoch = lease
        with session_scope(self.database) as session:
            if expires:
                past = func.clock_timestamp() - text("interval '1s'")
                leased = Job.lease_owner.is_not(None)
                session.execute(update(Job).where(Job.id == job_id, leased).values(lease_expires_at=past))
            accepted = attempts.crash(session, job_id, epoch, ERROR, backoff=0, max_crashes=MAX_CRASHES, silent=True)
        if not expires and not accepted:
            return  # the model does not know whether an earlier sweep has moved `lease_expires_at`
        self.check_end(lease, accepted, self.after_crash)

    @rule(data=st.data(), desired=st.sampled_from(Desired))
    def set_desired_state(self, data: st.DataObject, desired: Desired) -> None:
        if not self.models:
            return
        model = self.models[data.draw(st.sampled_from(sorted(self.models)))]
        refused = model.state in TERMINAL or (model.desired is Desired.CANCEL and desired is not Desired.CANCEL)
        try:
            with session_scope(self.database) as session:
                jobs.set_desired_state(session, self.tenant.id, model.row.id, desired)
        except Conflict:
            assert refused
            return
        assert not refused
        model.desired = desired
        if model.leased:
            return
        if desired is Desired.CANCEL:
            model.release(State.CANCELLED)
        elif desired is Desired.PAUSE and model.state is State.QUEUED:
            model.state = State.PAUSED
        elif desired is Desired.RUN and model.state is State.PAUSED:
            model.state = State.QUEUED

    def after_crash(self, model: Model) -> State:
        requested = model.requested()
        if requested is not None:
            return requested
        model.crashes += 1
        return State.FAILED if model.crashes >= MAX_CRASHES else model.waiting()

    def check_end(self, lease: tuple[str, int], accepted: bool, state: Callable[[Model], State]) -> None:
        model = self.models.get(lease[0])
        assert accepted == (model is not None and model.has_lease(lease[1]))
        if accepted:
            assert model is not None
            model.release(state(model))

    @invariant()
    def rows_match_the_model(self) -> None:
        type(self).transitions += 1
        with session_scope(self.database) as session:
            rows = session.scalars(select(Job)).all()
            events = session.execute(
                select(JobEvent.job_id, func.count(), func.max(JobEvent.seq), func.max(JobEvent.lease_epoch)).group_by(
                    JobEvent.job_id
                )
            ).all()
        assert {row.id for row in rows} == set(self.models)
        for row in rows:
            model = self.models[row.id]
            found = (row.state, row.desired_state, row.lease_epoch, row.lease_owner is not None)
            assert found == (model.state, model.desired, model.epoch, model.leased)
            found_counts = (row.attempt, row.crash_count, row.fallback_level)
            assert found_counts == (model.attempts, model.crashes, model.memory_failures)
            assert model.ends == (row.state in TERMINAL)
            assert (row.finished_at is not None) == (row.state in TERMINAL)
            assert model.seen == sorted(set(model.seen))
        for job_id, count, last, epoch in events:
            assert count == last, f"the events of {job_id} have a gap"
            assert epoch <= self.models[job_id].epoch


def test_the_state_machine_matches_its_model_in_any_order_of_events(
    database: Engine, tenant: Tenant, dataset: str
) -> None:
    Machine.database, Machine.tenant, Machine.dataset, Machine.transitions = database, tenant, dataset, 0
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Machine.transitions >= 10_000


def test_the_diagram_has_every_move_once() -> None:
    arrows = [line.strip().partition(": ") for line in state_machine.mermaid().splitlines() if ": " in line]
    drawn = sorted((arrow, reason) for arrow, _, reasons in arrows for reason in reasons.split(", "))
    moves = sorted(
        (f"{source} --> {move.target or ('queued' if source == 'running' else source)}", reason)
        for reason, move in state_machine.MOVES.items()
        for source in move.source
    )
    assert drawn == moves


@pytest.mark.parametrize("state", TERMINAL)
def test_no_move_leaves_a_terminal_state(state: State) -> None:
    assert not any(state in move.source for move in state_machine.MOVES.values())
