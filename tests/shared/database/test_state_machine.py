"""The state machine against a model of it, in any order: users, workers, zombies and sweepers on a real Postgres.

Hypothesis chooses who does what. The model knows of each job only what the promise says; whatever a worker does with an
epoch that is not the job's any more must change nothing. Postgres's clock is turned by moving `lease_expires_at`.
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
    """What must be true of one job."""

    row: Job
    state: State = State.VALIDATING
    desired: Desired = Desired.RUN
    epoch: int = 0
    leased: bool = False
    crashes: int = 0
    halvings: int = 0
    attempts: int = 0
    ends: int = 0
    seen: list[int] = field(default_factory=list)

    def holds(self, epoch: int) -> bool:
        return self.leased and epoch == self.epoch

    def let_go(self, state: State) -> None:
        self.state, self.leased = state, False
        self.ends += state in TERMINAL

    def wish(self) -> State | None:
        """Where the user wants it to go once nobody holds it."""
        if self.desired is Desired.CANCEL:
            return State.CANCELLED
        return State.PAUSED if self.desired is Desired.PAUSE and self.state is State.RUNNING else None

    def waiting(self) -> State:
        return State.QUEUED if self.state is State.RUNNING else self.state


class Machine(RuleBasedStateMachine):
    """One tenant's jobs; a lease is (job id, epoch), and old ones stay in the bundle as zombies."""

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

    @rule(lease=leases, queue=st.sampled_from(["renew", "note", "record", "checkpoint"]))
    def write(self, lease: tuple[str, int], queue: str) -> None:
        """What does not move the job: taken from its holder, refused from anybody else."""
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
            taken = writes[queue](session)
        model = self.models.get(job_id)
        assert bool(taken) == (model is not None and model.holds(epoch))
        if queue == "renew" and taken:
            assert model is not None
            assert taken is model.desired

    @rule(lease=leases)
    def plan(self, lease: tuple[str, int]) -> None:
        job_id, epoch = lease
        model = self.models.get(job_id)
        if model is not None and model.holds(epoch) and model.state is not State.VALIDATING:
            return  # a trainer has no plan to hand in
        with session_scope(self.database) as session:
            state = attempts.finish_planning(session, job_id, epoch, PLAN)
        if model is None or not model.holds(epoch):
            assert state is None
            return
        wishes = {Desired.CANCEL: State.CANCELLED, Desired.PAUSE: State.PAUSED}
        expected = wishes.get(model.desired, State.CANCELLED if model.row.dry_run else State.QUEUED)
        assert state is expected
        model.let_go(expected)

    @rule(lease=leases)
    def succeed(self, lease: tuple[str, int]) -> None:
        job_id, epoch = lease
        model = self.models.get(job_id)
        if model is not None and model.holds(epoch) and model.state is not State.RUNNING:
            return  # a dataset's reader has no adapter to hand in
        row = model.row if model else Job(id="none", tenant_id=self.tenant.id)
        with session_scope(self.database) as session:
            files: dict[str, Any] = {"adapter": adapter(row), "result_file": result_file(row)}
            state = attempts.succeed(session, job_id, epoch, report=REPORT, **files)
        if model is None or not model.holds(epoch):
            assert state is None
            return
        assert state is (State.CANCELLED if model.desired is Desired.CANCEL else State.SUCCEEDED)
        model.let_go(state)

    @rule(lease=leases)
    def fail(self, lease: tuple[str, int]) -> None:
        with session_scope(self.database) as session:
            taken = attempts.fail(session, *lease, ERROR)
        self.left(lease, taken, lambda model: State.CANCELLED if model.desired is Desired.CANCEL else State.FAILED)

    @rule(lease=leases)
    def release(self, lease: tuple[str, int]) -> None:
        with session_scope(self.database) as session:
            taken = attempts.release(session, *lease)
        self.left(lease, taken, lambda model: model.wish() or model.waiting())

    @rule(lease=leases)
    def crash(self, lease: tuple[str, int]) -> None:
        with session_scope(self.database) as session:
            taken = attempts.crash(session, *lease, ERROR, backoff=0, max_crashes=MAX_CRASHES)
        self.left(lease, taken, self.after_crash)

    @rule(lease=leases)
    def shrink(self, lease: tuple[str, int]) -> None:
        model = self.models.get(lease[0])
        with session_scope(self.database) as session:
            taken = attempts.step_down(session, *lease)
        if taken and model is not None:
            model.halvings += 1
        self.left(lease, taken, lambda model: model.wish() or model.waiting())

    @rule(lease=leases, runs_out=st.booleans())
    def sweep(self, lease: tuple[str, int], runs_out: bool) -> None:
        """A sweeper takes back what it thinks is lost; it is right only if the lease has run out."""
        job_id, epoch = lease
        with session_scope(self.database) as session:
            if runs_out:
                past = func.clock_timestamp() - text("interval '1s'")
                leased = Job.lease_owner.is_not(None)
                session.execute(update(Job).where(Job.id == job_id, leased).values(lease_expires_at=past))
            taken = attempts.crash(session, job_id, epoch, ERROR, backoff=0, max_crashes=MAX_CRASHES, silent=True)
        if not runs_out and not taken:
            return  # whether an earlier round has turned the clock is not the model's to know
        self.left(lease, taken, self.after_crash)

    @rule(data=st.data(), desired=st.sampled_from(Desired))
    def ask(self, data: st.DataObject, desired: Desired) -> None:
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
            model.let_go(State.CANCELLED)
        elif desired is Desired.PAUSE and model.state is State.QUEUED:
            model.state = State.PAUSED
        elif desired is Desired.RUN and model.state is State.PAUSED:
            model.state = State.QUEUED

    def after_crash(self, model: Model) -> State:
        wish = model.wish()
        if wish is not None:
            return wish
        model.crashes += 1
        return State.FAILED if model.crashes >= MAX_CRASHES else model.waiting()

    def left(self, lease: tuple[str, int], taken: bool, state: Callable[[Model], State]) -> None:
        model = self.models.get(lease[0])
        assert taken == (model is not None and model.holds(lease[1]))
        if taken:
            assert model is not None
            model.let_go(state(model))

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
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
            assert found_counts == (model.attempts, model.crashes, model.halvings)
            assert model.ends == (row.state in TERMINAL)
            assert (row.finished_at is not None) == (row.state in TERMINAL)
            assert model.seen == sorted(set(model.seen))
        for job_id, count, last, epoch in events:
            assert count == last, f"the events of {job_id} have a gap"
            assert epoch <= self.models[job_id].epoch


def test_any_order_of_events_keeps_the_promise(database: Engine, tenant: Tenant, dataset: str) -> None:
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


@pytest.mark.parametrize("state", TERMINAL)
def test_no_move_leaves_a_terminal_state(state: State) -> None:
    assert not any(state in move.source for move in state_machine.MOVES.values())
