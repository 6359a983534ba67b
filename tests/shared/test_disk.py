"""A folder is complete or does not exist: after errors and kills, and in which order the disk gets files and name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared import disk, linux

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "not there yet" / "folder"
    with disk.atomic_folder(folder) as partial:
        (partial / "below").mkdir()
        (partial / "below" / "file").write_bytes(b"x")
        assert not folder.exists()
        assert partial.parent == folder.parent
    assert (folder / "below" / "file").read_bytes() == b"x"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_older_folder_unchanged(tmp_path: Path, error: type[BaseException]) -> None:
    folder = older(tmp_path)
    with pytest.raises(error), disk.atomic_folder(folder) as partial:
        fail(partial, error)
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "file").read_bytes() == b"old"


def test_an_older_folder_is_replaced(tmp_path: Path) -> None:
    folder = older(tmp_path)
    with disk.atomic_folder(folder) as partial:
        (partial / "other").write_bytes(b"new")
        assert (folder / "file").read_bytes() == b"old"
    assert [path.name for path in folder.iterdir()] == ["other"]


def test_all_files_are_flushed_before_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = list[str](), os.fsync

    def recording_fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    folder = tmp_path / "folder"
    with disk.atomic_folder(folder) as partial:
        (partial / "below").mkdir()
        (partial / "below" / "file").write_bytes(b"x")
    wanted = [str(partial), f"{partial}/below", f"{partial}/below/file", str(tmp_path)]
    assert sorted(synced) == sorted(wanted)
    assert synced[-1] == str(tmp_path)


def test_tick_can_stop_before_each_file(tmp_path: Path) -> None:
    left = 2

    def tick() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise TimeoutError

    with pytest.raises(TimeoutError), disk.atomic_folder(tmp_path / "folder", tick=tick) as partial:
        (partial / "file").write_bytes(b"x")
    assert not list(tmp_path.iterdir())


def test_a_given_partial_folder_is_emptied_first(tmp_path: Path) -> None:
    folder, given = tmp_path / "folder", tmp_path / "folder.partial"
    given.mkdir()
    (given / "rest of a crash").write_bytes(b"x")
    with disk.atomic_folder(folder, partial=given) as partial:
        assert partial == given
        assert not list(partial.iterdir())
        (partial / "file").write_bytes(b"x")
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert not given.exists()


def test_a_killed_process_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    code = (
        "import sys, time; from pathlib import Path; from shared.disk import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'file').write_bytes(b'x'); print('written', flush=True); time.sleep(60)\n"
    )
    env = linux.inherited(*linux.BASIC) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(folder)]
    with linux.spawn(command, env=env, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
        linux.kill_group(child)
        assert child.wait() == -signal.SIGKILL
    assert [path.name.startswith(".partial-") for path in tmp_path.iterdir()] == [True]


def test_a_file_of_that_name_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").write_bytes(b"mine")
    with pytest.raises(NotADirectoryError), disk.atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_bytes(b"x")
    assert (tmp_path / "folder").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 1


def older(where: Path) -> Path:
    folder = where / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"old")
    return folder


def fail(partial: Path, error: type[BaseException]) -> None:
    (partial / "file").write_bytes(b"new")
    raise error
