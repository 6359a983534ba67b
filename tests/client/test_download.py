"""Downloads from a real HTTP server: right bytes are saved, wrong ones are not, and none outside the folder."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from client.download import Corrupt, pull
from shared.errors import InvalidRequest, Unavailable
from shared.schemas.responses import Artifact

CONTENT = {"adapter_model.safetensors": b"weights" * 300_000, "sub/config.json": b"{}"}


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, records the requested paths, and breaks off the first answer to each path under /flaky/."""

    def __init__(self, *args: Any, asked: list[str], **kwargs: Any) -> None:
        self.asked = asked
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/flaky/") and self.asked.count(self.path) == 1:
            self.send_response(200)
            self.send_header("content-length", "1000000")
            self.end_headers()
            self.wfile.write(b"only this")
            self.close_connection = True
            return
        self.path = self.path.removeprefix("/flaky")
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Bucket:
    """A served folder, and the list of its files as the API would send it."""

    def __init__(self, root: Path) -> None:
        self.asked: list[str] = []
        handler = functools.partial(Handler, asked=self.asked, directory=root)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        for path, content in CONTENT.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
        entries = [{"path": p, "bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for p, c in CONTENT.items()]
        self.set_manifest(root, entries)

    def set_manifest(self, root: Path, entries: list[dict[str, object]]) -> None:
        manifest = json.dumps({"files": entries}).encode()
        (root / "manifest.json").write_bytes(manifest)
        self.files = [self.artifact(path, content) for path, content in CONTENT.items()]
        self.files.insert(0, self.artifact("manifest.json", manifest))

    def artifact(self, path: str, content: bytes, *, prefix: str = "") -> Artifact:
        digest = hashlib.sha256(content).hexdigest()
        return Artifact(path=path, bytes=len(content), sha256=digest, url=f"{self.url}{prefix}/{path}")


@pytest.fixture
def served(tmp_path: Path) -> Path:
    return tmp_path / "served"


@pytest.fixture
def bucket(served: Path) -> Iterator[Bucket]:
    served.mkdir()
    bucket = Bucket(served)
    thread = threading.Thread(target=bucket.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield bucket
    bucket.server.shutdown()
    thread.join()
    bucket.server.server_close()


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_all_files_are_downloaded_the_manifest_last(bucket: Bucket, tmp_path: Path) -> None:
    counted: list[int] = []
    placed = pull(bucket.files, tmp_path / "out", on_bytes=counted.append)
    assert {path: (tmp_path / "out" / path).read_bytes() for path in CONTENT} == CONTENT
    assert files_in(tmp_path / "out") == {*CONTENT, "manifest.json"}
    assert placed[-1].name == "manifest.json"
    assert bucket.asked[-1] == "/manifest.json"
    assert sum(counted) == sum(file.bytes for file in bucket.files)


def test_a_file_with_the_right_hash_is_not_downloaded_again(bucket: Bucket, tmp_path: Path) -> None:
    pull(bucket.files, tmp_path / "out")
    (tmp_path / "out" / "sub/config.json").write_bytes(b"changed")
    bucket.asked.clear()
    pull(bucket.files, tmp_path / "out")
    assert bucket.asked == ["/sub/config.json"]
    assert (tmp_path / "out" / "sub/config.json").read_bytes() == b"{}"


def test_wrong_bytes_are_an_error_and_leave_no_file(bucket: Bucket, served: Path, tmp_path: Path) -> None:
    (served / "sub/config.json").write_bytes(b"[]")
    with pytest.raises(Corrupt, match=r"sub/config\.json: found sha256 .*, expected "):
        pull(bucket.files, tmp_path / "out")
    assert files_in(tmp_path / "out") == {"adapter_model.safetensors"}


def test_wrong_bytes_do_not_replace_an_older_file(bucket: Bucket, served: Path, tmp_path: Path) -> None:
    (served / "sub/config.json").write_bytes(b"[]")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/config.json").write_bytes(b"old")
    with pytest.raises(Corrupt):
        pull(bucket.files, tmp_path)
    assert (tmp_path / "sub/config.json").read_bytes() == b"old"


def test_more_bytes_than_expected_are_not_read_to_the_end(bucket: Bucket, served: Path, tmp_path: Path) -> None:
    (served / "sub/config.json").write_bytes(b"x" * 50_000_000)
    counted: list[int] = []
    with pytest.raises(Corrupt, match="more than the expected 2 bytes"):
        pull([file for file in bucket.files if file.path == "sub/config.json"], tmp_path, on_bytes=counted.append)
    assert sum(counted) < 10_000_000


def test_a_manifest_that_contradicts_the_list_is_an_error(bucket: Bucket, served: Path, tmp_path: Path) -> None:
    bucket.set_manifest(served, [{"path": "sub/config.json", "bytes": 2, "sha256": "0" * 64}])
    with pytest.raises(Corrupt, match=r"differ in: adapter_model\.safetensors, sub/config\.json"):
        pull(bucket.files, tmp_path / "out")


def test_a_broken_connection_is_retried_and_counted_once(bucket: Bucket, tmp_path: Path) -> None:
    content = CONTENT["adapter_model.safetensors"]
    counted: list[int] = []
    pull([bucket.artifact("adapter_model.safetensors", content, prefix="/flaky")], tmp_path, on_bytes=counted.append)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == content
    assert len(bucket.asked) == 2
    assert sum(counted) == len(content)


def test_an_expired_link_says_what_to_do(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="answered 404; links expire, run the command again"):
        pull([bucket.artifact("gone.json", b"")], tmp_path / "out")
    assert files_in(tmp_path / "out") == set()


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../../up", "", ".", "a\\..\\up", "C:up", "nul\0byte"])
def test_a_path_outside_the_folder_is_refused_before_any_download(bucket: Bucket, tmp_path: Path, path: str) -> None:
    evil = bucket.files[1].model_copy(update={"path": path})
    with pytest.raises(InvalidRequest, match="only paths inside the folder"):
        pull([*bucket.files, evil], tmp_path / "out")
    assert bucket.asked == []
    assert not (tmp_path / "out").exists()


def test_a_link_that_leads_outside_the_folder_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidRequest, match="leads out of"):
        pull(bucket.files, tmp_path / "out")
    assert files_in(tmp_path / "elsewhere") == set()
