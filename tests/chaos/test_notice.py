"""A machine gets a preemption notice: its worker drains, and another worker continues the job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.chaos.fleet import Fleet
from tests.chaos.servers import Servers, until


def test_a_spot_notice_drains_the_worker(fleet: Callable[..., Fleet], servers: Servers, tmp_path: Path) -> None:
    ours, notice = fleet(servers, workers=2, slots=1), tmp_path / "notice"
    ours.relaunch("train-0", MILLINER_NOTICE_COMMAND=f"test -e {notice}", MILLINER_NOTICE_SECONDS="0.2")
    ours.wait_ready()
    ours.submit(2, max_steps=150, save_every=1000, step_ms=30)
    until(lambda: len(ours.training()) == 2, "both train")
    ours.kept_down.add("train-0")
    notice.touch()
    assert ours.crew.process("train-0").wait(25) == 0
    ours.settle()
    found = ours.check()
    ours.check_adapters()
    assert (found.attempts, found.preemptions, found.crashes) == (3, 1, 0)
    assert found.steps_repeated == [0]
