"""Garbage: what the bucket holds and no row names, dropped round by round.

No flag on a row says what may go. A round lists the bucket, reads the rows *after* that, and drops what none of them
keeps. Each verdict must be one that nothing can overturn between the reading and the delete:

- a checkpoint's key holds its lease epoch, epochs only rise, and only the holder of a lease commits a row at its epoch;
- an adapter's row comes in the commit that ends its job, and a job that has ended stays so;
- a file that is not live can be given to no new job, and is marked as deleted before its bytes go;
- an adapter or a checkpoint whose row is gone can be started from by no new job, and jobs that do are read after the
  rows: a submit locks its source from when it saw it live to its own commit.

Only where no row can speak does a clock, the server's own: an upload whose row is still to come. So two collectors at
once are right, and need no lock.

What is not ours stays, however old: keys of another shape, and keys of a tenant that this database does not know. It
may be empty, set back, or the wrong one, and the bucket all there is. Base models belong to no tenant; they stay too.
Must not keep a transaction open while it talks to the bucket.
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

    `head_start`, a random number from 0 to 1, is the part of the first wait that is left out: workers that were started
    together then do not list the bucket together.
    """
    thread = Thread(target=_collecting, args=(stop, head_start), name="garbage", daemon=True)
    thread.start()
    return thread


def collect(settings: Settings) -> Counter[str]:
    """One round; returns how many objects were dropped of each kind, and how many `uploads` were aborted."""
    dropped: Counter[str] = Counter()
    for kind, (key, kept_of) in KINDS.items():
        piles = _piles(f"{kind}/", key)
        while batch := list(islice(piles, BATCH)):
            with session_scope() as session:
                known = known_tenants(session, {pile.tenant for pile in batch})
                ours = [pile for pile in batch if pile.tenant in known]
                kept = kept_of(session, ours, settings.orphan_seconds)
                kept |= adapters.prefixes_in_use(session, [pile.prefix for pile in ours])
            doomed = [pile for pile in ours if pile.prefix not in kept]
            storage.delete_many([name for pile in doomed for name in pile.keys])
            for pile in doomed:
                log.info("garbage.dropped", kind=kind, prefix=pile.prefix, objects=len(pile.keys), bytes=pile.bytes)
                dropped[kind] += len(pile.keys)
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
            dropped["uploads"] += 1
    return dropped


def _collecting(stop: Event, head_start: float) -> None:
    settings = get_settings()
    wait = settings.purge_seconds * (1 - head_start)
    while not stop.wait(wait):
        wait = settings.purge_seconds
        try:
            cache.sweep()
            log.info("garbage.collected", **collect(settings))
        except Unavailable as error:
            log.warning("garbage.missed", error=error.message)
        except Exception:
            log.exception("garbage.broke")


def _piles(prefix: str, key: re.Pattern[str]) -> Iterator[Pile]:
    """The listing, folder by folder."""
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


# ---------------------------------------------------------------- what the rows keep


_TENANT = r"(?P<tenant>org-[0-9a-f]{30})"
_JOB = r"(?P<owner>ftjob-[0-9a-f]{30})"

Kept = Callable[[Session, Sequence[Pile], float], set[str]]

# For each kind, how a key begins that is ours, and which prefixes of a batch must stay.
KINDS: dict[str, tuple[re.Pattern[str], Kept]] = {
    "checkpoints": (re.compile(rf"checkpoints/{_TENANT}/{_JOB}/(?P<epoch>[0-9]+)/[0-9]+/(?=.)"), kept_checkpoints),
    "adapters": (re.compile(rf"adapters/{_TENANT}/{_JOB}/(?=.)"), kept_adapters),
    "files": (re.compile(rf"files/{_TENANT}/(?P<owner>file-[0-9a-f]{{30}})\Z"), kept_files),
}
