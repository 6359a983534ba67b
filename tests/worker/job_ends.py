"""Wait for a job through the API, and check that it ended exactly once."""

from __future__ import annotations

import json
import time

import openai
import psycopg
from openai.types.fine_tuning import FineTuningJob

from deploy.local.folder import Record
from shared.schemas.responses import Job

TERMINAL = {"succeeded", "failed", "cancelled"}


def wait(client: openai.OpenAI, job_id: str, states: set[str] = TERMINAL, *, seconds: float = 120) -> FineTuningJob:
    deadline = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in states:
        assert time.monotonic() < deadline, f"{job.status} after {seconds} s: {job.model_extra}"
        time.sleep(0.1)
    return job


def finished(client: openai.OpenAI, job_id: str) -> Job:
    deadline = time.monotonic() + 120
    while (retrieved := client.fine_tuning.jobs.retrieve(job_id)).status != "succeeded":
        assert retrieved.status not in {"failed", "cancelled"}, retrieved.error
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return Job.model_validate(retrieved.to_dict())


def ends_once(stack: Record, client: openai.OpenAI, job_id: str) -> None:
    """Assert one terminal event, events without gaps, at most one adapter, no lease, and the same state in the API."""
    with psycopg.connect(stack.database_url) as connection:
        seqs = connection.execute("SELECT seq FROM job_events WHERE job_id = %s ORDER BY seq", (job_id,)).fetchall()
        terminal_events = connection.execute(
            "SELECT count(*) FROM job_events WHERE job_id = %s AND (message LIKE 'The job has successfully%%'"
            " OR message LIKE 'The job failed%%' OR message = 'The job was cancelled')",
            (job_id,),
        ).fetchone()
        row = connection.execute("SELECT state, lease_owner FROM jobs WHERE id = %s", (job_id,)).fetchone()
        adapters = connection.execute("SELECT count(*) FROM adapters WHERE job_id = %s", (job_id,)).fetchone()
    assert [seq for (seq,) in seqs] == list(range(1, len(seqs) + 1))
    assert terminal_events == (1,)
    assert row is not None
    assert row[1] is None
    assert adapters == (int(row[0] == "succeeded"),)
    assert json.dumps(client.fine_tuning.jobs.retrieve(job_id).status) == json.dumps(row[0])
