"""Faults of the bucket: how they affect jobs, uploads, cancels and drains, and which objects they leave behind.

The faults are between S3 and our processes, each of which has its own proxy; only one test kills the server itself. The
proxies count the faults that occurred, and the workers' logs show that the workers waited.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from deploy.local import servers as local
from tests.chaos.fleet import SHORT, Fleet, kill
from tests.chaos.proxy import Proxy, Way
from tests.chaos.servers import Servers, until

LEASE = float(SHORT["MILLINER_LEASE_SECONDS"])
LONGEST_DRAIN = 25.0
LONGEST_CANCEL = 20.0  # boto retries for 7 s at most, we wait 3 s before the next try; the rest is for a busy machine
# An offset inside the adapter's 4,096 bytes: they come first on a connection, or after one small file, each with 1 kB
# of headers.
INSIDE_AN_UPLOAD = 3000
LARGE = b'{"text": "' + b"a felt hat is a hat that is felt, " * 300 + b'"}\n'
LARGE_ROWS = 400
KINDS = {"checkpoints", "adapters"}
STEPS = 30
# No automatic garbage collection: it would use up the faults that are meant for jobs.
SETTINGS = {"MILLINER_PURGE_SECONDS": "1e9"}
COLLECT = (
    "from shared.settings import get_settings; from worker.background.garbage import collect; collect(get_settings())"
)


def error(status: str, code: str) -> bytes:
    """An HTTP error response like those of S3."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>later</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return head.encode() + b"\r\n\r\n" + body


OUTAGES: Mapping[str, Callable[[Proxy], None]] = {
    "reset": Proxy.reset,
    "500": lambda proxy: proxy.answer(error("500 Internal Server Error", "InternalError")),
    "503": lambda proxy: proxy.answer(error("503 Slow Down", "SlowDown")),
    "silence": Proxy.half_open,
}
FAULT_NAMES = {"reset": "reset", "500": "answer", "503": "answer", "silence": "held"}


@pytest.fixture(scope="module")
def shared(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet that reaches S3 only through proxies."""
    fleet = Fleet(
        servers,
        tmp_path_factory.mktemp("fleet"),
        via={name: ["s3"] for name in ("api", "prepare", "train-0", "train-1")},
        settings=SETTINGS,
    )
    fleet.start()
    yield fleet
    fleet.close()


@pytest.fixture
def ours(shared: Fleet) -> Iterator[Fleet]:
    """The shared fleet, with all faults healed after the test."""
    dataset = shared.dataset
    yield shared
    shared.dataset = dataset
    heal(shared)


# ---------------------------------------------------------------- outages


@pytest.mark.parametrize("kind", OUTAGES)
def test_staging_saving_and_publishing_wait_for_an_outage(
    ours: Fleet, kind: str, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """With "silence" every request reaches S3, and only the answers are lost."""
    before = count_faults(ours, FAULT_NAMES[kind])
    jobs = caught_by(ours, lambda: everywhere(ours, OUTAGES[kind]))
    assert_still_waiting(ours, jobs, size(2, 60))
    if kind == "silence":
        everywhere(ours, Proxy.reset)
    assert count_faults(ours, FAULT_NAMES[kind]) >= before + 3
    heal(ours)
    healed_at = time.monotonic()
    figures({"kind": kind, "settled_after_seconds": seconds_to_settle(ours, healed_at)})
    assert_undisturbed(ours, jobs)


def test_jobs_wait_for_a_killed_server(
    fleet: Callable[..., Fleet],
    own_servers: Servers,
    size: Callable[..., Any],
    figures: Callable[[dict[str, Any]], None],
) -> None:
    """SeaweedFS is killed, is down for longer than a lease, and restarts on its old data."""
    alone, after = fleet(own_servers, workers=1, settings=SETTINGS), list[float]()
    for _ in range(size(1, 20)):
        unavailable = waits(alone)
        jobs = caught_by(alone, lambda: own_servers.kill("s3"), third="tokenizing")
        assert_still_waiting(alone, jobs, LEASE + 1, third="tokenizing")
        assert waits(alone) > unavailable
        own_servers.start_again("s3")
        after.append(seconds_to_settle(alone, time.monotonic()))
        assert_undisturbed(alone, jobs)
    figures({"kills": len(after), "settled_after_seconds": after})


def test_a_slow_bucket_is_not_treated_as_an_outage(ours: Fleet) -> None:
    before, unavailable = count_faults(ours, "latency"), waits(ours)
    everywhere(ours, lambda proxy: proxy.latency(0.1))
    jobs = ours.submit(3, max_steps=20, save_every=10)
    ours.settle()
    assert count_faults(ours, "latency") >= before + 50
    assert waits(ours) == unavailable
    assert_undisturbed(ours, jobs)


# ---------------------------------------------------------------- single connections


@pytest.mark.parametrize("save_every", [10, 1000], ids=["checkpoint", "adapter"])
def test_an_upload_that_is_cut_repeatedly_is_retried(ours: Fleet, save_every: int) -> None:
    """It is cut more often than boto itself retries."""
    before, unavailable = count_faults(ours, "cut"), waits(ours)
    [job] = wait_until_training(ours, ours.submit(max_steps=STEPS, save_every=save_every, step_ms=60))
    everywhere(ours, lambda proxy: proxy.cut_after(INSIDE_AN_UPLOAD, times=5))
    everywhere(ours, Proxy.sever)
    ours.settle()
    assert count_faults(ours, "cut") >= before + 5
    assert waits(ours) > unavailable
    assert_undisturbed(ours, [job])


@pytest.mark.parametrize("save_every", [10, 1000], ids=["checkpoint", "adapter"])
def test_a_corrupted_upload_is_refused_and_retried(ours: Fleet, save_every: int) -> None:
    before, unavailable = count_faults(ours, "corrupt"), waits(ours)
    [job] = wait_until_training(ours, ours.submit(max_steps=STEPS, save_every=save_every, step_ms=60))
    everywhere(ours, lambda proxy: proxy.corrupt(INSIDE_AN_UPLOAD))
    everywhere(ours, Proxy.sever)
    ours.settle()
    assert count_faults(ours, "corrupt") > before
    assert waits(ours) > unavailable
    assert_undisturbed(ours, [job])


def test_a_download_that_is_cut_is_retried(ours: Fleet) -> None:
    ours.dataset = large_dataset(ours)
    everywhere(ours, lambda proxy: proxy.latency(0.1))
    before, reset = downloaded(ours), count_faults(ours, "reset")
    [job] = ours.submit(max_steps=5)
    until(lambda: downloaded(ours) > before + 10**6, "a part of the dataset is downloaded")
    everywhere(ours, Proxy.sever)
    assert downloaded(ours) < before + len(LARGE) * LARGE_ROWS
    assert count_faults(ours, "reset") > reset
    heal(ours)
    ours.settle()
    assert_undisturbed(ours, [job])


def test_a_corrupted_download_is_retried(ours: Fleet) -> None:
    ours.dataset = large_dataset(ours)
    before = count_faults(ours, "corrupt")
    everywhere(ours, lambda proxy: proxy.corrupt_answer(10**6))
    everywhere(ours, Proxy.sever)
    [job] = ours.submit(max_steps=5)
    ours.settle()
    assert count_faults(ours, "corrupt") == before + 1
    assert_undisturbed(ours, [job])


# ---------------------------------------------------------------- lasting damage


def test_a_permanently_damaged_dataset_fails_the_job(ours: Fleet) -> None:
    ours.dataset = large_dataset(ours)
    [(key,)] = ours.sql("SELECT key FROM files WHERE id = %s", ours.dataset)
    damage(ours, key)
    [job] = ours.submit()
    assert ours.settle()[job] == "failed"
    [(code, message)] = ours.sql("SELECT error->>'code', error->>'message' FROM jobs WHERE id = %s", job)
    assert code == "object_lost"
    assert key in message
    ours.check()


def test_a_permanently_damaged_checkpoint_is_replaced_by_the_previous_one(ours: Fleet) -> None:
    """The job is paused meanwhile, so that no newer checkpoint is saved between the damage and the next attempt."""
    [job] = wait_until_training(ours, ours.submit(max_steps=60, save_every=5, step_ms=60))
    checkpoints = "SELECT step, prefix FROM checkpoints WHERE job_id = %s AND deleted_at IS NULL ORDER BY step DESC"
    until(lambda: len(ours.sql(checkpoints, job)) > 0, "a checkpoint is saved")
    ours.client.fine_tuning.jobs.pause(job)
    until(lambda: ours.states()[job] == "paused", "the job is paused")
    [(broken, prefix), (good, _), *_] = ours.sql(checkpoints, job)
    damage(ours, f"{prefix}state.json")
    ours.client.fine_tuning.jobs.resume(job)
    ours.settle()
    messages = [
        message for (message,) in ours.sql("SELECT message FROM job_events WHERE job_id = %s ORDER BY seq", job)
    ]
    at = next(
        i
        for i, line in enumerate(messages)
        if line.startswith(f"Checkpoint of step {broken} is damaged; trying the one before it")
    )
    assert messages[at + 1] == f"Resuming from the checkpoint of step {good}"
    assert ours.states()[job] == "succeeded"
    assert ours.check().crashes == 0
    ours.check_adapters()


# ---------------------------------------------------------------- what does not wait


def test_the_api_without_a_bucket_refuses_only_uploads_and_downloads(ours: Fleet) -> None:
    proxy, impatient = ours.proxies["api", "s3"], ours.client.with_options(max_retries=0)
    files = ours.sql("SELECT count(*) FROM files")
    proxy.reset()
    before = proxy.faults["reset"]
    for request in (
        lambda: impatient.files.create(file=("rows.jsonl", b'{"text": "x"}\n'), purpose="fine-tune"),
        lambda: impatient.files.content(ours.dataset),
    ):
        with pytest.raises(openai.InternalServerError) as refused:
            request()
        assert refused.value.status_code == 503
        assert refused.value.code == "service_unavailable"
        assert "object storage" in str(refused.value)
        assert "try again" in str(refused.value)
    assert proxy.faults["reset"] >= before + 2
    assert ours.sql("SELECT count(*) FROM files") == files
    done, cancelled = ours.submit(2)
    impatient.fine_tuning.jobs.cancel(cancelled)
    assert ours.settle()[cancelled] == "cancelled"
    assert impatient.fine_tuning.jobs.retrieve(done).status == "succeeded"
    proxy.heal()
    uploaded = impatient.files.create(file=("rows.jsonl", b'{"text": "x"}\n'), purpose="fine-tune")
    assert impatient.files.content(uploaded.id).read() == b'{"text": "x"}\n'
    ours.check()


@pytest.mark.parametrize("fault", [Proxy.reset, Proxy.blackhole])
def test_a_cancel_does_not_wait_for_the_bucket(
    ours: Fleet, figures: Callable[[dict[str, Any]], None], fault: Callable[[Proxy], None]
) -> None:
    jobs = caught_by(ours, lambda: everywhere(ours, fault))
    asked_at = time.monotonic()
    for job in jobs:
        ours.client.fine_tuning.jobs.cancel(job)
    states = ours.settle(LONGEST_CANCEL)
    seconds = time.monotonic() - asked_at
    until(lambda: not ours.processes().trainers, "the slots are free")
    figures({"cancel_seconds": round(seconds, 2)})
    assert [states[job] for job in jobs] == ["cancelled"] * 3
    heal(ours)
    ours.check()


@pytest.mark.parametrize(("fault", "trace"), [(Proxy.reset, "reset"), (Proxy.blackhole, "held")])
def test_a_drain_does_not_wait_for_the_bucket(
    ours: Fleet, figures: Callable[[dict[str, Any]], None], fault: Callable[[Proxy], None], trace: str
) -> None:
    """The worker exits with 0 in time, and another one resumes from the last checkpoint."""
    [job] = wait_until_training(ours, ours.submit(max_steps=60, save_every=10, step_ms=60))
    until(lambda: len(saved(ours, job)) > 0, "a checkpoint is saved")
    seen = ours.processes()
    [slot] = [trainer.slot for trainer in seen.trainers if trainer.job == job]
    name = next(found.program for found in seen.slots if found.pid == slot)
    proxy = ours.proxies[name, "s3"]
    fault(proxy)
    before = proxy.faults[trace]
    until(lambda: proxy.faults[trace] > before, "a checkpoint meets the outage")
    last = saved(ours, job)[-1]
    ours.kept_down.add(name)
    process, asked_at = ours.crew.process(name), time.monotonic()
    process.terminate()
    assert process.wait(2 * LONGEST_DRAIN) == 0
    seconds = time.monotonic() - asked_at
    ours.settle()
    figures({"drain_seconds": round(seconds, 2)})
    assert seconds <= LONGEST_DRAIN
    counts = "SELECT state, attempt, crash_count, preempt_count FROM jobs WHERE id = %s"
    assert ours.sql(counts, job) == [("succeeded", 2, 0, 1)]
    epochs = dict[str, int]()
    for epoch, step, *_ in map(str.split, ours.witness_of(job).splitlines()):
        epochs.setdefault(epoch, int(step))
    assert list(epochs.values()) == [1, last + 1]
    proxy.heal()
    ours.bring_up(name)
    ours.wait_ready()
    ours.check()
    ours.check_adapters()


# ---------------------------------------------------------------- what is left


def test_objects_left_by_faults_and_kills_are_collected(
    ours: Fleet, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """Slots are killed after S3 has stored an upload and its answer is lost. The publishing job is then cancelled."""
    for _ in range(size(1, 10)):
        saving = ours.submit(2, max_steps=STEPS, save_every=10, step_ms=80)
        [publishing] = ours.submit(max_steps=STEPS, save_every=1000, step_ms=80)
        wait_until_training(ours, [*saving, publishing])
        before = objects(ours)
        everywhere(ours, Proxy.half_open)
        until(partial(stored_both, ours, before), "S3 has stored objects of both")
        killed = [kill(trainer.slot) for trainer in ours.processes().trainers]
        everywhere(ours, Proxy.reset)
        heal(ours)
        ours.client.fine_tuning.jobs.cancel(publishing)
        assert any(killed)
        states = ours.settle()
        assert [states[job] for job in [*saving, publishing]] == ["succeeded", "succeeded", "cancelled"]
    orphans = objects(ours) - named(ours)
    assert kinds(orphans) == KINDS
    env = ours.env["prepare"] | {"MILLINER_ORPHAN_SECONDS": "0"}
    subprocess.run([sys.executable, "-c", COLLECT], env=env, cwd=Path(__file__).parents[2], check=True)
    figures({"orphans_collected": len(orphans), "objects_kept": len(named(ours))})
    assert objects(ours) == named(ours)
    ours.check()
    ours.check_adapters()
    assert ours.client.files.content(ours.dataset).read()


# ---------------------------------------------------------------- causing faults


def stored_both(ours: Fleet, before: set[str]) -> bool:
    """True if the bucket has a new checkpoint and a new adapter that no row names."""
    return kinds(objects(ours) - before - named(ours)) == KINDS


def everywhere(ours: Fleet, fault: Callable[[Proxy], None]) -> None:
    """Apply a fault between S3 and every worker that trains."""
    for (program, _), proxy in ours.proxies.items():
        if program.startswith("train"):
            fault(proxy)


def heal(ours: Fleet) -> None:
    for proxy in ours.proxies.values():
        proxy.heal()


def wait_until_training(ours: Fleet, jobs: list[str]) -> list[str]:
    """Wait until all the jobs train; returns them."""
    until(lambda: all(map(ours.witness_of, jobs)), "the jobs train")
    return jobs


def caught_by(ours: Fleet, outage: Callable[[], None], *, third: str = "staging") -> list[str]:
    """Three jobs that the outage hits while they save, upload their adapter, and stage, in this order.

    `third` is the phase of the third job: `tokenizing` if the outage also hits `prepare` workers, because then it
    already waits in preparation.
    """
    saving = ours.submit(max_steps=STEPS, save_every=10, step_ms=80)
    jobs = wait_until_training(ours, saving + ours.submit(max_steps=STEPS, save_every=1000, step_ms=80))
    outage()
    jobs += ours.submit(max_steps=STEPS)
    until(lambda: waiting(ours, jobs, third), "the outage has hit all three")
    return jobs


def waiting(ours: Fleet, jobs: list[str], third: str = "staging") -> bool:
    """True if all jobs are as `caught_by` left them. The first has done its last step and is still being saved."""
    phases = dict(ours.sql("SELECT id, phase FROM jobs WHERE lease_owner IS NOT NULL"))
    steps = len(ours.witness_of(jobs[0]).splitlines())
    return steps == STEPS and [phases.get(job) for job in jobs] == ["training", "verifying", third]


def assert_still_waiting(ours: Fleet, jobs: list[str], seconds: float, *, third: str = "staging") -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert waiting(ours, jobs, third)
        time.sleep(0.2)


def large_dataset(ours: Fleet) -> str:
    """Upload a dataset that is downloaded in many chunks; returns its id."""
    return ours.client.files.create(file=("large.jsonl", LARGE * LARGE_ROWS), purpose="fine-tune").id


def damage(ours: Fleet, key: str) -> None:
    """Flip a bit of an object, from outside the product."""
    client = local.s3_client(ours.s3)
    body = client.get_object(Bucket=ours.s3.bucket, Key=key)["Body"].read()
    client.put_object(Bucket=ours.s3.bucket, Key=key, Body=body[:-1] + bytes([body[-1] ^ 1]))


# ---------------------------------------------------------------- observations


def count_faults(ours: Fleet, fault: str) -> int:
    """How often a fault has hit the workers that train so far."""
    return sum(proxy.faults[fault] for (program, _), proxy in ours.proxies.items() if program.startswith("train"))


def downloaded(ours: Fleet) -> int:
    return sum(p.passed[Way.BACK] for (program, _), p in ours.proxies.items() if program.startswith("train"))


def waits(ours: Fleet) -> int:
    """How often workers have logged so far that they wait for a server."""
    return sum(ours.crew.log(name).read_text().count("server.unavailable") for name in ours.env)


def saved(ours: Fleet, job: str) -> list[int]:
    return [step for (step,) in ours.sql("SELECT step FROM checkpoints WHERE job_id = %s ORDER BY step", job)]


def seconds_to_settle(ours: Fleet, since: float) -> float:
    ours.settle()
    return round(time.monotonic() - since, 2)


def assert_undisturbed(ours: Fleet, jobs: list[str]) -> None:
    """Assert that the jobs succeeded in one attempt, without crash or preemption, and with the correct bytes."""
    counts = "SELECT state, attempt, crash_count, preempt_count FROM jobs WHERE id = ANY(%s)"
    assert ours.sql(counts, jobs) == [("succeeded", 1, 0, 0)] * len(jobs)
    ours.check()
    ours.check_adapters()


def objects(ours: Fleet) -> set[str]:
    """Every key of a checkpoint or an adapter."""
    client = local.s3_client(ours.s3)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=ours.s3.bucket)
    keys = {item["Key"] for page in pages for item in page.get("Contents", [])}
    return {key for key in keys if kinds({key}) <= KINDS}


def kinds(keys: set[str]) -> set[str]:
    return {key.partition("/")[0] for key in keys}


def named(ours: Fleet) -> set[str]:
    """The keys that rows name."""
    return {
        prefix + path
        for table in KINDS
        for prefix, path in ours.sql(
            f"SELECT prefix, file->>'path' FROM {table}, jsonb_array_elements(files) AS file WHERE deleted_at IS NULL"
        )
    }
