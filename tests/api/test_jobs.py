"""Jobs through the official client, without training: create, list, page, cancel, and errors of invalid requests."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob, FineTuningJobWandbIntegrationObject

from deploy.local.folder import Record

BASE = "SmolLM2-135M-Instruct"
WANDB: Any = {"type": "wandb", "wandb": {"project": "hats", "name": "felt", "tags": ["a"]}}


def test_a_job_shows_its_request(client: openai.OpenAI, paused: FineTuningJob, dataset: FileObject) -> None:
    job = client.fine_tuning.jobs.retrieve(paused.id)
    assert (job.object, job.model, job.training_file) == ("fine_tuning.job", BASE, dataset.id)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == ("auto", "auto")
    assert (job.error, job.fine_tuned_model, job.finished_at, job.result_files) == (None, None, None, [])
    assert job.metadata == {"shelf": "top"}
    assert extra(job)["quantization"] == "nf4"
    assert extra(job)["priority"] == -100


def test_deprecated_and_current_hyperparameters_are_equivalent(client: openai.OpenAI, dataset: FileObject) -> None:
    wanted: Any = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    old = client.fine_tuning.jobs.create(model=BASE, training_file=dataset.id, hyperparameters=wanted)
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": wanted}}
    new = client.fine_tuning.jobs.create(model=BASE, training_file=dataset.id, method=method)
    for job in (old, new):
        assert job.method is not None
        assert job.method.supervised is not None
        assert job.hyperparameters.model_dump() == wanted
        assert job.method.supervised.hyperparameters is not None
        assert job.method.supervised.hyperparameters.model_dump() == wanted
        client.fine_tuning.jobs.cancel(job.id)


def test_a_dpo_job_shows_its_beta_and_requires_preferences(client: openai.OpenAI) -> None:
    row = {"prompt": "a", "chosen": "hat", "rejected": "cap"}
    file = client.files.create(file=("pairs.jsonl", json.dumps(row).encode()), purpose="fine-tune")
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 3}}}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, method=method)
    assert job.method is not None
    assert job.method.type == "dpo"
    assert job.method.supervised is None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert (job.method.dpo.hyperparameters.beta, job.method.dpo.hyperparameters.batch_size) == (0.2, "auto")
    assert job.hyperparameters.n_epochs == 3
    client.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.BadRequestError, match="found preference rows; method 'supervised'") as refused:
        client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    assert refused.value.code == "invalid_training_file"


def test_a_job_shows_its_integrations(client: openai.OpenAI, dataset: FileObject) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=dataset.id, integrations=[WANDB])
    client.fine_tuning.jobs.cancel(job.id)
    assert job.integrations is not None
    (shown,) = job.integrations
    assert isinstance(shown, FineTuningJobWandbIntegrationObject)
    assert (shown.type, shown.wandb.project, shown.wandb.name, shown.wandb.tags) == ("wandb", "hats", "felt", ["a"])


def test_a_classification_job_requires_labels(client: openai.OpenAI) -> None:
    file = client.files.create(file=("labels.csv", b"sentence,label\nfelt,1\nwool,0\n"), purpose="fine-tune")
    method: Any = {"type": "classification", "classification": {"hyperparameters": {"n_epochs": 3}}}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, method=method)
    client.fine_tuning.jobs.cancel(job.id)
    assert job.method is not None
    assert (job.method.type, job.hyperparameters.n_epochs) == ("classification", 3)
    with pytest.raises(openai.BadRequestError, match="found classification rows; method 'supervised'") as refused:
        client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    assert refused.value.code == "invalid_training_file"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"model": "gpt-4o"}, "model", f"allowed: {BASE}"),
        ({"training_file": "file-nope"}, "training_file", "upload one"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater than or equal to 1 (found 0)"),
        ({"suffix": "no spaces"}, "suffix", "found 'no spaces'"),
        ({"suffix": "x" * 65}, "suffix", "at most 64 characters"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "17 pairs; at most 16"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"method": {"type": "reinforcement"}}, "method.type", "'dpo' or 'classification' (found 'reinforcement')"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "only method.dpo is allowed"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "method.dpo.hyperparameters.beta", "2"),
        ({"method": {"type": "dpo"}}, "training_file", "found text rows; method 'dpo' trains on preference rows"),
        (
            {"integrations": [{"type": "mlflow", "mlflow": {"experiment": "e"}}]},
            "integrations.0.type",
            "enabled: wandb",
        ),
        ({"integrations": [{"type": "comet"}]}, "integrations.0.type", "'wandb' or 'mlflow' (found 'comet')"),
        ({"integrations": [{"type": "wandb"}]}, "integrations.0", "needs its settings under 'wandb'"),
        ({"integrations": [WANDB, WANDB]}, "integrations", "list each type once"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p", "base_url": "http://169.254.169.254"}}]},
            "integrations.0.wandb.base_url",
            "unknown key 'base_url'",
        ),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "../p"}}]}, "integrations.0.wandb.project", "match"),
        ({"extra_body": {"lora": {"rank": 8}}}, "lora.rank", "allowed: alpha, dropout, loraplus_lr_ratio, r"),
        ({"extra_body": {"lora": {"r": 0}}}, "lora.r", "greater than or equal to 1"),
        ({"extra_body": {"lora": {"loraplus_lr_ratio": 0.5}}}, "lora.loraplus_lr_ratio", "greater than or equal to 1"),
        ({"extra_body": {"from_checkpoint": BASE}}, "from_checkpoint", "is not the name of an adapter"),
        ({"extra_body": {"from_checkpoint": "ftckpt_0"}}, "from_checkpoint", "no checkpoint 'ftckpt_0'"),
        ({"model": "ft:x"}, "model", "no model 'ft:x'"),
        ({"extra_body": {"trainer": {"stepz": 8}}}, "trainer.stepz", "allowed: early_stopping"),
        ({"extra_body": {"quantization": "int8", "lora": {"use_dora": True}}}, "quantization", '"nf4" or "none"'),
        ({"extra_body": {"quantization": "fp4"}}, "quantization", "'nf4', 'int8' or 'none' (found 'fp4')"),
        (
            {"extra_body": {"quantization": "nf4", "trainer": {"full_finetuning": True}}},
            "quantization",
            "allowed: \"none\", or leave it out (found 'nf4')",
        ),
        ({"extra_body": {"lora": {"r": 4}, "trainer": {"full_finetuning": True}}}, "lora", "has no adapter"),
        (
            {"method": {"type": "classification"}, "extra_body": {"trainer": {"full_finetuning": True}}},
            "trainer",
            "allowed with the methods supervised and dpo",
        ),
        ({"extra_body": {"colour": "red"}}, "colour", "unknown key 'colour'"),
    ],
)
def test_an_invalid_request_says_what_is_allowed(
    client: openai.OpenAI, dataset: FileObject, body: dict[str, Any], param: str, message: str
) -> None:
    request = {"model": BASE, "training_file": dataset.id} | body
    with pytest.raises(openai.APIStatusError) as refused:
        client.fine_tuning.jobs.create(**request)
    assert refused.value.status_code in (400, 404)
    assert refused.value.param == param
    assert message in refused.value.message
    assert refused.value.request_id


def test_jobs_are_paged_and_filtered_by_metadata(client: openai.OpenAI, dataset: FileObject) -> None:
    made = []
    for i in range(5):
        job = client.fine_tuning.jobs.create(model=BASE, training_file=dataset.id, metadata={"batch": "p", "i": str(i)})
        client.fine_tuning.jobs.cancel(job.id)
        made.append(job.id)
    query: Any = {"metadata[batch]": "p"}
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2, extra_query=query)] == made[::-1]
    page = client.fine_tuning.jobs.list(limit=5, extra_query=query)
    assert (len(page.data), page.has_more) == (5, False)
    assert client.fine_tuning.jobs.list(limit=4, extra_query=query).has_more
    both: Any = {"metadata[batch]": "p", "metadata[i]": "3"}
    assert [job.id for job in client.fine_tuning.jobs.list(extra_query=both)] == [made[3]]
    bare: Any = {"metadata": "null"}
    assert not set(made) & {job.id for job in client.fine_tuning.jobs.list(limit=100, extra_query=bare)}


def test_events_are_listed_newest_first_on_all_pages(client: openai.OpenAI, dataset: FileObject) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=dataset.id)
    client.fine_tuning.jobs.cancel(job.id)
    wait(client, job.id, "cancelled")
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=1))
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert events[0].message == "The job was cancelled"
    assert len({event.id for event in events}) == len(events)
    assert [event.id for event in events] == sorted((event.id for event in events), reverse=True)
    with pytest.raises(openai.BadRequestError, match="not an event id"):
        client.fine_tuning.jobs.list_events(job.id, after="ftevent-1")
    with pytest.raises(openai.ConflictError, match="is cancelled") as refused:
        client.fine_tuning.jobs.cancel(job.id)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_a_repeated_request_creates_one_job(stack: Record, dataset: FileObject) -> None:
    body = {"model": BASE, "training_file": dataset.id, "seed": 77}
    headers = {"authorization": f"Bearer {stack.api_key}"}
    with httpx.Client(base_url=stack.base_url, headers=headers) as http:
        answers = [
            http.post("/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": str(i)}) for i in range(3)
        ]
        keyed = [http.post("/fine_tuning/jobs", json=body, headers={"idempotency-key": "k1"}) for _ in range(2)]
        other = http.post("/fine_tuning/jobs", json=body | {"seed": 78}, headers={"idempotency-key": "k1"})
        ids = [answer.json()["id"] for answer in [*answers, *keyed]]
        for job_id in set(ids):
            http.post(f"/fine_tuning/jobs/{job_id}/cancel")
    assert len(set(ids[:3])) == 1
    assert len(set(ids[3:])) == 1
    assert ids[0] != ids[3]
    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")


def test_a_stopped_broker_delays_no_request(client: openai.OpenAI, stack: Record, dataset: FileObject) -> None:
    os.kill(stack.pids.valkey, signal.SIGSTOP)
    try:
        slowest, ids = 0.0, []
        for _ in range(5):
            started = time.perf_counter()
            ids.append(client.fine_tuning.jobs.create(model=BASE, training_file=dataset.id).id)
            slowest = max(slowest, time.perf_counter() - started)
    finally:
        os.kill(stack.pids.valkey, signal.SIGCONT)
    # A publish to a stopped broker times out after 4 s. No request may have waited for it.
    assert slowest < 3
    for job_id in ids:
        client.fine_tuning.jobs.cancel(job_id)
        wait(client, job_id, "cancelled")


def test_an_invalid_body_is_a_400(stack: Record) -> None:
    headers = {"authorization": f"Bearer {stack.api_key}", "content-type": "application/json"}
    with httpx.Client(base_url=stack.base_url, headers=headers) as http:
        bodies = [{"model": None}, {"model": "a\0"}, {"model": "\ud800"}, {"\ud800": 1}, {"metadata": {"k\0": ""}}]
        for content in (b"{", b"[]", b"null", b'"x"', b"\xff", b"", *(json.dumps(body).encode() for body in bodies)):
            answer = http.post("/fine_tuning/jobs", content=content)
            assert answer.status_code == 400, content
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def wait(client: openai.OpenAI, job_id: str, status: str, *, seconds: float = 30) -> FineTuningJob:
    deadline = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status != status:
        assert time.monotonic() < deadline, f"{job.status}, not {status}, after {seconds} s"
        time.sleep(0.1)
    return job


def extra(job: FineTuningJob) -> dict[str, Any]:
    assert job.model_extra is not None
    return job.model_extra
