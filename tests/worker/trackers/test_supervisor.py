"""Jobs with trackers: attempts in this process, with a real database, bucket and child process.

The trainer is a small script; the tracker servers are those of tests/worker/trackers/servers.py.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobWandbIntegrationObject
from sqlalchemy import select, update

from api.present import job_out
from shared import settings
from shared.broker.queues import Queue
from shared.database import jobs
from shared.database.session import session_scope
from shared.database.tables import Job, JobEvent
from shared.schemas.requests import Desired, State
from tests.results import PROOF, REPORT
from tests.worker.trackers.servers import Mlflow, Silent, serving
from worker.attempt.runner import run_next
from worker.trackers import supervisor

SECRET = "s3cret" * 8
MLFLOW = {"type": "mlflow", "mlflow": {"experiment": "hats", "run_name": "felt", "tags": {}}}
WANDB = {"type": "wandb", "wandb": {"project": "hats", "entity": "acme", "tags": ["felt"]}}
TRAINER = f"""
    import json, os, pathlib, signal, sys, time

    how, go = sys.argv[1], pathlib.Path(sys.argv[2])

    def send(event, **fields):
        print(json.dumps({{"event": event, "job": command["job"]}} | fields), flush=True)

    for line in sys.stdin:
        command = json.loads(line)
        if command["op"] == "train":
            if {SECRET!r} in str(os.environ) + line:
                sys.exit("the trainer got a secret")
            first, last = (1, 4) if how == "die" else (3, 6)
            for step in range(first, last + 1):
                send("metrics", metrics={{"step": step, "total_steps": 6, "train_loss": 1 / step}})
            while not go.exists():
                time.sleep(0.01)
            if how == "die":
                sys.exit(3)
            folder = pathlib.Path(command["work_dir"], "adapter")
            folder.mkdir()
            (folder / "adapter_model.safetensors").write_bytes(b"weights")
            send("done", path=str(folder), report={REPORT.model_dump(mode="json")!r})
        elif command["op"] == "verify":
            send("verified", proof={PROOF!r}, versions={{}})
"""

Attempt = Callable[..., Job]


@pytest.fixture
def attempt(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """Run one attempt at the queued job. Its trainer waits at the last step until `hook` (polled) returns True."""
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(TRAINER))

    def once(how: str, integration: dict[str, Any], hook: Callable[[], bool] = lambda: True, **values: str) -> Job:
        go = tmp_path / f"go-{how}"
        values["TRAINER_COMMAND"] = f"{sys.executable} -S -E {script} {how} {go}"
        for name, value in values.items():
            monkeypatch.setenv(f"MILLINER_{name}", value)
        settings.get_settings.cache_clear()
        with session_scope() as session:
            request = Job.request.op("||")({"integrations": [integration]})
            session.execute(update(Job).where(Job.id == job).values(request=request))

        def draining() -> bool:
            if hook():
                go.touch()
            return False

        run_next(Queue.TRAIN, owner="here", slot=0, draining=draining)
        return row(job)

    return once


def test_two_attempts_report_to_one_run_at_mlflow(attempt: Attempt, job: str) -> None:
    with serving(Mlflow()) as server:
        values = {"MLFLOW_TRACKING_URI": server.url, "MLFLOW_TOKEN": SECRET}
        attempt("die", MLFLOW, lambda: len(steps(server)) > 0, **values)
        assert server.runs["run-0"]["status"] == "RUNNING"
        done = attempt("pass", MLFLOW, lambda: 5 in steps(server), **values)
        assert (done.state, done.attempt) == (State.SUCCEEDED, 2), done.error
        until(lambda: server.runs["run-0"]["status"] == "FINISHED")
        assert steps(server) == [1, 2, 3, 4, 5, 6]
        assert len(server.runs) == 1
        assert server.runs["run-0"]["run_name"] == "felt"
        assert server.runs["run-0"]["params"]["total_steps"]
        assert {seen["authorization"] for seen in server.seen} == {f"Bearer {SECRET}"}
    assert not warnings(job, about="MLflow")


def test_a_cancelled_job_has_a_killed_run_at_mlflow(attempt: Attempt, job: str) -> None:
    def cancel() -> bool:
        if steps(server) and row(job).desired_state == Desired.RUN:
            with session_scope() as session:
                jobs.set_desired_state(session, row(job).tenant_id, job, Desired.CANCEL)
        return False

    with serving(Mlflow()) as server:
        done = attempt("pass", MLFLOW, cancel, MLFLOW_TRACKING_URI=server.url, HEARTBEAT_SECONDS="0.1")
        assert done.state == State.CANCELLED
        until(lambda: server.runs["run-0"]["status"] == "KILLED")


@pytest.mark.parametrize("integration", [MLFLOW, WANDB], ids=["mlflow", "wandb"])
def test_a_tracker_that_never_answers_causes_one_warning(
    attempt: Attempt, job: str, integration: dict[str, Any]
) -> None:
    with serving(Silent()) as server:
        values = {"MLFLOW_TRACKING_URI": server.url, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": SECRET[:40]}
        done = attempt("pass", integration, lambda: len(server.seen) > 0, **values)
        assert done.state == State.SUCCEEDED, done.error
        assert server.seen
    assert len(warnings(job, about="does not accept this job's metrics")) == 1


def test_a_tracker_that_is_down_causes_one_warning(attempt: Attempt, job: str) -> None:
    with serving(Mlflow()) as server:
        server.down = True
        done = attempt(
            "pass", MLFLOW, lambda: len(server.seen) > 1, MLFLOW_TRACKING_URI=server.url, MLFLOW_TOKEN=SECRET
        )
        assert done.state == State.SUCCEEDED, done.error
    (warning,) = warnings(job, about="MLflow does not accept")
    assert "with status 503" in warning


def test_a_worker_without_the_settings_reports_what_is_missing(attempt: Attempt, job: str) -> None:
    done = attempt("pass", WANDB)
    assert done.state == State.SUCCEEDED, done.error
    (warning,) = warnings(job, about="Weights & Biases receives no metrics")
    assert "MILLINER_WANDB_API_KEY" in warning


def test_missing_names_what_a_worker_lacks(as_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert supervisor.missing("mlflow") == "address: set MILLINER_MLFLOW_TRACKING_URI"
    assert supervisor.missing("wandb") == "key: set MILLINER_WANDB_API_KEY"
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(sys, "path", [])
    assert supervisor.missing("wandb") == "package: pip install 'milliner[trackers]'"


def test_a_job_shows_its_integrations_in_the_clients_own_types(job: str) -> None:
    with session_scope() as session:
        request = Job.request.op("||")({"integrations": [WANDB, MLFLOW]})
        session.execute(update(Job).where(Job.id == job).values(request=request))
        tenant = session.get_one(Job, job).tenant_id
    with session_scope() as session:
        shown = job_out(jobs.get_job(session, tenant, job))
    parsed = FineTuningJob.construct(**shown.model_dump(mode="json"))  # as the client does
    assert parsed.integrations is not None
    first, second = parsed.integrations
    assert isinstance(first, FineTuningJobWandbIntegrationObject)
    assert (first.wandb.project, first.wandb.entity, first.wandb.tags) == ("hats", "acme", ["felt"])
    fields: dict[str, Any] = second.model_dump()
    assert (fields["type"], fields["mlflow"]) == ("mlflow", MLFLOW["mlflow"])  # a type that OpenAI does not have


def steps(server: Mlflow) -> list[int]:
    with server.lock:
        return [step for step, _ in server.history.get("run-0", {}).get("train/loss", [])]


def warnings(job: str, *, about: str) -> list[str]:
    with session_scope() as session:
        messages = session.scalars(
            select(JobEvent.message).where(JobEvent.job_id == job, JobEvent.level == "warn")
        ).all()
    return [message for message in messages if about in message]


def row(job: str) -> Job:
    with session_scope() as session:
        return session.get_one(Job, job)


def until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
