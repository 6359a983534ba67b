"""The API is killed between commit and ring, many times: no job is lost or duplicated, and each is rung for.

The API's process is forked from one that has imported everything, and serves on a socket that outlives it. The next one
starts in a tenth of a second, so that hundreds of kills take a minute.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL
from threading import Event, Thread
from typing import Any

import openai
import uvicorn

from shared.failpoints import Action, Failpoint
from tests.chaos.fleet import Fleet
from tests.chaos.servers import Servers

_forks = multiprocessing.get_context("forkserver")


def test_an_api_killed_between_commit_and_ring_loses_no_job(
    fleet: Callable[..., Fleet], servers: Servers, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """The server dies during every create request; the client's own retry must find the job that was created."""
    ours, wanted = fleet(servers, workers=2, slots=2), size(25, 500)
    env = ours.env["api"] | {"MILLINER_FAULT": f"{Failpoint.AFTER_SUBMIT_COMMIT}:{Action.KILL}"}
    with served(env, ours.folder.logs / "forks.log") as (url, deaths):
        client = openai.OpenAI(base_url=url, api_key=ours.api_key, max_retries=30)
        body: Any = {"trainer": {"max_steps": 2, "save_every": 2}}
        with client:
            for seed in range(1000, 1000 * (wanted + 1), 1000):
                job = client.fine_tuning.jobs.create(
                    model="hat", training_file=ours.dataset, seed=seed, extra_body=body
                )
                ours.accepted.append(job.id)
    assert len(set(ours.accepted)) == wanted
    assert set(ours.states()) == set(ours.accepted)
    ours.settle(timeout=300 + 2 * wanted)
    found = ours.check()
    assert set(ours.states().values()) == {"succeeded"}
    assert len(deaths) == wanted
    figures({"deaths": len(deaths), "jobs": found.jobs, "attempts": found.attempts})


@contextmanager
def served(env: Mapping[str, str], log: Path) -> Iterator[tuple[str, list[int]]]:
    """Serve the API with this environment, forked again when it dies. Yields its URL and the exit codes of kills."""
    _forks.set_forkserver_preload([__name__, "api.app"])
    done, deaths = Event(), []
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:

        def keep_up() -> None:
            while not done.is_set():
                process = _forks.Process(target=_serve, args=(listener, dict(env), str(log)))
                process.start()
                while process.is_alive() and not done.is_set():
                    process.join(0.02)
                if process.exitcode == -SIGKILL:
                    deaths.append(process.exitcode)
                process.kill()
                process.join()

        thread = Thread(target=keep_up, name="forks")
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", deaths
        finally:
            done.set()
            thread.join()


def _serve(listener: socket.socket, env: dict[str, str], log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.clear()
    os.environ.update(env)
    uvicorn.Server(uvicorn.Config("api.app:app", access_log=False)).run(sockets=[listener])
