"""The cache on disk, with a real bucket: kills at bad moments, full disks, and slots that run at the same time.

A slot that has to die is a process of its own. A slot that has to act between two calls uses a Python audit hook to
find the moment.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from shared import settings, storage
from shared.database.tables import BaseModelRow
from worker import cache

FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": bytes(1000)}
ALL_FILES = sorted(FILES)
SIZE = sum(len(data) for data in FILES.values())
HUGE = str(2**62)
Configure = Callable[..., None]


@pytest.fixture
def configure(as_worker: None, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Change settings of this worker."""

    def change(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"MILLINER_{name}", value)
        settings.get_settings.cache_clear()

    return change


@pytest.fixture
def small_disk(configure: Configure, tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB for the cache."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=False).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    configure(CACHE_DIR=str(disk))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------- fetching


def test_a_base_is_fetched_once_and_without_weights_for_tokenizing(configure: Configure) -> None:
    base, ticks = a_base(), list[int]()
    with cache.base_model(base, with_weights=True, tick=lambda: ticks.append(1)) as folder:
        assert on(folder) == ALL_FILES
    first = len(ticks)
    with cache.base_model(base, with_weights=True, tick=lambda: ticks.append(1)) as again:
        assert (again, len(ticks)) == (folder, first)
    with cache.base_model(base, with_weights=False, tick=nothing) as folder:
        assert on(folder) == ["config.json", "tokenizer.json"]


def test_a_base_is_synced_to_disk_before_it_gets_its_name(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = list[str](), os.fsync

    def recording(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    folder = fetch(a_base())
    partial = f"{folder}.partial"
    assert sorted(synced) == sorted([str(folder.parent), partial, *(f"{partial}/{name}" for name in FILES)])
    assert synced[-1] == str(folder.parent)


def test_an_aborted_fetch_leaves_no_files(configure: Configure) -> None:
    class Aborted(BaseException):
        """Not an Exception, so that `except Exception` does not catch it."""

    def abort() -> None:
        raise Aborted

    with pytest.raises(Aborted), cache.base_model(a_base(), with_weights=True, tick=abort):
        pass
    changed = a_base()
    storage.put_bytes(f"{changed.prefix}model.safetensors", b"other bytes")
    with pytest.raises(storage.Corrupt):
        fetch(changed)
    assert bases() == []


def test_a_fetch_that_fills_the_disk_leaves_no_files(small_disk: Path) -> None:
    understated = a_base({"model.safetensors": bytes(2 * 1024**2)})
    understated.files[0]["bytes"] = 1
    with pytest.raises(OSError, match="No space left"):
        fetch(understated)
    assert bases() == []
    assert on(fetch(a_base())) == ALL_FILES


def test_a_base_that_cannot_fit_is_not_downloaded(small_disk: Path) -> None:
    def fail() -> None:
        pytest.fail("the download started")

    large = a_base({"model.safetensors": bytes(2 * 1024**2)})
    refusal = pytest.raises(OSError, match="no more bases can be evicted")
    with refusal as refused, cache.base_model(large, with_weights=True, tick=fail):
        pass
    assert refused.value.errno == errno.ENOSPC


# ---------------------------------------------------------------- kills


def test_a_kill_during_an_eviction_leaves_no_partial_base(configure: Configure) -> None:
    base = a_base()
    folder = fetch(base)
    killed = other_slot(f"""
        removed = []
        def hook(event, args):
            if event == "os.remove":
                removed.append(args)
                if len(removed) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        os.environ["MILLINER_MIN_FREE_BYTES"] = "{HUGE}"
        cache.has_room()
    """)
    assert killed.returncode == -9, killed.stderr
    assert bases() == [f"{folder.name}.partial"]
    assert len(on(folder.with_name(bases()[0]))) == len(FILES) - 1
    assert on(fetch(base)) == ALL_FILES
    assert bases() == [folder.name]


def test_the_partial_files_of_a_killed_fetch_are_swept_unless_locked(configure: Configure) -> None:
    base = a_base()
    killed = other_slot(f"""
        base = BaseModelRow(name="b", digest="{base.digest}", prefix="{base.prefix}", files={base.files})
        with cache.base_model(base, with_weights=True, tick=lambda: os.kill(os.getpid(), signal.SIGKILL)):
            pass
    """)
    assert killed.returncode == -9, killed.stderr
    left = [f"{base.digest}.partial"]
    assert bases() == left
    with (models() / f"{base.digest}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.sweep()
        assert bases() == left
    cache.sweep()
    assert bases() == []


def test_a_work_directory_is_swept_unless_locked(configure: Configure) -> None:
    left = settings.get_settings().cache_dir / "work" / "of a killed attempt"
    left.mkdir(parents=True)
    with cache.work_dir("of a running attempt") as held:
        cache.sweep()
        assert on(held.parent) == [held.name, f"{held.name}.lock"]
    assert on(held.parent) == []


# ---------------------------------------------------------------- eviction


def test_the_least_recently_used_base_is_evicted_first_and_a_locked_one_stays(configure: Configure) -> None:
    configure(CACHE_BYTES=str(3 * SIZE))
    oldest, held, young, new, newer = (a_base() for _ in range(5))
    for age, base in enumerate((young, held, oldest)):
        os.utime(fetch(base), (1000 - age, 1000 - age))
    with ExitStack() as stack:
        stack.enter_context(cache.base_model(held, with_weights=True, tick=nothing))
        os.utime(models() / held.digest, (0, 0))
        fetch(new)
        assert bases() == sorted(base.digest for base in (held, young, new))
        fetch(newer)
        assert bases() == sorted(base.digest for base in (held, new, newer))


def test_bases_are_evicted_for_disk_space_within_the_budget(small_disk: Path, configure: Configure) -> None:
    """Five bases of 300 KB do not fit on 1 MB, of which 200 KB must stay free."""
    configure(MIN_FREE_BYTES="200000")
    several = [a_base({"model.safetensors": secrets.token_bytes(300_000)}) for _ in range(5)]
    for base in several:
        assert on(fetch(base)) == ["model.safetensors"]
    assert bases() == sorted(base.digest for base in several[-2:])
    assert cache.has_room()


def test_a_worker_evicts_unused_bases_before_it_reports_a_full_disk(small_disk: Path, configure: Configure) -> None:
    large = a_base({"model.safetensors": bytes(600_000)})
    (small_disk / "models" / "killed.partial").mkdir(parents=True)
    (small_disk / "models" / "killed.partial" / "model.safetensors").write_bytes(bytes(300_000))
    configure(MIN_FREE_BYTES="100000")
    assert cache.has_room()
    fetch(large)
    assert bases() == [large.digest]  # the partial base of the killed fetch is deleted
    configure(MIN_FREE_BYTES="600000")
    with cache.base_model(large, with_weights=True, tick=nothing):
        assert not cache.has_room()
    assert cache.has_room()
    assert bases() == []


def test_slots_can_evict_at_the_same_time(configure: Configure) -> None:
    configure(MIN_FREE_BYTES=HUGE)
    for _ in range(30):
        for i in range(10):
            (models() / f"base-{i}" / "sub").mkdir(parents=True)
            (models() / f"base-{i}" / "sub" / "model.safetensors").write_bytes(b"x")
        with ThreadPoolExecutor(8) as pool:
            results = [pool.submit(cache.has_room) for _ in range(8)]
            assert [done.result() for done in results] == [False] * 8
        assert bases() == []


@pytest.mark.parametrize("cached", [True, False])
def test_a_base_evicted_between_check_and_lock_is_fetched_under_an_exclusive_lock(
    configure: Configure, cached: bool
) -> None:
    """The eviction happens just before the shared lock: of a cached base, or of one that was just fetched."""
    base = a_base()
    if cached:
        fetch(base)
    done = other_slot(f"""
        base = BaseModelRow(name="b", digest="{base.digest}", prefix="{base.prefix}", files={base.files})
        folder, evicted, alone = cache._models() / base.digest, [], set()
        def hook(event, args):
            if event == "fcntl.flock" and args[1] & fcntl.LOCK_SH and folder.exists() and not evicted:
                evicted.append(folder.rename(folder.with_name("evicted")))
        sys.addaudithook(hook)
        def tick():
            with folder.with_name(folder.name + ".lock").open() as lock:
                alone.add(not cache._try_lock(lock.fileno(), fcntl.LOCK_SH))
        with cache.base_model(base, with_weights=True, tick=tick) as got:
            assert len(list(got.iterdir())) == {len(FILES)}
        assert evicted and alone == {{True}}, (evicted, alone)
    """)
    assert done.returncode == 0, done.stderr


def test_slots_that_need_the_same_base_fetch_it_once(configure: Configure) -> None:
    base = a_base()
    structlog.reset_defaults()  # an earlier test may have raised the log level
    with capture_logs() as logs, ThreadPoolExecutor(6) as pool:
        folders = {done.result() for done in [pool.submit(fetch, base) for _ in range(6)]}
    assert [on(folder) for folder in folders] == [ALL_FILES]
    assert [line["event"] for line in logs] == ["base.fetching"]


# ---------------------------------------------------------------- test data


def a_base(files: dict[str, bytes] = FILES) -> BaseModelRow:
    """Put a base into the bucket and return its row, as in the catalog."""
    digest = secrets.token_hex(32)
    prefix = f"models/{digest}/"
    entries = []
    for path, data in files.items():
        storage.put_bytes(prefix + path, data)
        entries.append(storage.Entry(path=path, bytes=len(data), sha256=storage.sha256_of_bytes(data)))
    return BaseModelRow(name="b", digest=digest, prefix=prefix, files=entries)


def fetch(base: BaseModelRow) -> Path:
    with cache.base_model(base, with_weights=True, tick=nothing) as folder:
        return folder


def nothing() -> None:
    """A tick that never aborts."""


def models() -> Path:
    return settings.get_settings().cache_dir / "models"


def bases() -> list[str]:
    """Return the folders of all bases, complete or partial."""
    return sorted(folder.name for folder in models().glob("*/"))


def on(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def other_slot(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in another process of this worker."""
    head = "import fcntl, os, signal, sys\nfrom shared.database.tables import BaseModelRow\nfrom worker import cache\n"
    command = [sys.executable, "-c", head + textwrap.dedent(script)]
    return subprocess.run(command, env=os.environ, timeout=60, check=False, capture_output=True, text=True)
