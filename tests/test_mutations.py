"""Mutation tests: remove one durability guard from a copy of the code; the copy's tests must fail.

The copy's tests run on the servers of this run, in their own databases. The workers and API of this run are not
mutated.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy.local.folder import Record

ROOT = Path(__file__).resolve().parents[1]
TREE = ("api", "client", "deploy", "examples", "migrations", "shared", "tests", "worker", "pyproject.toml")


class Mutant(NamedTuple):
    """Replace `guard` in `file` by `without_guard`; one of `tests` must fail."""

    file: str
    guard: str
    without_guard: str
    tests: str


JOBS, SWEEPER, ATTEMPTS, LEASE = (
    "tests/shared/database/test_jobs.py",
    "tests/worker/background/test_sweeper.py",
    "tests/worker/attempt/test_attempts.py",
    "tests/worker/attempt/test_lease.py",
)
MUTANTS = {
    "a worker's update without its epoch": Mutant(
        "shared/database/attempts.py",
        "update(Job).where(Job.id == job_id, Job.lease_epoch == epoch, Job.lease_owner.is_not(None))",
        "update(Job).where(Job.id == job_id, Job.lease_owner.is_not(None))",
        JOBS,
    ),
    "a worker's row lock without its epoch": Mutant(
        "shared/database/attempts.py",
        "select(Job).where(Job.id == job_id, Job.lease_epoch == epoch, Job.lease_owner.is_not(None))",
        "select(Job).where(Job.id == job_id, Job.lease_owner.is_not(None))",
        JOBS,
    ),
    "a transition without the epoch": Mutant(
        "shared/database/state_machine.py",
        "guard += [Job.lease_epoch == epoch, Job.lease_owner.is_not(None)]",
        "guard += [Job.lease_owner.is_not(None)]",
        JOBS,
    ),
    "a claim that does not lock its row": Mutant(
        "shared/database/claims.py", "        .with_for_update(of=Job, skip_locked=True)\n", "", JOBS
    ),
    "a success that ignores a cancel": Mutant(
        "shared/database/attempts.py",
        "    if job.desired_state == Desired.CANCEL:\n        return State.CANCELLED",
        "    if False:\n        return State.CANCELLED",
        JOBS,
    ),
    "a sweeper that does not ring again": Mutant(
        "worker/background/sweeper.py", "if not ring(queue):", "if True:", SWEEPER
    ),
    "a sweeper that does not wait after an outage": Mutant(
        "worker/background/sweeper.py", "if watched >= settings.lease_seconds and ", "if ", SWEEPER
    ),
    "a resume that does not verify hashes": Mutant("shared/storage.py", "if found == sha256:", "if found:", ATTEMPTS),
    "a proof that compares nothing": Mutant(
        "worker/trainer/artifact/verify.py",
        "    check(proof, command.report)\n",
        "",
        "tests/worker/trainer/artifact/test_verify.py",
    ),
    "a lease that does not freeze its trainer": Mutant(
        "worker/attempt/lease.py", "if late and not session.frozen:", "if False:", LEASE
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutants") / "tree"
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def test_the_unchanged_copy_passes(copy: Path, stack: Record) -> None:
    done = run_tests(copy, stack, *sorted({mutant.tests for mutant in MUTANTS.values()}))
    assert done.returncode == pytest.ExitCode.OK, done.stdout[-3000:]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails_its_tests(copy: Path, stack: Record, name: str) -> None:
    mutant = MUTANTS[name]
    file = copy / mutant.file
    original = file.read_text()
    assert original.count(mutant.guard) == 1, f"the guard is not exactly once in {mutant.file}: update MUTANTS"
    file.write_text(original.replace(mutant.guard, mutant.without_guard))
    try:
        done = run_tests(copy, stack, mutant.tests)
    finally:
        file.write_text(original)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:]
    assert "\nFAILED " in done.stdout


def run_tests(copy: Path, stack: Record, *tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--stack", stack.data, *tests]
    env = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False, timeout=300)
