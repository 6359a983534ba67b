"""`milliner doctor`: check what is installed and what answers, and name a fix for each broken part.

Owns: the checks. Must not change anything; only the S3 check puts and deletes one small object.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psycopg
from alembic.script import ScriptDirectory
from botocore.exceptions import BotoCoreError, ClientError
from sqlalchemy.exc import SQLAlchemyError

from deploy.local import servers, services
from deploy.local.folder import S3, Folder, Record
from shared import linux
from shared.allocator import jemalloc
from shared.settings import Settings, get_settings

_PACKAGES = ("sqlalchemy", "psycopg", "alembic", "celery", "redis", "boto3", "fastapi", "uvicorn")
_DISK_BYTES = 5 * 1024**3


@dataclass(frozen=True)
class Check:
    """The result for one part. `fix` says what to do if it is not ok."""

    name: str
    ok: bool
    found: str
    fix: str

    def to_json(self) -> dict[str, str | bool]:
        """Return the object that `doctor --json` prints; its key `mend` is public and stays."""
        return {"name": self.name, "ok": self.ok, "found": self.found, "mend": self.fix}


@dataclass(frozen=True)
class _Server:
    """The servers to check: a local stack, or those that the settings name."""

    database_url: str
    redis_url: str
    s3: S3
    base_url: str | None
    workers: dict[str, int]


def examine(folder: Folder) -> list[Check]:
    """Run all checks, in the order in which parts depend on each other."""
    settings = get_settings()
    record = folder.record()
    checks = [_python(), _packages(), _torch(), _allocator(), _disk(folder), _stack(folder, settings, record)]
    server = _of_settings(settings) if "database_url" in settings.model_fields_set else _of_record(record)
    parts: list[Callable[[_Server], Check]] = [_postgres, _valkey, _s3, _api, _workers, _models]
    return checks + [part(server) for part in parts] if server else checks


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    ok = sys.version_info >= (3, 11) and sys.platform == "linux"
    return Check("python", ok, found, "use Python 3.11 or later on Linux")


def _packages() -> Check:
    missing = [name for name in _PACKAGES if not _version(name)] + servers.missing_wheels()
    found = "missing: " + ", ".join(missing) if missing else "all installed, servers included"
    return Check("packages", not missing, found, "run: make setup")


def _torch() -> Check:
    """Check that torch sees the GPU if the driver does. In its own process, because torch takes seconds to import."""
    version = _version("torch")
    if version is None:
        return Check("torch", False, "not installed", "run: make setup")
    if shutil.which("nvidia-smi") is None:
        return Check("torch", True, f"{version}, CPU", "")
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    env = linux.inherited(*linux.BASIC, "HOME", "CUDA_HOME", "CUDA_VISIBLE_DEVICES")
    done = linux.run([sys.executable, "-c", code], env=env, timeout=120)
    gpu = done.stdout.decode(errors="replace").strip()
    return Check(
        "torch",
        bool(gpu),
        f"{version}, {gpu or 'but it does not see the GPU that nvidia-smi shows'}",
        "install the CUDA build of torch that matches the driver, or unset CUDA_VISIBLE_DEVICES",
    )


def _allocator() -> Check:
    """Show whether trainers will use jemalloc. It is optional, so its absence is no fault."""
    found = jemalloc()
    return Check(
        "allocator", True, f"jemalloc, {found}" if found else "the C library's; libjemalloc2 would save memory", ""
    )


def _disk(folder: Folder) -> Check:
    existing = next(path for path in (folder.root, *folder.root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    fix = f"free {_DISK_BYTES / 1e9:.0f} GB, or choose another folder with --data"
    return Check("disk", free >= _DISK_BYTES, f"{free / 1e9:.1f} GB free at {existing}", fix)


def _stack(folder: Folder, settings: Settings, record: Record | None) -> Check:
    if "database_url" in settings.model_fields_set:
        return Check("settings", True, "servers named by MILLINER_…", "")
    found = f"{record.base_url}, folder {folder.root}" if record else f"no stack is ready on {folder.root}"
    return Check("stack", record is not None, found, f"run: milliner up --data {folder.root}")


def _postgres(server: _Server) -> Check:
    head = ScriptDirectory(str(services.ROOT / "migrations")).get_current_head()
    try:
        with psycopg.connect(server.database_url, connect_timeout=3) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except psycopg.errors.UndefinedTable:
        row = None
    except psycopg.Error as error:
        return Check("postgres", False, str(error).strip().splitlines()[0], "start it, or set MILLINER_DATABASE_URL")
    at = row[0] if row else "no revision"
    return Check(
        "postgres",
        at == head,
        f"tables at {at}, code at {head}",
        "run: python -m alembic -c migrations/alembic.ini upgrade head",
    )


def _valkey(server: _Server) -> Check:
    ok = servers.valkey_answers(server.redis_url)
    found = "answers PING" if ok else "does not answer PING"
    return Check("redis", ok, found, "start it, or set MILLINER_REDIS_URL; jobs wait until then, none is lost")


def _s3(server: _Server) -> Check:
    fix = "start it, or set MILLINER_S3_ENDPOINT, MILLINER_S3_BUCKET and the two keys"
    try:
        servers.try_s3(server.s3)
    except (BotoCoreError, ClientError) as error:
        return Check("s3", False, str(error), fix)
    return Check("s3", True, f"bucket {server.s3.bucket}: list, put and delete work", fix)


def _api(server: _Server) -> Check:
    if server.base_url is None:
        return Check("api", True, "not checked: MILLINER_BASE_URL is not set", "")
    ok = services.api_ready(server.base_url)
    found = f"{server.base_url} {'is ready' if ok else 'is not ready'}"
    return Check("api", ok, found, "start it, and read its log (logs/api.log of the stack)")


def _workers(server: _Server) -> Check:
    if not server.workers:
        return Check("workers", True, "not checked: no local stack runs them", "")
    unconnected = [name for name, pid in server.workers.items() if not services.worker_listens(pid, server.redis_url)]
    found = (
        f"{', '.join(unconnected)}: no connection to Redis"
        if unconnected
        else f"{', '.join(server.workers)} are connected to Redis"
    )
    return Check("workers", not unconnected, found, "read logs/prepare.log and logs/train.log of the stack")


def _models(server: _Server) -> Check:
    fix = "run: milliner models add NAME SOURCE"
    try:
        names = services.catalog(server.database_url)
    except SQLAlchemyError as error:
        found = f"the catalog cannot be read ({type(error).__name__})"
        return Check("base models", False, found, "fix postgres first")
    return Check("base models", bool(names), ", ".join(names) or "the catalog is empty", fix)


def _of_record(record: Record | None) -> _Server | None:
    if record is None:
        return None
    workers = {"prepare": record.pids.prepare, "train": record.pids.train}
    return _Server(record.database_url, record.redis_url, record.s3, record.base_url, workers)


def _of_settings(settings: Settings) -> _Server:
    s3 = S3(
        endpoint=settings.s3_endpoint or "https://s3.amazonaws.com",
        bucket=settings.s3_bucket,
        access_key=settings.s3_access_key.get_secret_value(),
        secret_key=settings.s3_secret_key.get_secret_value(),
    )
    database, redis = settings.database_url.get_secret_value(), settings.redis_url.get_secret_value()
    return _Server(database, redis, s3, settings.base_url, {})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
