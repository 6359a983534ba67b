"""Datasets, tasks and recipes for the trainer's tests, on the tiny bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.protocol import Task
from shared.schemas import Recipe
from tests.tiny import tiny_gpt2
from worker.trainer.encoding import Encoder
from worker.trainer.prepare import prepare

Rows = list[dict[str, Any]]
WriteRows = Callable[[Rows], str]
MakeTask = Callable[..., Task]


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Conv1D layers, learned positions, biases: what is unlike Llama."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_gpt2(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder(llama: str) -> Encoder:
    return Encoder(llama)


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    def write(rows: Rows) -> str:
        path = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def make_task(llama: str) -> MakeTask:
    def make(training_file: str, **fields: Any) -> Task:
        values: dict[str, Any] = {
            "base_dir": llama,
            "base_name": "acme/tiny",
            "base_revision": "0" * 40,
            "training_file": training_file,
            "validation_file": None,
            "hyperparameters": {},
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
    """Rows of different lengths that share a pattern."""
    return [{"text": f'Quote by N{i % 5}: "{"hat " * (1 + i % 7)}{i}"'} for i in range(count)]


def recipe_of(task: Task, **changes: Any) -> Recipe:
    return prepare(task).recipe.model_copy(update=changes)
