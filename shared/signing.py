"""Ed25519 keys and signatures of manifests.

Owns: reading keys from PEM files, and checking a signature. Must not know what a manifest contains.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from shared.errors import InvalidRequest


def private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key from a PEM file. Raises InvalidRequest if it cannot be read or is not Ed25519."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(path, f"no private key can be read from it ({error})", "genpkey -algorithm ed25519") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, f"it contains a {type(key).__name__.lstrip('_')}", "genpkey -algorithm ed25519")
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key from a PEM file. Raises InvalidRequest if it cannot be read or is not Ed25519."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(path, f"no public key can be read from it ({error})", "pkey -pubout -in PRIVATE") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, f"it contains a {type(key).__name__.lstrip('_')}", "pkey -pubout -in PRIVATE")
    return key


def name_of(key: Ed25519PublicKey) -> str:
    """Return a public key in the form of `signed_by`: its 32 bytes in base64."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def is_signed_by(name: str, signature: bytes, text: bytes) -> bool:
    """Whether `signature` is a valid signature of `text` by the public key `name` (see `name_of`)."""
    try:
        Ed25519PublicKey.from_public_bytes(base64.b64decode(name, validate=True)).verify(signature, text)
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True


def _no_key(path: Path, found: str, openssl: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: {found}; allowed: an Ed25519 key in PEM format; create one with: openssl {openssl}")
