"""Datasets, tasks and recipes for tiny bases, and training runs in this process or in a real child."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any, Self, TypeVar

import pytest

from shared.schemas.requests import Method, MethodName
from shared.schemas.results import Recipe
from tests.tiny import tiny_encoder, tiny_gpt2
from worker.trainer.data.encoding import Encoder
from worker.trainer.evaluation import samples
from worker.trainer.model import base as base_module
from worker.trainer.planning.prepare import prepare
from worker.trainer.protocol import EVENT, Command, Failed, Measured, Task, Train, TrainerEvent
from worker.trainer.training.loop import train

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, "-m", "worker.trainer.main"]
Kind = TypeVar("Kind")

Rows = list[dict[str, Any]]
WriteRows = Callable[[Rows], str]
MakeTask = Callable[..., Task]


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base with Conv1D layers, learned positions and biases, unlike Llama."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_gpt2(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder base: bidirectional attention, and no text generation."""
    folder = tmp_path_factory.mktemp("bert")
    tiny_encoder(folder, "bert")
    return str(folder)


@pytest.fixture(scope="session")
def encoder(llama: str) -> Encoder:
    return Encoder(llama)


@pytest.fixture(autouse=True, scope="session")
def _frozen_imports() -> None:
    """Exclude the modules of torch and transformers from garbage collection, which takes 0.4 s after every run."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generate two tokens per sample, to save time. test_samples.py tests samples of full length."""
    monkeypatch.setattr(samples, "NEW_TOKENS", 2)


@pytest.fixture
def unreadable(llama: str, tmp_path: Path) -> Callable[[str], str]:
    """A copy of the base in which reading the named file is an I/O error, as on a failing disk, even for root."""

    def copy_without(name: str) -> str:
        folder = tmp_path / "unreadable"
        folder.mkdir()
        for path in Path(llama).iterdir():
            if path.name != name:
                (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).symlink_to("/proc/self/mem")
        return str(folder)

    return copy_without


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    def write(rows: Rows) -> str:
        path = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def make_task(llama: str) -> MakeTask:
    def make(
        training_file: str,
        *,
        method: MethodName = "supervised",
        hyperparameters: Any = MappingProxyType({}),
        **fields: Any,
    ) -> Task:
        values: dict[str, Any] = {
            "base_dir": llama,
            "base_name": "acme/tiny",
            "base_revision": "0" * 40,
            "training_file": training_file,
            "validation_file": None,
            "method": Method.of(method, **hyperparameters),
            "lora": {},
            "quantization": "none",
            "trainer": {},
            "seed": 7,
            "torch_threads": 1,
            "max_row_bytes": 1 << 20,
        }
        return Task.model_validate(values | fields)

    return make


def quotes(count: int) -> Rows:
    """Text rows of different lengths with a common pattern."""
    return [{"text": f'Quote by N{i % 5}: "{"hat " * (1 + i % 7)}{i}"'} for i in range(count)]


def recipe_of(task: Task, **changes: Any) -> Recipe:
    return prepare(task).recipe.model_copy(update=changes)


@dataclass
class Observer:
    """Stands for the supervisor: keeps the events, and requests a stop once `stop_at` steps are measured."""

    stop_at: int | None = None
    events: list[TrainerEvent] = field(default_factory=list)

    def stopping(self) -> bool:
        steps = [e.metrics.step for e in self.of(Measured)]
        return self.stop_at is not None and bool(steps) and steps[-1] >= self.stop_at

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]


def run(
    task: Task,
    work: Path,
    *,
    stop_at: int | None = None,
    resume_from: str | None = None,
    fallback_level: int = 0,
    seen: Callable[[TrainerEvent], None] = lambda event: None,
    **changes: Any,
) -> Observer:
    """Train in this process and return the Observer with the events. `seen` is called with each event at once."""
    observer = Observer(stop_at)
    command = Train(
        job="j",
        task=task,
        recipe=recipe_of(task, **changes),
        work_dir=str(work),
        resume_from=resume_from,
        fallback_level=fallback_level,
    )

    def emit(event: TrainerEvent) -> None:
        observer.events.append(event)
        seen(event)

    classes: dict[str, Any] = {"labels": command.recipe.labels} if command.recipe.labels else {}
    load_base = partial(base_module.load_base, task.base_dir, task.quantization, **classes)
    train(command, load_base, emit=emit, stopping=observer.stopping)
    return observer


def adapter_bytes(work: Path) -> bytes:
    return (work / "adapter" / "adapter_model.safetensors").read_bytes()


class Child:
    """A real child and the parent's end of its pipe. At the end of the `with` block it must exit with code 0."""

    def __init__(self, *, stderr: IO[bytes] | None = None, **env: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, str(os.getpid())],
            cwd=ROOT,
            env=os.environ | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,  # so that `select` sees every event that has not been read
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.process:
            if error is not None:
                self.process.kill()
                return
            assert self.process.stdin is not None
            self.process.stdin.close()
            assert self.process.wait(30) == 0

    def send(self, command: Command) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.model_dump_json().encode() + b"\n")
        self.process.stdin.flush()

    def until(self, *kinds: type[Kind]) -> Kind:
        """Read up to the next event of these kinds. Fails on a line that is no event, and on a `Failed` event."""
        while True:
            event = self.next()
            if isinstance(event, kinds):
                return event
            assert not isinstance(event, Failed), event

    def next(self) -> TrainerEvent:
        """Read the next event."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the child ended with {self.process.wait()}"
        return EVENT.validate_json(line)
