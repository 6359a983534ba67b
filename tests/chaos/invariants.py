"""Check rows, objects and witness lines after a chaos run: every run ends with this check.

Owns: a second statement of the durability promise, in plain SQL and S3. Must not share code with the product, so that
it does not repeat the product's mistakes: it imports no table, state machine or storage of shared/. Must not write.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import psycopg
from botocore.config import Config
from botocore.exceptions import ClientError
from psycopg.rows import dict_row

from deploy.local.folder import S3

Row = dict[str, Any]

STARTED = "Fine-tuning job started"
PAUSED = "The job was paused"
ENDS = {
    "succeeded": ("The job has successfully completed",),
    "failed": ("The job failed",),
    "cancelled": ("The job was cancelled", "Dry run: planned, not trained"),
}
READERS = 16


class Line(NamedTuple):
    """The line that a trainer wrote before a step. `boottime`: seconds on CLOCK_BOOTTIME, which counts during sleep."""

    epoch: int
    step: int
    pid: int
    boottime: float


class Object(NamedTuple):
    size: int
    sha256: str
    epoch: str | None
    body: bytes | None  # only for a manifest


@dataclass(frozen=True)
class History:
    """One job and its rows: events ordered by `seq`, checkpoints by `created_at`; `metrics` are step numbers."""

    job: Row
    events: list[Row]
    checkpoints: list[Row]
    adapter: Row | None
    result: Row | None
    metrics: list[int]


def violations(
    database_url: str, s3: S3, *, accepted: Collection[str], witness: Path | None, max_crashes: int
) -> list[str]:
    """Every violation as a sentence; empty if there is none. The run must be over.

    `accepted` are the ids that clients got, `witness` is the folder of the stub trainers' `<job id>.log`.
    """
    with psycopg.connect(database_url) as connection:
        histories, spare = _read(connection)
    found = [f"{job_id} was accepted but does not exist" for job_id in sorted(set(accepted) - set(histories))]
    found += _one_job_a_key(histories.values())
    found += [f"{file_id} is the result file of no job, or of two" for file_id in spare]
    for job_id, one in histories.items():
        checks = (
            _over(one),
            _events(one),
            _ending(one),
            _attempts(one, max_crashes),
            _checkpoints(one),
            _metrics(one),
        )
        found += [f"{job_id} {sentence}" for sentence in itertools.chain(*checks)]
    found += _objects(s3, histories)
    if witness is not None:
        for path in _logs(witness):
            if path.stem in histories:
                found += [f"{path.stem} {sentence}" for sentence in _witnessed(histories[path.stem], path)]
            else:
                found.append(f"{path.stem} was trained but does not exist")
    return found


def steps_repeated(witness: Path) -> list[int]:
    """For every change of trainer of any job: how many steps were trained again."""
    repeated = []
    for path in _logs(witness):
        spans = [(lines[0].step, lines[-1].step) for lines in _by_epoch(_lines(path))]
        repeated += [last - first + 1 for (_, last), (first, _) in itertools.pairwise(spans)]
    return repeated


def overlaps(witness: Path) -> int:
    """How many steps the trainer of an older epoch began after one of a newer epoch had begun."""
    return sum(later.epoch < epoch for path in _logs(witness) for epoch, later in _with_newest(_lines(path)))


# ---------------------------------------------------------------- rows


def _read(connection: psycopg.Connection[Any]) -> tuple[dict[str, History], list[str]]:
    """Read every job by id, and the result files that do not belong to exactly one job."""

    def rows(query: str) -> list[Row]:
        with connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query).fetchall()

    def by_job(query: str) -> defaultdict[str, list[Row]]:
        grouped = defaultdict(list)
        for row in rows(query):
            grouped[row["job_id"]].append(row)
        return grouped

    events = by_job("SELECT * FROM job_events ORDER BY job_id, seq")
    checkpoints = by_job("SELECT * FROM checkpoints ORDER BY job_id, created_at")
    metrics = by_job("SELECT job_id, step FROM job_metrics ORDER BY job_id, step")
    adapters = {row["job_id"]: row for row in rows("SELECT * FROM adapters")}
    results = {row["id"]: row for row in rows("SELECT * FROM files WHERE purpose = 'fine-tune-results'")}
    jobs = rows("SELECT *, not_before < clock_timestamp() AS due FROM jobs ORDER BY created_at")
    histories = {
        job["id"]: History(
            job,
            events[job["id"]],
            checkpoints[job["id"]],
            adapters.get(job["id"]),
            results.get(job["result_file"]),
            [row["step"] for row in metrics[job["id"]]],
        )
        for job in jobs
    }
    owners = Counter(job["result_file"] for job in jobs)
    return histories, [file_id for file_id in sorted(results) if owners[file_id] != 1]


def _one_job_a_key(histories: Iterable[History]) -> Iterator[str]:
    keys = Counter(
        (one.job["tenant_id"], one.job["idempotency_key"]) for one in histories if one.job["idempotency_key"]
    )
    for (tenant, key), count in keys.items():
        if count > 1:
            yield f"{count} jobs of {tenant} have the Idempotency-Key {key!r}"


def _over(one: History) -> Iterator[str]:
    job = one.job
    paused = job["state"] == "paused" and job["desired_state"] == "pause"
    if job["state"] not in ENDS and not paused:
        yield f"is still {job['state']} (desired: {job['desired_state']})"
    if job["lease_owner"] is not None or job["lease_expires_at"] is not None:
        yield f"is still leased to {job['lease_owner']} until {job['lease_expires_at']}"
    if job["state"] in {"queued", "validating_files"} and job["due"] and job["rung_at"] is None:
        yield "is queued, but was not rung for"


def _events(one: History) -> Iterator[str]:
    job, events = one.job, one.events
    seqs, epochs = [event["seq"] for event in events], [event["lease_epoch"] for event in events]
    if seqs != list(range(1, len(seqs) + 1)):
        yield f"has a gap in its events: {seqs}"
    if max(seqs, default=0) != job["event_seq"]:
        yield f"has event_seq {job['event_seq']}, but its last event is {max(seqs, default=0)}"
    if epochs != sorted(epochs):
        yield f"has events whose epochs decrease: {epochs}"
    if max(epochs, default=0) > job["lease_epoch"]:
        yield f"has an event of epoch {max(epochs)}, but is at epoch {job['lease_epoch']}"
    started = [event["lease_epoch"] for event in events if _says(event, STARTED)]
    if len(started) != len(set(started)):
        yield f"was started twice at one epoch: {started}"
    ends = [event for event in events if _says(event, *itertools.chain(*ENDS.values()))]
    if job["state"] not in ENDS:
        if ends:
            yield f"is {job['state']}, but has a terminal event: {ends[0]['message']}"
    elif len(ends) != 1:
        yield f"has {len(ends)} terminal events"
    elif ends[0] is not events[-1]:
        yield f"has events after its terminal one: {events[-1]['message']}"
    elif not _says(ends[0], *ENDS[job["state"]]):
        yield f"is {job['state']}, but its terminal event says: {ends[0]['message']}"
    elif ends[0]["lease_epoch"] != job["lease_epoch"]:
        yield f"ended at epoch {job['lease_epoch']}, but its terminal event is of epoch {ends[0]['lease_epoch']}"


def _says(event: Row, *beginnings: str) -> bool:
    message: str = event["message"]
    return event["type"] == "message" and message.startswith(beginnings)


def _ending(one: History) -> Iterator[str]:
    job, succeeded, failed = one.job, one.job["state"] == "succeeded", one.job["state"] == "failed"
    if (one.adapter is not None) != succeeded:
        yield f"is {job['state']} and has {'an' if one.adapter else 'no'} adapter"
    if one.adapter is not None and not one.adapter["proof"]:
        yield "has an adapter without a proof"
    if (one.result is not None) != succeeded:
        yield f"is {job['state']} and has {'a' if one.result else 'no'} result file"
    if (job["report"] is not None) != succeeded:
        yield f"is {job['state']} and has {'a' if job['report'] else 'no'} report"
    if (job["error"] is not None) != failed:
        yield f"is {job['state']} and has {'an' if job['error'] else 'no'} error"
    if failed and job["error"] and not (job["error"].get("code") and job["error"].get("message")):
        yield f"has an error without code or message: {job['error']}"


def _attempts(one: History, max_crashes: int) -> Iterator[str]:
    """Check that every start except the last was ended by something that is counted.

    There may be more counts than starts: a crash or preemption during preparation is counted without a start. A lease
    that ended by a cancel was the last one.
    """
    job, crashes = one.job, one.job["crash_count"]
    started = sum(_says(event, STARTED) for event in one.events)
    pauses = sum(_says(event, PAUSED) for event in one.events)
    if job["attempt"] != started:
        yield f"has {job['attempt']} attempts, but {started} were started"
    counted = crashes + job["preempt_count"] + job["fallback_level"] + pauses
    if job["attempt"] > counted + 1:
        yield f"was started {job['attempt']} times, but has {counted} reasons for a restart"
    if crashes > max_crashes:
        yield f"crashed {crashes} times; allowed: {max_crashes}"
    elif (crashes == max_crashes) != (job["state"] == "failed" and job["reason"] == "poison"):
        yield f"is {job['state']} ({job['reason']}) after {crashes} crashes; poison: {max_crashes}"


def _checkpoints(one: History) -> Iterator[str]:
    job, live = one.job, [row for row in one.checkpoints if row["deleted_at"] is None]
    steps = defaultdict(list)
    for row in live:
        steps[row["lease_epoch"]].append(row["step"])
        expected = f"checkpoints/{job['tenant_id']}/{job['id']}/{row['lease_epoch']}/{row['step']}/"
        if row["prefix"] != expected:
            yield f"has a checkpoint at {row['prefix']}, expected {expected}"
        if row["lease_epoch"] > job["lease_epoch"]:
            yield f"has a checkpoint of epoch {row['lease_epoch']}, but is at epoch {job['lease_epoch']}"
    for epoch, saved in steps.items():
        if saved != sorted(saved):
            yield f"has checkpoints out of order at epoch {epoch}: {saved}"


def _metrics(one: History) -> Iterator[str]:
    if one.job["state"] == "succeeded" and one.job["report"]:
        total = one.job["report"]["steps"]
        if one.metrics != list(range(1, total + 1)):
            yield f"has metrics of wrong steps: {sorted(set(range(1, total + 1)) ^ set(one.metrics))} of {total}"


# ---------------------------------------------------------------- objects


class Folder(NamedTuple):
    """The files that a row lists under a prefix; `epoch` is None if the objects' metadata has no epoch."""

    whose: str
    prefix: str
    files: list[Row]
    epoch: int | None


def _objects(s3: S3, histories: dict[str, History]) -> Iterator[str]:
    folders: list[Folder] = []
    for job_id, one in histories.items():
        for row in one.checkpoints:
            if row["deleted_at"] is None:
                folders.append(Folder(f"{job_id} (checkpoint {row['step']})", row["prefix"], row["files"], None))
        if one.adapter is not None and one.adapter["deleted_at"] is None:
            whose, epoch = f"{job_id} (adapter)", one.job["lease_epoch"]
            expected = f"adapters/{one.job['tenant_id']}/{job_id}/"
            if one.adapter["prefix"] != expected:
                yield f"{whose} is at {one.adapter['prefix']}, expected {expected}"
            folders.append(Folder(whose, one.adapter["prefix"], one.adapter["files"], epoch))
        if one.result is not None and one.result["deleted_at"] is None:
            file = {"path": "", "bytes": one.result["bytes"], "sha256": one.result["sha256"]}
            folders.append(Folder(f"{job_id} (result file)", one.result["key"], [file], None))
    bucket = Bucket(s3)
    try:
        bucket.fetch(folder.prefix + file["path"] for folder in folders for file in folder.files)
        for folder in folders:
            yield from (f"{folder.whose} {sentence}" for sentence in _folder(bucket, folder))
    finally:
        bucket.close()


def _folder(bucket: Bucket, folder: Folder) -> Iterator[str]:
    for file in folder.files:
        path, there = file["path"], bucket.objects.get(folder.prefix + file["path"])
        if there is None:
            yield f"lacks {path!r}"
            continue
        if there.size != file["bytes"]:
            yield f"has {there.size} bytes in {path!r}, expected {file['bytes']}"
        elif there.sha256 != file["sha256"]:
            yield f"has bytes in {path!r} that differ from its row's hash"
        if folder.epoch is not None and there.epoch != str(folder.epoch):
            yield f"has {path!r} of epoch {there.epoch}, expected {folder.epoch}"
    if not folder.prefix.endswith("/"):
        return
    files = {file["path"]: file for file in folder.files}
    strays = bucket.keys(folder.prefix) - {folder.prefix + path for path in files}
    if strays:
        yield f"has objects that no row names: {sorted(strays)}"
    files.pop("manifest.json.sig", None)
    manifest = bucket.objects.get(folder.prefix + "manifest.json")
    if files.pop("manifest.json", None) is None:
        yield "has no manifest"
    elif manifest is not None and _listed(manifest.body) != files:
        yield "has a manifest whose files differ from its row's"


def _listed(manifest: bytes | None) -> dict[str, Row] | None:
    try:
        return {file["path"]: file for file in json.loads(manifest or b"")["files"]}
    except (ValueError, LookupError, TypeError):
        return None


class Bucket:
    """The objects in S3, each read once; `objects` contains those that exist."""

    def __init__(self, s3: S3) -> None:
        self._bucket = s3.bucket
        self._client = boto3.client(
            "s3",
            endpoint_url=s3.endpoint,
            region_name="us-east-1",
            aws_access_key_id=s3.access_key,
            aws_secret_access_key=s3.secret_key,
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=READERS),
        )
        self._keys = {top: self._listed(top) for top in ("checkpoints/", "adapters/")}
        self.objects: dict[str, Object] = {}

    def close(self) -> None:
        self._client.close()

    def fetch(self, keys: Iterable[str]) -> None:
        wanted = list(keys)
        with ThreadPoolExecutor(READERS) as pool:
            found = zip(wanted, pool.map(self._get, wanted), strict=True)
            self.objects = {key: item for key, item in found if item is not None}

    def keys(self, prefix: str) -> set[str]:
        top = prefix.partition("/")[0] + "/"
        return {key for key in self._keys.get(top, ()) if key.startswith(prefix)}

    def _listed(self, prefix: str) -> set[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        return {item["Key"] for page in pages for item in page.get("Contents", [])}

    def _get(self, key: str) -> Object | None:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise
        with answer["Body"] as body:
            data = body.read()
        kept = data if key.endswith("/manifest.json") else None
        return Object(len(data), hashlib.sha256(data).hexdigest(), answer["Metadata"].get("lease-epoch"), kept)


# ---------------------------------------------------------------- witnesses


def _witnessed(one: History, path: Path) -> Iterator[str]:
    """Check that a job's trainers never overlap, and that each starts at an earlier trainer's checkpoint."""
    lines = _lines(path)
    for newest, line in _with_newest(lines):
        if line.epoch < newest:
            yield f"had overlapping trainers: step {line.step} of epoch {line.epoch} came after epoch {newest} began"
    saved, reached = {row["step"] for row in one.checkpoints}, 0
    for turn in _by_epoch(lines):
        epoch, first, steps = turn[0].epoch, turn[0].step, [line.step for line in turn]
        if len({line.pid for line in turn}) > 1:
            yield f"had several trainers at epoch {epoch}: {sorted({line.pid for line in turn})}"
        if steps != list(range(first, first + len(steps))):
            yield f"did not train step by step at epoch {epoch}: {steps}"
        if first > reached + 1:
            yield f"resumed at step {first} at epoch {epoch}, but only {reached} had been trained"
        elif first != 1 and first - 1 not in saved:
            yield f"resumed at step {first} at epoch {epoch}, but had no checkpoint there"
        if epoch > one.job["lease_epoch"]:
            yield f"was trained at epoch {epoch}, but is at epoch {one.job['lease_epoch']}"
        reached = max(reached, *steps)
    if one.job["state"] == "succeeded" and one.job["report"] and reached != one.job["report"]["steps"]:
        yield f"was trained for {reached} steps, but reports {one.job['report']['steps']}"


def _logs(witness: Path) -> list[Path]:
    return sorted(witness.glob("*.log"))


def _lines(path: Path) -> list[Line]:
    parts = (line.split() for line in path.read_text().splitlines())
    return [Line(int(epoch), int(step), int(pid), float(at)) for epoch, step, pid, at in parts]


def _by_epoch(lines: list[Line]) -> list[list[Line]]:
    """The lines of each epoch, ordered by epoch even if they are interleaved in the file."""
    in_turn = sorted(lines, key=lambda line: line.epoch)
    return [list(turn) for _, turn in itertools.groupby(in_turn, key=lambda line: line.epoch)]


def _with_newest(lines: list[Line]) -> Iterator[tuple[int, Line]]:
    """Each line, with the highest epoch up to it."""
    return zip(itertools.accumulate((line.epoch for line in lines), max), lines, strict=True)
