"""Schema of `manifest.json`, which is published with every adapter.

Owns: the content of a manifest and the format of its signature. The signature is Ed25519 over the bytes of
`manifest.json`; `manifest.json.sig` holds its 64 raw bytes, so `openssl pkeyutl -verify -rawin` can check it. The
manifest lists the hash of every other file and the public key, so one signature covers them all. Signing itself is in
`shared/signing.py`. Must not access a bucket or a database.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from shared.schemas.results import Export, Proof, Recipe

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"


class HashedFile(BaseModel):
    """A published file: path within the adapter's folder, size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


class Base(BaseModel):
    """The base model that was trained on. `digest` is a hash over the hashes of all its files."""

    name: str
    public_id: str
    revision: str
    digest: str
    license: str | None


class Dataset(BaseModel):
    """A dataset file: its id and the SHA-256 of its content, in hex."""

    id: str
    sha256: str


class Start(BaseModel):
    """The adapter that training started from. `sha256` is the hash of its weights, in hex."""

    name: str
    sha256: str


class Manifest(BaseModel):
    """The origin of an adapter, its verification result (`proof`), and the hashes of its files.

    `files` lists every file except the manifest and its signature. `signed_by` is the Ed25519 public key (32 bytes,
    base64), or null if the manifest is not signed.
    """

    model_config = ConfigDict(protected_namespaces=())

    format: Literal["milliner.adapter.v1"] = "milliner.adapter.v1"
    job: str
    model: str
    base: Base
    training_file: Dataset
    validation_file: Dataset | None
    from_checkpoint: Start | None = None
    recipe: Recipe
    proof: Proof
    exports: list[Export] = []
    versions: dict[str, str]
    signed_by: str | None
    files: list[HashedFile]

    def text(self) -> bytes:
        """Return the exact bytes that are stored, hashed and signed."""
        return self.model_dump_json(indent=1).encode() + b"\n"
