"""A checkpoint is complete or absent: on a disk that is really full, and with damaged files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tests.worker.trainer.conftest import Child, MakeTask, WriteRows, adapter_bytes, quotes, recipe_of, run
from worker.trainer.artifact import metrics_file
from worker.trainer.model import adapter_weights
from worker.trainer.model import base as base_module
from worker.trainer.model.base import load_base
from worker.trainer.protocol import CheckpointSaved, Done, Failed, Measured, Notice, Stopped, Train, TrainerEvent
from worker.trainer.training import checkpoint


class Disk:
    """A small filesystem that a test can fill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Fill it to the last page."""
        with self._filler.open("wb", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(bytes(4096))

    def empty(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small filesystem cannot be mounted here: {mounted.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_run_continues_without_checkpoints_on_a_full_disk(
    disk: Disk, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    task = make_task(write_rows(quotes(24)), trainer={"max_steps": 6, "save_every": 1, "eval_every": 9})
    run(task, tmp_path / "whole")

    def change_the_disk(event: TrainerEvent) -> None:
        if isinstance(event, CheckpointSaved) and event.step in (1, 4):
            disk.fill()
        elif isinstance(event, Measured) and event.metrics.step in (4, 6):
            disk.empty()

    observer = run(task, disk.folder, seen=change_the_disk)
    assert [saved.step for saved in observer.of(CheckpointSaved)] == [1, 4, 6]
    warnings = [notice.message for notice in observer.of(Notice) if notice.level == "warn"]
    assert [message.partition(",")[0] for message in warnings] == ["no checkpoint at step 2", "no checkpoint at step 5"]
    assert sorted(path.name[-1] for path in (disk.folder / "checkpoints").iterdir()) == ["1", "4", "6"]
    assert adapter_bytes(disk.folder) == adapter_bytes(tmp_path / "whole")
    first = observer.of(CheckpointSaved)[0]
    run(task, tmp_path / "resumed", resume_from=first.path)
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "whole")


def test_a_run_can_be_stopped_on_a_full_disk(disk: Disk, make_task: MakeTask, write_rows: WriteRows) -> None:
    disk.fill()
    task = make_task(write_rows(quotes(24)), trainer={"max_steps": 6, "save_every": 9, "eval_every": 9})
    observer = run(task, disk.folder, stop_at=3)
    assert observer.events[-1] == Stopped(job="j", step=3)
    assert observer.of(CheckpointSaved) == []


def test_no_space_for_the_adapter_is_a_retryable_error(disk: Disk, make_task: MakeTask, write_rows: WriteRows) -> None:
    disk.fill()
    task = make_task(write_rows(quotes(4)), trainer={"max_steps": 1})
    with Child() as child:
        child.send(Train(job="j", task=task, recipe=recipe_of(task), work_dir=str(disk.folder)))
        while not isinstance(event := child.next(), Failed):
            assert not isinstance(event, Done)
        assert (event.code, event.retryable, event.step) == ("disk_full", True, 1)
        assert event.hint
        assert not list(disk.folder.rglob(".partial-*"))
        disk.empty()
        child.send(Train(job="j", task=task, recipe=recipe_of(task), work_dir=str(disk.folder)))
        child.until(Done)


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 999])
def test_damaged_checkpoint_is_not_the_users_error_and_leaves_the_base_unchanged(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    """Hashes were checked before, so the machine is at fault. The error must not be TrainingFailed."""
    task = make_task(write_rows(quotes(8)), trainer={"max_steps": 2, "save_every": 1})
    saved = Path(run(task, tmp_path).of(CheckpointSaved)[0].path)
    base = load_base(task.base_dir, task.quantization)
    names = set(base.model.state_dict())
    monkeypatch.setattr(base_module, "load_base", lambda *args: base)
    for member in (checkpoint.STATE, metrics_file.METRICS, adapter_weights.ADAPTER, checkpoint.OPTIMIZER):
        whole = (saved / member).read_bytes()
        (saved / member).unlink() if content is None else (saved / member).write_bytes(content)
        if (content, member) != (b"", metrics_file.METRICS):  # empty metrics are valid: a run before its first step
            with pytest.raises((OSError, ValueError, SafetensorError)):
                run(task, tmp_path / "again", resume_from=str(saved))
        assert set(base.model.state_dict()) == names
        (saved / member).write_bytes(whole)
    assert run(task, tmp_path / "again", resume_from=str(saved)).of(Done)
