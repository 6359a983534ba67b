"""Download files from presigned URLs into a folder, and check each SHA-256.

Owns: which paths may be written. A file gets its name only after its hash is checked. A file that is already there with
the right hash is skipped, so an interrupted download resumes at the next file. Must not know jobs or models.
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
    """The downloaded bytes are not those that were published."""

    code = "checksum_mismatch"


def pull(
    files: Iterable[Artifact], folder: Path, *, on_bytes: Callable[[int], None] = lambda count: None
) -> list[Path]:
    """Download every file into `folder`, the manifest last, and return their paths.

    `on_bytes` is called with the size of each chunk, and with the whole size of a file that is skipped. Raises
    InvalidRequest: a path outside the folder (before any download). Corrupt: wrong bytes. Unavailable: no server.
    """
    ordered = sorted(files, key=lambda file: (file.path == MANIFEST, file.path))
    targets = [_target(folder, file.path) for file in ordered]
    # Identity: the size of a compressed body would not be the size of the file.
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
    """The target of `path`. The server chose the path, so it is not trusted: it must stay inside `folder`."""
    pure = PurePosixPath(path)
    plain = path not in ("", ".") and not pure.is_absolute() and ".." not in pure.parts and "\0" not in path
    if not plain or "\\" in path or PureWindowsPath(path).drive:
        raise InvalidRequest(f"the server sent the file path {path!r}; only paths inside the folder are allowed")
    root = folder.resolve()
    target = root / pure
    if not target.resolve().is_relative_to(root):
        raise InvalidRequest(f"{path!r} leads out of {folder} through a symbolic link; use another folder")
    return target


def _hash_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(http: httpx2.Client, file: Artifact, target: Path, on_bytes: Callable[[int], None]) -> None:
    """Download to a temporary file in the same folder, then rename it. Retries a broken connection, not wrong bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                found = _stream(http, file, partial, on_bytes)
                break
            except httpx2.TransportError as error:
                if attempt == _ATTEMPTS:
                    raise Unavailable(
                        f"{file.path}: {error or type(error).__name__}; run the command again to resume"
                    ) from error
        if found != file.sha256:
            raise Corrupt(
                f"{file.path}: found sha256 {found}, expected {file.sha256}; it was discarded, run the command again"
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _stream(http: httpx2.Client, file: Artifact, partial: Path, on_bytes: Callable[[int], None]) -> str:
    """Write the body to `partial` and return its hash. Takes the bytes of a broken attempt off the count."""
    digest, size = hashlib.sha256(), 0
    try:
        with http.stream("GET", file.url) as response, partial.open("wb") as out:
            if response.status_code != httpx2.codes.OK:
                raise Unavailable(
                    f"{file.path}: the storage answered {response.status_code}; links expire, run the command again"
                )
            for chunk in response.iter_bytes(CHUNK):
                size += len(chunk)
                on_bytes(len(chunk))
                if size > file.bytes:
                    raise Corrupt(f"{file.path}: found more than the expected {file.bytes:,} bytes; it was discarded")
                digest.update(chunk)
                out.write(chunk)
    except httpx2.TransportError:
        on_bytes(-size)
        raise
    return digest.hexdigest()


def _check_manifest(path: Path, files: Iterable[Artifact]) -> None:
    """Check that the manifest lists the same files as the API."""
    listed = {(file.path, file.bytes, file.sha256) for file in files if file.path not in {MANIFEST, SIGNATURE}}
    try:
        written = {(entry["path"], entry["bytes"], entry["sha256"]) for entry in json.loads(path.read_bytes())["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{MANIFEST} cannot be read ({error!r}); run the command again with an empty folder") from error
    if differing := sorted({entry[0] for entry in listed ^ written}):
        raise Corrupt(f"{MANIFEST} and the API's list differ in: {', '.join(differing)}; do not use these files")
