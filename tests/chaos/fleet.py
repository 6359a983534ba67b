"""A whole deployment for tests to break: the real API and workers, on the tests' servers, with short timeouts.

The programs are those of deploy/local/services.py. Only the trainer is the stub, unless a setting changes it. A thread
restarts whatever dies, as the supervisor of a deployment would. The fleet records each accepted job, and `check` fails
if one was lost, run twice or has a wrong state.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2
import openai
import psycopg

from deploy.local import servers as local
from deploy.local import services
from deploy.local.folder import Folder
from deploy.local.process import Program
from shared.database.session import engine, session_scope
from shared.database.tables import BaseModelRow
from shared.schemas.requests import TERMINAL
from tests.chaos import invariants, stub
from tests.chaos.proxy import Proxy
from tests.chaos.servers import Crew, Servers, parents, until

BASE = "hat"
CONFIG = json.dumps({"model_type": "llama", "hidden_size": 64, "max_position_embeddings": 256}).encode()
ROWS = b'{"text": "a felt hat is a hat that is felt"}\n' * 20
STUB = shlex.join([sys.executable, "-S", "-E", "-s", str(Path(stub.__file__).resolve())])
SHORT = {
    "MILLINER_LEASE_SECONDS": "5",
    "MILLINER_HEARTBEAT_SECONDS": "0.7",
    "MILLINER_FENCE_SECONDS": "3",
    "MILLINER_SWEEP_SECONDS": "0.3",
    "MILLINER_RERING_SECONDS": "1",
    "MILLINER_CRASH_BACKOFF_SECONDS": "0.1",
    "MILLINER_MIN_FREE_BYTES": "0",
    "MILLINER_TRAINER_COMMAND": STUB,
}


class Slot(NamedTuple):
    """A process of a Celery worker's pool, and the name of its program."""

    pid: int
    program: str


class Trainer(NamedTuple):
    """A trainer child, its slot, and its attempt (job and epoch)."""

    pid: int
    slot: int
    job: str
    epoch: int


class Processes(NamedTuple):
    """The processes of all workers at one moment: Celery main processes by name, slots, trainers."""

    mains: dict[str, int]
    slots: list[Slot]
    trainers: list[Trainer]


class Figures(NamedTuple):
    """The totals of a checked run."""

    jobs: int
    attempts: int
    crashes: int
    preemptions: int
    steps_repeated: list[int]
    overlaps: int


class Fleet:
    """An API named `api` and workers named `prepare`, `train-0` …; each is a child process of the tests.

    `via` says which programs reach which servers through a proxy, such as {"train-0": ["postgres", "s3"], "api":
    ["valkey"]}; a proxy is then `proxies["train-0", "postgres"]`. `settings` are further environment variables.
    """

    def __init__(
        self,
        servers: Servers,
        root: Path,
        *,
        workers: int = 2,
        slots: int = 3,
        max_crashes: int = 1000,
        via: Mapping[str, Collection[str]] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Folder(root).create()
        self.witness = self.folder.cache / "witness"
        self.max_crashes = max_crashes
        self.database_url, self.redis_url, self.s3 = servers.allocate()
        self.api_key = services.make_key(self.database_url)
        self.accepted: list[str] = []
        self.reviving = True
        self.kept_down: set[str] = set()
        self.crew = Crew(self.folder.logs)
        self._resources = ExitStack()
        self._ports = self.folder.ports()
        self.base_url = services.base_url(self._ports)
        trains = {f"train-{number}": slots for number in range(workers)}
        self.env = {name: self._environment(settings or {}) for name in ("api", "prepare", *trains)}
        self.proxies = self._insert_proxies(servers, via or {})
        self._slots = {"prepare": 1} | trains
        self._closing, self._changing = Event(), RLock()
        self._seeds = count(1)
        self._import_base()
        self.client = self._resources.enter_context(self._client())
        self.dataset = ""
        self._reviver = Thread(target=self._revive, name="reviver")

    def start(self) -> None:
        """Start all programs and upload a dataset."""
        for name in self.env:
            self.launch(name)
        self.wait_ready()
        self.dataset = self.client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
        self._reviver.start()

    def close(self) -> None:
        """Kill everything at once. A test that needs a clean end waits for it first."""
        self._closing.set()
        if self._reviver.is_alive():
            self._reviver.join()
        self.crew.close()
        self._resources.close()
        engine(self.database_url).dispose()

    # ------------------------------------------------------------ programs

    def launch(self, name: str) -> None:
        """Start a program with the environment `env[name]`."""
        self.crew.start(self._program(name))

    def wait_ready(self) -> None:
        """Wait until the API answers and every worker listens to the broker."""
        until(lambda: services.api_ready(self.base_url), "the API is ready")
        for name in self._slots:
            until(partial(self._listens, name), f"{name} listens")

    def relaunch(self, name: str, **settings: str) -> None:
        """Kill a program and restart it with more settings, which it keeps for later restarts."""
        with self._changing:
            self.crew.kill(name)
            self.env[name] |= settings
            self.launch(name)

    def keep_down(self, name: str) -> None:
        """Kill a program and leave it down until `bring_up`."""
        with self._changing:
            self.kept_down.add(name)
            self.crew.kill(name)

    def bring_up(self, name: str) -> None:
        with self._changing:
            self.kept_down.discard(name)
            self.launch(name)

    # ------------------------------------------------------------ processes

    def main(self, name: str) -> int:
        """The pid of a program: the API, or a Celery main."""
        return self.crew.process(name).pid

    def processes(self) -> Processes:
        """The current processes of the workers. The API and the servers are not included."""
        mains = {name: self.main(name) for name in self._slots if self.crew.process(name).poll() is None}
        names, parent_of = {pid: name for name, pid in mains.items()}, parents()
        slots = [Slot(pid, names[parent]) for pid, parent in parent_of.items() if parent in names]
        pids = {slot.pid for slot in slots}
        born = [(pid, parent, self._attempt_of(pid)) for pid, parent in parent_of.items() if parent in pids]
        return Processes(mains, slots, [Trainer(pid, parent, *attempt) for pid, parent, attempt in born if attempt])

    def training(self) -> list[Trainer]:
        """The trainers that have begun a step. Those that only prepare a dataset never do."""
        return [trainer for trainer in self.processes().trainers if self.steps_of(trainer)]

    def steps_of(self, trainer: Trainer) -> int:
        """How many steps a trainer has begun."""
        return self.witness_of(trainer.job).count(f" {trainer.pid} ")

    def witness_of(self, job: str) -> str:
        """The witness lines of a job so far, as text."""
        path = self.witness / f"{job}.log"
        return path.read_text() if path.exists() else ""

    # ------------------------------------------------------------ jobs

    def submit(self, n: int = 1, *, step_ms: int = 20, threads: int = 8, **trainer: Any) -> list[str]:
        """Submit `n` jobs through the official client, which retries while the API is down. Returns the ids.

        Each job has its own seed, because a retry with an identical body is the same job.
        """
        trainer = {"max_steps": 30, "save_every": 10} | trainer

        def one(seed: int) -> str:
            job = self.client.fine_tuning.jobs.create(
                model=BASE, training_file=self.dataset, seed=seed, extra_body={"trainer": trainer}
            )
            self.accepted.append(job.id)
            return job.id

        with ThreadPoolExecutor(max_workers=min(n, threads)) as pool:
            return list(pool.map(one, [1000 * next(self._seeds) + step_ms for _ in range(n)]))

    def states(self) -> dict[str, str]:
        """The state of every job, from the database."""
        return dict(self.sql("SELECT id, state FROM jobs"))

    def unfinished(self) -> list[str]:
        """Accepted jobs that have not ended."""
        states = self.states()
        return [job for job in self.accepted if states.get(job) not in TERMINAL]

    def restarted(self, jobs: Sequence[str]) -> list[str]:
        """Those of the jobs that had more than one attempt or trainer, a crash or a preemption."""
        ran = "SELECT id, attempt + crash_count + preempt_count FROM jobs WHERE id = ANY(%s)"
        tries = dict(self.sql(ran, list(jobs)))
        pids = {job: {line.split()[2] for line in self.witness_of(job).splitlines()} for job in jobs}
        return [job for job in jobs if tries[job] > 1 or len(pids[job]) > 1]

    def settle(self, timeout: float = 120) -> dict[str, str]:
        """Wait until every accepted job has ended. Returns the states of all jobs."""
        until(lambda: not self.unfinished(), "every accepted job has ended", seconds=timeout)
        return self.states()

    def sql(self, query: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        """The rows of a query, on a direct connection without a proxy."""
        with psycopg.connect(self.database_url) as connection:
            return connection.execute(query.encode(), values).fetchall()

    def check(self) -> Figures:
        """Assert that no invariant is violated, and return the totals. Call it once all jobs have settled."""
        found = invariants.violations(
            self.database_url, self.s3, accepted=self.accepted, witness=self.witness, max_crashes=self.max_crashes
        )
        assert not found, "\n".join(found)
        jobs, attempts, crashes, preemptions = self.sql(
            "SELECT count(*), coalesce(sum(attempt), 0)::int, coalesce(sum(crash_count), 0)::int,"
            " coalesce(sum(preempt_count), 0)::int FROM jobs"
        )[0]
        repeated = invariants.steps_repeated(self.witness)
        return Figures(jobs, attempts, crashes, preemptions, repeated, invariants.overlaps(self.witness))

    def check_adapters(self) -> int:
        """Assert that each succeeded job has the adapter of an undisturbed run. Returns how many were compared."""
        client = local.s3_client(self.s3)
        rows = self.sql(
            "SELECT j.id, j.seed, (j.plan #>> '{recipe,total_steps}')::int, a.prefix,"
            " jsonb_path_query_array(a.exports, '$[*].path') FROM jobs j"
            " JOIN adapters a ON a.job_id = j.id WHERE j.state = 'succeeded'"
        )
        for job, seed, steps, prefix, exported in rows:
            found = client.get_object(Bucket=self.s3.bucket, Key=prefix + stub.ADAPTER)["Body"].read()
            assert found == stub.expected(job, seed, steps), (
                f"the adapter of {job} differs from that of an undisturbed run"
            )
            for path in exported:
                found = client.get_object(Bucket=self.s3.bucket, Key=f"{prefix}{path}{stub.ADAPTER}")["Body"].read()
                assert found == stub.expected(job, seed, steps), (
                    f"the export {path} of {job} differs from that of an undisturbed run"
                )
        return len(rows)

    # ------------------------------------------------------------ inside

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        """The servers, the short times and `settings`, without the MILLINER_… variables of the calling process."""
        found = services.environment(self.folder, database_url=self.database_url, redis_url=self.redis_url, s3=self.s3)
        caller = {name for name in os.environ if name.startswith("MILLINER_") and found[name] == os.environ[name]}
        plain = {name: value for name, value in found.items() if name not in caller}
        return plain | SHORT | {"MILLINER_MAX_CRASHES": str(self.max_crashes)} | dict(settings)

    def _insert_proxies(self, servers: Servers, via: Mapping[str, Collection[str]]) -> dict[tuple[str, str], Proxy]:
        variables = {
            "postgres": "MILLINER_DATABASE_URL",
            "valkey": "MILLINER_REDIS_URL",
            "s3": "MILLINER_S3_ENDPOINT",
        }
        proxies = {}
        for program, names in via.items():
            for name in names:
                proxy = self._resources.enter_context(Proxy(local.HOST, servers.port(name)))
                proxies[program, name] = proxy
                url = urlsplit(self.env[program][variables[name]])
                there = url._replace(netloc=url.netloc.replace(f":{url.port}", f":{proxy.port}"))
                self.env[program][variables[name]] = there.geturl()
        return proxies

    def _client(self) -> openai.OpenAI:
        """The official client with more retries than its default, because a restart of the API takes seconds."""
        limits = httpx2.Limits(max_connections=100)
        return openai.OpenAI(
            base_url=self.base_url,
            api_key=self.api_key,
            max_retries=20,
            timeout=30,
            http_client=openai.DefaultHttpxClient(limits=limits),
        )

    def _import_base(self) -> None:
        """Add a catalog row and one file: the stub trainer needs no more of a base."""
        digest = sha256(CONFIG).hexdigest()
        prefix = f"models/{digest}/"
        local.s3_client(self.s3).put_object(Bucket=self.s3.bucket, Key=prefix + "config.json", Body=CONFIG)
        with session_scope(engine(self.database_url)) as session:
            session.add(
                BaseModelRow(
                    name=BASE,
                    public_id=f"acme/{BASE}",
                    revision="1",
                    digest=digest,
                    prefix=prefix,
                    files=[{"path": "config.json", "bytes": len(CONFIG), "sha256": digest}],
                    config=json.loads(CONFIG),
                    parameters=1,
                    bytes=len(CONFIG),
                )
            )

    def _program(self, name: str) -> Program:
        if name == "api":
            return services.api(self.env[name], self._ports)
        queue = name.partition("-")[0]
        return replace(services.worker(queue, self.env[name], slots=self._slots[name]), name=name)

    def _revive(self) -> None:
        while not self._closing.wait(0.1):
            for name in self.env:
                with self._changing:
                    dead = self.crew.process(name).poll() is not None
                    if dead and self.reviving and name not in self.kept_down:
                        self.crew.kill(name)  # the remaining processes of its group
                        self.launch(name)

    def _listens(self, name: str) -> bool:
        return services.worker_listens(self.main(name), self.env[name]["MILLINER_REDIS_URL"])

    def _attempt_of(self, pid: int) -> tuple[str, int] | None:
        try:
            folder = Path(os.readlink(f"/proc/{pid}/cwd"))
        except OSError:
            return None
        if folder.parent != self.folder.cache / "work":
            return None
        job, _, epoch = folder.name.rpartition("-")
        if folder.name.endswith(" (deleted)") or not job.startswith("ftjob-"):
            return None  # between attempts, or before its first: it waits for work
        return job, int(epoch)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that is not less than `share` of them."""
    ranked = sorted(values)
    return ranked[max(0, -int(-share * len(ranked) // 1) - 1)]


def now() -> float:
    """Seconds on the clock of the witness lines (CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal; False if there is no such process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
