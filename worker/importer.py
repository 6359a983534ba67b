"""Import a base model into the catalog: `python -m worker.importer NAME SOURCE`, run by `milliner models add`.

A source is a local folder, a GGUF file (dequantized once, by a trainer process), or `hf://repo@revision`. Weights must
be safetensors; models with remote code are refused. Every file is hashed and copied into the bucket under
`models/<digest>/`, where workers find it. Importing the same files again under the same name changes nothing.

Owns: which sources and files are accepted. Must not import torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from shared import linux, storage
from shared.database import base_models
from shared.database.adapters import names_adapter
from shared.database.session import session_scope
from shared.database.tables import BaseModelRow
from shared.errors import Conflict, InvalidRequest, MillinerError
from shared.telemetry import configure, log
from worker.child.trainer_process import OFFLINE, PASSED_ON

ACCEPTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
WEIGHTS = ".safetensors"


def main() -> None:
    """Import one model and print its row as JSON; on an error, print one line and exit 1."""
    parser = argparse.ArgumentParser(prog="milliner models add", description=__doc__)
    parser.add_argument("name", help="the name that jobs will use")
    parser.add_argument("source", help="a folder, a .gguf file, or hf://repo@revision")
    parser.add_argument("--public-id", help="the public id of the model, such as org/name")
    parser.add_argument("--license", help="SPDX id")
    parser.add_argument("--revision", help="the pinned revision of the public id")
    options = parser.parse_args()
    configure("importer")
    try:
        base = add_model(
            options.name,
            options.source,
            public_id=options.public_id,
            license_id=options.license,
            revision=options.revision,
        )
    except MillinerError as error:
        sys.exit(f"✗ {error.message}")
    print(json.dumps({"id": base.name, "public_id": base.public_id, "revision": base.revision, "bytes": base.bytes}))


def add_model(
    name: str, source: str, *, public_id: str | None = None, license_id: str | None = None, revision: str | None = None
) -> BaseModelRow:
    """Import `source` as `name`.

    Raises `Conflict` if the name is taken by other files, and `InvalidRequest` if the source or a name is not allowed.
    """
    if (public_id or name).startswith(("/", ".", "~")):
        raise InvalidRequest(
            f"{public_id or name!r} is a path; adapters name their base by a public id: pass one such as org/name"
        )
    if names_adapter(name):
        raise InvalidRequest(
            f"{name!r} is a name for adapters (ft:…, ftckpt_…); choose another name for the base model"
        )
    with tempfile.TemporaryDirectory(prefix="milliner-import-") as scratch:
        if source.startswith("hf://"):
            repo, folder, revision = _from_hub(source, Path(scratch))
            public_id = public_id or repo
        elif source.endswith(".gguf"):
            folder = _from_gguf(Path(source), Path(scratch) / "model")
        else:
            folder = Path(source)
        return _mirror(name, folder, public_id=public_id or name, license_id=license_id, revision=revision)


def check_folder(folder: Path) -> list[Path]:
    """Return the files to import.

    Raises `InvalidRequest` if there is no config, there are no safetensors weights, or the model needs remote code.
    """
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} does not exist; a source is a folder, a .gguf file, or hf://repo@revision")
    accepted = sorted({path for pattern in ACCEPTED for path in folder.glob(pattern) if path.is_file()})
    names = {path.name for path in accepted}
    if "config.json" not in names:
        raise InvalidRequest(f"{folder} has no config.json; it is not a transformers model folder")
    if not any(path.suffix == WEIGHTS for path in accepted):
        pickles = sorted(
            path.name for path in folder.glob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
        )
        found = f"only pickled weights ({', '.join(pickles)}), which can run code" if pickles else "no weights"
        raise InvalidRequest(f"{folder} has {found}; convert them to safetensors (save_pretrained) first")
    config = json.loads((folder / "config.json").read_text())
    if "auto_map" in config:
        raise InvalidRequest(
            f"{folder} needs remote code (auto_map); only architectures built into transformers are supported"
        )
    return accepted


def count_parameters(path: Path) -> int:
    """Count the elements of a safetensors file from its header. Raises InvalidRequest if it is truncated or invalid."""
    try:
        with safe_open(path, framework="numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise InvalidRequest(
            f"{path.name} is truncated or not a safetensors file: {error}; download it again"
        ) from error


def _mirror(name: str, folder: Path, *, public_id: str, license_id: str | None, revision: str | None) -> BaseModelRow:
    paths = check_folder(folder)
    entries = [storage.Entry(path=p.name, bytes=p.stat().st_size, sha256=storage.sha256_of(p)) for p in paths]
    listing = "".join(f"{entry['sha256']}  {entry['path']}\n" for entry in entries)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    with session_scope() as session:
        existing = base_models.find_base_model(session, name)
    if existing is not None:
        if existing.digest != digest:
            raise Conflict(
                f"{name!r} is in the catalog with other files, and jobs may depend on them; choose a new name"
            )
        return existing
    prefix = f"models/{digest}/"
    for path, entry in zip(paths, entries, strict=True):
        storage.put_file(prefix + entry["path"], path, entry["sha256"])
        log.info("model.mirrored", path=entry["path"], bytes=entry["bytes"])
    storage.put_bytes(prefix + storage.MANIFEST, json.dumps({"files": entries}, indent=1).encode())
    base = BaseModelRow(
        name=name,
        public_id=public_id,
        revision=revision or digest,
        license=license_id,
        digest=digest,
        prefix=prefix,
        files=entries,
        config=json.loads((folder / "config.json").read_text()),
        parameters=sum(count_parameters(path) for path in paths if path.suffix == WEIGHTS),
        bytes=sum(entry["bytes"] for entry in entries),
    )
    with session_scope() as session:
        base_models.add_base_model(session, base)
    return base


def _from_gguf(path: Path, folder: Path) -> Path:
    if not path.is_file():
        raise InvalidRequest(f"{path} does not exist; pass the path of a .gguf file")
    command = [sys.executable, "-m", "worker.trainer.gguf_import", str(path.resolve()), str(folder)]
    done = linux.run([*command, "--parent", str(os.getpid())], env=linux.inherited(*PASSED_ON) | OFFLINE)
    if done.returncode != 0:
        last_line = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise InvalidRequest(f"{path.name} could not be converted: {last_line}")
    return folder


def _from_hub(source: str, scratch: Path) -> tuple[str, Path, str]:
    """Download a repository at a revision; return its name, the folder, and the commit that the revision names now."""
    repo, _, wanted = source.removeprefix("hf://").partition("@")
    try:
        commit = HfApi().model_info(repo, revision=wanted or "main").sha
        folder = snapshot_download(repo, revision=commit, allow_patterns=list(ACCEPTED), local_dir=scratch / "hub")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InvalidRequest(f"{source} could not be downloaded: {str(error).splitlines()[0]}") from error
    return repo, Path(folder), commit or wanted


if __name__ == "__main__":
    main()
