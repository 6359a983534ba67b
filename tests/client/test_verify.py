"""`milliner verify`: a folder as published, and every way in which it can differ."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from client.cli import main
from client.verify import Signature, verdict, verify
from deploy.local.folder import Folder
from shared import signing
from shared.errors import InvalidRequest
from shared.schemas import manifest
from shared.schemas.manifest import HashedFile, Manifest
from tests.client.conftest import PROOF, RECIPE

FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}", "sub/tokenizer.json": b"[]"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The folder of a stack, with its key pair."""
    folder = Folder(tmp_path / "keys").create()
    folder.signing_key()
    return folder.root


@pytest.fixture
def adapter(tmp_path: Path, keys: Path) -> Path:
    return published(tmp_path / "adapter", keys)


def published(folder: Path, keys: Path | None) -> Path:
    """A folder as a worker publishes it, signed if there are keys."""
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    key = signing.private_key(keys / "signing.pem") if keys is not None else None
    text = Manifest.model_validate(
        {
            "job": "ftjob-1",
            "model": "ft:small:me::1",
            "base": {"name": "small", "public_id": "acme/small", "revision": "1", "digest": "ab", "license": None},
            "training_file": {"id": "file-1", "sha256": "0" * 64},
            "validation_file": None,
            "recipe": RECIPE,
            "proof": PROOF,
            "versions": {"torch": "2.13.0"},
            "signed_by": signing.name_of(key.public_key()) if key is not None else None,
            "files": [
                HashedFile(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
                for path, content in FILES.items()
            ],
        }
    ).text()
    (folder / manifest.MANIFEST).write_bytes(text)
    if key is not None:
        (folder / manifest.SIGNATURE).write_bytes(key.sign(text))
    return folder


def test_a_folder_as_published_is_verified(adapter: Path, keys: Path) -> None:
    assert verify(adapter).signature is Signature.VALID
    found = verify(adapter, keys / "signing.pub")
    assert (found.ok, found.signature, found.files) == (True, Signature.TRUSTED, 3)
    assert (found.job, found.base) == ("ftjob-1", "acme/small @ 1")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda a: (a / "adapter_config.json").write_bytes(b"[]"), {"changed": ["adapter_config.json"]}),
        (lambda a: (a / "sub/tokenizer.json").unlink(), {"missing": ["sub/tokenizer.json"]}),
        (lambda a: (a / "sub/evil.py").write_bytes(b""), {"unlisted": ["sub/evil.py"]}),
        (lambda a: (a / manifest.SIGNATURE).unlink(), {"signature": Signature.BROKEN}),
        (lambda a: (a / manifest.SIGNATURE).write_bytes(bytes(64)), {"signature": Signature.BROKEN}),
        (lambda a: (a / manifest.SIGNATURE).write_bytes(b"short"), {"signature": Signature.BROKEN}),
        (lambda a: rewrite(a, job="ftjob-2"), {"signature": Signature.BROKEN}),
        (lambda a: rewrite(a, signed_by=None), {"signature": Signature.BROKEN}),
        (lambda a: rewrite(a, signed_by="no key"), {"signature": Signature.BROKEN}),
    ],
)
def test_every_change_is_found(
    adapter: Path, keys: Path, change: Callable[[Path], object], fault: dict[str, object]
) -> None:
    change(adapter)
    for key, sound in ((None, Signature.VALID), (keys / "signing.pub", Signature.TRUSTED)):
        found = verify(adapter, key)
        expected = {"changed": [], "missing": [], "unlisted": [], "signature": sound} | fault
        assert found.model_dump(include=set(expected)) == expected
        assert not found.ok


def test_a_signature_by_another_key_is_found_only_with_the_key(tmp_path: Path, adapter: Path, keys: Path) -> None:
    forger = Folder(tmp_path / "forger").create()
    forger.signing_key()
    shutil.rmtree(adapter)
    published(adapter, forger.root)
    assert verify(adapter).ok
    found = verify(adapter, keys / "signing.pub")
    assert (found.ok, found.signature) == (False, Signature.BROKEN)


def test_an_unsigned_adapter_is_refused_if_a_key_is_named(tmp_path: Path, keys: Path) -> None:
    bare = published(tmp_path / "bare", None)
    found = verify(bare)
    assert (found.ok, found.signature, found.signed_by) == (True, Signature.UNSIGNED, None)
    assert not verify(bare, keys / "signing.pub").ok


def test_openssl_agrees(adapter: Path, keys: Path) -> None:
    """Signatures can be checked, and keys made, without Milliner."""
    openssl = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys / "signing.pub"), "-rawin"]
    files = ["-in", str(adapter / manifest.MANIFEST), "-sigfile", str(adapter / manifest.SIGNATURE)]
    assert b"Success" in subprocess.run([*openssl, *files], check=True, capture_output=True).stdout
    made = keys / "made.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(made)], check=True, capture_output=True)
    assert signing.private_key(made)


@pytest.mark.parametrize("content", [b"", b"no PEM", None])
def test_an_invalid_key_is_an_error_with_the_command_that_makes_one(
    adapter: Path, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "key.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"key\.pem: no public key .* openssl pkey -pubout"):
        verify(adapter, path)
    with pytest.raises(InvalidRequest, match=r"key\.pem: no private key .* openssl genpkey -algorithm ed25519"):
        signing.private_key(path)


def test_a_key_of_another_kind_is_refused(adapter: Path, tmp_path: Path) -> None:
    private, public = tmp_path / "p256.pem", tmp_path / "p256.pub"
    make = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(private)]
    subprocess.run(make, check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)], check=True)
    with pytest.raises(InvalidRequest, match="it contains a"):
        verify(adapter, public)
    with pytest.raises(InvalidRequest, match="it contains a"):
        signing.private_key(private)


def test_a_folder_without_an_adapter_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="milliner pull JOB DIR"):
        verify(tmp_path)
    (tmp_path / manifest.MANIFEST).write_text('{"files": []}')
    with pytest.raises(InvalidRequest, match=r"is not the manifest of an adapter \(job: Field required\)"):
        verify(tmp_path)


def test_the_exit_code_says_what_was_found(adapter: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_(str(adapter), "--key", str(keys / "signing.pub"), "--json")
    assert json.loads(capsys.readouterr().out)["signature"] == "trusted"
    main_(str(adapter))
    assert "give the key that you trust with --key" in capsys.readouterr().out
    (adapter / "adapter_config.json").write_bytes(b"[]")
    with pytest.raises(SystemExit) as ended:
        main_(str(adapter))
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "adapter_config.json: its bytes differ from those that were published" in said
    assert "do not use this folder" in said


def main_(*arguments: str) -> None:
    """Run the command; it ends with SystemExit even on success."""
    try:
        main(["verify", *arguments])
    except SystemExit as ended:
        if ended.code:
            raise


def rewrite(adapter: Path, **changes: object) -> None:
    path = adapter / manifest.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def test_every_verdict_can_be_shown(adapter: Path) -> None:
    found = verify(adapter)
    for signature in Signature:
        assert verdict(found.model_copy(update={"signature": signature, "ok": False}))


def test_a_link_does_not_count_as_a_file_of_an_adapter(adapter: Path, tmp_path: Path) -> None:
    """transformers would read chat templates from such a folder, whatever it contains."""
    (tmp_path / "elsewhere").mkdir()
    (adapter / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    found = verify(adapter)
    assert (found.ok, found.unlisted) == (False, ["additional_chat_templates"])
    (adapter / "additional_chat_templates").unlink()
    copy = tmp_path / "config"
    (adapter / "adapter_config.json").rename(copy)
    (adapter / "adapter_config.json").symlink_to(copy)
    assert verify(adapter).changed == ["adapter_config.json"]
