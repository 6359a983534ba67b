"""The real child, spoken to through its pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from shared.protocol import (
    EVENT,
    CheckpointSaved,
    Done,
    Failed,
    Measured,
    Prepare,
    Prepared,
    Stop,
    Stopped,
    Train,
    TrainerEvent,
)

from .conftest import MakeTask, WriteRows, quotes

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, "-m", "worker.trainer.main"]
Kind = TypeVar("Kind")


class Child:
    """The parent's end of the pipe."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, str(os.getpid())], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def send(self, command: Prepare | Train | Stop) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.model_dump_json().encode() + b"\n")
        self.process.stdin.flush()

    def until(self, *kinds: type[Kind]) -> Kind:
        """The next event of one of these kinds; every line on the way must be an event."""
        while True:
            event = self.next()
            if isinstance(event, kinds):
                return event
            assert not isinstance(event, Failed), event

    def next(self) -> TrainerEvent:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the child ended with {self.process.wait()}"
        return EVENT.validate_json(line)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """One session serves all tests of this module, as it may serve many jobs."""
    child = Child()
    with child.process:
        yield child
        assert child.process.stdin is not None
        child.process.stdin.close()
        assert child.process.wait(30) == 0


def test_prepares_and_trains(child: Child, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    task = make_task(write_rows(quotes(30)), quantization="nf4", trainer={"max_steps": 3})
    child.send(Prepare(job="a", task=task))
    plan = child.until(Prepared).plan
    assert (plan.rows, plan.heldout_rows, plan.recipe.total_steps) == (30, 1, 3)
    assert 0 < plan.trained_tokens < plan.tokens
    child.send(Train(job="a", task=task, recipe=plan.recipe, work_dir=str(tmp_path)))
    done = child.until(Done)
    assert (done.job, done.report.steps) == ("a", 3)
    assert Path(done.path, "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b'{"text":"a"}\n' * 6 + b'{"text":\n', "invalid_training_file", "line 7: not JSON at column"),
        (b'{"messages":[{"role":"boss","content":"x"}]}\n', "invalid_training_file", "line 1: messages[0].role"),
        (b"", "invalid_training_file", "line 1: the file is empty"),
        (b'{"text":"\xff"}\n', "invalid_training_file", "line 1: byte 10 of the line is not UTF-8"),
    ],
)
def test_bad_files_fail_with_line_and_hint(
    child: Child, make_task: MakeTask, tmp_path: Path, content: bytes, code: str, said: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    child.send(Prepare(job="b", task=make_task(str(path))))
    child.next()
    failed = child.next()
    assert isinstance(failed, Failed)
    assert (failed.code, failed.param, failed.retryable) == (code, "training_file", False)
    assert said in failed.message
    assert failed.hint


def test_stops_when_told_and_goes_on_from_there(
    child: Child, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    task = make_task(write_rows(quotes(30)), hyperparameters={"n_epochs": 50, "batch_size": 1})
    child.send(Prepare(job="c", task=task))
    recipe = child.until(Prepared).plan.recipe
    child.send(Train(job="c", task=task, recipe=recipe, work_dir=str(tmp_path)))
    child.until(Measured)
    child.send(Stop(job="c"))
    saved = child.until(CheckpointSaved)
    assert child.until(Stopped).step == saved.step < recipe.total_steps
    child.send(Train(job="c", task=task, recipe=recipe, work_dir=str(tmp_path), resume_from=saved.path))
    assert child.until(Measured).metrics.step == saved.step + 1
    child.send(Stop(job="c"))
    child.until(Stopped)


def test_a_surprise_is_retryable_and_the_session_lives_on(
    child: Child, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    child.send(Prepare(job="d", task=make_task(str(tmp_path / "missing.jsonl"))))
    child.next()
    failed = child.next()
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("internal_error", True)
    child.send(Prepare(job="e", task=make_task(write_rows(quotes(3)))))
    assert child.until(Prepared).job == "e"


def test_what_is_no_command_ends_the_session() -> None:
    ended = subprocess.run(COMMAND, cwd=ROOT, input=b'{"op":"dance"}\n', capture_output=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert b"not a command" in ended.stderr


def test_child_of_a_dead_parent_does_not_start() -> None:
    ended = subprocess.run([*COMMAND, "1"], cwd=ROOT, capture_output=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert b"the parent is gone" in ended.stderr


def test_death_of_the_parent_kills_the_child(make_task: MakeTask, write_rows: WriteRows) -> None:
    """The pipe stays open in this process, so only the death of its parent can end the child."""
    downward, upward = os.pipe(), os.pipe()
    script = f"import subprocess, time; p = subprocess.Popen({COMMAND!r}); print(p.pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=downward[0], stdout=upward[1], pass_fds=(downward[0], upward[1])
    )
    with parent, os.fdopen(upward[0], "rb") as events, os.fdopen(downward[1], "wb") as commands:
        pid = int(events.readline())
        commands.write(Prepare(job="f", task=make_task(write_rows(quotes(3)))).model_dump_json().encode() + b"\n")
        commands.flush()
        events.readline()
        os.close(upward[1])
        os.close(downward[0])
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive(pid)


def alive(pid: int) -> bool:
    """False for a zombie too: nobody may be there to reap it."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
