"""Ed25519 keys and signatures of manifests.

Owns: reading keys from PEM files, and checking a signature. Must not know what a manifest says."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from shared.errors import InvalidRequest


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
