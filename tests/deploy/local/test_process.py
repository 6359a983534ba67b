"""A child has its own process group, and ends when its parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.local.folder import Folder
from deploy.local.process import Identity, Program, end, kill_holders, open_files, spawn, stop, tail, unprivileged

ROOT = Path(__file__).resolve().parents[3]


def program(*argv: str, cwd: Path, **options: object) -> Program:
    return Program("child", list(argv), {"PATH": os.defpath}, cwd, **options)  # type: ignore[arg-type]  # any field


def start(wanted: Program, log: Path) -> subprocess.Popen[bytes]:
    with log.with_suffix(".lock").open("w") as lock:
        return spawn(wanted, log=log, inherit=lock.fileno())


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(condition: object, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    assert callable(condition)
    while not (done := bool(condition())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return done


def test_a_child_writes_its_log_and_leads_its_group(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    wanted = program("/bin/sh", "-c", "echo one; echo two >&2; exec sleep 60", cwd=tmp_path)
    child = start(wanted, log)
    assert until(lambda: tail(log, 1) == "two")
    assert tail(log) == "one\ntwo"
    assert os.getpgid(child.pid) == child.pid
    assert log.stat().st_mode & 0o777 == 0o600
    stop(child, wanted)
    end(child, wanted, asked_at=time.monotonic())
    assert child.returncode == -signal.SIGTERM


def test_a_child_that_ignores_its_signal_is_killed_with_its_group(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    wanted = program(
        "/bin/sh", "-c", "trap '' TERM; sleep 60 & echo $!; while :; do wait; done", cwd=tmp_path, grace=0.2
    )
    child = start(wanted, log)
    assert until(lambda: tail(log).isdigit())
    stop(child, wanted)
    end(child, wanted, asked_at=time.monotonic())
    assert child.returncode == -signal.SIGKILL
    assert until(lambda: gone(int(tail(log))))


def test_a_child_gets_its_signal_when_the_parent_is_killed(tmp_path: Path) -> None:
    """Also inside the user namespace, where a change of credentials could clear the signal."""
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from deploy.local.process import Program, spawn, unprivileged\n"
        "work = Path(sys.argv[2]); lock = open(work / 'lock', 'w')\n"
        "for identity in ('self', unprivileged()):\n"
        "    wanted = Program('c', ['/bin/sleep', '60'], {}, Path('/'), identity=identity)\n"
        "    print(spawn(wanted, log=work / 'c.log', inherit=lock.fileno()).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(ROOT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        assert not any(map(gone, pids))
        parent.kill()
    assert until(lambda: all(map(gone, pids)))


def test_postgres_never_runs_as_root(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    child = start(program("/usr/bin/id", "-u", cwd=Path("/"), identity=unprivileged()), log)
    assert child.wait() == 0
    assert tail(log) != "0"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_root_can_run_a_program_as_nobody(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    child = start(program("/usr/bin/id", "-un", cwd=Path("/"), identity=Identity.NOBODY), log)
    assert child.wait() == 0
    assert tail(log) == "nobody"


def test_processes_that_have_a_file_open_are_found_and_killed(tmp_path: Path) -> None:
    folder = Folder(tmp_path).create()
    inherit = folder.children_fd(timeout=0)
    assert inherit is not None
    wanted = program("/bin/sleep", "60", cwd=tmp_path)
    child = spawn(wanted, log=tmp_path / "child.log", inherit=inherit)
    os.close(inherit)
    assert str(folder.children_lock) in open_files(child.pid)
    assert folder.children_fd(timeout=0) is None, "the child holds the lock that its parent took"
    kill_holders(folder.children_lock)
    assert child.wait() == -signal.SIGKILL
    assert folder.wait_until_stopped(timeout=5)


def test_a_large_log_is_rotated(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    log.write_bytes(b"x" * (10 * 1024**2 + 1))
    assert start(program("/bin/echo", "new", cwd=tmp_path), log).wait() == 0
    assert log.read_text() == "new\n"
    assert (tmp_path / "child.log.1").exists()
