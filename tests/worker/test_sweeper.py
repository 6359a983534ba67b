"""What the sweeper takes back, and when it dares to. The watch has its clock as an argument."""

from __future__ import annotations

from worker.sweeper import Watch


def test_a_watch_grows_while_there_is_no_gap() -> None:
    watch = Watch(longest_gap=5)
    assert [watch.seen(now) for now in (100, 104, 108)] == [0, 4, 8]


def test_a_gap_or_a_miss_starts_it_anew() -> None:
    watch = Watch(longest_gap=5)
    assert [watch.seen(now) for now in (0, 5, 20, 24)] == [0, 5, 0, 4]
    watch.missed()
    assert [watch.seen(now) for now in (25, 29)] == [0, 4]
