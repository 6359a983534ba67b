"""A run at Weights & Biases, by its own package: what it speaks to its server is documented nowhere.

Owns: that nothing of this machine or its environment goes along: no host, no user, no command line, no packages, no
console, no Git. Must not be imported by the supervisor: the package starts a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import wandb

from shared.schemas.requests import Wandb
from worker.trackers.pipe import Ending, StartRun, Values

INIT_SECONDS = 15.0
TAG_CHARACTERS = 64
#: What the process would have ended with; 255 is the one that the server shows as "killed".
EXIT_CODE = {"succeeded": 0, "failed": 1, "cancelled": 255, "interrupted": 1}


class WandbRun:
    """The job's run. The server counts steps by itself and takes none below the last that it has."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        self._next = run.starting_step

    def log(self, batch: list[tuple[int, Values]]) -> None:
        for step, values in batch:
            if step >= self._next:
                self._run.log(values, step=step)
                self._next = step + 1

    def end(self, ending: Ending) -> None:
        """Wait until all has been sent, however long that takes: somebody else has an eye on the time."""
        if ending == "interrupted":
            self._run.mark_preempting()
        self._run.finish(exit_code=EXIT_CODE[ending])


def open_run(start: StartRun) -> WandbRun:
    """The run whose id is the job's, gone on with where it is there. Raises wandb.Error."""
    asked = start.integration.wandb
    assert asked is not None
    try:
        return WandbRun(_init(start, asked))
    except Exception:
        wandb.teardown()  # what a failed try leaves behind would hold the run's id against the next
        raise


def _init(start: StartRun, asked: Wandb) -> wandb.Run:
    ours = ["milliner/finetune", f"milliner/{start.base_model}", f"milliner/{start.job}"]
    return wandb.init(
        id=start.job,
        resume="allow",
        project=asked.project,
        entity=asked.entity,
        name=asked.name or start.job,
        tags=[*asked.tags, *(tag[:TAG_CHARACTERS] for tag in ours)],
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
