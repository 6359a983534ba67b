"""Whole jobs on the real stack, and what happens to them when processes are killed.

The promise: an accepted job ends once, in one state, with one result, whichever process dies.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import psycopg
import pytest
import redis
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob

from client import download
from client.connect import job_of
from client.verify import verify
from deploy.local.folder import Folder, Record
from shared.schemas.manifest import MANIFEST, Manifest
from shared.schemas.responses import Artifact
from tests.worker.job_ends import TERMINAL, ends_once, wait

LONG = {"max_steps": 400, "save_every": 20}


@pytest.fixture(scope="module")
def dataset(client: openai.OpenAI, quotes: bytes) -> FileObject:
    return client.files.create(file=("quotes.jsonl", quotes), purpose="fine-tune")


@pytest.fixture
def submit(client: openai.OpenAI, tiny: str, dataset: FileObject) -> Callable[..., FineTuningJob]:
    def send(**trainer: Any) -> FineTuningJob:
        extra = {"trainer": trainer, "lora": {"r": 4, "dropout": 0.1}}
        epochs: Any = {"n_epochs": 50, "batch_size": 4}
        return client.fine_tuning.jobs.create(
            model=tiny, training_file=dataset.id, seed=7, suffix="t", hyperparameters=epochs, extra_body=extra
        )

    return send


def test_a_job_from_file_to_adapter(client: openai.OpenAI, stack: Record, submit: Callable[..., Any]) -> None:
    job = wait(client, submit(max_steps=6, save_every=2, eval_every=3).id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == f"ft:tiny:local:t:{job.id.removeprefix('ftjob-')}"
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (50, 4)
    assert job.trained_tokens
    assert job.finished_at
    extra = job.model_extra or {}
    assert (extra["phase"], extra["reason"], extra["attempt"]) == (None, "completed", 1)
    assert extra["progress"]["percent"] == 100
    assert extra["report"]["tuned"]["loss"] < extra["report"]["base"]["loss"]
    assert 0 < extra["fit"]["predicted_bytes"] < 2 * extra["fit"]["measured_bytes"]
    assert extra["fit"]["device"] == extra["report"]["fit"]["device"]["name"]
    names = {file["path"] for file in extra["adapter"]["files"]}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "report.json",
        "metrics.jsonl",
        "README.md",
        f"runs/{job.id}/events.out.tfevents.milliner",
        "manifest.json",
        "manifest.json.sig",
    }
    proof = extra["adapter"]["proof"]
    assert (proof["base"], proof["tuned"]) == (extra["report"]["base"], extra["report"]["tuned"])
    assert proof["max_logit_difference"] > 0
    assert extra["adapter"]["signed_by"]
    table = client.files.content(job.result_files[0]).text.splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [line.split(",")[0] for line in table[1:]] == ["1", "2", "3", "4", "5", "6"]
    points = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [point.step_number for point in points] == [6, 4, 2]
    assert points[0].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-6"
    assert client.models.retrieve(job.fine_tuned_model).owned_by == "local"
    assert client.models.delete(job.fine_tuned_model).deleted
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None
    ends_once(stack, client, job.id)


def test_a_job_with_exports(client: openai.OpenAI, submit: Callable[..., Any], tmp_path: Path) -> None:
    """Both exports are in the manifest, and the pulled files are complete."""
    job = wait(client, submit(max_steps=6, exports=["merged", "gguf_adapter"]).id)
    assert job.status == "succeeded", job.error
    adapter = (job.model_extra or {})["adapter"]
    merged, gguf = adapter["exports"]
    assert (merged["name"], merged["path"], merged["error"]) == ("merged", "exports/merged/", None)
    assert merged["difference"] == pytest.approx(merged["loss"] - adapter["proof"]["tuned"]["loss"])
    assert (gguf["name"], gguf["loss"], gguf["error"]) == ("gguf_adapter", None, None)
    sizes = {file["path"]: file["bytes"] for file in adapter["files"]}
    assert sizes["exports/gguf_adapter/adapter.gguf"] == gguf["bytes"]
    assert "exports/merged/model.safetensors" in sizes
    download.pull([Artifact.model_validate(file) for file in adapter["files"]], tmp_path)
    found = verify(tmp_path)
    assert (found.ok, found.files) == (True, len(sizes) - 2)
    assert [export.name for export in Manifest.model_validate_json((tmp_path / MANIFEST).read_bytes()).exports] == [
        "merged", "gguf_adapter",
    ]  # fmt: skip
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert any(message.startswith("exported merged: reloaded, loss") for message in messages)


def test_invalid_exports_are_refused_before_training(client: openai.OpenAI, submit: Callable[..., Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="names merged more than once"):
        submit(exports=["merged", "merged"])
    with pytest.raises(openai.BadRequestError, match="gguf_adapter"):
        submit(exports=["onnx"])


def test_a_preference_job_from_file_to_adapter(client: openai.OpenAI, tiny: str) -> None:
    """Two answers in chat messages, in OpenAI's format."""
    question = {"messages": [{"role": "user", "content": "What is on your head?"}]}
    hat, cap = ([{"role": "assistant", "content": text}] for text in ("a felt hat", "a cap"))
    row = json.dumps({"input": question, "preferred_output": hat, "non_preferred_output": cap})
    file = client.files.create(file=("pairs.jsonl", "\n".join([row] * 8).encode()), purpose="fine-tune")
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 40}}}
    job = wait(client, client.fine_tuning.jobs.create(model=tiny, training_file=file.id, method=method).id)
    assert job.status == "succeeded", job.error
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert (job.method.dpo.hyperparameters.n_epochs, job.method.dpo.hyperparameters.beta) == (2, 0.1)
    report = (job.model_extra or {})["report"]
    assert report["base"]["loss"] == pytest.approx(math.log(2))
    assert report["tuned"]["loss"] < report["base"]["loss"]
    assert report["tuned"]["reward_accuracy"] == 1


def test_a_full_finetuning_job_from_file_to_model(
    client: openai.OpenAI, tiny: str, dataset: FileObject, tmp_path: Path
) -> None:
    extra: Any = {"trainer": {"full_finetuning": True, "max_steps": 4, "save_every": 2}}
    job = wait(client, client.fine_tuning.jobs.create(model=tiny, training_file=dataset.id, extra_body=extra).id)
    assert job.status == "succeeded", job.error
    found = job_of(job)
    assert found.quantization == "none"
    assert found.plan is not None
    assert found.report is not None
    assert found.adapter is not None
    assert found.adapter.proof is not None
    assert found.report.trainable_parameters == found.report.total_parameters
    assert (found.adapter.proof.base, found.adapter.proof.tuned) == (found.report.base, found.report.tuned)
    names = {file.path for file in found.adapter.files}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "README.md", "manifest.json"}
    assert "adapter_config.json" not in names
    download.pull(found.adapter.files, tmp_path)
    checked = verify(tmp_path)
    assert (checked.ok, checked.full_finetuning) == (True, True)


def test_a_broken_file_fails_with_its_line_and_parameter(client: openai.OpenAI, tiny: str) -> None:
    body = b'{"text":"x"}\n' * 6 + b'{"text": oops}\n'
    file = client.files.create(file=("broken.jsonl", body), purpose="fine-tune")
    job = wait(client, client.fine_tuning.jobs.create(model=tiny, training_file=file.id).id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "line 7" in job.error.message
    assert (job.model_extra or {})["attempt"] == 0


def test_a_lost_object_fails_the_job_and_frees_the_slot(
    client: openai.OpenAI, stack: Record, tiny: str, quotes: bytes
) -> None:
    file = client.files.create(file=("lost.jsonl", quotes), purpose="fine-tune")
    with psycopg.connect(stack.database_url) as connection:
        connection.execute("UPDATE files SET key = 'files/nowhere' WHERE id = %s", (file.id,))
    job = wait(client, client.fine_tuning.jobs.create(model=tiny, training_file=file.id).id)
    assert (job.status, job.error and job.error.code) == ("failed", "object_lost")


def test_a_killed_trainer_is_replaced_and_the_job_resumes(
    client: openai.OpenAI, stack: Record, submit: Callable[..., Any]
) -> None:
    job_id = submit(**LONG).id
    at_step(client, job_id, 40)
    os.kill(trainer_of(stack, job_id), signal.SIGKILL)
    job = wait(client, job_id)
    assert job.status == "succeeded", job.error
    assert (job.model_extra or {})["attempt"] == 2
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job_id)]
    assert any("killed by SIGKILL" in message for message in messages)
    assert any("Resuming from the checkpoint" in message for message in messages)
    ends_once(stack, client, job_id)


def test_a_killed_worker_is_replaced_and_the_job_resumes(
    client: openai.OpenAI, stack: Record, submit: Callable[..., Any]
) -> None:
    job_id = submit(**LONG).id
    at_step(client, job_id, 40)
    trainer = trainer_of(stack, job_id)
    os.kill(pids(stack).train, signal.SIGKILL)
    gone(trainer)
    job = wait(client, job_id)
    assert job.status == "succeeded", job.error
    assert (job.model_extra or {})["attempt"] == 2
    ends_once(stack, client, job_id)


def test_a_killed_and_paused_job_has_the_same_bytes_as_an_undisturbed_one(
    client: openai.OpenAI, stack: Record, submit: Callable[..., Any]
) -> None:
    """NF4 and dropout: a wrong random number, optimizer state or row would change the bytes."""
    undisturbed, disturbed = submit(**LONG).id, submit(**LONG).id
    for _ in range(2):
        here = step_of(client.fine_tuning.jobs.retrieve(disturbed))
        at_step(client, disturbed, here + 45)
        os.kill(trainer_of(stack, disturbed), signal.SIGKILL)
    at_step(client, disturbed, step_of(client.fine_tuning.jobs.retrieve(disturbed)) + 45)
    client.fine_tuning.jobs.pause(disturbed)
    wait(client, disturbed, {"paused"})
    client.fine_tuning.jobs.resume(disturbed)
    ended = [wait(client, job_id) for job_id in (undisturbed, disturbed)]
    assert [job.status for job in ended] == ["succeeded"] * 2
    first, second = ((job.model_extra or {}) for job in ended)
    assert (first["attempt"], second["attempt"]) == (1, 4)
    assert weights(first) == weights(second)
    assert first["report"]["tuned"] == second["report"]["tuned"]
    ends_once(stack, client, disturbed)


def test_a_stopped_worker_and_its_trainer_never_overlap_with_their_successors(
    client: openai.OpenAI, stack: Record, submit: Callable[..., Any]
) -> None:
    """The slot is stopped with SIGSTOP until its lease has expired.

    Its trainer has frozen itself before the job returns to the queue. When the slot continues, it sees a newer epoch,
    kills its trainer, and writes nothing.
    """
    job_id = submit(**LONG).id
    at_step(client, job_id, 40)
    trainer = trainer_of(stack, job_id)
    slot = int(stat_of(trainer)[1])
    os.kill(slot, signal.SIGSTOP)
    try:
        wait(client, job_id, {"queued"})
        assert stat_of(trainer)[0] == "T"
    finally:
        os.kill(slot, signal.SIGCONT)
    gone(trainer)
    job = wait(client, job_id)
    assert job.status == "succeeded", job.error
    ends_once(stack, client, job_id)


def test_a_draining_worker_gives_its_job_back(client: openai.OpenAI, stack: Record, submit: Callable[..., Any]) -> None:
    job_id = submit(**LONG | {"save_every": 1000}).id
    at_step(client, job_id, 20)
    worker = pids(stack).train
    os.kill(worker, signal.SIGTERM)
    gone(worker)
    job = wait(client, job_id)
    assert job.status == "succeeded", job.error
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job_id)]
    assert any("shutting down" in message for message in messages)
    assert not any("crash" in message for message in messages)
    ends_once(stack, client, job_id)


def test_a_flushed_broker_loses_no_job(client: openai.OpenAI, stack: Record, submit: Callable[..., Any]) -> None:
    ids = [submit(max_steps=4).id for _ in range(3)]
    with redis.Redis.from_url(stack.redis_url) as broker:
        for _ in range(5):
            broker.flushall()
            time.sleep(0.2)
    for job_id in ids:
        assert wait(client, job_id).status == "succeeded"
        ends_once(stack, client, job_id)


def test_cancel_pause_and_resume_reach_a_running_job(
    client: openai.OpenAI, stack: Record, submit: Callable[..., Any]
) -> None:
    cancelled = submit(**LONG).id
    at_step(client, cancelled, 5)
    trainer = trainer_of(stack, cancelled)
    client.fine_tuning.jobs.cancel(cancelled)
    assert wait(client, cancelled).status == "cancelled"
    gone(trainer)
    paused = submit(**LONG).id
    at_step(client, paused, 25)
    client.fine_tuning.jobs.pause(paused)
    wait(client, paused, {"paused"})
    client.fine_tuning.jobs.resume(paused)
    assert wait(client, paused).status == "succeeded"
    for job_id in (cancelled, paused):
        ends_once(stack, client, job_id)


def test_the_trainer_gets_no_secret(client: openai.OpenAI, stack: Record, submit: Callable[..., Any]) -> None:
    job_id = submit(**LONG).id
    at_step(client, job_id, 1)
    environ = Path(f"/proc/{trainer_of(stack, job_id)}/environ").read_text()
    client.fine_tuning.jobs.cancel(job_id)
    assert "MILLINER" not in environ
    for secret in (stack.s3.secret_key, stack.api_key, stack.database_url, stack.redis_url):
        assert secret not in environ
    assert "HF_HUB_OFFLINE=1" in environ
    wait(client, job_id)


def at_step(client: openai.OpenAI, job_id: str, step: int, *, seconds: float = 120) -> None:
    """Wait until that step is recorded."""
    deadline = time.monotonic() + seconds
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if step_of(job) >= step:
            return
        assert job.status not in TERMINAL, f"{job.status} before step {step}: {job.error}"
        assert time.monotonic() < deadline, f"not at step {step} after {seconds} s: {job.status}"
        time.sleep(0.05)


def step_of(job: FineTuningJob) -> int:
    """Return the last recorded step."""
    return int(((job.model_extra or {})["progress"] or {"step": 0})["step"])


def weights(extra: dict[str, Any]) -> str:
    """Return the SHA-256 of the published adapter's weights."""
    return next(str(f["sha256"]) for f in extra["adapter"]["files"] if f["path"] == "adapter_model.safetensors")


def trainer_of(stack: Record, job_id: str) -> int:
    """Return the pid of the trainer that runs this job."""
    with psycopg.connect(stack.database_url) as connection:
        [[owner]] = connection.execute("SELECT lease_owner FROM jobs WHERE id = %s", (job_id,))
    slot = owner.split(":")[1]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, folder = (entry / "cmdline").read_bytes(), os.readlink(entry / "cwd")
            except OSError:
                continue
            if b"worker.trainer.main" in command and f"/work/work-{slot}-" in folder:
                return int(entry.name)
    raise AssertionError(f"no trainer runs {job_id}")


def stat_of(pid: int) -> list[str]:
    """Return state, parent and more: the fields of proc_pid_stat(5) from the third on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def pids(stack: Record) -> Any:
    """Return the current pids: the stack's supervisor replaces processes that end."""
    record = Folder(Path(stack.data)).record()
    assert record is not None
    return record.pids


def gone(pid: int, *, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.05)
