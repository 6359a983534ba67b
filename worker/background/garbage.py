"""Garbage collection: delete objects in the bucket that no row refers to.

No flag on a row marks garbage. A round lists the bucket, reads the rows *after* that, and deletes objects that no row
keeps. Each decision must stay right between the read and the delete:

- a checkpoint's key contains its lease epoch; epochs only rise, and only the holder of a lease commits rows at its
  epoch;
- an adapter's row comes in the commit that ends its job, and a job that has ended never starts again;
- a file that is not live cannot be used by a new job, and it is marked as deleted before its bytes are;
- no new job can start from an adapter or checkpoint whose row is deleted. Jobs that already do are read after the rows:
  a submit locks its source from the moment it sees it live until its own commit.

A clock (the server's own) decides only where no row can: for an upload whose row is not committed yet. Two collectors
at once are therefore safe and need no lock.

Objects that are not ours stay, however old: keys of another form, and keys of a tenant that this database does not
know. The database may be empty, restored from a backup, or the wrong one, and the bucket the only copy. Base models
belong to no tenant; they stay too. Must not keep a transaction open while it talks to the bucket.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from threading import Event, Thread

from shared import storage
from shared.database import adapters
from shared.database.garbage import Pile, kept_adapters, kept_checkpoints, kept_files, known_tenants
from shared.database.session import Session, session_scope
from shared.errors import Unavailable
from shared.settings import Settings, get_settings
from shared.telemetry import log
from worker import cache

BATCH = 200


def start(stop: Event, *, head_start: float) -> Thread:
    """Collect every `purge_seconds` until `stop` is set.

    `head_start`, a random number from 0 to 1, shortens the first wait by that fraction, so that workers started at the
    same time do not list the bucket at the same time.
    """
    thread = Thread(target=_keep_collecting, args=(stop, head_start), name="garbage", daemon=True)
    thread.start()
    return thread


def collect(settings: Settings) -> Counter[str]:
    """Run one round. Returns the number of deleted objects of each kind, and of aborted multipart `uploads`."""
    deleted: Counter[str] = Counter()
    for kind, (key, kept_of) in KINDS.items():
        piles = _piles(f"{kind}/", key)
        while batch := list(islice(piles, BATCH)):
            with session_scope() as session:
                known = known_tenants(session, {pile.tenant for pile in batch})
                ours = [pile for pile in batch if pile.tenant in known]
                kept = kept_of(session, ours, settings.orphan_seconds)
                kept |= adapters.prefixes_in_use(session, [pile.prefix for pile in ours])
            garbage = [pile for pile in ours if pile.prefix not in kept]
            storage.delete_many([name for pile in garbage for name in pile.keys])
            for pile in garbage:
                log.info("garbage.deleted", kind=kind, prefix=pile.prefix, objects=len(pile.keys), bytes=pile.bytes)
                deleted[kind] += len(pile.keys)
    for kind, (key, _) in KINDS.items():
        matched = ((key.match(upload.key), upload) for upload in storage.unfinished(f"{kind}/"))
        aged = [
            (match["tenant"], upload) for match, upload in matched if match and upload.age >= settings.orphan_seconds
        ]
        with session_scope() as session:
            known = known_tenants(session, {tenant for tenant, _ in aged})
        for upload in (upload for tenant, upload in aged if tenant in known):
            storage.abort(upload)
            log.info("garbage.aborted", key=upload.key, age=upload.age)
            deleted["uploads"] += 1
    return deleted


def _keep_collecting(stop: Event, head_start: float) -> None:
    settings = get_settings()
    wait = settings.purge_seconds * (1 - head_start)
    while not stop.wait(wait):
        wait = settings.purge_seconds
        try:
            cache.sweep()
            log.info("garbage.collected", **collect(settings))
        except Unavailable as error:
            log.warning("garbage.skipped", error=error.message)
        except Exception:
            log.exception("garbage.failed")


def _piles(prefix: str, key: re.Pattern[str]) -> Iterator[Pile]:
    """Group the listed objects of our own by folder."""
    ours = ((match, listed) for listed in storage.listing(prefix) if (match := key.match(listed.key)))
    for _, group in groupby(ours, key=lambda pair: pair[0][0]):
        matches, listed = zip(*group, strict=True)
        parts = matches[0].groupdict()
        yield Pile(
            prefix=matches[0][0],
            tenant=parts["tenant"],
            owner=parts["owner"],
            epoch=int(parts.get("epoch", 0)),
            keys=[item.key for item in listed],
            bytes=sum(item.bytes for item in listed),
            age=min(item.age for item in listed),
        )


# ---------------------------------------------------------------- keys and the rows that keep them


_TENANT = r"(?P<tenant>org-[0-9a-f]{30})"
_JOB = r"(?P<owner>ftjob-[0-9a-f]{30})"

Kept = Callable[[Session, Sequence[Pile], float], set[str]]

# For each kind: how our keys begin, and the function that returns which prefixes of a batch must stay.
KINDS: dict[str, tuple[re.Pattern[str], Kept]] = {
    "checkpoints": (re.compile(rf"checkpoints/{_TENANT}/{_JOB}/(?P<epoch>[0-9]+)/[0-9]+/(?=.)"), kept_checkpoints),
    "adapters": (re.compile(rf"adapters/{_TENANT}/{_JOB}/(?=.)"), kept_adapters),
    "files": (re.compile(rf"files/{_TENANT}/(?P<owner>file-[0-9a-f]{{30}})\Z"), kept_files),
}
