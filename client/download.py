"""Files from presigned URLs to a folder, each checked against its SHA-256.

Owns: what may be written where. A file appears under its name only when all of its bytes are right; what is there
already and right is not fetched again, so a broken download goes on where it stopped. Must not know jobs or models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

import httpx2

from shared.errors import InvalidRequest, MillinerError, Unavailable
from shared.schemas.manifest import MANIFEST, SIGNATURE
from shared.schemas.responses import Artifact

CHUNK = 1024 * 1024
_ATTEMPTS = 3
_TIMEOUT = httpx2.Timeout(60.0, connect=10.0)


class Corrupt(MillinerError):
    """Bytes that came are not the bytes that were promised."""

    code = "checksum_mismatch"


def pull(
    files: Iterable[Artifact], folder: Path, *, on_bytes: Callable[[int], None] = lambda count: None
) -> list[Path]:
    """Bring every file into `folder`, the manifest last, and return where they lie.

    `on_bytes` hears of each chunk; a file that is already there counts at once. Raises InvalidRequest for a path that
    would leave the folder (before anything is fetched), Corrupt for wrong bytes, Unavailable if the server is gone.
    """
    ordered = sorted(files, key=lambda file: (file.path == MANIFEST, file.path))
    targets = [_target(folder, file.path) for file in ordered]
    # Identity: a compressed transfer would be unpacked on the way and could not be counted.
    with httpx2.Client(timeout=_TIMEOUT, follow_redirects=True, headers={"accept-encoding": "identity"}) as http:
        for file, target in zip(ordered, targets, strict=True):
            if _hash_of(target) == file.sha256:
                on_bytes(file.bytes)
            else:
                _fetch(http, file, target, on_bytes)
            if file.path == MANIFEST:
                _check_manifest(target, ordered)
    return targets


def _target(folder: Path, path: str) -> Path:
    """Where `path` goes. The server chose it, so it is trusted with nothing outside of `folder`."""
    pure = PurePosixPath(path)
    plain = path not in ("", ".") and not pure.is_absolute() and ".." not in pure.parts and "\0" not in path
    if not plain or "\\" in path or PureWindowsPath(path).drive:
        raise InvalidRequest(f"the server sent the file path {path!r}; only paths inside the folder are allowed")
    root = folder.resolve()
    target = root / pure
    if not target.resolve().is_relative_to(root):
        raise InvalidRequest(f"{path!r} leads out of {folder} through a link there; pull into another folder")
    return target


def _hash_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(http: httpx2.Client, file: Artifact, target: Path, on_bytes: Callable[[int], None]) -> None:
    """Download to a neighbour and rename it. A connection that breaks is tried again; wrong bytes are not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                found = _stream(http, file, partial, on_bytes)
                break
            except httpx2.TransportError as error:
                if attempt == _ATTEMPTS:
                    raise Unavailable(f"{file.path}: {error or type(error).__name__}; run it again to go on") from error
        if found != file.sha256:
            raise Corrupt(
                f"{file.path}: sha256 {found} came, {file.sha256} was promised; nothing was kept of it, run it again"
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _stream(http: httpx2.Client, file: Artifact, partial: Path, on_bytes: Callable[[int], None]) -> str:
    """Write the body to `partial` and return its hash. What was counted of a broken attempt is taken back."""
    digest, size = hashlib.sha256(), 0
    try:
        with http.stream("GET", file.url) as response, partial.open("wb") as out:
            if response.status_code != httpx2.codes.OK:
                raise Unavailable(
                    f"{file.path}: the storage answered {response.status_code}; links are short-lived, run it again"
                )
            for chunk in response.iter_bytes(CHUNK):
                size += len(chunk)
                on_bytes(len(chunk))
                if size > file.bytes:
                    raise Corrupt(f"{file.path}: more than the promised {file.bytes:,} bytes came; nothing was kept")
                digest.update(chunk)
                out.write(chunk)
    except httpx2.TransportError:
        on_bytes(-size)
        raise
    return digest.hexdigest()


def _check_manifest(path: Path, files: Iterable[Artifact]) -> None:
    """The manifest was written with the files, the list came from the API: both must say the same."""
    listed = {(file.path, file.bytes, file.sha256) for file in files if file.path not in {MANIFEST, SIGNATURE}}
    try:
        written = {(entry["path"], entry["bytes"], entry["sha256"]) for entry in json.loads(path.read_bytes())["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{MANIFEST} cannot be read ({error!r}); run it again into an empty folder") from error
    if differing := sorted({entry[0] for entry in listed ^ written}):
        raise Corrupt(f"{MANIFEST} and the API's list differ in: {', '.join(differing)}; do not use these files")
