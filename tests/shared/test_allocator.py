"""jemalloc is used where it is installed, and its absence changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared import allocator, linux


@pytest.mark.parametrize("folder", ["usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/local/lib"])
def test_the_library_is_found_where_systems_put_it(tmp_path: Path, folder: str) -> None:
    library = tmp_path / folder / "libjemalloc.so.2"
    library.parent.mkdir(parents=True)
    library.touch()
    assert allocator.preload(tmp_path) == {"LD_PRELOAD": str(library)}


def test_a_machine_without_it_preloads_nothing(tmp_path: Path) -> None:
    assert allocator.preload(tmp_path) == {}


def test_a_child_maps_it_exactly_if_it_is_installed() -> None:
    environment = linux.inherited(*linux.BASIC) | allocator.preload()
    show = "print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert ("libjemalloc" in maps.stdout) == (allocator.jemalloc() is not None)
