"""The child that talks to a tracker, as its supervisor starts it, and W&B's own client where that is what it uses."""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from shared.schemas.requests import Integration
from tests.worker.trackers.servers import Lying, Mlflow, Server, Silent, Wandb, serving
from worker.trackers.main import KEPT_STEPS, Backlog
from worker.trackers.pipe import End, Ending, StartRun, Step, Word

ROOT = Path(__file__).resolve().parents[3]
JOB, SECRET = "ftjob-1", "s3cret" * 8
MLFLOW = Integration.model_validate({"type": "mlflow", "mlflow": {"experiment": "hats", "tags": {"team": "felt"}}})
WANDB = Integration.model_validate({"type": "wandb", "wandb": {"project": "hats", "tags": ["felt"]}})


class Child:
    """One attempt's. Told where its tracker is, it takes steps until it is told how the attempt ended."""

    def __init__(self, folder: Path, integration: Integration, url: str) -> None:
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker.trackers.main"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder), "WANDB_ERROR_REPORTING": "false"},
                start_new_session=True,
            )
        config = {"r": 4, "learning_rate": 1e-4}
        self.send(StartRun(job=JOB, integration=integration, base_model="tiny", config=config, url=url, secret=SECRET))

    def send(self, message: BaseModel) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(message.model_dump_json().encode() + b"\n")
        self.process.stdin.flush()

    def steps(self, *steps: int) -> None:
        """A loss each, and an evaluation after every third."""
        for step in steps:
            self.send(Step(step=step, values={"train/loss": 1 / step}))
            if step % 3 == 0:
                self.send(Step(step=step, values={"valid/loss": 2 / step}))

    def word(self) -> Word:
        assert self.process.stdout is not None
        return Word.model_validate_json(self.process.stdout.readline())

    def end(self, ending: Ending) -> int:
        self.send(End(ending=ending))
        return self.process.wait(60)


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(integration: Integration, server: Server) -> Child:
        children.append(Child(tmp_path, integration, server.url))
        return children[-1]

    yield start
    for child in children:
        if child.process.poll() is None:
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()
        for pipe in (child.process.stdin, child.process.stdout):
            assert pipe is not None
            pipe.close()


def test_two_attempts_make_one_run_at_mlflow_with_each_step_once(attempt: Callable[..., Child]) -> None:
    with serving(Mlflow()) as server:
        first = attempt(MLFLOW, server)
        first.steps(1, 2, 3, 4)
        assert first.end("interrupted") == 0
        second = attempt(MLFLOW, server)
        second.steps(*range(1, 5), *range(3, 8))  # what was recorded, then what a resumed trainer says
        assert second.end("succeeded") == 0
        ((run_id, run),) = server.runs.items()
        history = server.history[run_id]
        assert history["train/loss"] == [(step, 1 / step) for step in range(1, 8)]
        assert history["valid/loss"] == [(3, 2 / 3), (6, 2 / 6)]
        assert (run["run_name"], run["status"], run["params"]["r"]) == (JOB, "FINISHED", "4")
        assert {"key": "team", "value": "felt"} in run["tags"]
        assert {seen["authorization"] for seen in server.seen} == {f"Bearer {SECRET}"}


@pytest.mark.parametrize(("ending", "status"), [("failed", "FAILED"), ("cancelled", "KILLED")])
def test_mlflow_is_told_how_the_job_ended(attempt: Callable[..., Child], ending: Ending, status: str) -> None:
    with serving(Mlflow()) as server:
        assert attempt(MLFLOW, server).end(ending) == 0
        assert [run["status"] for run in server.runs.values()] == [status]


def test_two_attempts_make_one_run_at_wandb_with_each_step_once(attempt: Callable[..., Child]) -> None:
    """Through W&B's own client, which counts steps by itself and drops what comes late."""
    with serving(Wandb()) as server:
        first = attempt(WANDB, server)
        first.steps(1, 2, 3, 4)
        assert first.end("interrupted") == 0
        assert (server.exits, server.preempting) == ([1], 1)
        second = attempt(WANDB, server)
        second.steps(*range(1, 5), *range(3, 8))
        assert second.end("cancelled") == 0
        rows = [{key: value for key, value in row.items() if key in {"_step", "train/loss", "valid/loss"}}
                for row in server.history]  # fmt: skip
        assert rows == [
            {"_step": step, "train/loss": pytest.approx(1 / step)}
            | ({"valid/loss": pytest.approx(2 / step)} if step % 3 == 0 else {})
            for step in range(1, 8)
        ]
        assert server.exits == [1, 255]
        assert server.bucket is not None
        assert (server.bucket["name"], server.bucket["displayName"], server.bucket["project"]) == (JOB, JOB, "hats")
        assert server.bucket["tags"] == ["felt", "milliner/finetune", "milliner/tiny", "milliner/ftjob-1"]
        told = f"{server.bucket} {server.history} {server.seen}"
        for private in (socket.gethostname(), getpass.getuser(), str(ROOT)):
            assert private not in told.replace("127.0.0.1", "")


def test_a_tracker_that_comes_back_gets_all(attempt: Callable[..., Child]) -> None:
    with serving(Mlflow()) as server:
        server.down = True
        child = attempt(MLFLOW, server)
        child.steps(1, 2, 3)
        assert child.word().trouble == "Refused: MLflow answers experiments/get-by-name with 503 and no JSON"
        server.down = False
        assert child.word().trouble is None
        assert child.end("succeeded") == 0
        assert [step for step, _ in server.history["run-0"]["train/loss"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("status", "answer", "told"),
    [
        (200, b"<html>", "answers experiments/get-by-name with 200 and no JSON"),
        (200, b"{}", "KeyError"),
        (200, b'"' + 2 * 1024 * 1024 * b"x", "more than 1,048,576 bytes"),
        (400, json.dumps({"message": f"a\0b \ud800 {SECRET} {'c' * 500}"}).encode(), "with 400: ab ? … ccc"),
        (302, b"", "with 302"),
    ],
    ids=["no JSON", "empty", "endless", "unstorable", "a way elsewhere"],
)
def test_what_a_lying_tracker_says_becomes_one_short_line(
    attempt: Callable[..., Child], status: int, answer: bytes, told: str
) -> None:
    with serving(Lying(status, answer)) as server:
        trouble = attempt(MLFLOW, server).word().trouble
        assert trouble is not None
        assert told in trouble
        assert len(trouble) <= 200
        assert SECRET not in trouble


def test_nothing_is_said_once_the_supervisor_is_gone(attempt: Callable[..., Child]) -> None:
    """A lease that is lost ends the pipe without a word: another attempt may be at the run."""
    with serving(Mlflow()) as server:
        child = attempt(MLFLOW, server)
        assert child.word().trouble is None
        child.steps(1, 2)
        assert child.process.stdin is not None
        child.process.stdin.close()
        assert child.process.wait(30) == -signal.SIGKILL
        assert server.runs["run-0"]["status"] == "RUNNING"


def test_a_silent_tracker_is_given_five_seconds_and_then_told_of(attempt: Callable[..., Child]) -> None:
    with serving(Silent()) as server:
        assert attempt(MLFLOW, server).word().trouble == "ReadTimeout: timed out"


def test_of_too_many_steps_the_oldest_go() -> None:
    backlog = Backlog()
    for step in range(KEPT_STEPS + 3):
        backlog.add(Step(step=step, values={"train/loss": 1.0}))
    batch, ending = backlog.due()
    assert (batch[0][0], ending) == (3, None)


def test_the_newest_step_waits_for_its_evaluation_and_is_left_to_the_next_attempt() -> None:
    backlog = Backlog()
    for step in (1, 2):
        backlog.add(Step(step=step, values={"train/loss": 1.0}))
    assert backlog.due() == ([(1, {"train/loss": 1.0})], None)
    backlog.add(Step(step=2, values={"valid/loss": 2.0}))
    backlog.taken([(1, {"train/loss": 1.0})])
    assert backlog.due() == ([], None)
    backlog.end("succeeded")
    assert backlog.due() == ([(2, {"train/loss": 1.0, "valid/loss": 2.0})], "succeeded")
    backlog.end("interrupted")
    assert backlog.due() == ([], "interrupted")
