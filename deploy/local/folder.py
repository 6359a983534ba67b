"""The folder of one local stack: its files, their permissions, and its locks.

Owns: the layout, the generated secrets and ports, `stack.json`, and two locks. Must not start or end any process.
Only the owner can read the folder; files with a secret have mode 0600.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from pydantic import BaseModel

from shared.errors import Conflict

BUCKET = "milliner"

# Below Linux's usual ephemeral range (32768-60999), so that no outgoing connection can take one of our ports. The range
# ends 10000 below that, because SeaweedFS's admin server opens its gRPC port at its own port plus 10000.
_PORTS = range(10240, 22700)


class Secrets(BaseModel):
    """Generated once. `api_key` is added when a database exists to store its hash."""

    postgres: str
    valkey: str
    s3_access_key: str
    s3_secret_key: str
    api_key: str | None = None


class Ports(BaseModel):
    """Loopback ports. SeaweedFS opens many, and chooses by itself each one that is not configured."""

    api: int
    postgres: int
    valkey: int
    s3: int
    s3_grpc: int
    master: int
    master_grpc: int
    volume: int
    volume_grpc: int
    filer: int
    filer_grpc: int
    admin: int


class S3(BaseModel):
    endpoint: str
    bucket: str
    access_key: str
    secret_key: str


class Pids(BaseModel):
    supervisor: int
    postgres: int
    valkey: int
    s3: int
    api: int
    prepare: int
    train: int


class Record(BaseModel):
    """The content of `stack.json` and of `up --json`. The file exists only while the stack is ready."""

    base_url: str
    api_key: str
    database_url: str
    redis_url: str
    s3: S3
    data: str
    pids: Pids


class Folder:
    """One stack's folder. Reading methods also work if the folder does not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.logs = self.root / "logs"
        self.cache = self.root / "cache"
        self._stack = self.root / "stack.json"
        self._lock = self.root / "lock"
        self.children_lock = self.root / "children.lock"
        self._secrets = self.root / "secrets.json"
        self._ports = self.root / "ports.json"
        self._lock_fd: int | None = None

    def create(self) -> Self:
        for path in (self.root, self.logs, self.cache):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root.chmod(0o700)
        return self

    def acquire(self) -> None:
        """Become the supervisor. The kernel frees the lock however the process ends, so that it cannot go stale.

        Raises Conflict if another supervisor runs.
        """
        self.create()
        lock = _open(self._lock)
        if not _wait_until(lambda: _try_lock(lock), 0.5):  # `supervisor_pid` locks it for an instant to test it
            os.close(lock)
            raise Conflict(f"a stack already runs on {self.root}; stop it with: milliner down --data {self.root}")
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        self._lock_fd = lock
        self.remove_record()

    def release(self) -> None:
        """Stop being the supervisor."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def children_fd(self, *, timeout: float) -> int | None:
        """Lock and return the descriptor that every child inherits.

        Returns None if children of an earlier supervisor still have it open after `timeout` seconds.
        """
        fd = _open(self.children_lock)
        if _wait_until(lambda: _try_lock(fd), timeout):
            return fd
        os.close(fd)
        return None

    def supervisor_pid(self) -> int | None:
        """Return the pid of the running supervisor, or None."""
        if not self._lock.exists():
            return None
        lock = _open(self._lock)
        try:
            if _try_lock(lock):
                return None
            return int(os.pread(lock, 32, 0) or 0) or None
        finally:
            os.close(lock)

    def wait_until_stopped(self, *, timeout: float) -> bool:
        """Wait at most `timeout` seconds for the supervisor, then for its children; return whether all have ended."""
        if not self.root.exists():
            return True
        if not _wait_until(lambda: self.supervisor_pid() is None, timeout):
            return False
        fd = self.children_fd(timeout=timeout)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def secrets(self) -> Secrets:
        if self._secrets.exists():
            return _load(Secrets, self._secrets)
        generated = Secrets(
            postgres=secrets.token_urlsafe(32),
            valkey=secrets.token_urlsafe(32),
            s3_access_key=secrets.token_hex(10),
            s3_secret_key=secrets.token_urlsafe(32),
        )
        self.save_secrets(generated)
        return generated

    def save_secrets(self, value: Secrets) -> None:
        _save(self._secrets, value)

    def signing_key(self) -> Path:
        """Return the path of the key that signs adapters, generated once.

        Its public half is next to it, in `signing.pub`, for `milliner verify --key`.
        """
        path = self.root / "signing.pem"
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            _write(self.root / "signing.pub", public)
            _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return path

    def ports(self, *, api: int | None = None) -> Ports:
        """Return the ports of the last run, each replaced if it is in use now; `api` overrides the API's port.

        Raises Conflict if the port `api` is in use.
        """
        if api is not None and not _free(api):
            raise Conflict(f"port {api} is in use; choose another with --port, or leave it out")
        last = self.last_ports()
        known = last.model_dump() if last else _block(list(Ports.model_fields))
        chosen = {name: port if _free(port) else _block([name])[name] for name, port in known.items()}
        ports = Ports(**chosen | ({"api": api} if api is not None else {}))
        _save(self._ports, ports)
        return ports

    def last_ports(self) -> Ports | None:
        """Return the ports of the last run, whether or not they are in use; None before the first run."""
        return _load(Ports, self._ports) if self._ports.exists() else None

    def record(self) -> Record | None:
        """Return the record of the ready stack, or None if no stack is ready."""
        supervisor = self.supervisor_pid()
        try:
            record = _load(Record, self._stack)
        except FileNotFoundError:
            return None
        return record if record.pids.supervisor == supervisor else None

    def save_record(self, record: Record) -> None:
        _save(self._stack, record)

    def remove_record(self) -> None:
        self._stack.unlink(missing_ok=True)


Saved = TypeVar("Saved", bound=BaseModel)


def _load(kind: type[Saved], path: Path) -> Saved:
    return kind.model_validate_json(path.read_bytes())


def _save(path: Path, value: BaseModel) -> None:
    """Replace the file in one step: a reader sees the old one or the new one."""
    _write(path, value.model_dump_json(indent=2).encode() + b"\n")


def _write(path: Path, data: bytes) -> None:
    fresh = path.with_name(f"{path.name}.new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(data)
    fresh.replace(path)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try_lock(fd: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done


def _block(names: list[str]) -> dict[str, int]:
    """Choose consecutive free ports. Two stacks that choose at the same time clash with a chance of 1 in 1,000."""
    while True:
        first = _PORTS[secrets.randbelow(len(_PORTS) // len(names)) * len(names)]
        ports = range(first, first + len(names))
        if all(map(_free, ports)):
            return dict(zip(names, ports, strict=True))


def _free(port: int) -> bool:
    with socket.socket() as probe:
        # Servers bind with SO_REUSEADDR too: to them, a port with old connections in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
