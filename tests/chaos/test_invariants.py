"""The check of chaos runs works: it finds no violation in a correct world, and finds each planted fault.

The world (rows, objects, witness lines) is built by the product's own functions on a real Postgres and S3. Each fault
is planted in a copy.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING

import psycopg
import pytest
from sqlalchemy import Engine

from deploy.local.folder import S3
from deploy.local.servers import s3_client
from shared import settings, storage
from shared.broker.queues import Queue
from shared.database import attempts, checkpoints, claims, jobs, state_machine
from shared.database.session import engine, session_scope
from shared.database.tables import Adapter, BaseModelRow, File, Job
from shared.database.tenants import ensure_tenant
from shared.schemas.requests import Desired, JobCreate, State
from shared.schemas.results import JobError, Metrics
from tests.chaos.invariants import ENDS, PAUSED, STARTED, overlaps, steps_repeated, violations
from tests.chaos.servers import Servers
from tests.results import PLAN, REPORT

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

STEPS, MAX_CRASHES = 6, 3
OOPS = JobError(code="trainer_crashed", message="the trainer was killed by SIGKILL")


@dataclass(frozen=True)
class World:
    """Everything that `violations` checks. `ids`: jobs by outcome, and the `tenant` and `result` file of `won`."""

    database_url: str
    s3: S3
    bucket: S3Client
    witness: Path
    ids: dict[str, str]

    def found(self) -> list[str]:
        accepted = [job_id for job_id in self.ids.values() if job_id.startswith("ftjob-")]
        return violations(self.database_url, self.s3, accepted=accepted, witness=self.witness, max_crashes=MAX_CRASHES)

    def sql(self, statement: str) -> None:
        """Change rows without triggers and foreign keys."""
        with psycopg.connect(self.database_url) as connection:
            connection.execute("SET session_replication_role = replica")
            assert connection.execute(statement.encode(), self.ids).rowcount, "nothing was planted"

    def key(self, where: str, path: str = "manifest.json") -> str:
        """The key of an object of job `won`: in its last checkpoint, its adapter, or its result file."""
        tenant, won = self.ids["tenant"], self.ids["won"]
        folders = {"checkpoint": f"checkpoints/{tenant}/{won}/5/6/", "adapter": f"adapters/{tenant}/{won}/"}
        return folders[where] + path if where in folders else f"files/{tenant}/{self.ids['result']}"

    def put(self, key: str, body: bytes, metadata: dict[str, str]) -> None:
        self.bucket.put_object(Bucket=self.s3.bucket, Key=key, Body=body, Metadata=metadata)

    def delete(self, key: str) -> None:
        self.bucket.delete_object(Bucket=self.s3.bucket, Key=key)

    def objects(self) -> dict[str, tuple[bytes, dict[str, str]]]:
        pages = self.bucket.get_paginator("list_objects_v2").paginate(Bucket=self.s3.bucket)
        return {item["Key"]: self._get(item["Key"]) for page in pages for item in page.get("Contents", [])}

    def _get(self, key: str) -> tuple[bytes, dict[str, str]]:
        answer = self.bucket.get_object(Bucket=self.s3.bucket, Key=key)
        with answer["Body"] as body:
            return body.read(), answer["Metadata"]


# ---------------------------------------------------------------- a correct world


def test_a_correct_world_has_no_violation(good: World) -> None:
    assert good.found() == []


def test_the_check_knows_the_messages_of_the_product() -> None:
    words = tuple(word for words in ENDS.values() for word in words)
    for move in state_machine.MOVES.values():
        assert move.message.startswith(ENDS.get(str(move.target), ())) == move.message.startswith(words)
    assert {move.target for move in state_machine.MOVES.values() if move.message.startswith(words)} == ENDS.keys()
    assert (
        state_machine.MOVES[state_machine.Reason.CLAIMED].message,
        state_machine.MOVES[state_machine.Reason.PAUSED].message,
    ) == (STARTED, PAUSED)


@pytest.mark.usefixtures("restored_bucket")
@pytest.mark.parametrize(("where", "table"), [("checkpoint", "checkpoints"), ("adapter", "adapters"), ("", "files")])
def test_deleted_objects_may_be_missing(world: World, where: str, table: str) -> None:
    world.sql(f"UPDATE {table} SET deleted_at = now()")
    world.delete(world.key(where))
    assert world.found() == []


@pytest.mark.parametrize("values", ["rung_at = now()", "not_before = now() + interval '1h'"])
def test_a_job_that_was_rung_for_or_backs_off_is_no_violation(world: World, values: str) -> None:
    world.sql(f"UPDATE jobs SET state = 'queued', {values} WHERE id = %(paused)s")
    assert not any("rung" in sentence for sentence in world.found())


def test_repeated_steps_and_overlaps_are_counted(good: World) -> None:
    assert steps_repeated(good.witness) == [1, 0]
    assert overlaps(good.witness) == 0


# ---------------------------------------------------------------- faults in rows


def job(values: str, who: str = "won") -> str:
    return f"UPDATE jobs SET {values} WHERE id = %({who})s"


def last_event(values: str) -> str:
    last = "SELECT max(seq) FROM job_events WHERE job_id = %(won)s"
    return f"UPDATE job_events SET {values} WHERE job_id = %(won)s AND seq = ({last})"


def one_more_event(message: str, who: str = "won") -> str:
    """Add an event at the job's epoch, and count it."""
    return (
        f"WITH job AS (UPDATE jobs SET event_seq = event_seq + 1 WHERE id = %({who})s RETURNING *)"
        " INSERT INTO job_events (job_id, seq, level, type, message, lease_epoch)"
        f" SELECT id, event_seq, 'info', 'message', '{message}', lease_epoch FROM job"
    )


NEWEST = "WHERE job_id = %(won)s AND step = 6"
IN_ROWS = [
    ("was accepted but does not exist", "DELETE FROM jobs WHERE id = %(cancelled)s"),
    ("2 jobs of .* have the Idempotency-Key 'k'", job("idempotency_key = 'k'", "invalid")),
    ("file-data is the result file of no job", "UPDATE files SET purpose = 'fine-tune-results' WHERE id = 'file-data'"),
    ("of no job, or of two", job("result_file = %(result)s", "invalid")),
    ("is still queued", job("state = 'queued'", "cancelled")),
    (r"is still paused \(desired: run\)", job("desired_state = 'run'", "paused")),
    ("is still leased to w", job("lease_owner = 'w', lease_expires_at = now()", "paused")),
    ("is still leased to w", job("lease_owner = 'w'")),
    ("is still leased to None", job("lease_expires_at = now()")),
    ("is queued, but was not rung for", job("state = 'queued'", "paused")),
    ("is queued, but was not rung for", job("state = 'validating_files'", "paused")),
    ("has a gap in its events", "DELETE FROM job_events WHERE job_id = %(won)s AND seq = 2"),
    ("has event_seq .*, but its last event is", job("event_seq = event_seq + 1")),
    ("has events whose epochs decrease", "UPDATE job_events SET lease_epoch = 2 WHERE job_id = %(won)s AND seq = 1"),
    ("has an event of epoch 6, but is at epoch 5", last_event("lease_epoch = 6")),
    ("started twice at one epoch", "UPDATE job_events SET lease_epoch = 2 WHERE message LIKE '%%(attempt 2)'"),
    ("is paused, but has a terminal event", one_more_event("The job was cancelled", "paused")),
    ("has 2 terminal events", one_more_event("The job was cancelled")),
    ("has 0 terminal events", last_event("message = 'x'")),
    ("has events after its terminal one: x", one_more_event("x")),
    ("is succeeded, but its terminal event says: The job failed", last_event("message = 'The job failed'")),
    ("ended at epoch 6, but its terminal event is of epoch 5", job("lease_epoch = 6")),
    ("is succeeded and has no adapter", "DELETE FROM adapters"),
    ("is failed and has an adapter", "UPDATE adapters SET job_id = %(invalid)s"),
    ("is succeeded and has no result file", job("result_file = NULL")),
    ("is succeeded and has no result file", "DELETE FROM files WHERE id = %(result)s"),
    ("is cancelled and has a result file", job("result_file = %(result)s", "cancelled")),
    ("is succeeded and has no report", job("report = NULL")),
    ("is paused and has a report", job("report = '{\"steps\": 6}'", "paused")),
    ("is failed and has no error", job("error = NULL", "poison")),
    ("is cancelled and has an error", job('error = \'{"code": "x"}\'', "dry")),
    ("has an error without code or message", job("error = error - 'code'", "poison")),
    ("has an error without code or message", job('error = error || \'{"message": ""}\'', "invalid")),
    ("has 5 attempts, but 4 were started", job("attempt = 5")),
    ("was started 4 times, but has 2 reasons", job("preempt_count = 0")),
    ("crashed 4 times; allowed: 3", job("crash_count = 4", "poison")),
    (r"is succeeded \(completed\) after 3 crashes", job("crash_count = 3")),
    (r"is failed \(invalid\) after 3 crashes", job("crash_count = 3", "invalid")),
    (r"is failed \(poison\) after 2 crashes", job("crash_count = 2", "poison")),
    ("has a checkpoint at elsewhere/, expected", f"UPDATE checkpoints SET prefix = 'elsewhere/' {NEWEST}"),
    ("has a checkpoint of epoch 7, but is at epoch 5", f"UPDATE checkpoints SET lease_epoch = 7 {NEWEST}"),
    (r"out of order at epoch 5: \[6, 5\]", f"UPDATE checkpoints SET created_at = '2000-01-01' {NEWEST}"),
    (r"has metrics of wrong steps: \[3\] of 6", "DELETE FROM job_metrics WHERE step = 3"),
    (r"has metrics of wrong steps: \[6, 7\] of 6", "UPDATE job_metrics SET step = 7 WHERE step = 6"),
    (r"\(adapter\) is at elsewhere/, expected", "UPDATE adapters SET prefix = 'elsewhere/'"),
    (r"\(adapter\) has a manifest whose files differ", "UPDATE adapters SET files = files - 0"),
    ("has an adapter without a proof", "UPDATE adapters SET proof = NULL"),
    (r"\(adapter\) has no manifest", "UPDATE adapters SET files = files - -1"),
    (r"\(checkpoint 6\) has a manifest whose files differ", f"UPDATE checkpoints SET files = files - 0 {NEWEST}"),
    (r"\(checkpoint 6\) has no manifest", f"UPDATE checkpoints SET files = files - -1 {NEWEST}"),
]


@pytest.mark.parametrize(("sentence", "planted"), IN_ROWS)
def test_a_fault_in_rows_is_found(world: World, sentence: str, planted: str) -> None:
    world.sql(planted)
    assert_found(sentence, world)


# ---------------------------------------------------------------- faults in the bucket


@pytest.mark.usefixtures("restored_bucket")
@pytest.mark.parametrize("where", ["checkpoint", "adapter", "result file"])
@pytest.mark.parametrize(
    ("sentence", "body"),
    [("lacks", None), ("has bytes in .* that differ", b"\0" * 64), ("has 7 bytes in .*, expected 64", b"shorter")],
)
def test_a_fault_in_objects_is_found(world: World, where: str, sentence: str, body: bytes | None) -> None:
    key = world.key(where, "adapter_model.safetensors")
    if body is None:
        world.delete(key)
    else:
        world.put(key, body, {"lease-epoch": "5"})
    assert_found(rf"\({where}.*\) {sentence}", world)


@pytest.mark.usefixtures("restored_bucket")
@pytest.mark.parametrize("where", ["checkpoint", "adapter"])
def test_a_stray_object_is_found(world: World, where: str) -> None:
    world.put(world.key(where, "left.over"), b"", {})
    assert_found(rf"\({where}.*\) has objects that no row names: \['.*left.over'\]", world)


@pytest.mark.usefixtures("restored_bucket")
@pytest.mark.parametrize("where", ["checkpoint", "adapter"])
def test_an_invalid_manifest_is_found(world: World, where: str) -> None:
    world.put(world.key(where), b"{}", {"lease-epoch": "5"})
    assert_found(rf"\({where}.*\) has a manifest whose files differ", world)


@pytest.mark.usefixtures("restored_bucket")
@pytest.mark.parametrize("metadata", [{"lease-epoch": "4"}, {}])
def test_an_adapter_of_another_epoch_is_found(world: World, metadata: dict[str, str]) -> None:
    world.put(world.key("adapter", "adapter_config.json"), b"{}", metadata)
    assert_found(r"\(adapter\) has 'adapter_config.json' of epoch (4|None), expected 5", world)


# ---------------------------------------------------------------- faults in witnesses


IN_WITNESSES = [
    ("had overlapping trainers: step 4 of epoch 2 came after epoch 5 began", "2 4 10 9.0\n"),
    (r"had several trainers at epoch 5: \[10, 12\]", "5 7 10 9.0\n"),
    (r"did not train step by step at epoch 5: \[5, 6, 6\]", "5 6 12 9.0\n"),
    (r"did not train step by step at epoch 5: \[5, 6, 8\]", "5 8 12 9.0\n"),
    ("resumed at step 8 at epoch 6, but only 6 had been trained", "6 8 13 9.0\n"),
    ("resumed at step 4 at epoch 6, but had no checkpoint there", "6 4 13 9.0\n"),
    ("was trained at epoch 6, but is at epoch 5", "6 1 13 9.0\n"),
    ("was trained for 7 steps, but reports 6", "5 7 12 9.0\n"),
]


@pytest.mark.parametrize(("sentence", "line"), IN_WITNESSES)
def test_a_fault_in_witness_lines_is_found(world: World, sentence: str, line: str) -> None:
    with (world.witness / f"{world.ids['won']}.log").open("a") as log:
        log.write(line)
    assert_found(sentence, world)
    assert overlaps(world.witness) == ("overlapping trainers" in sentence)


def test_witness_lines_of_an_unknown_job_are_found(world: World) -> None:
    (world.witness / "ftjob-x.log").write_text("1 1 10 9.0\n")
    assert_found("ftjob-x was trained but does not exist", world)


def assert_found(sentence: str, world: World) -> None:
    found = world.found()
    assert any(re.search(sentence, one) for one in found), found


# ---------------------------------------------------------------- building the world


@pytest.fixture(scope="module")
def good(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A correct world with one job of every outcome. Tests must not change its rows."""
    (url, _, s3), folder = servers.allocate(), tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in s3.model_dump().items():
            patch.setenv(f"MILLINER_S3_{variable.upper()}", value)
        settings.get_settings.cache_clear()
        storage.client.cache_clear()
        ids = history(engine(url), folder)
    settings.get_settings.cache_clear()
    storage.client.cache_clear()
    engine(url).dispose()
    for statement in ("ALTER TABLE jobs DROP CONSTRAINT ck_jobs_lease_whole", "DROP INDEX uq_jobs_idempotency"):
        administer(url, statement)  # otherwise two of the faults could not be planted
    bucket = s3_client(s3)
    yield World(url, s3, bucket, folder / "witness", ids)
    bucket.close()


@pytest.fixture
def world(servers: Servers, good: World, tmp_path: Path) -> Iterator[World]:
    """A copy of the correct world to plant a fault in. The bucket is not copied: use `restored_bucket` too."""
    maintenance, name = servers.database_url("postgres"), f"planted_{secrets.token_hex(4)}"
    administer(maintenance, f"CREATE DATABASE {name} TEMPLATE {good.database_url.rsplit('/', 1)[1]}")
    witness = copytree(good.witness, tmp_path / "witness")
    yield replace(good, database_url=servers.database_url(name), witness=witness)
    administer(maintenance, f"DROP DATABASE {name}")


@pytest.fixture
def restored_bucket(good: World) -> Iterator[None]:
    """Restore the bucket's objects after the test."""
    before = good.objects()
    yield
    after = good.objects()
    for key in after.keys() - before.keys():
        good.delete(key)
    for key, (body, metadata) in before.items():
        if after.get(key) != (body, metadata):
            good.put(key, body, metadata)


def administer(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def history(bind: Engine, folder: Path) -> dict[str, str]:
    """Create a tenant's jobs, one per outcome; `won` crashes, is preempted and is paused before it succeeds."""
    with session_scope(bind) as session:
        tenant = ensure_tenant(session, "acme")
        data = File(
            id="file-data", tenant_id=tenant.id, filename="a.jsonl", purpose="fine-tune", status="processed", bytes=1,
            sha256="0" * 64, key="files/data",
        )  # fmt: skip
        base = BaseModelRow(
            name="tiny", public_id="org/tiny", revision="1", digest="d", prefix="models/d/", files=[], config={},
            parameters=1, bytes=1,
        )  # fmt: skip
        session.add_all([data, base])
    ids = {"tenant": tenant.id}
    for outcome in ("won", "invalid", "poison", "cancelled", "dry", "paused"):
        body = JobCreate(model="tiny", training_file="file-data", dry_run=outcome == "dry")
        with session_scope(bind) as session:
            key = {"won": "k"}.get(outcome)
            ids[outcome] = jobs.submit(session, tenant.id, body, idempotency_key=key)[0].id
        if outcome == "cancelled":
            ask(bind, ids, outcome, Desired.CANCEL)
            continue
        claim(bind, Queue.PREPARE)
        with session_scope(bind) as session:
            if outcome == "invalid":
                assert attempts.fail(session, ids[outcome], 1, OOPS)
            else:
                assert attempts.finish_planning(session, ids[outcome], 1, PLAN)
        if outcome == "won":
            ids["result"] = win(bind, ids, folder)
        elif outcome == "poison":
            for _ in range(MAX_CRASHES):
                crash(bind, claim(bind, Queue.TRAIN))
        elif outcome == "paused":
            ask(bind, ids, outcome, Desired.PAUSE)
    return ids


def win(bind: Engine, ids: dict[str, str], folder: Path) -> str:
    """Train six steps in four attempts; returns the id of the result file."""
    won, weights = ids["won"], folder / "files"
    weights.mkdir()
    (folder / "witness").mkdir()
    (weights / "adapter_model.safetensors").write_bytes(bytes(range(64)))
    (folder / "witness" / f"{won}.log").write_text(
        "2 1 10 1.0\n2 2 10 2.0\n2 3 10 3.0\n3 3 11 4.0\n3 4 11 5.0\n5 5 12 6.0\n5 6 12 7.0\n"
    )
    first = claim(bind, Queue.TRAIN)
    train(bind, first, [1, 2, 3])
    checkpoint(bind, first, 2, weights)
    crash(bind, first)
    second = claim(bind, Queue.TRAIN)
    train(bind, second, [3, 4])
    checkpoint(bind, second, 4, weights)
    with session_scope(bind) as session:
        assert attempts.release(session, won, second.lease_epoch)
    third = claim(bind, Queue.TRAIN)
    ask(bind, ids, "won", Desired.PAUSE)
    with session_scope(bind) as session:
        assert attempts.release(session, won, third.lease_epoch)
    ask(bind, ids, "won", Desired.RUN)
    last = claim(bind, Queue.TRAIN)
    train(bind, last, [5, 6])
    for step in (5, 6):
        checkpoint(bind, last, step, weights)
    with session_scope(bind) as session:
        dropped = checkpoints.drop_checkpoints(session, won, last.lease_epoch, keep=3)
    assert [storage.delete_prefix(prefix) for prefix in dropped] == [2]
    return publish(bind, last, weights)


def publish(bind: Engine, last: Job, weights: Path) -> str:
    prefix, result, table = f"adapters/{last.tenant_id}/{last.id}/", "file-result", bytes(range(64))
    (weights / "adapter_config.json").write_text("{}")
    files = storage.put_folder(prefix, weights, epoch=last.lease_epoch)
    key = f"files/{last.tenant_id}/{result}"
    storage.put_bytes(key, table)
    adapter = Adapter(
        job_id=last.id, tenant_id=last.tenant_id, name="ft:tiny", base_model="tiny", prefix=prefix, files=files,
        bytes=sum(file["bytes"] for file in files), proof={"tensors": 1},
    )  # fmt: skip
    file = File(
        id=result, tenant_id=last.tenant_id, filename="step_metrics.csv", purpose="fine-tune-results",
        status="processed", bytes=len(table), sha256=storage.sha256_of_bytes(table), key=key,
    )  # fmt: skip
    report = REPORT.model_copy(update={"steps": STEPS})
    with session_scope(bind) as session:
        done = attempts.succeed(session, last.id, last.lease_epoch, report=report, adapter=adapter, result_file=file)
        assert done is State.SUCCEEDED
    return result


def claim(bind: Engine, queue: Queue) -> Job:
    with session_scope(bind) as session:
        claimed = claims.claim(session, queue, owner="worker", lease_seconds=60)
    assert claimed is not None
    return claimed


def ask(bind: Engine, ids: dict[str, str], outcome: str, desired: Desired) -> None:
    with session_scope(bind) as session:
        jobs.set_desired_state(session, ids["tenant"], ids[outcome], desired)


def train(bind: Engine, leased: Job, steps: list[int]) -> None:
    batch = [Metrics(step=step, total_steps=STEPS, train_loss=1.0) for step in steps]
    with session_scope(bind) as session:
        assert attempts.record_metrics(session, leased.id, leased.lease_epoch, batch, {})


def checkpoint(bind: Engine, leased: Job, step: int, weights: Path) -> None:
    prefix = f"checkpoints/{leased.tenant_id}/{leased.id}/{leased.lease_epoch}/{step}/"
    files, metrics = storage.put_folder(prefix, weights), Metrics(step=step, total_steps=STEPS, train_loss=1.0)
    with session_scope(bind) as session:
        assert attempts.add_checkpoint(
            session, leased.id, leased.lease_epoch, step=step, prefix=prefix, files=files, metrics=metrics
        )


def crash(bind: Engine, leased: Job) -> None:
    with session_scope(bind) as session:
        assert attempts.crash(session, leased.id, leased.lease_epoch, OOPS, backoff=0.0, max_crashes=MAX_CRASHES)
