"""A run on an MLflow server, by its REST API (`/api/2.0/mlflow`, the same since MLflow 1).

It uses six documented and stable calls; MLflow's own client would add forty packages (decision 14). Redirects are not
followed: they could send the token to another host. Must not be imported by the supervisor.
"""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2

from worker.trackers.pipe import Ending, StartRun, Values

#: Limits that every server accepts: 1,000 metrics per request, and (older versions) 250 characters per parameter.
METRICS_PER_REQUEST = 1000
PARAMETER_CHARACTERS = 250
#: Longest answer that is read. A run has a few dozen metrics, so real answers are far shorter.
ANSWER_BYTES = 1024 * 1024
TIMEOUT = httpx2.Timeout(5.0)

JOB_TAG = "milliner.job"
STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


class Refused(Exception):
    """The server answered with an error or with something unexpected."""


class MlflowRun:
    """The job's run. `last` is the newest step of each metric that the server has."""

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
        """Close the run. An interrupted one stays open: the next attempt continues it, and may already have started."""
        if ending != "interrupted":
            ended = {"run_id": self._id, "status": STATUS[ending], "end_time": int(1000 * time.time())}
            _call(self._http, "POST", "runs/update", json=ended)


def open_run(start: StartRun) -> MlflowRun:
    """Find or create the job's run and its experiment. Raises Refused or httpx2.HTTPError."""
    requested = start.integration.mlflow
    assert requested is not None
    headers = {"authorization": f"Bearer {start.secret}"} if start.secret else {}
    http = httpx2.Client(base_url=f"{start.url.rstrip('/')}/api/2.0/mlflow/", headers=headers, timeout=TIMEOUT)
    experiment = _experiment(http, requested.experiment)
    wanted = {"experiment_ids": [experiment], "filter": f"tags.`{JOB_TAG}` = '{start.job}'", "max_results": 1}
    found = _call(http, "POST", "runs/search", json=wanted).get("runs")
    if found:
        run_id = str(found[0]["info"]["run_id"])
        _call(http, "POST", "runs/update", json={"run_id": run_id, "status": "RUNNING"})
    else:
        tags = requested.tags | {JOB_TAG: start.job}
        new = {
            "experiment_id": experiment,
            "run_name": requested.run_name or start.job,
            "start_time": int(1000 * time.time()),
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
        }
        run_id = str(_call(http, "POST", "runs/create", json=new)["run"]["info"]["run_id"])
    # Also for a run that existed: sending the same parameters again is allowed, and it may have been created without.
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
    """The requested object does not exist."""


def _call(http: httpx2.Client, verb: str, path: str, **request: Any) -> dict[str, Any]:
    """Send one request and return its JSON answer; at most `ANSWER_BYTES` are read. Raises Refused or Missing."""
    with http.stream(verb, path, **request) as response:
        body = b""
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > ANSWER_BYTES:
                raise Refused(f"MLflow answered {path} with more than {ANSWER_BYTES:,} bytes")
    try:
        answer = json.loads(body or b"{}")
    except ValueError as error:
        raise Refused(f"MLflow answered {path} with status {response.status_code} and no JSON") from error
    if not isinstance(answer, dict):
        raise Refused(f"MLflow answered {path} with status {response.status_code} and no JSON object")
    if response.status_code == httpx2.codes.OK:
        return answer
    kind = Missing if answer.get("error_code") == "RESOURCE_DOES_NOT_EXIST" else Refused
    raise kind(f"MLflow answered {path} with status {response.status_code}: {answer.get('message') or 'no message'}")
