"""A run at Weights & Biases, through its own package, because the protocol to its server is not documented.

Owns: that no data about this machine or its environment is sent: no host, user, command line, packages, console or Git
data. Must not be imported by the supervisor: the package starts a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import wandb

from shared.schemas.requests import Wandb
from worker.trackers.pipe import Ending, StartRun, Values

INIT_SECONDS = 15.0
TAG_CHARACTERS = 64
#: The exit code of the run. The server shows 255 as "killed".
EXIT_CODE = {"succeeded": 0, "failed": 1, "cancelled": 255, "interrupted": 1}


class WandbRun:
    """The job's run. The server counts steps itself and drops those below its last one."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        self._next = run.starting_step

    def log(self, batch: list[tuple[int, Values]]) -> None:
        for step, values in batch:
            if step >= self._next:
                self._run.log(values, step=step)
                self._next = step + 1

    def end(self, ending: Ending) -> None:
        """Close the run once everything is sent. There is no timeout here: `main` kills the process in time."""
        if ending == "interrupted":
            self._run.mark_preempting()
        self._run.finish(exit_code=EXIT_CODE[ending])


def open_run(start: StartRun) -> WandbRun:
    """Open the run with the job's id; continue it if it exists. Raises wandb.Error."""
    requested = start.integration.wandb
    assert requested is not None
    try:
        return WandbRun(_init(start, requested))
    except Exception:
        wandb.teardown()  # otherwise a failed attempt keeps the run's id reserved, and the next one fails
        raise


def _init(start: StartRun, requested: Wandb) -> wandb.Run:
    ours = ["milliner/finetune", f"milliner/{start.base_model}", f"milliner/{start.job}"]
    return wandb.init(
        id=start.job,
        resume="allow",
        project=requested.project,
        entity=requested.entity,
        name=requested.name or start.job,
        tags=[*requested.tags, *(tag[:TAG_CHARACTERS] for tag in ours)],
        config={"base_model": start.base_model, **start.config},
        dir=str(Path.cwd()),
        settings=wandb.Settings(
            api_key=start.secret,
            base_url=start.url,
            init_timeout=INIT_SECONDS,
            host="milliner",
            program="milliner",
            username="milliner",
            email="",
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )
