"""`manifest.json` of a published adapter, and its signature beside it.

Owns: what a manifest says, and how it is signed: Ed25519 over its bytes, 64 of them raw in `manifest.json.sig`, which
`openssl pkeyutl -verify -rawin` checks as well as we do. The manifest names the hash of every other file and the public
key, so one signature covers all. Must not touch a bucket or a database.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from shared.schemas.results import Export, Proof, Recipe

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"


class HashedFile(BaseModel):
    """A file of the folder; SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


class Base(BaseModel):
    """The frozen model. `digest` is over the hashes of all its files."""

    name: str
    public_id: str
    revision: str
    digest: str
    license: str | None


class Dataset(BaseModel):
    id: str
    sha256: str


class Start(BaseModel):
    """The adapter that training began with; the hash is that of its weights."""

    name: str
    sha256: str


class Manifest(BaseModel):
    """Where an adapter comes from, what was proven of it, and the hash of each of its files but this and its signature.

    `signed_by` is the public key (32 bytes, base64); None says that it is not signed.
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
        """The bytes that are stored, hashed and signed."""
        return self.model_dump_json(indent=1).encode() + b"\n"
