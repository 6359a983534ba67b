"""Fake tracker servers over real HTTP; the real ones are too large to run in tests.

`Mlflow` answers the six calls like MLflow 3.17. `Wandb` answers the requests of W&B's own client (wandb 0.31), which
are not documented. `Silent` accepts connections and never answers; `Invalid` always sends the same wrong answer.
"""

from __future__ import annotations

import gzip
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

Kind = TypeVar("Kind", bound="Server")
Answer = tuple[int, dict[str, Any] | bytes]


class Server(ABC):
    """A tracker on its own port. `seen` has path and headers of every request; while `down`, it answers 503."""

    def __init__(self) -> None:
        self.url = ""
        self.seen: list[dict[str, str]] = []
        self.lock = Lock()
        self.closing = Event()
        self.down = False

    @abstractmethod
    def answer(self, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> Answer:
        """Return status and body for a request with this path, query and JSON body."""


class Mlflow(Server):
    """`history` is {run id: {metric: [(step, value), …]}}; a point that is logged twice appears twice."""

    def __init__(self) -> None:
        super().__init__()
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, dict[str, list[tuple[int, float]]]] = {}

    def answer(self, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> Answer:
        match path.removeprefix("/api/2.0/mlflow/"):
            case "experiments/get-by-name":
                (name,) = query["experiment_name"]
                if name not in self.experiments:
                    return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"no experiment {name}"}
                return 200, {"experiment": {"experiment_id": self.experiments[name], "name": name}}
            case "experiments/create":
                return 200, {"experiment_id": self.experiments.setdefault(body["name"], str(len(self.experiments)))}
            case "runs/search":
                wanted = body["filter"].removeprefix("tags.`milliner.job` = '").removesuffix("'")
                found = [run for run in self.runs.values() if {"key": "milliner.job", "value": wanted} in run["tags"]]
                return 200, {"runs": [self._shown(run) for run in found]} if found else {}
            case "runs/create":
                run_id = f"run-{len(self.runs)}"
                self.runs[run_id] = {"run_id": run_id, "status": "RUNNING", "params": {}} | body
                self.history[run_id] = {}
                return 200, {"run": self._shown(self.runs[run_id])}
            case "runs/update":
                self.runs[body["run_id"]] |= body
                return 200, {"run_info": {}}
            case "runs/log-batch":
                self.runs[body["run_id"]]["params"] |= {p["key"]: p["value"] for p in body.get("params", [])}
                for metric in body.get("metrics", []):
                    point = (metric["step"], metric["value"])
                    self.history[body["run_id"]].setdefault(metric["key"], []).append(point)
                return 200, {}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path}

    def _shown(self, run: dict[str, Any]) -> dict[str, Any]:
        latest = ((key, points[-1]) for key, points in self.history[run["run_id"]].items())
        metrics = [{"key": key, "step": step, "value": value, "timestamp": 0} for key, (step, value) in latest]
        return {"info": {"run_id": run["run_id"]}, "data": {"metrics": metrics}}


class Wandb(Server):
    """`history` has the rows of the one run in order of arrival; `exits` has the exit code of each process."""

    def __init__(self) -> None:
        super().__init__()
        self.bucket: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.exits: list[int] = []
        self.preempting = 0

    def answer(self, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> Answer:
        if path.endswith("/file_stream"):
            rows = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += [json.loads(row) for row in rows]
            self.preempting += bool(body.get("preempting"))
            if body.get("complete"):
                self.exits.append(body["exitcode"])
            return 200, {}
        variables = body.get("variables", {})
        match body.get("operationName"):
            case "RunResumeStatus":
                entity = {"id": "e", "name": "acme"}
                return 200, {
                    "data": {"model": {"id": "p", "name": "hats", "entity": entity, "bucket": self._resumed()}}
                }
            case "UpsertBucket":
                sent = {key: value for key, value in variables.items() if value is not None}
                self.bucket = (self.bucket or {}) | sent
                project = {"id": "p", "name": "hats", "entity": {"id": "e", "name": "acme"}}
                run = {"id": "r", "name": variables["name"], "displayName": None, "project": project}
                return 200, {"data": {"upsertBucket": {"bucket": run, "inserted": True}}}
            case "CreateRunFiles":
                return 200, {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}}
        return 200, {"data": {}}

    def _resumed(self) -> dict[str, Any] | None:
        if self.bucket is None:
            return None
        tail = json.dumps([json.dumps(row) for row in self.history[-1:]])
        return {
            "id": "r",
            "name": self.bucket["name"],
            "displayName": self.bucket.get("displayName"),
            "summaryMetrics": "{}",
            "config": "{}",
            "tags": [],
            "notes": None,
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyLineCount": len(self.history),
            "historyTail": tail,
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
        }


class Silent(Server):
    def answer(self, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> Answer:
        self.closing.wait()
        return 500, {}


class Invalid(Server):
    """Gives the same answer to every request."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__()
        self.fixed: Answer = (status, body)

    def answer(self, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> Answer:
        return self.fixed


@contextmanager
def serving(server: Kind) -> Iterator[Kind]:
    """Run the server inside the `with` block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def _serve(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                raw = gzip.decompress(raw)
            url = urlsplit(self.path)
            is_json = "json" in self.headers.get("content-type", "")
            with server.lock:
                server.seen.append({"path": url.path} | {key.lower(): value for key, value in self.headers.items()})
            status: int
            answer: dict[str, Any] | bytes
            query, body = parse_qs(url.query), json.loads(raw) if raw and is_json else {}
            if server.down:
                status, answer = 503, b"unavailable"
            elif isinstance(server, Silent):
                status, answer = server.answer(url.path, query, body)
            else:
                with server.lock:
                    status, answer = server.answer(url.path, query, body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Do not log."""

    class Threads(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Ignore errors: tests kill clients during requests."""

    with Threads(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_address[1]}"
        Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.closing.set()
            listening.shutdown()
