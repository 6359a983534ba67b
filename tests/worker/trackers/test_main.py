"""The child process that reports to a tracker, started as its supervisor does; W&B through its own client."""

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
from tests.worker.trackers.servers import Invalid, Mlflow, Server, Silent, Wandb, serving
from worker.trackers.main import KEPT_STEPS, Backlog
from worker.trackers.pipe import End, Ending, StartRun, Status, Step

ROOT = Path(__file__).resolve().parents[3]
JOB, SECRET = "ftjob-1", "s3cret" * 8
MLFLOW = Integration.model_validate({"type": "mlflow", "mlflow": {"experiment": "hats", "tags": {"team": "felt"}}})
WANDB = Integration.model_validate({"type": "wandb", "wandb": {"project": "hats", "tags": ["felt"]}})


class Child:
    """The child of one attempt. It gets the tracker's address, then steps, then how the attempt ended."""

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
        """Send a loss for each step, and an evaluation after every third."""
        for step in steps:
            self.send(Step(step=step, values={"train/loss": 1 / step}))
            if step % 3 == 0:
                self.send(Step(step=step, values={"valid/loss": 2 / step}))

    def status(self) -> Status:
        assert self.process.stdout is not None
        return Status.model_validate_json(self.process.stdout.readline())

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
        second.steps(*range(1, 5), *range(3, 8))  # the recorded steps, then those of the resumed trainer
        assert second.end("succeeded") == 0
        ((run_id, run),) = server.runs.items()
        history = server.history[run_id]
        assert history["train/loss"] == [(step, 1 / step) for step in range(1, 8)]
        assert history["valid/loss"] == [(3, 2 / 3), (6, 2 / 6)]
        assert (run["run_name"], run["status"], run["params"]["r"]) == (JOB, "FINISHED", "4")
        assert {"key": "team", "value": "felt"} in run["tags"]
        assert {seen["authorization"] for seen in server.seen} == {f"Bearer {SECRET}"}


@pytest.mark.parametrize(("ending", "status"), [("failed", "FAILED"), ("cancelled", "KILLED")])
def test_the_run_at_mlflow_shows_how_the_job_ended(attempt: Callable[..., Child], ending: Ending, status: str) -> None:
    with serving(Mlflow()) as server:
        assert attempt(MLFLOW, server).end(ending) == 0
        assert [run["status"] for run in server.runs.values()] == [status]


def test_two_attempts_make_one_run_at_wandb_with_each_step_once(attempt: Callable[..., Child]) -> None:
    """Through W&B's own client, which counts steps itself and drops late ones."""
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
        sent = f"{server.bucket} {server.history} {server.seen}"
        for private in (socket.gethostname(), getpass.getuser(), str(ROOT)):
            assert private not in sent.replace("127.0.0.1", "")


def test_a_tracker_that_recovers_gets_all_steps(attempt: Callable[..., Child]) -> None:
    with serving(Mlflow()) as server:
        server.down = True
        child = attempt(MLFLOW, server)
        child.steps(1, 2, 3)
        assert child.status().error == "Refused: MLflow answered experiments/get-by-name with status 503 and no JSON"
        server.down = False
        assert child.status().error is None
        assert child.end("succeeded") == 0
        assert [step for step, _ in server.history["run-0"]["train/loss"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [
        (200, b"<html>", "answered experiments/get-by-name with status 200 and no JSON"),
        (200, b"{}", "KeyError"),
        (200, b'"' + 2 * 1024 * 1024 * b"x", "more than 1,048,576 bytes"),
        (400, json.dumps({"message": f"a\0b \ud800 {SECRET} {'c' * 500}"}).encode(), "with status 400: ab ? … ccc"),
        (302, b"", "with status 302"),
    ],
    ids=["no JSON", "empty", "endless", "unstorable", "redirect"],
)
def test_an_invalid_answer_becomes_one_short_line(
    attempt: Callable[..., Child], status: int, answer: bytes, expected: str
) -> None:
    with serving(Invalid(status, answer)) as server:
        error = attempt(MLFLOW, server).status().error
        assert error is not None
        assert expected in error
        assert len(error) <= 200
        assert SECRET not in error


def test_nothing_is_sent_after_the_supervisor_has_closed_the_pipe(attempt: Callable[..., Child]) -> None:
    """A lost lease closes the pipe without `end`: another attempt may already use the run."""
    with serving(Mlflow()) as server:
        child = attempt(MLFLOW, server)
        assert child.status().error is None
        child.steps(1, 2)
        assert child.process.stdin is not None
        child.process.stdin.close()
        assert child.process.wait(30) == -signal.SIGKILL
        assert server.runs["run-0"]["status"] == "RUNNING"


def test_a_tracker_without_an_answer_is_reported_after_five_seconds(attempt: Callable[..., Child]) -> None:
    with serving(Silent()) as server:
        assert attempt(MLFLOW, server).status().error == "ReadTimeout: timed out"


def test_the_oldest_of_too_many_steps_are_dropped() -> None:
    backlog = Backlog()
    for step in range(KEPT_STEPS + 3):
        backlog.add(Step(step=step, values={"train/loss": 1.0}))
    batch, ending = backlog.due()
    assert (batch[0][0], ending) == (3, None)


def test_the_newest_step_waits_for_its_evaluation_or_for_the_next_attempt() -> None:
    backlog = Backlog()
    for step in (1, 2):
        backlog.add(Step(step=step, values={"train/loss": 1.0}))
    assert backlog.due() == ([(1, {"train/loss": 1.0})], None)
    backlog.add(Step(step=2, values={"valid/loss": 2.0}))
    backlog.remove([(1, {"train/loss": 1.0})])
    assert backlog.due() == ([], None)
    backlog.end("succeeded")
    assert backlog.due() == ([(2, {"train/loss": 1.0, "valid/loss": 2.0})], "succeeded")
    backlog.end("interrupted")
    assert backlog.due() == ([], "interrupted")
