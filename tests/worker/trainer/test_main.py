"""The real trainer child, tested through its pipe."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from shared.linux import boot_time
from shared.schemas.requests import Phase
from tests.worker.trainer.conftest import COMMAND, ROOT, Child, MakeTask, WriteRows, quotes, recipe_of
from worker.trainer import main as child_main
from worker.trainer.main import CommandLoop
from worker.trainer.model import base as base_module
from worker.trainer.model.base import Base, load_base
from worker.trainer.protocol import (
    EVENT,
    Alive,
    CheckpointSaved,
    Done,
    Failed,
    Measured,
    Notice,
    PhaseEntered,
    Prepare,
    Prepared,
    Stop,
    Stopped,
    Train,
    TrainerEvent,
    Working,
)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """One child for all tests of this module, as one child may run many jobs."""
    with Child() as child:
        yield child


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


def test_a_job_does_not_change_the_base_for_the_next_one(
    child: Child, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    """A text job, then classifiers that share a base and its head."""
    rows = [{"text": f"hat {i}", "label": i % 3} for i in range(6)]
    two: dict[str, Any] = {"trainer": {"max_steps": 2}}
    text = make_task(write_rows(quotes(6)), **two)
    labels, others = (make_task(write_rows(rows), method="classification", seed=seed, **two) for seed in (7, 8))
    adapters = []
    for i, task in enumerate((text, labels, others, labels)):
        child.send(Prepare(job="f", task=task))
        recipe = child.until(Prepared).plan.recipe
        child.send(Train(job="f", task=task, recipe=recipe, work_dir=str(tmp_path / str(i))))
        adapters.append(Path(child.until(Done).path, "adapter_model.safetensors").read_bytes())
    assert adapters[1] == adapters[3] != adapters[2]


def test_base_in_4_bits_is_freed_before_the_next_is_loaded(
    make_task: MakeTask, write_rows: WriteRows, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two may not fit. bitsandbytes' weights refer to their layer, and reference counting does not free a cycle."""
    freed: list[bool] = []
    weights: list[weakref.ref[torch.nn.Parameter]] = []
    load = load_base

    def recording(*args: Any, **options: Any) -> Base:
        freed.append(all(weight() is None for weight in weights))
        base = load(*args, **options)
        weights.extend(weakref.ref(layer.weight) for layer in base.model.modules() if isinstance(layer, Linear4bit))
        return base

    monkeypatch.setattr(base_module, "load_base", recording)
    other = shutil.copytree(llama, tmp_path / "other")
    rows = write_rows(quotes(2))
    with Path("/dev/null").open("wb") as pipe:
        session = CommandLoop(pipe)
        for i, base_dir in enumerate((llama, str(other))):
            task = make_task(rows, base_dir=base_dir, quantization="nf4", trainer={"max_steps": 1})
            session.serve(Train(job="g", task=task, recipe=recipe_of(task), work_dir=str(tmp_path / str(i))))
    assert weights
    assert freed == [True, True]


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        (b'{"text":"a"}\n' * 6 + b'{"text":\n', "invalid_training_file", "line 7: not JSON at column"),
        (b'{"messages":[{"role":"boss","content":"x"}]}\n', "invalid_training_file", "line 1: messages[0].role"),
        (b"", "invalid_training_file", "line 1: the file is empty"),
        (b'{"text":"\xff"}\n', "invalid_training_file", "line 1: byte 10 of the line is not UTF-8"),
    ],
)
def test_bad_files_fail_with_line_and_hint(
    child: Child, make_task: MakeTask, tmp_path: Path, content: bytes, code: str, expected: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    child.send(Prepare(job="b", task=make_task(str(path))))
    failed = child.until(Failed)
    assert (failed.code, failed.param, failed.retryable) == (code, "training_file", False)
    assert expected in failed.message
    assert failed.hint


def test_stops_on_request_and_resumes_from_the_checkpoint(
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
    child.send(Stop(job="c"))  # the first run has ended already, and the next has not begun: no effect
    child.send(Train(job="c", task=task, recipe=recipe, work_dir=str(tmp_path), resume_from=saved.path))
    assert child.until(Measured).metrics.step == saved.step + 1
    child.send(Stop(job="c"))
    child.until(Stopped)


def test_an_unexpected_error_is_retryable_and_does_not_end_the_child(
    child: Child, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    child.send(Prepare(job="d", task=make_task(str(tmp_path / "missing.jsonl"))))
    failed = child.until(Failed)
    assert (failed.code, failed.retryable) == ("internal_error", True)
    child.send(Prepare(job="e", task=make_task(write_rows(quotes(3)))))
    assert child.until(Prepared).job == "e"


def test_an_invalid_command_ends_the_child() -> None:
    ended = subprocess.run(COMMAND, cwd=ROOT, input=b'{"op":"dance"}\n', capture_output=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert b"not a command" in ended.stderr


def test_child_of_a_dead_parent_does_not_start() -> None:
    ended = subprocess.run([*COMMAND, "1"], cwd=ROOT, capture_output=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert b"the parent is gone" in ended.stderr


def test_death_of_the_parent_kills_the_child(make_task: MakeTask, write_rows: WriteRows) -> None:
    """This process keeps the pipe open, so only the death of its parent can end the child."""
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
    """Whether the process runs. A zombie does not: it may have no parent to reap it."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_a_log_on_a_full_disk_does_not_fail_a_job(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    """Output of libraries, the traceback of an error and the end of the process may all fail to be written."""
    task = make_task(write_rows(quotes(4)), trainer={"max_steps": 2})
    with open("/dev/full", "wb") as full, Child(stderr=full, PYTHONUNBUFFERED="1") as child:
        child.send(Prepare(job="g", task=make_task(str(tmp_path / "missing.jsonl"))))
        assert child.until(Failed).code == "internal_error"
        child.send(Train(job="g", task=task, recipe=recipe_of(task), work_dir=str(tmp_path)))
        assert child.until(Done).report.steps == 2


def test_a_resumed_child_does_nothing_before_it_receives_a_new_alive(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    """Stopped for longer than its limit and resumed, the child must emit no event, whichever thread runs first.

    An `Alive` that waited in the pipe was sent before the stop and does not count.
    """
    silence = 0.6
    task = make_task(write_rows(quotes(30)), hyperparameters={"n_epochs": 50, "batch_size": 1}, silence_seconds=silence)
    with Child() as child:
        pid = child.process.pid
        child.send(Train(job="h", task=task, recipe=recipe_of(task), work_dir=str(tmp_path)))
        for _ in range(4):
            while not isinstance(next_event(child), Measured):
                pass
            os.kill(pid, signal.SIGSTOP)
            wait_until_stopped(pid)
            stopped_at = boot_time()
            while readable(child):
                child.next()
            child.send(Alive(job="h"))
            while boot_time() - stopped_at < silence + 0.1:
                time.sleep(0.01)
            os.kill(pid, signal.SIGCONT)
            wait_until_stopped(pid)
            assert not readable(child)
        child.send(Stop(job="h"))
        while not isinstance(next_event(child), Stopped):
            pass
        # The child may freeze once more until it is done with this job. Awake for the next one, it freezes no more.
        child.send(Prepare(job="i", task=make_task(str(tmp_path / "missing.jsonl"))))
        while not isinstance(next_event(child), Failed):
            pass


@pytest.mark.parametrize(("interval", "emitted"), [(0.0, True), (3600.0, False)])
def test_progress_is_reported(
    make_task: MakeTask,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interval: float,
    emitted: bool,
) -> None:
    """While rows are read and scored, and within a step, unless another event was emitted recently."""
    monkeypatch.setattr(child_main, "WORKING_SECONDS", interval)
    held = write_rows([*quotes(2), {"text": "hat"}])
    task = make_task(
        write_rows(quotes(4)),
        validation_file=held,
        hyperparameters={"batch_size": 4},
        trainer={"max_steps": 1, "micro_batch": 1, "packing": False},
    )
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, open(writing, "wb") as ours:
        session = CommandLoop(ours)
        session.serve(Prepare(job="i", task=task))
        *before, prepared = events(pipe, Prepared)
        assert before == [PhaseEntered(job="i", phase=Phase.TOKENIZING), *[Working(job="i")] * (7 if emitted else 0)]
        assert isinstance(prepared, Prepared)
        session.serve(Train(job="i", task=task, recipe=prepared.plan.recipe, work_dir=str(tmp_path)))
        phase: Phase | None = None
        working_in: dict[Phase | None, int] = {}
        for event in events(pipe, Done):
            phase = event.phase if isinstance(event, PhaseEntered) else phase
            working_in[phase] = working_in.get(phase, 0) + isinstance(event, Working)
    rows, micro_batches = 7, 4
    assert working_in.pop(Phase.LOADING) == 0
    assert working_in[Phase.TOKENIZING] == (rows if emitted else 0)
    assert all((count >= micro_batches - 1) == emitted for count in working_in.values())


def events(pipe: BinaryIO, last: type[TrainerEvent]) -> list[TrainerEvent]:
    """Read events up to the first of kind `last`."""
    found: list[TrainerEvent] = []
    while not found or not isinstance(found[-1], last):
        found.append(EVENT.validate_json(pipe.readline()))
        assert not isinstance(found[-1], Failed), found[-1]
    return found


def test_a_line_is_complete_even_if_the_child_was_stopped_while_writing_it() -> None:
    """A pipe holds 64 KiB. SIGSTOP and SIGCONT cut short a write that waits for room."""
    notice = Notice(job="k", level="info", message="x" * 300_000)
    script = (
        "from worker.trainer.protocol import Notice; from worker.trainer.main import CommandLoop, claim_stdout;"
        "CommandLoop(claim_stdout()).emit(Notice(job='k', level='info', message='x' * 300_000))"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert isinstance(process.stdout, BufferedReader)
        assert process.stdout.peek(1)
        wait_until_sleeping(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        wait_until_stopped(process.pid)
        os.kill(process.pid, signal.SIGCONT)
        assert EVENT.validate_json(process.stdout.readline()) == notice
        assert process.stdout.read() == b""


def wait_until_sleeping(pid: int) -> None:
    """Wait until the process sleeps, which here means that it waits for room in the pipe."""
    deadline = time.monotonic() + 10
    while ") S " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def next_event(child: Child) -> TrainerEvent:
    """Read the next event, resuming the child whenever it has stopped itself."""
    while not readable(child):
        if is_stopped(child.process.pid):
            os.kill(child.process.pid, signal.SIGCONT)
        time.sleep(0.01)
    return child.next()


def readable(child: Child) -> bool:
    assert child.process.stdout is not None
    return bool(select.select([child.process.stdout], [], [], 0)[0])


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 10
    while not is_stopped(pid):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_stopped(pid: int) -> bool:
    return ") T " in Path(f"/proc/{pid}/stat").read_text()
