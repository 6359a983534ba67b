"""Make the exports that a job asked for, each in a trainer of its own, and upload them next to the adapter.

Owns: where exports are stored (`exports/<name>/…` under the adapter's prefix), and that a failed export does not fail
the job: the adapter is verified by then. Must not write a row, nor decide how the job ends (`runner.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shared import storage
from shared.schemas.results import Export
from shared.storage import Entry
from worker.attempt.waiting import Retry
from worker.trainer.protocol import Done, Exported, Failed, MakeExport, Train, Verified

FOLDER = "exports/"

Make = Callable[[MakeExport], object]
#: (level, message) for the job's events.
AddEvent = Callable[[str, str], None]


class PublishedExports(NamedTuple):
    """The result of each export, and the uploaded files; their paths are relative to the adapter's prefix."""

    exports: list[Export]
    files: list[Entry]


def commands(trained: Train, done: Done, verified: Verified, adapter: Path) -> list[MakeExport]:
    """Return a command for each export that the job asked for, from the verified files in `adapter`."""
    return [
        MakeExport(
            job=trained.job,
            task=trained.task,
            recipe=trained.recipe,
            name=name,
            adapter_dir=str(adapter),
            work_dir=trained.work_dir,
            proof=verified.proof,
            fallback_level=done.fallback_level,
        )
        for name in trained.task.trainer.exports
    ]


def publish(
    commands: Sequence[MakeExport], prefix: str, *, make: Make, add_event: AddEvent, epoch: int, retry: Retry
) -> PublishedExports:
    """Make and upload one export after the other, so that the disk holds only one at a time.

    `make` returns Exported or Failed. Files of an earlier attempt are overwritten; those of an export that now fails
    are deleted once the job has ended.
    """
    exports: list[Export] = []
    files: list[Entry] = []
    for command in commands:
        name, answer = command.name, make(command)
        assert isinstance(answer, Exported | Failed), answer
        if isinstance(answer, Failed):
            # A killed trainer may leave a partial export. Delete it: the next export may need the space.
            shutil.rmtree(Path(command.work_dir, FOLDER), ignore_errors=True)
            add_event("warn", f"export {name.value} failed: {answer.message}; the adapter is not affected")
            exports.append(Export(name=name, error=answer.message))
            continue
        path = f"{FOLDER}{name.value}/"
        put = partial(storage.put_files, prefix + path, Path(answer.path), epoch=epoch)
        for file in retry.call(put):
            files.append(Entry(path=path + file["path"], bytes=file["bytes"], sha256=file["sha256"]))
        shutil.rmtree(answer.path)
        exports.append(answer.export.model_copy(update={"path": path}))
        add_event("info", f"exported {name.value}: {_check_result(answer.export)}")
    return PublishedExports(exports, files)


def _check_result(export: Export) -> str:
    if export.loss is None or export.difference is None:
        return "read back, bit for bit equal to the adapter"
    return f"reloaded, loss {export.loss:.4f}, {export.difference:+.4f} compared with the adapter"
