"""Failpoints: named places where tests make a process die, stop or raise, to prove that nothing is lost there.

Owns: their names, and what happens at the one that `MILLINER_FAULT=<point>:<action>` names. Without the setting, a
failpoint costs one comparison. Each stands between two effects (a row, an object, a ring) that no single transaction
covers.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from functools import lru_cache

from shared.settings import get_settings
from shared.telemetry import log


class Failpoint(StrEnum):
    """Where the failpoints are: first the API's, then those of an attempt in order, then the sweeper's."""

    AFTER_FILE_PUT = "after_file_put"
    BEFORE_SUBMIT_COMMIT = "before_submit_commit"
    AFTER_SUBMIT_COMMIT = "after_submit_commit"
    AFTER_CLAIM = "after_claim"
    AFTER_STAGE = "after_stage"
    AFTER_TRAINER_START = "after_trainer_start"
    AFTER_PLAN = "after_plan"
    BEFORE_CHECKPOINT_UPLOAD = "before_checkpoint_upload"
    AFTER_CHECKPOINT_UPLOAD = "after_checkpoint_upload"
    AFTER_CHECKPOINT_ROW = "after_checkpoint_row"
    BEFORE_PUBLISH = "before_publish"
    AFTER_ADAPTER_UPLOAD = "after_adapter_upload"
    AFTER_PROOF = "after_proof"
    AFTER_EXPORTS = "after_exports"
    AFTER_RESULT_UPLOAD = "after_result_upload"
    AFTER_MANIFEST = "after_manifest"
    AFTER_FINISH = "after_finish"
    BEFORE_RELEASE = "before_release"
    AFTER_RELEASE = "after_release"
    BEFORE_RECLAIM_COMMIT = "before_reclaim_commit"
    AFTER_RECLAIM = "after_reclaim"
    AFTER_RERING = "after_rering"


class Action(StrEnum):
    """What happens at a failpoint."""

    KILL = "kill"  # SIGKILL: no handler runs, nothing is flushed
    STOP = "stop"  # SIGSTOP: every thread is stopped until the process gets SIGCONT
    RAISE = "raise"  # an unexpected exception


def failpoint(point: Failpoint) -> None:
    """Run the configured action if MILLINER_FAULT names this failpoint. Raises ValueError if the setting is invalid."""
    armed = _armed(get_settings().fault)
    if armed is None or armed[0] is not point:
        return
    log.warning("failpoint.reached", point=point, action=armed[1])
    if armed[1] is Action.RAISE:
        raise RuntimeError(f"failpoint {point} was triggered by MILLINER_FAULT")
    os.kill(os.getpid(), signal.SIGKILL if armed[1] is Action.KILL else signal.SIGSTOP)


@lru_cache(maxsize=1)
def _armed(setting: str | None) -> tuple[Failpoint, Action] | None:
    if not setting:
        return None
    point, _, action = setting.partition(":")
    if point not in set(Failpoint) or action not in set(Action):
        raise ValueError(
            f"MILLINER_FAULT={setting!r} is not valid; allowed is <point>:<action> with a point of "
            f"{', '.join(Failpoint)} and an action of {', '.join(Action)}"
        )
    return Failpoint(point), Action(action)
