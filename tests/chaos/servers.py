"""Processes that chaos tests kill, including their three servers.

Owns: starting, signalling and ending programs by name, and a Postgres, Valkey and SeaweedFS that are separate from the
`stack` of the other tests. They listen on loopback only, and end in `close()` or when this process is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path

import psycopg
import redis

from deploy.local import servers, services
from deploy.local.folder import S3, Folder
from deploy.local.process import Program, spawn

START_SECONDS = 90.0
REDIS_DATABASES = 16  # Valkey's default


class Crew:
    """Running programs by name. Safe to use from several threads.

    One thread starts all of them and lives as long as they do, because the kernel kills a child (PDEATHSIG) when the
    thread that started it ends.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._inherit = os.open(os.devnull, os.O_RDONLY)
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="starter")
        self._running: dict[str, tuple[Program, subprocess.Popen[bytes]]] = {}

    def start(self, program: Program) -> None:
        """Start or restart a program."""
        log = self.log(program.name)
        process = self._starter.submit(spawn, program, log=log, inherit=self._inherit).result()
        self._running[program.name] = (program, process)

    def process(self, name: str) -> subprocess.Popen[bytes]:
        """The latest process with that name; its return code is None while it runs."""
        return self._running[name][1]

    def names(self) -> list[str]:
        return list(self._running)

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to the main process only; does nothing if it has ended."""
        process = self.process(name)
        if process.poll() is None:
            process.send_signal(number)

    def kill(self, name: str) -> None:
        """SIGKILL a program, its process group and all its descendants, and wait."""
        process = self.process(name)
        for pid in descendants(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self, name: str, number: signal.Signals | None = None) -> None:
        """Stop a program with its usual signal, or another one, and wait for its grace period at most."""
        program, process = self._running[name]
        self.send(name, number or program.stop_signal)
        process.wait(program.grace)

    def complete(self, program: Program, *, seconds: float = 120) -> None:
        """Run a program to its end; AssertionError unless its exit code is 0."""
        self.start(program)
        code = self._running.pop(program.name)[1].wait(seconds)
        assert code == 0, f"{program.name} ended with exit code {code}; its log is {self.log(program.name)}"

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def close(self) -> None:
        """Kill all remaining programs, the latest first."""
        for name in reversed(self.names()):
            self.kill(name)
        self._starter.shutdown()
        os.close(self._inherit)


class Servers:
    """Postgres, Valkey and SeaweedFS, with a migrated database as the template of each fleet's own."""

    def __init__(self, root: Path) -> None:
        self.folder = Folder(root).create()
        self.ports, self._secrets = self.folder.ports(), self.folder.secrets()
        self._bucket = servers.s3(self.ports, self._secrets).bucket
        self.crew = Crew(self.folder.logs)
        self._programs = {
            "postgres": lambda: servers.postgres(self.folder, self.ports),
            "valkey": lambda: servers.valkey(self.folder, self.ports, self._secrets),
            "s3": lambda: servers.seaweed(self.folder, self.ports, self._secrets),
        }
        self._answers = {
            "postgres": lambda: servers.postgres_answers(self.database_url("postgres")),
            "valkey": lambda: servers.valkey_answers(self.redis_url(0)),
            "s3": lambda: servers.s3_answers(self.s3(self._bucket)),
        }
        self._numbers = count(1)

    def start(self) -> None:
        cluster = servers.initdb(self.folder, self._secrets)
        assert cluster is not None, f"{self.folder.root} is not empty"
        self.crew.complete(cluster)
        servers.adopt_cluster(self.folder)
        for name in self._programs:
            self.start_again(name, wait=False)
        for name in self._programs:
            self.wait_for(name)
        servers.create_database(self.database_url("postgres"))
        servers.create_bucket(self.s3(self._bucket))
        until(lambda: servers.s3_stores(self.s3(self._bucket)), "the bucket accepts objects")
        env = services.environment(
            self.folder,
            database_url=self.database_url("milliner"),
            redis_url=self.redis_url(0),
            s3=self.s3(self._bucket),
        )
        self.crew.complete(services.migrate(env))

    def database_url(self, name: str) -> str:
        return servers.database_url(self.ports, self._secrets, database=name)

    def redis_url(self, number: int) -> str:
        return servers.redis_url(self.ports, self._secrets).removesuffix("/0") + f"/{number}"

    def s3(self, bucket: str) -> S3:
        return servers.s3(self.ports, self._secrets).model_copy(update={"bucket": bucket})

    def port(self, name: str) -> int:
        """The port of `postgres`, `valkey` or `s3`."""
        return int(getattr(self.ports, name))

    def allocate(self) -> tuple[str, str, S3]:
        """Create an unused database, broker and bucket; returns their URLs and the bucket's credentials."""
        number = next(self._numbers)
        with psycopg.connect(self.database_url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE fleet{number} TEMPLATE milliner")
        broker, s3 = self.redis_url(number % REDIS_DATABASES), self.s3(f"fleet{number}")
        with redis.Redis.from_url(broker) as client:
            client.flushdb()
        servers.create_bucket(s3)
        until(lambda: servers.s3_stores(s3), "the bucket accepts objects")
        return self.database_url(f"fleet{number}"), broker, s3

    def kill(self, name: str) -> None:
        """SIGKILL a server with all its processes."""
        self.crew.kill(name)

    def stop(self, name: str, number: signal.Signals | None = None) -> None:
        """Stop a server with its usual signal (Postgres: fast shutdown), or another one (SIGQUIT: immediate)."""
        self.crew.stop(name, number)

    def start_again(self, name: str, *, wait: bool = True) -> None:
        """Start a server that has ended, on its old data and port."""
        self.crew.start(self._programs[name]())
        if wait:
            self.wait_for(name)

    def wait_for(self, name: str) -> None:
        until(self._answers[name], f"{name} answers")

    def freeze(self, name: str) -> None:
        """SIGSTOP a server and all its processes: connections stay open, but nothing answers."""
        main = self.crew.process(name).pid
        os.kill(main, signal.SIGSTOP)  # first, so that it starts no more children
        for pid in descendants(main):
            os.kill(pid, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        main = self.crew.process(name).pid
        for pid in [*descendants(main), main]:
            os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        self.crew.close()
        servers.remove_sockets(self.ports)


def until(condition: Callable[[], object], what: str, *, seconds: float = START_SECONDS) -> None:
    """Wait until `condition()` is true; AssertionError with `what` if that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


def state_of(pid: int | None) -> str:
    """The state of a process, one letter as in proc_pid_stat(5); X if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def parents() -> dict[int, int]:
    """The parent pid of every process, without zombies."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                found[int(entry.name)] = int(parent)
    return found


def descendants(pid: int) -> list[int]:
    """All descendants of a process. Process groups would not find them: Postgres's children have their own groups."""
    parent_of, found = parents(), [pid]
    for each in found:
        found += [child for child, parent in parent_of.items() if parent == each]
    return found[1:]
