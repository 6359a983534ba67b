"""A dataset and a paused job, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob

from deploy.local.folder import Record
from shared.database.session import engine, session_scope
from shared.database.tables import Job

BASE = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def dataset(client: openai.OpenAI, quotes: bytes) -> FileObject:
    return client.files.create(file=("quotes.jsonl", quotes), purpose="fine-tune")


@pytest.fixture
def paused(client: openai.OpenAI, dataset: FileObject, stack: Record) -> Iterator[FineTuningJob]:
    """A job that no worker takes: it is paused before its dataset is validated."""
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=dataset.id, metadata={"shelf": "top"}, extra_body={"priority": -100}
    )
    client.fine_tuning.jobs.pause(job.id)
    yield job
    with session_scope(engine(stack.database_url)) as session:
        ended = session.get_one(Job, job.id).state == "cancelled"
    if not ended:
        client.fine_tuning.jobs.cancel(job.id)
