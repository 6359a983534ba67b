"""Jobs that start from another job's adapter, through the official client on the real stack.

The start is a model's name or a checkpoint's id. The result is verified against it, and the source may be deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import openai
import psycopg
import pytest
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob

from deploy.local.folder import Record
from tests.worker.job_ends import ends_once, wait

CREATE: dict[str, Any] = {"seed": 7, "hyperparameters": {"n_epochs": 50, "batch_size": 4}}


@pytest.fixture(scope="module")
def dataset(client: openai.OpenAI, quotes: bytes) -> FileObject:
    return client.files.create(file=("quotes.jsonl", quotes), purpose="fine-tune")


@pytest.fixture(scope="module")
def source(client: openai.OpenAI, tiny: str, dataset: FileObject) -> FineTuningJob:
    extra = {"trainer": {"max_steps": 8, "save_every": 4}, "lora": {"r": 4, "alpha": 12}}
    job = client.fine_tuning.jobs.create(model=tiny, training_file=dataset.id, extra_body=extra, **CREATE)
    job = wait(client, job.id)
    assert job.status == "succeeded", job.error
    return job


def test_a_fine_tuned_model_is_trained_further(
    client: openai.OpenAI, stack: Record, source: FineTuningJob, dataset: FileObject
) -> None:
    """As with OpenAI: only the model's name is given."""
    assert source.fine_tuned_model is not None
    extra = {"trainer": {"max_steps": 4}}
    sent = client.fine_tuning.jobs.create(
        model=source.fine_tuned_model, training_file=dataset.id, extra_body=extra, **CREATE
    )
    job = wait(client, sent.id)
    assert job.status == "succeeded", job.error
    assert job.model == "tiny"
    assert job.fine_tuned_model == f"ft:tiny:local::{job.id.removeprefix('ftjob-')}"
    found, before = job.model_extra or {}, source.model_extra or {}
    assert found["from_checkpoint"] == source.fine_tuned_model
    assert (found["lora"]["r"], found["plan"]["recipe"]["r"], found["plan"]["recipe"]["alpha"]) == (4, 4, 12)
    report = found["report"]
    assert (report["base"], report["start"]) == (before["report"]["base"], before["report"]["tuned"])
    assert report["tuned"]["loss"] < report["start"]["loss"]
    assert report["start_change"]["loss"] == pytest.approx(report["tuned"]["loss"] - report["start"]["loss"])
    assert report["kept_step"] == 4
    proof = found["adapter"]["proof"]
    assert (proof["base_deviation"], proof["tuned_deviation"]) == (0, 0)
    assert proof["start_logit_difference"] > 0
    manifest = json.loads(read(found, "manifest.json"))
    weights = next(f["sha256"] for f in before["adapter"]["files"] if f["path"] == "adapter_model.safetensors")
    assert manifest["from_checkpoint"] == {"name": source.fine_tuned_model, "sha256": weights}
    assert source.fine_tuned_model in read(found, "README.md")
    ends_once(stack, client, job.id)


def test_a_preference_job_starts_from_a_checkpoint_that_is_dropped_meanwhile(
    client: openai.OpenAI, stack: Record, source: FineTuningJob
) -> None:
    """A checkpoint may be dropped while the job waits; a model cannot be deleted while a job needs it."""
    row = json.dumps({"prompt": "Quote by SPEAKER 1: ", "chosen": "a felt hat", "rejected": "cap"})
    file = client.files.create(file=("pairs.jsonl", "\n".join([row] * 8).encode()), purpose="fine-tune")
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 40}}}
    submit = submit_paused(client, method=method, training_file=file.id)
    last = next(iter(client.fine_tuning.jobs.checkpoints.list(source.id)))
    job = submit(model="tiny", from_checkpoint=last.id)
    other = submit(model=source.fine_tuned_model, from_checkpoint=None)
    assert source.fine_tuned_model is not None
    with pytest.raises(openai.ConflictError, match=f"job {other.id} still starts from") as refused:
        client.models.delete(source.fine_tuned_model)
    assert refused.value.code == "model_in_use"
    client.fine_tuning.jobs.cancel(other.id)
    with psycopg.connect(stack.database_url) as connection:
        connection.execute("UPDATE checkpoints SET deleted_at = clock_timestamp() WHERE id = %s", (last.id,))
    client.fine_tuning.jobs.resume(job.id)
    job = wait(client, job.id)
    assert job.status == "succeeded", job.error
    found = job.model_extra or {}
    assert found["from_checkpoint"] == last.fine_tuned_model_checkpoint == f"{source.fine_tuned_model}:ckpt-step-8"
    assert found["report"]["start"]["reward_margin"] == 0
    assert found["report"]["base"]["reward_margin"] != 0
    assert found["report"]["tuned"]["reward_accuracy"] == 1
    ends_once(stack, client, job.id)


def test_another_tenants_adapter_is_not_found(
    stranger: openai.OpenAI, client: openai.OpenAI, source: FineTuningJob, quotes: bytes
) -> None:
    file = stranger.files.create(file=("quotes.jsonl", quotes), purpose="fine-tune")
    first = next(iter(client.fine_tuning.jobs.checkpoints.list(source.id)))
    for name in (source.fine_tuned_model, first.id, first.fine_tuned_model_checkpoint):
        assert name is not None
        with pytest.raises(openai.NotFoundError, match=r"no (model|checkpoint)"):
            stranger.fine_tuning.jobs.create(model=name, training_file=file.id)
        with pytest.raises(openai.NotFoundError, match=r"no (model|checkpoint)"):
            stranger.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body={"from_checkpoint": name})
    stranger.files.delete(file.id)


def submit_paused(client: openai.OpenAI, **body: Any) -> Callable[..., FineTuningJob]:
    """Return a function that submits a job and pauses it before a worker can train it."""

    def send(*, model: Any, from_checkpoint: str | None) -> FineTuningJob:
        job = client.fine_tuning.jobs.create(model=model, extra_body={"from_checkpoint": from_checkpoint}, **body)
        return client.fine_tuning.jobs.pause(job.id)

    return send


def read(job: dict[str, Any], name: str) -> str:
    url = next(file["url"] for file in job["adapter"]["files"] if file["path"] == name)
    return httpx.get(url).text
