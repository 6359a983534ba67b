"""Child processes are real and really killed; cgroups are read from files that the tests write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import linux

ROOT = Path(__file__).resolve().parents[2]
ENV = linux.inherited(*linux.BASIC)


# ---------------------------------------------------------------- children


def test_a_child_has_only_the_environment_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLINER_S3_SECRET_KEY", "s3cret")
    done = linux.run(["/usr/bin/env"], env={"A": "1"})
    assert done.stdout == b"A=1\n"
    assert done.stderr == b""


def test_inherited_returns_variables_that_are_named_and_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.setenv("MILLINER_API_KEY", "s3cret")
    assert linux.inherited("LANG", "LC_ALL") == {"LANG": "C.UTF-8"}


def test_a_child_leads_a_session_and_can_be_stopped_and_killed_with_its_group(tmp_path: Path) -> None:
    with linux.spawn(["/bin/sh", "-c", "sleep 60 & echo $!; wait"], env=ENV, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        assert os.getsid(grandchild) == os.getpgid(grandchild) == child.pid
        assert linux.signal_group(child, signal.SIGSTOP)
        until(lambda: (state_of(child.pid), state_of(grandchild)) == ("T", "T"))
        linux.kill_group(child)
        assert child.wait() == -signal.SIGKILL
        until(lambda: state_of(grandchild) in "XZ")
    until(lambda: not linux.signal_group(child, signal.SIGTERM))
    linux.kill_group(child)


def test_a_child_without_new_session_stays_in_our_group() -> None:
    command = ["/bin/sh", "-c", "cut -d' ' -f5 /proc/$$/stat"]
    with linux.spawn(command, env=ENV, stderr=subprocess.DEVNULL, new_session=False) as child:
        assert int(child.communicate()[0]) == os.getpgrp()


def test_a_program_that_cannot_be_executed_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        linux.run(["/nowhere/to/be/found"], env={})


def test_both_outputs_come_back_with_the_exit_code() -> None:
    command = ["/bin/sh", "-c", "cat; echo out; echo err >&2; exit 3"]
    done = linux.run(command, env=ENV, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    assert linux.run(command, env=ENV, stderr=subprocess.STDOUT).stdout == b"out\nerr\n"


def test_a_child_that_times_out_is_killed_with_its_group() -> None:
    command = ["/bin/sh", "-c", "sleep 60 & echo $!; wait"]
    with pytest.raises(subprocess.TimeoutExpired) as late:
        linux.run(command, env=ENV, timeout=0.5)
    until(lambda: state_of(int(late.value.output)) in "XZ")


def test_a_child_that_ended_in_time_has_not_timed_out_because_of_its_own_child() -> None:
    done = linux.run(["/bin/sh", "-c", "sleep 60 & echo $!; exit 3"], env=ENV, timeout=0.5)
    assert done.returncode == 3
    until(lambda: state_of(int(done.stdout)) in "XZ")


def test_a_child_is_waited_for_and_then_killed() -> None:
    with linux.spawn(["/bin/sleep", "0"], env=ENV, stderr=subprocess.DEVNULL) as quick:
        assert linux.wait_or_kill(quick, seconds=20)
        assert quick.returncode == 0
    with linux.spawn(["/bin/sh", "-c", "trap '' TERM; sleep 60"], env=ENV, stderr=subprocess.DEVNULL) as stubborn:
        assert not linux.wait_or_kill(stubborn, seconds=0.1)
        assert stubborn.returncode == -signal.SIGKILL


def test_a_child_gets_its_signal_when_its_parent_is_killed(tmp_path: Path) -> None:
    """It says which one it was: it is not the default."""
    orphan = (
        "import os, signal, sys, time; from shared import linux\n"
        "linux.kill_when_parent_dies(int(sys.argv[1]), by=signal.SIGUSR1)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (open(sys.argv[2], 'w').close(), os._exit(0)))\n"
        "print(os.getpid(), flush=True); time.sleep(60)\n"
    )
    parent = (
        "import os, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid()), sys.argv[2]])"
    )
    command = [sys.executable, "-c", parent, orphan, str(tmp_path / "signalled")]
    with linux.spawn(command, env=ENV | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL) as started:
        assert started.stdout is not None
        child = int(started.stdout.readline())
        os.kill(started.pid, signal.SIGKILL)
        until((tmp_path / "signalled").exists)
        until(lambda: state_of(child) in "XZ")


def test_a_child_whose_parent_has_ended_gets_an_error() -> None:
    code = "from shared import linux; linux.kill_when_parent_dies(2**22 + 1)"
    done = linux.run([sys.executable, "-c", code], env=ENV | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert b"ProcessLookupError: the parent is gone" in done.stderr


def test_a_signal_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OSError, match="PR_SET_PDEATHSIG"):
        linux.kill_when_parent_dies(os.getppid(), by=1000)  # type: ignore[arg-type]  # not a signal


def test_no_other_module_of_the_repository_is_imported() -> None:
    code = "import sys, shared.disk, shared.linux; print(*(name for name in sys.modules if name.startswith('shared')))"
    done = linux.run([sys.executable, "-c", code], env=ENV | {"PYTHONPATH": str(ROOT)})
    assert set(done.stdout.decode().split()) == {"shared", "shared.disk", "shared.linux"}


# ---------------------------------------------------------------- the machine


def test_the_clock_counts_from_boot() -> None:
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert linux.boot_time() == pytest.approx(uptime, abs=2)


@pytest.mark.parametrize(
    ("limits", "lowest"),
    [
        ({"slice/worker": "max"}, None),
        ({"slice/worker": "2000000000"}, 2_000_000_000),
        ({"slice/worker": "max", "slice": "1000000000"}, 1_000_000_000),
        ({"slice/worker": "3000", "slice": "4000", "": "5000", "slice/other": "7"}, 3000),
        ({"": "5000"}, 5000),
        ({}, None),
    ],
)
def test_the_memory_limit_is_the_lowest_of_our_group_and_those_above(
    tmp_path: Path, limits: dict[str, str], lowest: int | None
) -> None:
    proc, cgroups = machine(tmp_path)
    for group, limit in limits.items():
        (cgroups / group).mkdir(parents=True, exist_ok=True)
        (cgroups / group / "memory.max").write_text(f"{limit}\n")
    assert linux.memory_limit(proc=proc, cgroups=cgroups) == lowest


@pytest.mark.parametrize("where", ["cgroup", "above", "root", "machine", "nowhere"])
def test_kills_for_lack_of_memory_are_read_from_the_nearest_counter(tmp_path: Path, where: str) -> None:
    proc, cgroups = machine(tmp_path)
    if where != "nowhere":
        (proc / "vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
    places = {"cgroup": "slice/worker", "above": "slice", "root": ""}
    if where in places:
        (cgroups / places[where] / "memory.events").write_text("oom 9\noom_kill 7\n")
    assert linux.oom_kill_count(proc=proc, cgroups=cgroups) == {"machine": 3, "nowhere": 0}.get(where, 7)


def test_cgroups_of_version_one_are_ignored(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path)
    (proc / "self" / "cgroup").write_text("4:memory:/other\n0::/slice/worker\n1:name=systemd:/other\n")
    (cgroups / "slice" / "worker" / "memory.max").write_text("3000\n")
    assert linux.memory_limit(proc=proc, cgroups=cgroups) == 3000


def test_the_limits_of_this_machine_can_be_read() -> None:
    limit = linux.memory_limit()
    assert limit is None or limit > 0
    assert linux.oom_kill_count() >= 0


def machine(folder: Path) -> tuple[Path, Path]:
    """A /proc and a cgroup mount of a process in /slice/worker."""
    proc, cgroups = folder / "proc", folder / "cgroups"
    (proc / "self").mkdir(parents=True)
    (cgroups / "slice" / "worker").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/slice/worker\n")
    return proc, cgroups


def state_of(pid: int) -> str:
    """The state of a process as in proc(5); X for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def until(holds: Callable[[], bool], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
