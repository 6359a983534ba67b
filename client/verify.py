"""`milliner verify`: check that a folder is an adapter exactly as a server published it.

Owns: the check of every hash, of missing and unlisted files, and of the signature. Needs no server. Must not print.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ValidationError
from rich.console import Group, RenderableType
from rich.text import Text

from client.download import Corrupt
from client.show import facts
from shared import signing
from shared.errors import InvalidRequest
from shared.schemas.manifest import MANIFEST, SIGNATURE, Manifest


class Signature(StrEnum):
    """The result of its check. Only `trusted` means that the files come from the holder of a key the caller named."""

    TRUSTED = "trusted"
    VALID = "valid"  # by the key that the manifest names; the caller named none
    UNSIGNED = "unsigned"
    BROKEN = "broken"


class Verdict(BaseModel):
    """What was found; `ok` is the exit code."""

    ok: bool
    job: str
    model: str
    full_finetuning: bool
    base: str
    signature: Signature
    signed_by: str | None
    files: int
    changed: list[str]
    missing: list[str]
    unlisted: list[str]


def verify(folder: Path, key: Path | None = None) -> Verdict:
    """Check every hash and the signature. With `key`, a PEM file, the signature must be by that key.

    Raises InvalidRequest: the folder has no manifest, or `key` is not a public key.
    """
    text, seal = _manifest(folder)
    trusted = signing.name_of(signing.public_key(key)) if key is not None else None
    signature = _signature(folder, text, seal.signed_by, trusted)
    listed = {file.path: file for file in seal.files}
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    there = {path.relative_to(folder).as_posix() for path in found}
    # The target of a link is in another folder and may change after this check.
    linked = {path for path in there if (folder / path).is_symlink() or not (folder / path).is_file()}
    changed = [p for p in sorted(listed.keys() & there) if p in linked or _sha256(folder / p) != listed[p].sha256]
    missing, unlisted = sorted(listed.keys() - there), sorted(there - listed.keys() - {MANIFEST, SIGNATURE})
    signed = signature is Signature.TRUSTED if key is not None else signature is not Signature.BROKEN
    return Verdict(
        ok=signed and not (changed or missing or unlisted),
        job=seal.job,
        model=seal.model,
        full_finetuning=seal.recipe.full_finetuning,
        base=f"{seal.base.public_id} @ {seal.base.revision}",
        signature=signature,
        signed_by=seal.signed_by,
        files=len(listed),
        changed=changed,
        missing=missing,
        unlisted=unlisted,
    )


def signer(folder: Path) -> str | None:
    """The key that signed a folder, or None; hashes are not checked. Raises Corrupt: the signature is not valid."""
    if "format" not in json.loads((folder / MANIFEST).read_bytes()):
        return None  # written before there were signatures
    text, seal = _manifest(folder)
    if _signature(folder, text, seal.signed_by, None) is Signature.BROKEN:
        raise Corrupt(f"{folder / SIGNATURE} is not a valid signature of {MANIFEST}; do not use these files")
    return seal.signed_by


def verdict(item: Verdict) -> RenderableType:
    """The result as text."""
    grid = facts()
    grid.add_row("model" if item.full_finetuning else "adapter", item.model)
    grid.add_row("job", item.job)
    grid.add_row("base", item.base)
    grid.add_row("signature", Text(_words(item), style="red" if item.signature is Signature.BROKEN else ""))
    faults = [
        Text(f"{path}: {fault}", style="red")
        for fault, paths in (
            ("its bytes differ from those that were published", item.changed),
            ("is missing", item.missing),
            ("is not listed in the manifest", item.unlisted),
        )
        for path in paths
    ]
    end = Text(f"{item.files} files are as published", style="green") if item.ok else _refusal(item)
    return Group(grid, *faults, end)


def _manifest(folder: Path) -> tuple[bytes, Manifest]:
    try:
        text = (folder / MANIFEST).read_bytes()
        return text, Manifest.model_validate_json(text)
    except FileNotFoundError as error:
        raise InvalidRequest(f"{folder} has no {MANIFEST}; download an adapter with: milliner pull JOB DIR") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequest(
            f"{folder / MANIFEST} is not the manifest of an adapter ({where}: {first['msg']})"
        ) from error


def _signature(folder: Path, text: bytes, signed_by: str | None, trusted: str | None) -> Signature:
    path = folder / SIGNATURE
    if signed_by is None and not path.exists():
        return Signature.UNSIGNED
    name = trusted or signed_by
    if name is None or not path.exists() or not signing.is_signed_by(name, path.read_bytes(), text):
        return Signature.BROKEN
    return Signature.TRUSTED if trusted else Signature.VALID


def _words(item: Verdict) -> str:
    return {
        Signature.TRUSTED: f"by the key that you named, {item.signed_by}",
        Signature.VALID: f"by {item.signed_by}; to check whose key that is, give the key that you trust with --key",
        Signature.UNSIGNED: "none: hashes detect damage, not forgery",
        Signature.BROKEN: f"not valid for this manifest (it names {item.signed_by or 'no key'})",
    }[item.signature]


def _refusal(item: Verdict) -> Text:
    if item.signature is Signature.UNSIGNED and not (item.changed or item.missing or item.unlisted):
        return Text("not verified: --key was given, but the adapter is not signed", style="red")
    return Text("not verified: do not use this folder; download it again with: milliner pull JOB DIR", style="red")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
