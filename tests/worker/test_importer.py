"""Which sources are imported into the catalog and which are refused, through the importer's own process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import openai
import pytest

from deploy.local.folder import Record
from shared.errors import InvalidRequest
from worker.importer import add_model, check_folder, count_parameters


def test_a_folder_becomes_a_base_model(client: openai.OpenAI, tiny: str, llama: str) -> None:
    model = client.models.retrieve(tiny).model_extra or {}
    assert (model["public_id"], model["revision"]) == ("acme/tiny", "1")
    weights = Path(llama) / "model.safetensors"
    assert model["parameters"] == count_parameters(weights)
    names = {file["path"]: file["bytes"] for file in model["files"]}
    assert names["model.safetensors"] == weights.stat().st_size


def test_importing_the_same_files_again_is_allowed_and_other_files_are_refused(
    stack: Record, tiny: str, llama: str, tmp_path: Path
) -> None:
    again = add(stack, tiny, llama)
    assert again.returncode == 0, again.stderr
    changed = Path(shutil.copytree(llama, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    refused = add(stack, tiny, str(changed))
    assert refused.returncode != 0
    assert "with other files" in refused.stderr


def test_pickles_remote_code_and_empty_folders_are_refused(llama: str, tmp_path: Path) -> None:
    pickled = Path(shutil.copytree(llama, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InvalidRequest, match=r"pickled weights \(pytorch_model\.bin\), which can run code"):
        check_folder(pickled)
    remote = Path(shutil.copytree(llama, tmp_path / "remote"))
    config = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(InvalidRequest, match="remote code"):
        check_folder(remote)
    with pytest.raises(InvalidRequest, match="does not exist"):
        check_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match=r"no config\.json"):
        check_folder(tmp_path / "empty")


@pytest.mark.parametrize("kept", [slice(0), slice(5), slice(-1), slice(8, None)])
def test_truncated_weights_are_refused(llama: str, tmp_path: Path, kept: slice) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((Path(llama) / "model.safetensors").read_bytes()[kept])
    with pytest.raises(InvalidRequest, match=r"model\.safetensors is truncated or not a safetensors file"):
        count_parameters(weights)


def test_a_path_is_refused_as_public_id(llama: str) -> None:
    with pytest.raises(InvalidRequest, match=r"'/srv/llama' is a path; .* such as org/name"):
        add_model("llama", llama, public_id="/srv/llama")


def test_a_base_cannot_have_an_adapters_name(llama: str) -> None:
    with pytest.raises(InvalidRequest, match="'ft:llama' is a name for adapters"):
        add_model("ft:llama", llama, public_id="acme/llama")


def test_files_that_could_run_code_are_never_imported(llama: str, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(llama, tmp_path / "mixed"))
    for name in ("pytorch_model.bin", "modeling_evil.py", "setup.sh"):
        (mixed / name).write_text("boo")
    assert {path.suffix for path in check_folder(mixed)} <= {".safetensors", ".json", ".jinja", ".txt", ".model"}


def test_a_hub_repository_is_pinned_to_its_commit(
    client: openai.OpenAI, stack: Record, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(Path(llama)) as (endpoint, commit):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        command = [sys.executable, "-m", "deploy.local", "add-model", "hubbed", "hf://acme/tiny@main"]
        done = subprocess.run([*command, "--data", stack.data], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = client.models.retrieve("hubbed").model_extra or {}
    assert (model["public_id"], model["revision"]) == ("acme/tiny", commit)
    assert {file["path"] for file in model["files"]} >= {"config.json", "model.safetensors"}


def test_a_broken_gguf_file_is_reported(stack: Record, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(os.urandom(1000))
    refused = add(stack, "bad", str(tmp_path / "bad.gguf"))
    assert refused.returncode != 0
    assert "bad.gguf could not be converted" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_converter_gets_no_settings_and_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It reads an untrusted file. Here, its program is replaced by a script that writes its environment to a file."""
    monkeypatch.setenv("MILLINER_S3_SECRET_KEY", "s3cret")
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    environment, converter = tmp_path / "environment", tmp_path / "python"
    converter.write_text(f"#!/bin/sh\nenv > {environment}\necho broken >&2\nexit 1\n")
    converter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(converter))
    (tmp_path / "some.gguf").touch()
    with pytest.raises(InvalidRequest, match=r"some\.gguf could not be converted: broken"):
        add_model("some", str(tmp_path / "some.gguf"), public_id="acme/some")
    assert "HF_HUB_OFFLINE=1" in environment.read_text()
    assert "MILLINER_" not in environment.read_text()
    assert "s3cret" not in environment.read_text()


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, str]]:
    """Serve the requests of huggingface_hub from a folder; yields (endpoint, commit)."""
    commit = "c0ffee" + "0" * 34
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            if self.path == "/api/models/acme/tiny/revision/main" or self.path.endswith(f"/revision/{commit}"):
                info = {"id": "acme/tiny", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                self.answer(json.dumps(info).encode(), "application/json")
            elif self.path.startswith(f"/api/models/acme/tiny/tree/{commit}"):
                tree = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in files.items()]
                self.answer(json.dumps(tree).encode(), "application/json")
            elif self.path == f"/acme/tiny/resolve/{commit}/{name}" and name in files:
                self.answer(files[name], "application/octet-stream")
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            for header, value in {
                "content-type": kind,
                "content-length": str(len(body)),
                "etag": f'"{hashlib.sha256(body).hexdigest()}"',
                "x-repo-commit": commit,
            }.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Do not log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", commit
        server.shutdown()


def add(stack: Record, name: str, source: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.local", "add-model", name, source, "--data", stack.data]
    return subprocess.run([*command, "--public-id", "acme/tiny"], capture_output=True, text=True, check=False)
