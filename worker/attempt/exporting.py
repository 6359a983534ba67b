"""The exports that a job asked for: each made by a trainer of its own, then put beside the adapter.

Owns: where they lie (`exports/<name>/…` under the adapter's prefix), and that one which cannot be made costs itself
alone: the adapter is proven by then. Must not write a row, nor decide what becomes of the job (`runner.py`).
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
from worker.attempt.waiting import Patience
from worker.trainer.protocol import Done, Exported, Failed, MakeExport, Train, Verified

FOLDER = "exports/"

#: Has one made; a line for the job's events.
Make = Callable[[MakeExport], object]
Tell = Callable[[str, str], None]


class Published(NamedTuple):
    """What came of each, and their files by their paths beside the adapter's."""

    exports: list[Export]
    files: list[Entry]


def commands(trained: Train, done: Done, verified: Verified, adapter: Path) -> list[MakeExport]:
    """One for each that the job asked for, of the proven files in `adapter`."""
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
    commands: Sequence[MakeExport], prefix: str, *, make: Make, tell: Tell, epoch: int, patience: Patience
) -> Published:
    """One after the other, so that a disk holds one at a time. `make` answers Exported or Failed.

    What an earlier attempt has put there is written over; a file more that it had goes once the job has ended.
    """
    exports: list[Export] = []
    files: list[Entry] = []
    for command in commands:
        name, said = command.name, make(command)
        assert isinstance(said, Exported | Failed), said
        if isinstance(said, Failed):
            # What a trainer that was killed left half written is more than the next may find room beside.
            shutil.rmtree(Path(command.work_dir, FOLDER), ignore_errors=True)
            tell("warn", f"no export {name.value}: {said.message}; the adapter is not affected")
            exports.append(Export(name=name, error=said.message))
            continue
        path = f"{FOLDER}{name.value}/"
        put = partial(storage.put_files, prefix + path, Path(said.path), epoch=epoch)
        for file in patience.do(put):
            files.append(Entry(path=path + file["path"], bytes=file["bytes"], sha256=file["sha256"]))
        shutil.rmtree(said.path)
        exports.append(said.export.model_copy(update={"path": path}))
        tell("info", f"exported {name.value}: {_told(said.export)}")
    return Published(exports, files)


def _told(export: Export) -> str:
    if export.loss is None or export.difference is None:
        return "read back, bit for bit the adapter"
    return f"loaded anew, loss {export.loss:.4f}, {export.difference:+.4f} against the adapter"
