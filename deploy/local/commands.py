"""The commands of the local stack: `up`, `down`, `doctor`, `keys`, `models add`. client/cli.py registers them.

Owns: their options and output. The stack itself is imported inside the commands: it imports SQLAlchemy, boto3 and
psycopg, which take 0.4 s that every other `milliner` command would otherwise wait for. Must not start a server itself.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from deploy.local.folder import Folder, Record
from shared.errors import Conflict, MillinerError, Unavailable
from shared.settings import get_settings

Data = Annotated[Path | None, typer.Option("--data", help="Folder of the stack.", show_default="MILLINER_DATA")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

keys = typer.Typer(help="API keys of the server's tenants.", no_args_is_help=True)


def up(
    *,
    data: Data = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the API; by default a free one, reused by the next run.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Run in the background; return when everything is ready.")
    ] = False,
    base_model: Annotated[bool, typer.Option(help="Import the bundled base model if the catalog lacks it.")] = True,
    as_json: AsJson = False,
) -> None:
    """Start the whole service on this machine: PostgreSQL, Valkey, S3, the API and two workers."""
    from deploy.local.stack import Stack

    with _errors_printed():
        folder = _folder(data)
        supervisor = folder.supervisor_pid()
        if supervisor is not None and not (detach or as_json):
            record = folder.record()
            raise Conflict(
                f"a stack already runs on {folder.root} "
                f"({record.base_url if record else f'starting, pid {supervisor}'}); "
                f"use it, or stop it with: milliner down --data {folder.root}"
            )
        if supervisor is not None:
            _print_record(_wait_for_record(folder, supervisor), as_json=as_json, detached=True)
        elif detach:
            _print_record(_start_detached(folder, port=port, base_model=base_model), as_json=as_json, detached=True)
        else:
            stack = Stack(folder, port=port, base_model=base_model, report=_print_status)
            stack.run(lambda record: _print_record(record, as_json=as_json, detached=False))


def down(data: Data = None) -> None:
    """Stop the stack of a folder, in order; its data stays."""
    with _errors_printed():
        folder = _folder(data)
        supervisor = folder.supervisor_pid()
        if supervisor is not None:
            os.kill(supervisor, signal.SIGTERM)
        if not folder.wait_until_stopped(timeout=100):
            raise Unavailable(f"processes of the stack on {folder.root} are still running; see {folder.logs}")
        _print_status(f"the stack on {folder.root} has ended" if supervisor else f"no stack runs on {folder.root}")


def doctor(data: Data = None, as_json: AsJson = False) -> None:
    """Check each part, and print in one line how to fix it."""
    from deploy.local.doctor import examine

    checks = examine(_folder(data))
    if as_json:
        print(json.dumps({"ok": all(check.ok for check in checks), "checks": [check.to_json() for check in checks]}))
    else:
        table = Table.grid(padding=(0, 2))
        for check in checks:
            mark = "[green]✓[/]" if check.ok else "[red]✗[/]"
            table.add_row(mark, check.name, check.found if check.ok else f"{check.found}\n[bold]→ {check.fix}[/]")
        Console().print(table)
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


@keys.command("add")
def add_key(
    tenant: Annotated[str, typer.Argument(help="Tenant of the key; created if it does not exist.")],
    *,
    name: Annotated[str, typer.Option(help="What the key is for.")] = "cli",
    data: Data = None,
) -> None:
    """Make a key. It is printed only once; the server stores its hash."""
    from shared.database.session import engine, session_scope
    from shared.database.tenants import create_key, ensure_tenant

    with _errors_printed(), session_scope(engine(_database_url(data))) as session:
        secret = create_key(session, ensure_tenant(session, tenant), name=name)
    print(secret)


@keys.command("ls")
def list_keys(data: Data = None, as_json: AsJson = False) -> None:
    """List all keys, without their secrets."""
    from shared.database import tenants
    from shared.database.session import engine, session_scope

    with _errors_printed(), session_scope(engine(_database_url(data))) as session:
        rows = [
            {
                "id": key.id,
                "tenant": tenant.name,
                "name": key.name,
                "created_at": key.created_at.isoformat(timespec="seconds"),
                "revoked": key.revoked_at is not None,
            }
            for key, tenant in tenants.list_keys(session)
        ]
    if as_json:
        print(json.dumps({"object": "list", "data": rows}))
        return
    table = Table("id", "tenant", "name", "created", "state", box=None)
    for row in rows:
        state = "revoked" if row["revoked"] else "live"
        table.add_row(str(row["id"]), str(row["tenant"]), str(row["name"]), str(row["created_at"]), state)
    Console().print(table)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(metavar="ID")], *, data: Data = None) -> None:
    """Revoke a key: requests with it are refused from now on."""
    from shared.database import tenants
    from shared.database.session import engine, session_scope

    with _errors_printed(), session_scope(engine(_database_url(data))) as session:
        tenants.revoke_key(session, key_id)
    _print_status(f"key {key_id} is revoked")


def add_model(
    name: Annotated[str, typer.Argument(help="Name in the catalog.")],
    source: Annotated[str, typer.Argument(help="A folder of safetensors, a .gguf file, or hf://repo@revision.")],
    *,
    public_id: Annotated[
        str | None, typer.Option(help="The model's id on the Hugging Face hub, such as org/name.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="SPDX id of its licence.")] = None,
    revision: Annotated[str | None, typer.Option(help="Pinned revision.")] = None,
    data: Data = None,
) -> None:
    """Import a base model into the bucket and the catalog."""
    from deploy.local import services

    with _errors_printed():
        if _settings_name_a_server():
            env = dict(os.environ)
        else:
            folder = _folder(data)
            record = _require_record(folder)
            env = services.environment(
                folder, database_url=record.database_url, redis_url=record.redis_url, s3=record.s3
            )
    program = services.importer(name, source, env, public_id=public_id, license=license, revision=revision)
    raise typer.Exit(subprocess.run(program.argv, env=program.env, check=False).returncode)


# ---------------------------------------------------------------- a stack in the background


def _start_detached(folder: Folder, *, port: int | None, base_model: bool) -> Record:
    """Start a supervisor in its own session, pass on its output, and return when the stack is ready."""
    folder.create()
    command = [sys.executable, "-m", "deploy.local", "up", "--data", str(folder.root)]
    command += ["--base-model" if base_model else "--no-base-model"]
    command += [] if port is None else ["--port", str(port)]
    log = folder.logs / "supervisor.log"
    log.unlink(missing_ok=True)
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as out:
        supervisor = subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=out,
            start_new_session=True,
        )
    try:
        with log.open() as output:
            while True:
                ended, record = supervisor.poll() is not None, folder.record()
                sys.stderr.write(output.read())
                if record is not None:
                    return record
                if ended:
                    raise typer.Exit(1)
                time.sleep(0.1)
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait()
        raise


def _wait_for_record(folder: Folder, supervisor: int) -> Record:
    """Wait until a stack that is already starting is ready, and return its record."""
    while (record := folder.record()) is None:
        if folder.supervisor_pid() != supervisor:
            raise Unavailable(f"the stack on {folder.root} ended while it was starting; see {folder.logs}")
        time.sleep(0.1)
    return record


def _require_record(folder: Folder) -> Record:
    record = folder.record()
    if record is None:
        raise Unavailable(
            f"no stack is ready on {folder.root}; start one with: milliner up, or name another with --data, "
            "or set MILLINER_DATABASE_URL"
        )
    return record


def _database_url(data: Path | None) -> str:
    if _settings_name_a_server():
        return get_settings().database_url.get_secret_value()
    return _require_record(_folder(data)).database_url


def _settings_name_a_server() -> bool:
    return "database_url" in get_settings().model_fields_set


def _folder(data: Path | None) -> Folder:
    return Folder(data or get_settings().data)


# ---------------------------------------------------------------- printing


def _print_record(record: Record, *, as_json: bool, detached: bool) -> None:
    if as_json:
        print(record.model_dump_json(), flush=True)
        return
    lines = (
        f"API       {record.base_url}",
        f"key       {record.api_key}",
        f"bucket    {record.s3.bucket} at {record.s3.endpoint}",
        f"data      {record.data}",
        f"stop it   {f'milliner down --data {record.data}' if detached else 'Ctrl-C'}",
    )
    Console().print(Panel("\n".join(lines), title="Milliner is ready", expand=False), soft_wrap=True)


def _print_status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _errors_printed() -> Iterator[None]:
    try:
        yield
    except MillinerError as error:
        _print_status(f"milliner: {error.message}")
        raise typer.Exit(1) from None
