"""This machine's disk, with a real bucket: kills in the middle, full disks, slots that get in each other's way.

Another slot is a process of its own where it has to die. Where it has to act between two calls of this one, an audit
hook of Python tells when.
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
WHOLE = sorted(FILES)
SIZE = sum(len(data) for data in FILES.values())
MISER = str(2**62)
Tell = Callable[..., None]


@pytest.fixture
def tell(as_worker: None, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Change settings of this worker."""

    def change(**told: str) -> None:
        for name, value in told.items():
            monkeypatch.setenv(f"MILLINER_{name}", value)
        settings.get_settings.cache_clear()

    return change


@pytest.fixture
def small_disk(tell: Tell, tmp_path: Path) -> Iterator[Path]:
    """A megabyte for the cache."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=False).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    tell(CACHE_DIR=str(disk))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------- fetching


def test_a_base_is_fetched_once_and_without_weights_where_only_tokens_are_wanted(tell: Tell) -> None:
    base, ticks = a_base(), list[int]()
    with cache.base_model(base, with_weights=True, tick=lambda: ticks.append(1)) as folder:
        assert on(folder) == WHOLE
    first = len(ticks)
    with cache.base_model(base, with_weights=True, tick=lambda: ticks.append(1)) as again:
        assert (again, len(ticks)) == (folder, first)
    with cache.base_model(base, with_weights=False, tick=nothing) as folder:
        assert on(folder) == ["config.json", "tokenizer.json"]


def test_a_base_is_on_the_disk_before_its_name_is(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = list[str](), os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    folder = fetch(a_base())
    partial = f"{folder}.partial"
    assert sorted(synced) == sorted([str(folder.parent), partial, *(f"{partial}/{name}" for name in FILES)])
    assert synced[-1] == str(folder.parent)


def test_a_fetch_that_is_given_up_leaves_nothing(tell: Tell) -> None:
    class GivenUp(BaseException):
        """No Exception: as hard as it gets."""

    def give_up() -> None:
        raise GivenUp

    with pytest.raises(GivenUp), cache.base_model(a_base(), with_weights=True, tick=give_up):
        pass
    changed = a_base()
    storage.put_bytes(f"{changed.prefix}model.safetensors", b"other bytes")
    with pytest.raises(storage.Corrupt):
        fetch(changed)
    assert bases() == []


def test_a_fetch_that_fills_the_disk_leaves_nothing_on_it(small_disk: Path) -> None:
    liar = a_base({"model.safetensors": bytes(2 * 1024**2)})
    liar.files[0]["bytes"] = 1
    with pytest.raises(OSError, match="No space left"):
        fetch(liar)
    assert bases() == []
    assert on(fetch(a_base())) == WHOLE


def test_a_base_that_no_eviction_makes_room_for_is_not_begun(small_disk: Path) -> None:
    def never() -> None:
        pytest.fail("it was begun")

    large = a_base({"model.safetensors": bytes(2 * 1024**2)})
    refusal = pytest.raises(OSError, match="nothing more can be evicted")
    with refusal as refused, cache.base_model(large, with_weights=True, tick=never):
        pass
    assert refused.value.errno == errno.ENOSPC


# ---------------------------------------------------------------- kills


def test_a_kill_in_the_middle_of_an_eviction_leaves_no_half_of_a_base(tell: Tell) -> None:
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
        os.environ["MILLINER_MIN_FREE_BYTES"] = "{MISER}"
        cache.has_room()
    """)
    assert killed.returncode == -9, killed.stderr
    assert bases() == [f"{folder.name}.partial"]
    assert len(on(folder.with_name(bases()[0]))) == len(FILES) - 1
    assert on(fetch(base)) == WHOLE
    assert bases() == [folder.name]


def test_what_a_kill_in_the_middle_of_a_fetch_left_is_swept_unless_somebody_holds_it(tell: Tell) -> None:
    base = a_base()
    killed = other_slot(f"""
        base = BaseModel(name="b", digest="{base.digest}", prefix="{base.prefix}", files={base.files})
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


def test_a_work_directory_is_swept_unless_an_attempt_holds_it(tell: Tell) -> None:
    left = settings.get_settings().cache_dir / "work" / "of a killed attempt"
    left.mkdir(parents=True)
    with cache.work_dir("of a living one") as held:
        cache.sweep()
        assert on(held.parent) == [held.name, f"{held.name}.lock"]
    assert on(held.parent) == []


# ---------------------------------------------------------------- eviction


def test_the_least_recently_used_goes_first_and_what_is_held_stays(tell: Tell) -> None:
    tell(CACHE_BYTES=str(3 * SIZE))
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


def test_a_disk_that_is_fuller_than_the_budget_makes_room_for_a_base(small_disk: Path, tell: Tell) -> None:
    """Five times 300 KB do not fit into a megabyte, of which 200 KB are to stay free."""
    tell(MIN_FREE_BYTES="200000")
    several = [a_base({"model.safetensors": secrets.token_bytes(300_000)}) for _ in range(5)]
    for base in several:
        assert on(fetch(base)) == ["model.safetensors"]
    assert bases() == sorted(base.digest for base in several[-2:])
    assert cache.has_room()


def test_a_worker_drops_idle_bases_before_it_says_that_it_has_no_room(small_disk: Path, tell: Tell) -> None:
    large = a_base({"model.safetensors": bytes(600_000)})
    (small_disk / "models" / "killed.partial").mkdir(parents=True)
    (small_disk / "models" / "killed.partial" / "model.safetensors").write_bytes(bytes(300_000))
    tell(MIN_FREE_BYTES="100000")
    assert cache.has_room()
    fetch(large)
    assert bases() == [large.digest]  # and not what the kill left
    tell(MIN_FREE_BYTES="600000")
    with cache.base_model(large, with_weights=True, tick=nothing):
        assert not cache.has_room()
    assert cache.has_room()
    assert bases() == []


def test_slots_that_evict_at_once_do_not_mind_each_other(tell: Tell) -> None:
    tell(MIN_FREE_BYTES=MISER)
    for _ in range(30):
        for i in range(10):
            (models() / f"base-{i}" / "sub").mkdir(parents=True)
            (models() / f"base-{i}" / "sub" / "model.safetensors").write_bytes(b"x")
        with ThreadPoolExecutor(8) as pool:
            said = [pool.submit(cache.has_room) for _ in range(8)]
            assert [done.result() for done in said] == [False] * 8
        assert bases() == []


@pytest.mark.parametrize("there", [True, False])
def test_a_base_that_is_evicted_between_look_and_lock_is_fetched_alone(tell: Tell, there: bool) -> None:
    """There before: evicted as it is about to be shared. Not there: as the fetcher is about to share it."""
    base = a_base()
    if there:
        fetch(base)
    done = other_slot(f"""
        base = BaseModel(name="b", digest="{base.digest}", prefix="{base.prefix}", files={base.files})
        folder, evicted, alone = cache._models() / base.digest, [], set()
        def hook(event, args):
            if event == "fcntl.flock" and args[1] & fcntl.LOCK_SH and folder.exists() and not evicted:
                evicted.append(folder.rename(folder.with_name("evicted")))
        sys.addaudithook(hook)
        def tick():
            with folder.with_name(folder.name + ".lock").open() as lock:
                alone.add(not cache._locked(lock.fileno(), fcntl.LOCK_SH))
        with cache.base_model(base, with_weights=True, tick=tick) as got:
            assert len(list(got.iterdir())) == {len(FILES)}
        assert evicted and alone == {{True}}, (evicted, alone)
    """)
    assert done.returncode == 0, done.stderr


def test_slots_that_want_the_same_base_fetch_it_once(tell: Tell) -> None:
    base = a_base()
    structlog.reset_defaults()  # a test before may have raised the level
    with capture_logs() as logs, ThreadPoolExecutor(6) as pool:
        folders = {done.result() for done in [pool.submit(fetch, base) for _ in range(6)]}
    assert [on(folder) for folder in folders] == [WHOLE]
    assert [line["event"] for line in logs] == ["base.fetching"]


# ---------------------------------------------------------------- planting


def a_base(files: dict[str, bytes] = FILES) -> BaseModelRow:
    """A base in the bucket, and its row as the catalog would have it."""
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
    """A tick that never gives up."""


def models() -> Path:
    return settings.get_settings().cache_dir / "models"


def bases() -> list[str]:
    """Whole or not."""
    return sorted(folder.name for folder in models().glob("*/"))


def on(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def other_slot(script: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of this worker."""
    head = "import fcntl, os, signal, sys\nfrom shared.database.tables import BaseModelRow\nfrom worker import cache\n"
    command = [sys.executable, "-c", head + textwrap.dedent(script)]
    return subprocess.run(command, env=os.environ, timeout=60, check=False, capture_output=True, text=True)
