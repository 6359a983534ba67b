"""The files of a stack's folder, their permissions, and its locks."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from deploy.local.folder import Folder
from shared.errors import Conflict
from shared.signing import private_key, public_key


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_secrets_are_made_once_and_kept_private(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data").create()
    first = folder.secrets()
    assert Folder(tmp_path / "data").secrets() == first
    assert len({first.postgres, first.valkey, first.s3_secret_key}) == 3
    assert mode(folder.root) == 0o700
    assert mode(folder.root / "secrets.json") == 0o600


def test_the_signing_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data").create()
    path = folder.signing_key()
    first = path.read_bytes()
    assert Folder(tmp_path / "data").signing_key().read_bytes() == first
    assert mode(path) == 0o600
    assert private_key(path).public_key() == public_key(path.with_suffix(".pub"))


def test_ports_are_reused_and_one_in_use_is_replaced(tmp_path: Path) -> None:
    folder = Folder(tmp_path).create()
    first = folder.ports()
    assert folder.ports() == first
    with socket.socket() as other_program:
        other_program.bind(("127.0.0.1", first.valkey))
        other_program.listen()
        second = folder.ports()
    assert second.valkey != first.valkey
    assert second.model_copy(update={"valkey": first.valkey}) == first


def test_a_requested_port_must_be_free(tmp_path: Path) -> None:
    folder = Folder(tmp_path).create()
    with socket.socket() as other_program:
        other_program.bind(("127.0.0.1", 0))
        other_program.listen()
        port = other_program.getsockname()[1]
        with pytest.raises(Conflict, match=f"port {port} is in use"):
            folder.ports(api=port)
    assert folder.ports(api=port).api == port
    assert folder.ports().api == port


def test_only_one_supervisor_at_a_time(tmp_path: Path) -> None:
    first = Folder(tmp_path)
    assert first.supervisor_pid() is None
    first.acquire()
    assert Folder(tmp_path).supervisor_pid() == os.getpid()
    with pytest.raises(Conflict, match="already runs"):
        Folder(tmp_path).acquire()
    first.release()
    assert Folder(tmp_path).supervisor_pid() is None


def test_a_missing_folder_has_no_stack(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "nowhere")
    assert folder.record() is None
    assert folder.wait_until_stopped(timeout=0)
    assert not folder.root.exists()
