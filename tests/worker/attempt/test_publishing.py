"""Between training and "succeeded": verification, exports, and what is downloaded from the bucket.

Attempts in this process, with a real bucket and database. The trainer is a small script, so that its proof can end in
every way; real proofs are tested in tests/worker/trainer/artifact/test_verify.py.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from deploy.local.folder import Folder
from shared import settings, storage
from shared.broker.queues import Queue
from shared.database import jobs, state_machine
from shared.database.session import session_scope
from shared.database.tables import Adapter, Job, JobEvent
from shared.linux import boot_time
from shared.schemas.manifest import MANIFEST, SIGNATURE, Manifest
from shared.schemas.requests import Desired, State
from shared.schemas.results import Export
from shared.signing import is_signed_by
from tests.results import PROOF, REPORT
from worker.attempt.lease import Lease
from worker.attempt.publishing import Damaged, fetch_back
from worker.attempt.runner import run_next
from worker.attempt.waiting import Retry

TRAINER = f"""
    import json, os, pathlib, sys, time

    def send(event, **fields):
        print(json.dumps({{"event": event, "job": command["job"]}} | fields), flush=True)

    for line in sys.stdin:
        command = json.loads(line)
        if command["op"] == "train":
            pathlib.Path(sys.argv[2] + ".pid").write_text(str(os.getpid()))
            folder = pathlib.Path(command["work_dir"], "adapter")
            folder.mkdir()
            (folder / "adapter_model.safetensors").write_bytes(b"weights")
            send("done", path=str(folder), report={REPORT.model_dump(mode="json")!r})
        elif command["op"] == "verify":
            pathlib.Path(sys.argv[2]).touch()
            if pathlib.Path("/proc", pathlib.Path(sys.argv[2] + ".pid").read_text()).exists():
                sys.exit("the trainer is still running")
            if pathlib.Path(command["adapter_dir"], "adapter_model.safetensors").read_bytes() != b"weights":
                sys.exit("these are other weights")
            if sys.argv[1] == "hang":
                time.sleep(600)
            elif sys.argv[1] == "die":
                sys.exit(3)
            elif sys.argv[1] == "pass":
                send("verified", proof={PROOF!r}, versions={{"torch": "1"}})
            else:
                retryable = sys.argv[1] == "doubt"
                send("failed", code="adapter_" + sys.argv[1], message="the proof failed", retryable=retryable)
        elif command["op"] == "export":
            pathlib.Path(sys.argv[2] + "-" + command["name"]).touch()
            exports = pathlib.Path(command["work_dir"], "exports")
            if command["name"] == "merged":
                folder = exports / "merged"
                folder.mkdir(parents=True)
                (folder / "model.safetensors").write_bytes(b"merged")
                export = {{"name": "merged", "bytes": 6, "loss": 1, "difference": 0.5}}
                send("exported", path=str(folder), export=export)
            elif command["name"] == "merged_dequantized":
                (exports / ".partial-0").mkdir(parents=True)
                sys.exit(3)
            elif command["name"] == "gguf_adapter":
                message = "files were left" if exports.exists() else "the losses differ"
                send("failed", code="export_unlike", message=message, retryable=False)
            else:
                time.sleep(600)
"""

Attempt = Callable[..., Job]


@pytest.fixture
def verifying(tmp_path: Path) -> Path:
    """A file that exists once the proof has started."""
    return tmp_path / "verifying"


@pytest.fixture
def attempt(job: str, tmp_path: Path, verifying: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """Run one attempt at the queued job, whose proof ends as `how` says, and return the job's row."""
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(TRAINER))

    def once(how: str, *, draining: Callable[[], bool] = lambda: False, **values: str) -> Job:
        values.setdefault("WARM_SECONDS", "0")  # each test has a trainer of its own
        values["TRAINER_COMMAND"] = f"{sys.executable} -S -E {script} {how} {verifying}"
        for name, value in values.items():
            monkeypatch.setenv(f"MILLINER_{name}", value)
        settings.get_settings.cache_clear()
        run_next(Queue.TRAIN, owner="here", slot=0, draining=draining)
        return row(job)

    return once


def test_a_verified_adapter_has_a_proof_and_a_signed_manifest(attempt: Attempt, tmp_path: Path) -> None:
    keys = Folder(tmp_path / "keys").create()
    done = attempt("pass", SIGNING_KEY_FILE=str(keys.signing_key()))
    assert done.state == State.SUCCEEDED, done.error
    adapter = published(done)
    assert adapter is not None
    assert adapter.proof == PROOF
    assert [file["path"] for file in adapter.files] == ["adapter_model.safetensors", SIGNATURE, MANIFEST]
    text = b"".join(storage.read(adapter.prefix + MANIFEST))
    signature = b"".join(storage.read(adapter.prefix + SIGNATURE))
    manifest = Manifest.model_validate_json(text)
    assert manifest.signed_by == adapter.signed_by
    assert is_signed_by(adapter.signed_by or "", signature, text)
    assert (manifest.job, manifest.model, manifest.base.public_id) == (done.id, adapter.name, "org/m")
    assert manifest.versions == {"torch": "1"}
    assert [file.path for file in manifest.files] == ["adapter_model.safetensors"]


def test_without_a_key_the_manifest_is_unsigned(attempt: Attempt) -> None:
    done = attempt("pass")
    adapter = published(done)
    assert adapter is not None
    assert adapter.signed_by is None
    assert [file["path"] for file in adapter.files] == ["adapter_model.safetensors", MANIFEST]
    assert json.loads(b"".join(storage.read(adapter.prefix + MANIFEST)))["signed_by"] is None


def test_a_failed_proof_fails_the_job_with_its_code(attempt: Attempt) -> None:
    done = attempt("no_effect")
    assert done.error is not None
    assert (done.state, done.error["code"], done.crash_count) == (State.FAILED, "adapter_no_effect", 0)
    assert published(done) is None


@pytest.mark.parametrize(("how", "code"), [("doubt", "adapter_doubt"), ("die", "trainer_crashed")])
def test_a_proof_that_may_succeed_next_time_counts_as_a_crash(attempt: Attempt, how: str, code: str) -> None:
    first = attempt(how, MAX_CRASHES="2")
    assert (first.state, first.reason, first.crash_count) == (State.QUEUED, state_machine.Reason.CRASHED, 1)
    assert published(first) is None
    second = attempt(how)
    assert second.error is not None
    assert (second.state, second.reason, second.error["code"]) == (State.FAILED, state_machine.Reason.POISON, code)


def test_a_proof_without_progress_is_stuck(attempt: Attempt) -> None:
    done = attempt("hang", STUCK_SECONDS="0.3", MAX_CRASHES="1")
    assert done.error is not None
    assert (done.state, done.error["code"]) == (State.FAILED, "trainer_stuck")


def test_a_drain_during_the_proof_gives_the_job_back(attempt: Attempt, verifying: Path) -> None:
    done = attempt("hang", draining=verifying.exists)
    assert (done.state, done.reason, done.crash_count) == (State.QUEUED, state_machine.Reason.PREEMPTED, 0)
    assert published(done) is None


@pytest.mark.parametrize(
    ("desired", "state"), [(Desired.PAUSE, State.PAUSED), (Desired.CANCEL, State.CANCELLED)], ids=["pause", "cancel"]
)
def test_a_pause_or_cancel_during_the_proof_ends_the_attempt(
    attempt: Attempt, job: str, verifying: Path, desired: Desired, state: State
) -> None:
    def request_during_the_proof() -> bool:
        if verifying.exists() and row(job).desired_state == Desired.RUN:
            with session_scope() as session:
                jobs.set_desired_state(session, row(job).tenant_id, job, desired)
        return False

    done = attempt("hang", draining=request_during_the_proof, HEARTBEAT_SECONDS="0.1")
    assert (done.state, done.crash_count) == (state, 0)
    assert published(done) is None


# ---------------------------------------------------------------- exports


def test_a_failed_export_does_not_affect_the_adapter_or_other_exports(attempt: Attempt, job: str) -> None:
    request_exports(job, "merged", "merged_dequantized", "gguf_adapter")
    stray = f"adapters/{row(job).tenant_id}/{job}/exports/gguf_adapter/adapter.gguf"
    storage.put_bytes(stray, b"of an attempt that died", epoch=0)
    done = attempt("pass")
    assert (done.state, done.crash_count) == (State.SUCCEEDED, 0), done.error
    adapter = published(done)
    assert adapter is not None
    merged, dead, unlike = (Export.model_validate(export) for export in adapter.exports)
    assert (merged.path, merged.difference, merged.error) == ("exports/merged/", 0.5, None)
    assert (dead.path, dead.error) == (None, "the trainer ended with exit code 3")
    assert (unlike.path, unlike.error) == (None, "the losses differ")
    paths = ["adapter_model.safetensors", "exports/merged/model.safetensors"]
    assert [file["path"] for file in adapter.files] == [*paths, MANIFEST]
    manifest = Manifest.model_validate_json(b"".join(storage.read(adapter.prefix + MANIFEST)))
    assert [file.path for file in manifest.files] == paths
    assert manifest.exports == [merged, dead, unlike]
    assert b"".join(storage.read(adapter.prefix + paths[1])) == b"merged"
    assert not list(storage.listing(stray))
    messages = events(job)
    assert "exported merged: reloaded, loss 1.0000, +0.5000 compared with the adapter" in messages
    assert "export gguf_adapter failed: the losses differ; the adapter is not affected" in messages


@pytest.mark.parametrize(
    ("desired", "state"), [(None, State.QUEUED), (Desired.CANCEL, State.CANCELLED)], ids=["drain", "cancel"]
)
def test_a_drain_or_cancel_during_an_export_ends_the_attempt(
    attempt: Attempt, job: str, verifying: Path, desired: Desired | None, state: State
) -> None:
    request_exports(job, "gguf_merged")
    started = verifying.with_name("verifying-gguf_merged")

    def draining() -> bool:
        if not started.exists():
            return False
        if desired is not None and row(job).desired_state == Desired.RUN:
            with session_scope() as session:
                jobs.set_desired_state(session, row(job).tenant_id, job, desired)
        return desired is None

    done = attempt("pass", draining=draining, HEARTBEAT_SECONDS="0.1")
    assert (done.state, done.crash_count) == (state, 0)
    assert published(done) is None


def test_an_export_without_progress_is_abandoned(attempt: Attempt, job: str) -> None:
    request_exports(job, "gguf_merged")
    done = attempt("pass", STUCK_SECONDS="0.3")
    adapter = published(done)
    assert adapter is not None
    assert "made no progress" in adapter.exports[0]["error"]


def request_exports(job: str, *names: str) -> None:
    with session_scope() as session:
        found = session.get_one(Job, job)
        found.request = found.request | {"trainer": {"exports": list(names)}}


def events(job: str) -> list[str]:
    with session_scope() as session:
        return list(session.scalars(select(JobEvent.message).where(JobEvent.job_id == job)).all())


# ---------------------------------------------------------------- downloading what was uploaded


@pytest.mark.parametrize("stored", [b"other bytes", None], ids=["changed", "lost"])
def test_a_file_damaged_in_the_bucket_is_uploaded_again(as_worker: None, tmp_path: Path, stored: bytes | None) -> None:
    prefix, files, source = uploaded(tmp_path)
    storage.delete(prefix + "b")
    if stored is not None:
        storage.put_bytes(prefix + "b", stored, epoch=1)
    fetch_back(prefix, files, source, tmp_path / "back", epoch=1, retry=retry())
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {"a": b"one", "b": b"two"}
    assert b"".join(storage.read(prefix + "b")) == b"two"


def test_a_file_damaged_on_the_disk_too_is_an_error(as_worker: None, tmp_path: Path) -> None:
    prefix, files, source = uploaded(tmp_path)
    storage.put_bytes(prefix + "b", b"other bytes", epoch=1)
    (source / "b").write_bytes(b"tow")
    with pytest.raises(Damaged, match="b has changed on the disk"):
        fetch_back(prefix, files, source, tmp_path / "back", epoch=1, retry=retry())


def uploaded(tmp_path: Path) -> tuple[str, list[storage.Entry], Path]:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"one")
    (source / "b").write_bytes(b"two")
    prefix = f"adapters/{tmp_path.name}/"
    storage.delete_prefix(prefix)
    return prefix, storage.put_files(prefix, source, epoch=1), source


def retry() -> Retry:
    lease = Lease("ftjob-none", 1, boot_time())
    return Retry(lease, draining=lambda: False, warn=print, honours_pause=True, stop_seconds=1)


def row(job: str) -> Job:
    with session_scope() as session:
        return session.get_one(Job, job)


def published(job: Job) -> Adapter | None:
    with session_scope() as session:
        return session.scalar(select(Adapter).where(Adapter.job_id == job.id))
