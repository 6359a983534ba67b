"""A run on an MLflow server, by its REST API (`/api/2.0/mlflow`, the same since MLflow 1).

Six calls that are documented and stable; MLflow's own client would bring forty packages (decision 14). Redirects are
not followed: they might lead the token elsewhere. Must not be imported by the supervisor.
"""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2

from worker.trackers.pipe import Ending, StartRun, Values

#: What every server takes: a request of 1,000 metrics, parameters of 250 characters in older versions.
METRICS_PER_REQUEST = 1000
PARAMETER_CHARACTERS = 250
#: Longest answer that is read: a run has a few dozen metrics.
ANSWER_BYTES = 1024 * 1024
TIMEOUT = httpx2.Timeout(5.0)

JOB_TAG = "milliner.job"
STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


class Refused(Exception):
    """The server has answered, and not as it should."""


class MlflowRun:
    """The job's run; `last` is the newest step of each metric that the server has."""

    def __init__(self, http: httpx2.Client, run_id: str, last: dict[str, int]) -> None:
        self._http = http
        self._id = run_id
        self._last = last

    def log(self, batch: list[tuple[int, Values]]) -> None:
        now = int(1000 * time.time())
        metrics: list[dict[str, Any]] = [
            {"key": key, "value": value, "step": step, "timestamp": now}
            for step, values in batch
            for key, value in values.items()
            if step > self._last.get(key, -1)
        ]
        for at in range(0, len(metrics), METRICS_PER_REQUEST):
            part = metrics[at : at + METRICS_PER_REQUEST]
            _call(self._http, "POST", "runs/log-batch", json={"run_id": self._id, "metrics": part})
            self._last |= {metric["key"]: metric["step"] for metric in part}

    def end(self, ending: Ending) -> None:
        """An interrupted run stays as it is: the next attempt goes on with it, and may be faster than we are here."""
        if ending != "interrupted":
            ended = {"run_id": self._id, "status": STATUS[ending], "end_time": int(1000 * time.time())}
            _call(self._http, "POST", "runs/update", json=ended)


def open_run(start: StartRun) -> MlflowRun:
    """The job's run in its experiment, both made where they are not there. Raises Refused or httpx2.HTTPError."""
    asked = start.integration.mlflow
    assert asked is not None
    headers = {"authorization": f"Bearer {start.secret}"} if start.secret else {}
    http = httpx2.Client(base_url=f"{start.url.rstrip('/')}/api/2.0/mlflow/", headers=headers, timeout=TIMEOUT)
    experiment = _experiment(http, asked.experiment)
    wanted = {"experiment_ids": [experiment], "filter": f"tags.`{JOB_TAG}` = '{start.job}'", "max_results": 1}
    found = _call(http, "POST", "runs/search", json=wanted).get("runs")
    if found:
        run_id = str(found[0]["info"]["run_id"])
        _call(http, "POST", "runs/update", json={"run_id": run_id, "status": "RUNNING"})
    else:
        tags = asked.tags | {JOB_TAG: start.job}
        new = {
            "experiment_id": experiment,
            "run_name": asked.run_name or start.job,
            "start_time": int(1000 * time.time()),
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
        }
        run_id = str(_call(http, "POST", "runs/create", json=new)["run"]["info"]["run_id"])
    # Once more where the run was there: the same parameters are no error, and it may have been made without them.
    config = {"base_model": start.base_model, **start.config}
    parameters = [{"key": key, "value": str(value)[:PARAMETER_CHARACTERS]} for key, value in config.items()]
    _call(http, "POST", "runs/log-batch", json={"run_id": run_id, "params": parameters})
    metrics = found[0].get("data", {}).get("metrics", []) if found else []
    return MlflowRun(http, run_id, {metric["key"]: int(metric.get("step", 0)) for metric in metrics})


def _experiment(http: httpx2.Client, name: str) -> str:
    try:
        found = _call(http, "GET", "experiments/get-by-name", params={"experiment_name": name})
        return str(found["experiment"]["experiment_id"])
    except Missing:
        return str(_call(http, "POST", "experiments/create", json={"name": name})["experiment_id"])


class Missing(Refused):
    """What was asked for is not there."""


def _call(http: httpx2.Client, verb: str, path: str, **request: Any) -> dict[str, Any]:
    """One request and its answer, of which no more is read than an honest one holds."""
    with http.stream(verb, path, **request) as response:
        body = b""
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > ANSWER_BYTES:
                raise Refused(f"MLflow answers {path} with more than {ANSWER_BYTES:,} bytes")
    try:
        answer = json.loads(body or b"{}")
    except ValueError as error:
        raise Refused(f"MLflow answers {path} with {response.status_code} and no JSON") from error
    if not isinstance(answer, dict):
        raise Refused(f"MLflow answers {path} with {response.status_code} and no JSON object")
    if response.status_code == httpx2.codes.OK:
        return answer
    kind = Missing if answer.get("error_code") == "RESOURCE_DOES_NOT_EXIST" else Refused
    raise kind(f"MLflow answers {path} with {response.status_code}: {answer.get('message') or 'no message'}")
