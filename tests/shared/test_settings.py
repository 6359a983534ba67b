"""Settings with which a job could run twice are refused at the start, as are invalid failpoints."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from shared.failpoints import Action, Failpoint, _armed
from shared.settings import Settings


@pytest.mark.parametrize("times", [(10, 45, 30), (50, 45, 60), (0, 45, 60), (10, 60, 60)])
def test_fence_seconds_must_be_between_heartbeat_and_lease(times: tuple[float, float, float]) -> None:
    heartbeat, fence, lease = times
    with pytest.raises(ValidationError, match="each less than the next"):
        Settings(heartbeat_seconds=heartbeat, fence_seconds=fence, lease_seconds=lease)


@pytest.mark.parametrize("setting", ["after_claim", "after_claim:dance", "nowhere:kill"])
def test_a_fault_that_names_no_failpoint_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="allowed is <point>:<action>"):
        _armed(setting)


def test_a_fault_is_a_failpoint_and_an_action() -> None:
    assert _armed("after_claim:kill") == (Failpoint.AFTER_CLAIM, Action.KILL)
    assert _armed("") is None
    assert len(Failpoint) >= 12
