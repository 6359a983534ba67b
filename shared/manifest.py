"""`manifest.json` of a published adapter, and its signature beside it.

Owns: what a manifest says, and how it is signed: Ed25519 over its bytes, 64 of them raw in `manifest.json.sig`, which
`openssl pkeyutl -verify -rawin` checks as well as we do. The manifest names the hash of every other file and the public
key, so one signature covers all. Must not touch a bucket or a database.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from pydantic import BaseModel, ConfigDict

from shared.errors import InvalidRequest
from shared.training import Proof, Recipe

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
    versions: dict[str, str]
    signed_by: str | None
    files: list[HashedFile]

    def text(self) -> bytes:
        """The bytes that are stored, hashed and signed."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key of a PEM file. Raises InvalidRequest: unreadable, or of another kind."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(path, f"no private key can be read from it ({error})", "genpkey -algorithm ed25519") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, f"it holds a {type(key).__name__.lstrip('_')}", "genpkey -algorithm ed25519")
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """The same for the public half, which is what verifiers have."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(path, f"no public key can be read from it ({error})", "pkey -pubout -in PRIVATE") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, f"it holds a {type(key).__name__.lstrip('_')}", "pkey -pubout -in PRIVATE")
    return key


def name_of(key: Ed25519PublicKey) -> str:
    """A public key as `signed_by` has it."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def is_signed_by(name: str, signature: bytes, text: bytes) -> bool:
    """Is this the signature of `text` by the key of that name?"""
    try:
        Ed25519PublicKey.from_public_bytes(base64.b64decode(name, validate=True)).verify(signature, text)
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True


def _no_key(path: Path, found: str, openssl: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: {found}; wanted is an Ed25519 key in PEM, as by: openssl {openssl}")
