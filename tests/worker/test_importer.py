"""What is taken into the catalog and what is refused, through the importer's own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from deploy.local.folder import Record
from shared.errors import InvalidRequest
from worker.importer import check_folder, count_parameters


def test_a_folder_becomes_a_base_model(client: openai.OpenAI, tiny: str, llama: str) -> None:
    model = client.models.retrieve(tiny).model_extra or {}
    assert (model["public_id"], model["revision"]) == ("acme/tiny", "1")
    weights = Path(llama) / "model.safetensors"
    assert model["parameters"] == count_parameters(weights)
    names = {file["path"]: file["bytes"] for file in model["files"]}
    assert names["model.safetensors"] == weights.stat().st_size


def test_the_same_bytes_are_the_same_entry_and_others_are_refused(
    stack: Record, tiny: str, llama: str, tmp_path: Path
) -> None:
    again = add(stack, tiny, llama)
    assert again.returncode == 0, again.stderr
    changed = Path(shutil.copytree(llama, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    refused = add(stack, tiny, str(changed))
    assert refused.returncode != 0
    assert "with other bytes" in refused.stderr


def test_pickles_remote_code_and_nothing_are_refused(llama: str, tmp_path: Path) -> None:
    pickled = Path(shutil.copytree(llama, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InvalidRequest, match=r"pickled weights \(pytorch_model\.bin\), which can run code"):
        check_folder(pickled)
    remote = Path(shutil.copytree(llama, tmp_path / "remote"))
    config = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(InvalidRequest, match="remote code"):
        check_folder(remote)
    with pytest.raises(InvalidRequest, match="is not there"):
        check_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match=r"no config\.json"):
        check_folder(tmp_path / "empty")


def test_what_could_run_code_is_never_mirrored(llama: str, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(llama, tmp_path / "mixed"))
    for name in ("pytorch_model.bin", "modeling_evil.py", "setup.sh"):
        (mixed / name).write_text("boo")
    assert {path.suffix for path in check_folder(mixed)} <= {".safetensors", ".json", ".jinja", ".txt", ".model"}


def test_a_broken_gguf_is_told_of(stack: Record, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(os.urandom(1000))
    refused = add(stack, "bad", str(tmp_path / "bad.gguf"))
    assert refused.returncode != 0
    assert "bad.gguf could not be converted" in refused.stderr
    assert "Traceback" not in refused.stderr


def add(stack: Record, name: str, source: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.local", "add-model", name, source, "--data", stack.data]
    return subprocess.run([*command, "--public-id", "acme/tiny"], capture_output=True, text=True, check=False)
